"""Shards -> Parquet files and records -> dataset.json -> the same samples again, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from vla_ray.config import PrepareConfig
from vla_ray.config.prepare import SourceDataConfig
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.shards import ReadOptions, Shard, Tally
from vla_ray.data.prepared import PreparedDataset, samples, to_table
from vla_ray.errors import ConfigError, DataError, StorageError
from vla_ray.report.dataset_table import dataset_table
from vla_ray.schema import SAMPLES
from vla_ray.stages import prepare
from vla_ray.stages.dataset_document import build_document
from vla_ray.stages.prepare import ShardPreparer, ShardRecord
from vla_ray.storage.files import Location, write_json
from vla_ray.training.spec import check_actions

OPTIONS = ReadOptions()
TRAIN = Shard("paths", "train", "paths-train-0", "table", "/nowhere/train.parquet", "1")
VAL = Shard("paths", "val", "paths-val-0", "table", "/nowhere/val.parquet", "1")


def sample(number: int, split: str = "train", **changes: object) -> Sample:
    rng = np.random.default_rng(number)
    valid = np.arange(8) < 8 - number % 3
    values = Sample(
        sample_id=f"paths/{split}/0:{number:05d}/0000",
        dataset="paths",
        split=split,
        recording=f"walk_{number // 4}",
        t=number,
        image=rng.bytes(100),
        instruction="go forward",
        instructions=("go forward", "move ahead, na\u00efvely"),
        actions=(rng.normal(size=(8, 2)) * valid[:, None]).astype(np.float32),
        valid=valid,
        scale_m=0.25 if number % 2 else None,
    )
    return dataclasses.replace(values, **changes)  # type: ignore[arg-type]


class FakeReader:
    """Yields these samples, and fails after them if told to."""

    def __init__(self, found: Sequence[Sample], error: Exception | None = None) -> None:
        self.found, self.error = found, error

    def __call__(self, shard: Shard, options: ReadOptions, tally: Tally) -> Iterator[Sample]:
        for one in self.found:
            tally.samples += 1
            tally.steps += 1
            yield one
        if self.error:
            raise self.error
        tally.episodes += 1


def same(one: Sample, other: Sample) -> bool:
    return all(
        np.array_equal(getattr(one, f.name), getattr(other, f.name))
        and getattr(getattr(one, f.name), "dtype", None) == getattr(getattr(other, f.name), "dtype", None)
        for f in dataclasses.fields(Sample)
    )


def prepared(directory: Path, shards: dict[Shard, Sequence[Sample]], row_group: int = 4) -> list[ShardRecord]:
    location = Location.of(directory)
    records = [ShardPreparer(location, OPTIONS, row_group, FakeReader(found))(s) for s, found in shards.items()]
    write_json(location / "dataset.json", build_document(records, "/nowhere", OPTIONS))
    return records


def test_samples_come_back(tmp_path: Path) -> None:
    train, val = [sample(i) for i in range(10)], [sample(i, "val") for i in range(20, 24)]
    prepared(tmp_path, {TRAIN: train, VAL: val})
    dataset = PreparedDataset.open(str(tmp_path))
    assert (dataset.horizon, dataset.splits, dataset.rows("train"), dataset.rows("val")) == (8, ("train", "val"), 10, 4)
    assert dataset.rows("test") == 0
    first, second = dataset.files
    assert (first.path, first.dataset, first.split) == ("samples/train/paths-train-0.parquet", "paths", "train")
    assert (first.row_groups, second.row_groups) == ((4, 4, 2), (4,))
    for file, expected in ((first, train), (second, val)):
        tables = [dataset.read_group(file, group) for group in range(len(file.row_groups))]
        assert [t.num_rows for t in tables] == list(file.row_groups)
        assert all(t.schema.equals(SAMPLES) and t.schema.metadata[b"units"] for t in tables)
        again = [s for table in tables for s in samples(table)]
        assert [s.sample_id for s in again] == [s.sample_id for s in expected]
        assert all(map(same, again, expected))
    some = dataset.read_group(first, 1, columns=["t", "actions"])
    assert some.column_names == ["t", "actions"]
    assert some["t"].to_pylist() == [4, 5, 6, 7]


def test_statistics_leave_out_what_is_padded(tmp_path: Path) -> None:
    found = [sample(i) for i in range(9)]
    prepared(tmp_path, {TRAIN: found})
    statistics = PreparedDataset.open(str(tmp_path)).statistics["train"]
    moved = np.concatenate([s.actions[s.valid] for s in found]).astype(np.float64)
    assert statistics.count == len(moved) < 72
    np.testing.assert_allclose(statistics.mean, moved.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, moved.std(axis=0), rtol=1e-12)


def test_a_picture_with_many_instructions_is_stored_once(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).bytes(20_000)
    prepared(tmp_path, {TRAIN: [sample(i, image=picture) for i in range(10)]}, row_group=10)
    assert (tmp_path / "samples/train/paths-train-0.parquet").stat().st_size < 2 * len(picture)


def test_a_shard_may_hold_several_splits_and_sub_datasets(tmp_path: Path) -> None:
    """As when recordings are split again, or in somebody's table."""
    found = [sample(i, "val" if i % 3 == 0 else "train", dataset="paths" if i % 5 else "extra") for i in range(23)]
    (record,) = prepared(tmp_path, {TRAIN: found}, row_group=3)
    assert sorted(file.path for file in record.files) == [
        "samples/train/paths-train-0.parquet",
        "samples/train/paths-train-0@extra.parquet",
        "samples/val/paths-train-0.parquet",
        "samples/val/paths-train-0@extra.parquet",
    ]
    dataset = PreparedDataset.open(str(tmp_path))
    again = [
        (file, s)
        for file in dataset.files
        for group in range(len(file.row_groups))
        for s in samples(dataset.read_group(file, group))
    ]
    assert all((file.split, file.dataset) == (s.split, s.dataset) for file, s in again)
    by_id = {s.sample_id: s for _, s in again}
    assert len(again) == len(by_id) == 23
    assert all(same(by_id[s.sample_id], s) for s in found)
    with pytest.raises(DataError, match=r"split='a/b' of paths/x cannot name a file"):
        prepared(tmp_path, {TRAIN: [sample(0, "a/b", sample_id="paths/x")]})


def test_no_two_shards_write_one_file(tmp_path: Path) -> None:
    """Their names may hold dots, as those of sub-datasets may."""
    one, other = (dataclasses.replace(TRAIN, name=name) for name in ("train", "train.b"))
    records = prepared(tmp_path, {one: [sample(0), sample(1, dataset="b")], other: [sample(2), sample(3, dataset="b")]})
    paths = [file.path for record in records for file in record.files]
    assert len(paths) == len(set(paths)) == 4
    dataset = PreparedDataset.open(str(tmp_path))
    assert {s.t for file in dataset.files for s in samples(dataset.read_group(file, 0))} == {0, 1, 2, 3}


def test_records_are_small_for_a_driver_that_keeps_thousands(tmp_path: Path) -> None:
    (record,) = prepared(tmp_path, {TRAIN: [sample(i) for i in range(10)]})
    assert len(pickle.dumps(record)) < 10_000, "a histogram is 200 kB as an object"
    damaged = record.to_dict()
    damaged["files"][0]["statistics"]["grid"] = [1, 1]
    (tmp_path / "shards/paths-train-0.json").write_text(json.dumps(damaged))
    assert ShardRecord.read(Location.of(tmp_path), TRAIN, record.options) is None, "of another version"


@pytest.mark.parametrize("after", [0, 3, 10])
def test_a_shard_that_fails_leaves_nothing(tmp_path: Path, after: int) -> None:
    found = [sample(i, "val" if i % 2 else "train") for i in range(after)]
    reader = FakeReader(found, DataError("no scale"))
    with pytest.raises(DataError, match="no scale"):
        ShardPreparer(Location.of(tmp_path), OPTIONS, 4, reader)(TRAIN)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_record_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one is, the files are: a crash before it means that the shard is done again."""

    def full(location: Location, value: object) -> int:
        assert (tmp_path / "samples/train/paths-train-0.parquet").exists()
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_json", full)
        with pytest.raises(StorageError):
            prepared(tmp_path, {TRAIN: [sample(0)]})
    location = Location.of(tmp_path)
    preparer = ShardPreparer(location, OPTIONS, 4, FakeReader([sample(0)]))
    assert ShardRecord.read(location, TRAIN, preparer.fingerprint) is None
    record = preparer(TRAIN)
    read = ShardRecord.read(location, TRAIN, preparer.fingerprint)
    assert read is not None
    assert read.to_dict() == record.to_dict()


def test_a_record_is_of_one_content_and_options(tmp_path: Path) -> None:
    location = Location.of(tmp_path)
    preparer = ShardPreparer(location, OPTIONS, 4, FakeReader([sample(0)]))
    preparer(TRAIN)
    other = ShardPreparer(location, dataclasses.replace(OPTIONS, every=2), 4, FakeReader([]))
    assert ShardRecord.read(location, TRAIN, other.fingerprint) is None
    assert ShardRecord.read(location, dataclasses.replace(TRAIN, identity="2"), preparer.fingerprint) is None
    assert ShardRecord.read(location, VAL, preparer.fingerprint) is None
    (tmp_path / "shards/paths-train-0.json").write_text('{"of": "another version"}')
    assert ShardRecord.read(location, TRAIN, preparer.fingerprint) is None


def test_the_fingerprint_is_of_samples(tmp_path: Path) -> None:
    found = [sample(i) for i in range(6)]

    def fingerprint(name: str, shards: dict[Shard, Sequence[Sample]]) -> str:
        prepared(tmp_path / name, shards)
        return PreparedDataset.open(str(tmp_path / name)).fingerprint

    one = fingerprint("one", {TRAIN: found, VAL: [sample(9, "val")]})
    assert fingerprint("elsewhere", {VAL: [sample(9, "val")], TRAIN: found}) == one
    other = dataclasses.replace(found[3], image=found[3].image + b"!")
    assert fingerprint("picture", {TRAIN: [*found[:3], other, *found[4:]], VAL: [sample(9, "val")]}) != one
    assert fingerprint("fewer", {TRAIN: found[:5], VAL: [sample(9, "val")]}) != one


def test_recordings_in_both_splits_are_a_warning(tmp_path: Path) -> None:
    apart = prepared(tmp_path / "a", {TRAIN: [sample(i) for i in range(8)], VAL: [sample(8, "val")]})
    text = "\n".join(dataset_table(build_document(apart, "x", OPTIONS)))
    assert "warning" not in text
    assert "recordings: 2 train, 1 val" in text
    mixed = prepared(tmp_path / "b", {TRAIN: [sample(i) for i in range(8)], VAL: [sample(7, "val")]})
    document = build_document(mixed, "x", OPTIONS)
    assert document["recordings"] == {"by_split": {"train": 2, "val": 1}, "shared": 1, "examples": ["walk_1"]}
    assert "warning: 1 recordings lie in more than one split (e.g. walk_1)" in "\n".join(dataset_table(document))


def test_what_is_no_prepared_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no dataset at .*nowhere.*jobs/prepare_cast.py"):
        PreparedDataset.open(str(tmp_path / "nowhere"))
    (tmp_path / "features.json").write_text("{}")
    with pytest.raises(DataError, match=r"is no prepared dataset.*jobs/prepare_cast.py source="):
        PreparedDataset.open(str(tmp_path))
    run = {"settings": {"job": "prepare_cast"}, "status": "stopped", "command": "python jobs/prepare_cast.py name=n"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(
        DataError, match=r"not finished \(stopped\). Run this again: python jobs/prepare_cast.py name=n"
    ):
        PreparedDataset.open(str(tmp_path))
    # A refused preparation takes run.json away and keeps the shards that it has done.
    (tmp_path / "run.json").unlink()
    (tmp_path / "shards").mkdir()
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(DataError, match=rf"its preparation failed.* source=\.\.\. name={tmp_path.name}"):
        PreparedDataset.open(str(tmp_path))
    (tmp_path / "dataset.json").write_text('{"format": "something"}')
    with pytest.raises(DataError, match="was not written by this version"):
        PreparedDataset.open(str(tmp_path))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    prepared(tmp_path, {TRAIN: [sample(i) for i in range(10)]})
    dataset = PreparedDataset.open(str(tmp_path))
    path = tmp_path / dataset.files[0].path
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(StorageError, match=r"paths-train-0\.parquet"):
        dataset.read_group(dataset.files[0], 0)
    path.unlink()
    with pytest.raises(StorageError, match=r"paths-train-0\.parquet"):
        dataset.read_group(dataset.files[0], 0)


def test_samples_without_actions(tmp_path: Path) -> None:
    """Logs of a robot, to predict for."""
    log = sample(0, actions=np.zeros((0, 2), np.float32), valid=np.zeros(0, bool))
    location, options = Location.of(tmp_path), ReadOptions(targets="optional")
    for found, lacking, said in (
        ([log], 1, "actions: none"),
        ([log, sample(3), sample(6)], 1, "median step"),
        ([sample(3)], 0, "median step"),
    ):
        record = ShardPreparer(location, options, 4, FakeReader(found))(TRAIN)
        write_json(location / "dataset.json", build_document([record], "/nowhere", options))
        dataset = PreparedDataset.open(location)
        assert dataset.without_actions("train") == lacking
        assert all(map(same, samples(dataset.read_group(dataset.files[0], 0)), found))
        assert said in "\n".join(dataset_table(dataset.document))
        if lacking:
            with pytest.raises(DataError, match=rf"1 of the {len(found)} samples of .* have no actions") as e:
                check_actions(dataset, "train")
            assert "\n" not in str(e.value)
        else:
            check_actions(dataset, "train")


def test_empty_tables() -> None:
    assert to_table([]).schema.equals(SAMPLES)
    assert list(samples(to_table([]))) == []


@pytest.mark.parametrize("given", ["sacson", "sacson=", "=0.1", "sacson=-1", "sacson=nan", "sacson=inf", "sacson=many"])
def test_scales_are_checked(given: str) -> None:
    with pytest.raises(ConfigError, match=r"data.scale_m=.*\[sacson=0.12,recon=0.25\]"):
        SourceDataConfig(scale_m=[given])


def test_scales() -> None:
    assert SourceDataConfig(scale_m=["sacson=0.12", "*=0.3"]).scales == (("sacson", 0.12), ("*", 0.3))
    assert [name for name, _ in SourceDataConfig(scale_m="known").scales] == ["known"]
    assert SourceDataConfig().scales == ()
    (cache_dir,) = (f for f in dataclasses.fields(SourceDataConfig) if f.name == "cache_dir")
    assert "archives are unpacked there" in str(cache_dir.metadata), "as find_shards(source, cache) does"
    with pytest.raises(ConfigError, match="val_share=2 is no share"):
        PrepareConfig(val_share=2)
    with pytest.raises(ConfigError, match="Did you mean"):
        PrepareConfig(padding="keeps")
