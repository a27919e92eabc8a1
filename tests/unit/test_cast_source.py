"""Archives, tables, the hub, and everything that is no source: each answered in one line."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import secrets
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from moto.server import ThreadedMotoServer
from PIL import Image

import datasets
from vla_ray.data.cast import hub
from vla_ray.data.cast.episodes import has_words
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.shards import ReadOptions, Tally
from vla_ray.data.cast.source import find_shards, read_shard
from vla_ray.errors import DataError
from vla_ray.models.paligemma.processing import sanitise
from vla_ray.schema import SAMPLES
from vla_ray.storage.location import Location

FULL = ReadOptions(crc="full")


def read(source: str | Location, options: ReadOptions = FULL, cache: Path | None = None) -> tuple[list[Sample], Tally]:
    shards = find_shards(source, cache, options.targets)
    tallies = [Tally() for _ in shards]
    samples = [s for shard, tally in zip(shards, tallies, strict=True) for s in read_shard(shard, options, tally)]
    return samples, Tally.total(tallies)


def row(sample: Sample) -> dict[str, Any]:
    """As schema SAMPLES has it, and comparable."""
    values = {name: getattr(sample, name) for name in SAMPLES.names}
    return values | {
        "instructions": list(sample.instructions),
        "actions": sample.actions.ravel().tolist(),
        "valid": sample.valid.tolist(),
    }


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.fixture(scope="module")
def published(golden: Path) -> Path:
    return golden / "cast_rlds"


@pytest.fixture(scope="module")
def samples(published: Path) -> list[Sample]:
    return read(str(published))[0]


# Archives ------------------------------------------------------------------------------------------------------


def pack(directory: Path, archive: Path, mode: str = "w:gz") -> Path:
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        tar.add(directory, directory.name)
    return archive


@pytest.mark.parametrize("ending", ["tar.gz", "tar"])
@pytest.mark.parametrize("cached", [True, False])
def test_archives_give_the_same_samples(
    published: Path, samples: list[Sample], tmp_path: Path, ending: str, cached: bool
) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache" if cached else None
    source.mkdir()
    for name in ("cast_filtered_dataset", "cast_counterfactual_dataset"):
        pack(published / name, source / f"{name}.{ending}", "w:gz" if ending == "tar.gz" else "w")
    found, _ = read(str(source), cache=cache)
    assert list(map(row, found)) == list(map(row, samples))
    where = cache or source
    unpacked = sorted(path for path in where.rglob("*") if path.is_file() and ".extracted" in str(path))
    assert {path.name for path in unpacked} >= {"features.json", "dataset_info.json", ".complete"}
    assert not any(path.suffix == ".npz" for path in unpacked)
    # Unpacked once; a single archive is a source too; nothing temporary stays.
    times = [path.stat().st_mtime_ns for path in unpacked]
    assert len(find_shards(str(source), cache)) == 4
    assert len(find_shards(str(source / f"cast_filtered_dataset.{ending}"), cache)) == 2
    assert [path.stat().st_mtime_ns for path in unpacked] == times
    assert not [path for path in where.iterdir() if path.name.startswith(".")]


def test_a_changed_archive_is_unpacked_again_and_a_new_one_is_seen(published: Path, tmp_path: Path) -> None:
    archive = pack(published / "cast_filtered_dataset", tmp_path / "data.tar")
    assert len(find_shards(str(tmp_path))) == 2
    pack(published / "cast_counterfactual_dataset", archive)
    assert {shard.dataset for shard in find_shards(str(tmp_path))} == {"cast_counterfactual_dataset"}
    pack(published / "cast_filtered_dataset", tmp_path / "second.tar.gz")
    assert len(find_shards(str(tmp_path))) == 4


def test_an_archive_beside_its_own_content_is_left_alone(published: Path, tmp_path: Path) -> None:
    archive = pack(published / "cast_filtered_dataset", tmp_path / "cast_filtered_dataset.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    assert len(find_shards(str(tmp_path))) == 2
    assert not list(tmp_path.glob("*.extracted"))


@pytest.mark.parametrize("ending", ["tar.gz", "tar"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
def test_a_truncated_archive_leaves_nothing_behind(published: Path, tmp_path: Path, ending: str, share: float) -> None:
    mode = "w:gz" if ending == "tar.gz" else "w"
    archive = pack(published / "cast_filtered_dataset", tmp_path / f"data.{ending}", mode)
    whole = archive.read_bytes()
    # A tar ends in 10 kB of zeros: cut what is before them.
    archive.write_bytes(whole[: int(share * (len(whole) - (0 if ending == "tar.gz" else 10240)))])
    with pytest.raises(DataError, match=r"data\.tar.* is truncated, damaged or unsafe \(.*fetch it again") as raised:
        find_shards(str(tmp_path))
    one_line(raised.value)
    assert list(tmp_path.iterdir()) == [archive]


def test_a_tar_that_is_cut_between_two_members_is_truncated(published: Path, tmp_path: Path) -> None:
    archive = pack(published / "cast_filtered_dataset", tmp_path / "data.tar", "w")
    with tarfile.open(archive) as tar:
        last = tar.getmembers()[-1]
    archive.write_bytes(archive.read_bytes()[: last.offset])
    with pytest.raises(DataError, match="no end of archive"):
        find_shards(str(tmp_path))


def test_members_that_leave_the_directory_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        member = tarfile.TarInfo("../outside/features.json")
        tar.addfile(member, io.BytesIO())
    with pytest.raises(DataError, match="unsafe"):
        find_shards(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["data.tar"]


def test_what_stands_in_the_place_of_the_unpacked_is_not_deleted(published: Path, tmp_path: Path) -> None:
    pack(published / "cast_filtered_dataset", tmp_path / "data.tar", "w")
    mine = tmp_path / "data.tar.extracted" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(DataError, match="move it away"):
        find_shards(str(tmp_path))
    assert mine.exists()


def test_other_archives_are_named(published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        for name in ("0001.jpg", "0001.json"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(DataError, match=r"web\.tar holds pictures and texts in pairs \(WebDataset\).* 0001\.jpg"):
        find_shards(str(tmp_path))
    pack(published / "cast_filtered_dataset", tmp_path / "data.tar.gz")
    with caplog.at_level(logging.WARNING):
        assert len(find_shards(str(tmp_path))) == 2
    assert "are in web.tar: left out" in caplog.text


def test_an_archive_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "cast_filtered_dataset.tar.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataError, match=r"cast_filtered_dataset\.tar\.gz is a git-LFS pointer"):
        find_shards(str(tmp_path))


# Tables --------------------------------------------------------------------------------------------------------


def write_parquet(rows: list[dict[str, Any]], directory: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLES), directory / "part.parquet", row_group_size=20)


def write_jsonl(rows: list[dict[str, Any]], directory: Path) -> None:
    (directory / "frames").mkdir()
    lines = []
    for i, values in enumerate(rows):
        (directory / f"frames/{i}.png").write_bytes(values["image"])
        lines.append(json.dumps({**values, "image": None, "image_path": f"./frames/{i}.png"}))
    (directory / "table.jsonl").write_text("\ufeff" + "\n\n".join(lines))


def write_saved(rows: list[dict[str, Any]], directory: Path) -> None:
    nested = [
        {
            **values,
            "image": {"bytes": values["image"], "path": "a.png"},
            "actions": np.reshape(values["actions"], (-1, 2)).tolist(),
        }
        for values in rows
    ]
    table = datasets.Dataset.from_list(nested).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": table}).save_to_disk(directory / "saved")


@pytest.mark.parametrize("write", [write_parquet, write_jsonl, write_saved])
def test_tables_go_round(samples: list[Sample], tmp_path: Path, write: Callable[[list[Any], Path], None]) -> None:
    rows = [row(sample) for sample in samples]
    write(rows, tmp_path)
    found, tally = read(str(tmp_path))
    assert list(map(row, found)) == rows
    assert (tally.samples, tally.steps, tally.corrupt) == (len(rows), len(rows), 0)


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def jsonl(directory: Path, *rows: dict[str, Any] | str, name: str = "drives.jsonl") -> Path:
    directory.mkdir(exist_ok=True)
    for value in (7, 255):
        (directory / f"{value}.png").write_bytes(png(value))
    (directory / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return directory


PLAIN = {"image_path": "7.png", "text": "go on", "action": [1.0, 0.5] * 10}


def test_a_plain_table_needs_three_columns(tmp_path: Path) -> None:
    directory = jsonl(tmp_path / "my drives", PLAIN, {**PLAIN, "scale_m": 0.3, "instructions": ["go on", "ahead"]})
    jsonl(directory, PLAIN, name="val.jsonl")
    found, _ = read(str(directory))
    assert [s.sample_id for s in found] == [
        "my_drives/train/drives:00000/0000",
        "my_drives/train/drives:00001/0000",
        "my_drives/val/val:00000/0000",
    ]
    assert found[0].actions.tolist() == [[1.0, 0.5]] * 8
    assert [s.scale_m for s in found] == [None, 0.3, None]
    assert found[1].instructions == ("go on", "ahead")
    assert found[0].valid.all()
    assert {s.recording for s in found} == {"7.png"}  # one picture stays on one side of a split
    scaled, _ = read(str(directory), ReadOptions(scale_m=(("my_drives", 0.5),)))
    assert [s.scale_m for s in scaled] == [0.5, 0.3, 0.5]


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    directory = jsonl(
        tmp_path / "d",
        PLAIN,
        "{broken",
        "[1]",
        {**PLAIN, "text": " "},
        {**PLAIN, "image_path": "absent.png"},
        {**PLAIN, "image_path": "255.png"},
        {**PLAIN, "action": [None] * 16},
        {**PLAIN, "valid": [True] * 7 + [False]},
        {**PLAIN, "image_path": "../outside.png"},
    )
    found, tally = read(str(directory))
    assert len(found) == tally.samples == 1
    assert (tally.corrupt, tally.no_language, tally.undecodable, tally.white) == (2, 1, 2, 1)
    assert (tally.not_finite, tally.padding, tally.steps) == (1, 1, 7)
    assert "drives: row 1 is not valid JSON" in tally.problems[0]
    assert "drives: row 4: Cannot read" in tally.problems[2]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({**PLAIN, "action": [[1.0, 0.0]] * 5}, r"row 0 has actions of 5 steps and action\.num_steps=8"),
        ({**PLAIN, "action": [[1.0, 0.0, 0.0]] * 8}, r"row 0: actions are .*expected \[\[x, y\]"),
        ({**PLAIN, "action": [[1.0], [1.0, 2.0]]}, "row 0: actions are"),
        ({**PLAIN, "valid": [True]}, "`valid` has 1 values for 8 steps"),
        (
            {"image": "7.png", "task": "go"},
            "lacks the columns instruction or .*; actions or action; it has image, task",
        ),
        ("{", "is damaged or truncated"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path: Path, row: dict[str, Any] | str, told: str) -> None:
    with pytest.raises(DataError, match=told) as raised:
        read(str(jsonl(tmp_path / "d", row)))
    one_line(raised.value)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("scale_m", "abc"),
        ("scale_m", -1),
        ("scale_m", 0),
        ("scale_m", float("nan")),
        ("scale_m", float("inf")),
        ("scale_m", 10**400),
        ("scale_m", 1e-60),
        ("t", "one"),
        ("t", -1),
        ("t", 0.5),
        ("t", 2**31),
        ("valid", 5),
        ("valid", "yes, all"),
        ("valid", [True] * 7 + ["no"]),
        ("instructions", 5),
        ("instructions", ["go", 5]),
        ("text", {"en": "go"}),
        ("dataset", ["a"]),
        ("split", 0.5),
        ("recording", {"a": 1}),
        ("sample_id", [1]),
        ("image_path", "a\0.png"),
    ],
)
def test_a_cell_of_a_wrong_type_is_named(tmp_path: Path, column: str, value: Any) -> None:
    directory = jsonl(tmp_path / "d", PLAIN, {**PLAIN, column: value})
    with pytest.raises(DataError, match=rf"d/drives\.jsonl: row 1: {column} is .*; expected .*") as raised:
        read(str(directory))
    assert len(one_line(raised.value)) < 400


def test_logs_have_no_actions_and_are_read_when_asked_for(tmp_path: Path) -> None:
    log = {"image_path": "7.png", "text": "go on"}
    nothing = [{**log, "actions": None}, {**log, "actions": []}]
    source = jsonl(tmp_path / "d", log, *nothing, {**log, "text": " "}, PLAIN, {**PLAIN, "valid": [True] * 7 + [False]})
    for padding, own in (("drop", [0, 0, 0, 8]), ("keep", [0, 0, 0, 8, 8])):
        found, tally = read(str(source), ReadOptions(targets="optional", padding=padding))
        assert [len(s.actions) for s in found] == [len(s.valid) for s in found] == own
        assert (tally.no_language, tally.padding, tally.samples) == (1, 5 - len(own), len(own))
    assert found[0].actions.shape == (0, 2)
    assert found[0].actions.dtype == np.float32
    with pytest.raises(DataError, match=r"lacks the columns actions or action; .*targets=optional") as raised:
        read(str(source))
    one_line(raised.value)
    with pytest.raises(DataError, match="row 1: actions are None"):
        read(str(jsonl(tmp_path / "other", PLAIN, nothing[0])))
    with pytest.raises(DataError, match="row 0: actions are"):
        read(str(jsonl(tmp_path / "wrong", {**log, "actions": "left"})), ReadOptions(targets="optional"))


def test_cells_that_say_the_same_in_another_way(tmp_path: Path) -> None:
    numbers = {"t": 3.0, "valid": [1] * 8, "recording": 0, "scale_m": 1, "instructions": None, "sample_id": ""}
    ((sample,), _) = read(str(jsonl(tmp_path / "d", {**PLAIN, **numbers})))
    assert (sample.t, sample.recording, sample.scale_m, sample.valid.tolist()) == (3, "0", 1.0, [True] * 8)
    assert sample.sample_id == "d/train/drives:00000/0003"


def test_texts_and_numbers_that_nothing_can_hold(tmp_path: Path) -> None:
    half = json.dumps({**PLAIN, "text": "go \ud800"})
    found, tally = read(str(jsonl(tmp_path / "d", half, {**PLAIN, "text": "\U0001f600"})))
    assert ([s.instruction for s in found], tally.corrupt) == (["\U0001f600"], 1)
    with pytest.raises(DataError, match="actions are"):
        read(str(jsonl(tmp_path / "e", {**PLAIN, "action": [10**400] * 16})))


def test_instructions_without_words_are_none(tmp_path: Path) -> None:
    """What is left of them is empty, and training would stop at the first one."""
    rows = [{**PLAIN, "text": text} for text in ("<>", " < > ", "go", "<go>")]
    variants = [{**PLAIN, "text": None, "instructions": given} for given in (["<>", "turn < left"], [">", " "], [])]
    found, tally = read(str(jsonl(tmp_path / "d", *rows, *variants)))
    assert [s.instructions for s in found] == [("go",), ("<go>",), ("turn < left",)]
    assert all(sanitise(text) for s in found for text in s.instructions)
    assert (tally.samples, tally.no_language) == (3, 4)
    for text in ("", "<>", "< a", ">>", "\u3000<", "a"):
        if has_words(text):
            sanitise(text)
        else:
            with pytest.raises(DataError):
                sanitise(text)


@pytest.mark.parametrize("path", ["ABSOLUTE", "../7.png", "a/../../7.png", "file://ABSOLUTE", "s3://bucket/7.png"])
@pytest.mark.parametrize("form", ["image_path", "image"])
def test_tables_from_the_hub_name_no_pictures_elsewhere(tmp_path: Path, path: str, form: str) -> None:
    absolute = str(tmp_path / "7.png")
    Path(absolute).write_bytes(png(7))
    path = path.replace("ABSOLUTE", absolute)
    named = {"image_path": path} if form == "image_path" else {"image": {"bytes": None, "path": path}}
    row = {"text": "go", "action": [0.5] * 16, **named}
    directory = jsonl(tmp_path / "owner--name", row)
    (directory / hub.COMPLETE).write_text(json.dumps({"repo_id": "owner/name", "revision": "0"}))
    with pytest.raises(
        DataError, match=rf"drives\.jsonl: row 0: {form} is '.*7\.png', which leaves .*owner--name"
    ) as raised:
        read(str(directory))
    one_line(raised.value)
    # Pictures below it are read, however their paths are written; a table of one's own may name any.
    jsonl(directory, *({**PLAIN, "image_path": inside} for inside in ("./7.png", "a/../7.png", ".//7.png")))
    assert read(str(directory))[1].samples == 3
    if not path.startswith("s3"):
        (tmp_path / "mine/a").mkdir(parents=True)
        assert read(str(jsonl(tmp_path / "mine", row)))[1].samples == 1


def test_samples_without_a_step_of_their_own_are_padding(tmp_path: Path) -> None:
    rows = [{**PLAIN, "valid": [k < n for k in range(8)]} for n in (0, 1, 8)]
    found, tally = read(str(jsonl(tmp_path / "d", *rows)), ReadOptions(padding="keep"))
    assert ([int(s.valid.sum()) for s in found], tally.padding) == ([1, 8], 1)


def test_damaged_tables(samples: list[Sample], tmp_path: Path) -> None:
    write_parquet([row(sample) for sample in samples], tmp_path)
    file = tmp_path / "part.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"part\.parquet is damaged or truncated"):
        find_shards(str(tmp_path))
    middle = pq.read_metadata(io.BytesIO(whole)).row_group(2).column(0).data_page_offset
    file.write_bytes(whole[:middle] + b"\xff" * 40 + whole[middle + 40 :])
    found, tally = read(str(tmp_path))
    assert len(found) < len(samples)
    assert tally.corrupt == 1
    assert "part: the rows from" in tally.problems[0]


# What is no source ---------------------------------------------------------------------------------------------


def test_an_unknown_layout_lists_what_is_there_and_what_lacked(tmp_path: Path) -> None:
    for i in range(25):
        (tmp_path / f"{i:02d}.txt").write_text("x")
    with pytest.raises(DataError) as raised:
        find_shards(str(tmp_path))
    message = one_line(raised.value)
    assert "00.txt, 01.txt" in message
    assert "19.txt and 5 more" in message
    assert "RLDS lacks *.tfrecord* files" in message
    assert "archives: no *.tar.gz" in message
    assert "tables: no *.parquet" in message
    (tmp_path / "x-train.tfrecord-00000-of-00001").write_bytes(b"")
    with pytest.raises(DataError, match=r"RLDS lacks features\.json beside x-train\.tfrecord"):
        find_shards(str(tmp_path))


@pytest.mark.parametrize("name", ["traj_0/traj_data.pkl", "data.npz"])
def test_pickles_are_refused_and_not_opened(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    file = tmp_path / "d" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=rf"holds {name}: nothing is unpickled, because .*any code"):
        find_shards(str(tmp_path / "d"))
    assert not (tmp_path / "exploded").exists()


def test_sources_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no files"):
        find_shards(str(tmp_path))
    with pytest.raises(DataError, match="does not exist; give a directory"):
        find_shards(str(tmp_path / "absent"))
    (tmp_path / "readme.md").write_text("version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(DataError, match=r"readme\.md is a git-LFS pointer"):
        find_shards(str(tmp_path))


def test_the_synthetic_source_is_dispatched() -> None:
    shards = find_shards("synthetic")
    assert shards
    assert {shard.layout for shard in shards} == {"synthetic"}
    tally = Tally()
    assert next(read_shard(shards[0], FULL, tally)).actions.shape == (8, 2)


def test_reading_needs_neither_torch_nor_tensorflow() -> None:
    code = "import sys, vla_ray.data.cast.source; print({'torch', 'tensorflow', 'ray', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# An object store -----------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Location]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    name = f"bucket-{secrets.token_hex(4)}"
    urlopen(Request(f"http://{host}:{port}/{name}", method="PUT")).close()
    yield Location.of(f"s3://{name}")
    moto.stop()


def test_shards_and_tables_stream_from_a_store(
    published: Path, samples: list[Sample], tmp_path: Path, bucket: Location
) -> None:
    def put(file: Path, path: str) -> None:
        with bucket.filesystem.open_output_stream(f"{bucket.path}/{path}") as stream:
            stream.write(file.read_bytes())

    for file in published.rglob("1.0.0/*"):
        put(file, f"cast/{file.relative_to(published)}")
    found, _ = read(f"{bucket}/cast")
    assert list(map(row, found)) == list(map(row, samples))
    for file in jsonl(tmp_path / "d", PLAIN).iterdir():
        put(file, f"table/{file.name}")
    assert read(f"{bucket}/table")[1].samples == 1
    put(pack(published / "cast_filtered_dataset", tmp_path / "data.tar"), "packed/data.tar")
    with pytest.raises(DataError, match="must be on a local disk"):
        find_shards(f"{bucket}/packed")
    put(
        jsonl(tmp_path / "e", {**PLAIN, "image_path": str(tmp_path / "d/7.png")}) / "drives.jsonl", "other/drives.jsonl"
    )
    with pytest.raises(DataError, match=r"row 0: image_path is .*, which leaves s3://"):
        read(f"{bucket}/other")


# The hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub with one dataset, whose files arrive as `repository` says."""
    state: dict[str, Any] = {"files": ["a.tar.gz", "README.md"], "arrive": ["a.tar.gz"], "error": None, "calls": 0}

    def dataset_info(repo_id: str) -> Any:
        return SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename=name) for name in state["files"]])

    def snapshot_download(repo_id: str, *, local_dir: Path, **how: Any) -> str:
        state["calls"] += 1
        assert how["repo_type"] == "dataset"
        assert how["revision"] == "0" * 40
        if state["error"]:
            raise state["error"]
        local_dir.mkdir(parents=True, exist_ok=True)
        for name in state["arrive"]:
            (local_dir / name).write_bytes(b"x")
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def answer(kind: type[HfHubHTTPError], status: int, text: str = "no") -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(text, response=response)


def test_a_download_is_made_once_and_only_when_it_is_whole(repository: dict[str, Any], tmp_path: Path) -> None:
    repository["arrive"] = []
    with pytest.raises(DataError, match=r"1 of 1 files did not arrive, a\.tar\.gz first"):
        hub.download("owner/name", tmp_path)
    repository["arrive"] = ["a.tar.gz"]
    target = hub.download("owner/name", tmp_path)
    assert target == tmp_path / "owner--name"
    assert (target / "a.tar.gz").exists()
    assert hub.download("owner/name", tmp_path) == target
    assert repository["calls"] == 2
    repository["files"] = ["README.md"]
    with pytest.raises(DataError, match=r"has no data files .* it holds README\.md"):
        hub.download("owner/other", tmp_path)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            answer(GatedRepoError, 403),
            r"gated\. Accept its terms on https://huggingface\.co/datasets/owner/name .*HF_TOKEN",
        ),
        (answer(HfHubHTTPError, 401), "gated.*HF_TOKEN"),
        (answer(RepositoryNotFoundError, 404), "no path of that name is here, and the hub has no such public dataset"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (answer(HfHubHTTPError, 503, "busy\nlater"), "the hub answered busy later.* goes on where it stopped"),
    ],
)
def test_refusals_of_the_hub_are_explained(
    repository: dict[str, Any], tmp_path: Path, error: Exception, told: str
) -> None:
    repository["error"] = error
    with pytest.raises(DataError, match=told) as raised:
        hub.download("owner/name", tmp_path)
    one_line(raised.value)
    assert not (tmp_path / "owner--name" / hub.COMPLETE).exists()


def test_no_network_and_the_real_offline_mode(
    repository: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    repository["error"] = HTTPError("connection refused")
    with pytest.raises(DataError, match=r"the hub cannot be reached \(connection refused\)\. Check the network"):
        hub.download("owner/name", tmp_path)
    monkeypatch.undo()
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        hub.download("owner/name", tmp_path)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id("catglossop/CAST-dataset")
    (tmp_path / "catglossop/CAST-dataset").mkdir(parents=True)
    assert not hub.is_hub_id("catglossop/CAST-dataset")
    for path in ("synthetic", "/data/cast", "./data/cast", "../a/b", "a/b/c", "s3://bucket/key", "a/"):
        assert not hub.is_hub_id(path)
