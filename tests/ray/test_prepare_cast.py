"""Sources become datasets: every sample once, whatever is corrupt, stopped or killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_ray.config import PrepareConfig
from vla_ray.config.prepare import ActionStepsConfig
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.shards import ReadOptions, Shard, Tally
from vla_ray.data.cast.source import find_shards, read_shard
from vla_ray.data.prepared import PreparedDataset, samples
from vla_ray.errors import ClusterError, ConfigError, DataError, RunError
from vla_ray.pipelines import prepare_cast as module
from vla_ray.pipelines.prepare_cast import default_name, prepare_cast
from vla_ray.stages.prepare import ShardPreparer
from vla_ray.storage.files import Location
from vla_ray.storage.lease import Lease

pytestmark = pytest.mark.ray

Configure = Callable[..., PrepareConfig]


@pytest.fixture
def configure(tmp_path: Path, golden: Path) -> Configure:
    """Dataset `d` of the golden source, unless said otherwise."""

    def make(**settings: Any) -> PrepareConfig:
        return PrepareConfig(
            **{"source": str(golden / "cast_rlds"), "output_dir": str(tmp_path), "name": "d"} | settings
        )

    return make


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Iterator[Any]:
        raise AssertionError("this run must not need Ray")

    monkeypatch.setattr("vla_ray.pipelines.prepare_shards.prepare_shards", refuse)


def document(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "dataset.json").read_text())


def status(directory: Path) -> str:
    return json.loads((directory / "run.json").read_text())["status"]


def times(directory: Path) -> dict[str, int]:
    """Relative path -> modification time of every record and Parquet file."""
    files = [*directory.glob("shards/*.json"), *directory.glob("samples/*/*.parquet")]
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in files}


def left_behind(directory: Path) -> list[str]:
    return [str(p) for p in [*directory.rglob(".*"), *directory.glob("lease*"), *directory.glob("attempts/*")]]


def all_samples(directory: Path) -> list[Sample]:
    dataset = PreparedDataset.open(str(directory))
    found = [
        sample
        for file in dataset.files
        for group in range(len(file.row_groups))
        for sample in samples(dataset.read_group(file, group))
    ]
    return sorted(found, key=lambda s: s.sample_id)


def facts(sample: Sample) -> tuple[Any, ...]:
    return tuple(
        value.tolist() if isinstance(value := getattr(sample, name), np.ndarray) else value for name in Sample.__slots__
    )


def flip_byte(path: Path, record: int, byte: int) -> None:
    """Damage the data of one record of a TFRecord file."""
    content, start = bytearray(path.read_bytes()), 0
    for _ in range(record):
        start += int.from_bytes(content[start : start + 8], "little") + 16
    content[start + 12 + byte] ^= 0xFF
    path.write_bytes(content)


def test_golden(
    tmp_path: Path,
    golden: Path,
    configure: Configure,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that the source holds arrives, counted as the reference decodes say; a finished run needs no Ray."""
    caplog.set_level("INFO")
    config, directory = configure(row_group=16), tmp_path / "d"
    assert prepare_cast(config) == 0
    out = capsys.readouterr().out
    held = document(directory)

    rows = {(r["dataset"], r["split"]): r for r in held["counts"]}
    assert len(rows) == 4
    for (dataset, split), row in rows.items():
        reference = np.load(golden / f"cast_rlds/{dataset}.{split}.ref.npz")
        pictures = [reference[name] for name in reference.files if name.endswith("observation/image")]
        real = [[not (step == 255).all() for step in episode] for episode in pictures]
        assert row["episodes"] == len(pictures)
        assert row["steps"] == sum(map(len, real))
        assert row["samples"] == sum(sum(episode[: len(episode) - 8]) for episode in real) > 0
        assert row["white"] + row["padding"] == row["steps"] - row["samples"]
        assert held["samples"][dataset][split] == row["samples"]
        assert f"{row['samples']:,}" in out
    for text in ("cast_counterfactual_dataset", "no language", f"jobs/train.py data.path={directory}", "median step"):
        assert text in out

    found = all_samples(directory)
    direct = [s for shard in find_shards(config.source) for s in read_shard(shard, ReadOptions(), Tally())]
    assert [facts(s) for s in found] == [facts(s) for s in sorted(direct, key=lambda s: s.sample_id)]
    train = np.concatenate([s.actions for s in direct if s.split == "train"])
    statistics = PreparedDataset.open(str(directory)).statistics["train"]
    assert statistics.count == len(train)
    np.testing.assert_allclose(statistics.mean, train.astype(np.float64).mean(axis=0), rtol=1e-9)
    assert all(max(f["row_groups"]) <= 16 for f in held["files"])
    assert held["problems"] == []
    assert status(directory) == "finished"
    assert left_behind(directory) == []

    before = times(directory)
    with monkeypatch.context() as patch:
        patch.setattr("vla_ray.pipelines.prepare_shards.prepare_shards", lambda *_: pytest.fail("no Ray is needed"))
        assert prepare_cast(config) == 0
        assert "is finished: nothing to do" in caplog.text
        assert capsys.readouterr().out.splitlines()[2:] == out.splitlines()[2:]
        for changes, message in (
            ({"every": 2}, "every: run has 1, asked 2"),
            ({"row_group": 8}, "row_group: run has 16, asked 8"),
            ({"source": "synthetic"}, 'asked "synthetic"'),
        ):
            with pytest.raises(RunError, match=r"started with other settings.*another name=NAME") as refused:
                prepare_cast(configure(**{"row_group": 16} | changes))
            assert message in str(refused.value)
    assert times(directory) == before
    assert document(directory) == held


def test_only_what_is_missing_is_done(tmp_path: Path, golden: Path, configure: Configure) -> None:
    source = tmp_path / "source"
    shutil.copytree(golden / "cast_rlds", source)
    config, directory = configure(source=str(source)), tmp_path / "d"
    assert prepare_cast(config) == 0
    held, before = document(directory), times(directory)
    assert len(before) == 8

    def changed() -> set[str]:
        return {Path(path).stem for path, time in times(directory).items() if time != before[path]}

    lost = "cast_filtered_dataset-val-00000-of-00001"
    (directory / f"shards/{lost}.json").unlink()
    (directory / f"samples/val/{lost}.parquet").unlink()
    assert prepare_cast(config) == 0
    assert changed() == {lost}
    assert document(directory) == held

    # A file of another size is not ours any more; nor is one whose source has changed.
    before = times(directory)
    (directory / f"samples/val/{lost}.parquet").write_bytes(b"other")
    assert prepare_cast(config) == 0
    assert changed() == {lost}
    assert document(directory) == held
    before = times(directory)
    (shard,) = source.rglob("cast_counterfactual_dataset-train.tfrecord*")
    os.utime(shard, ns=(1, 1))
    assert prepare_cast(config) == 0
    assert changed() == {"cast_counterfactual_dataset-train-00000-of-00001"}
    assert document(directory) == held

    # A shard that the source has no more is not in the dataset any more.
    shard.unlink()
    assert prepare_cast(config) == 0
    assert len(times(directory)) == 6
    assert {f["dataset"] for f in document(directory)["files"] if f["split"] == "train"} == {"cast_filtered_dataset"}


@pytest.mark.parametrize("stop", ["ctrl-c", "sigterm"])
def test_a_stopped_run_goes_on(
    tmp_path: Path,
    configure: Configure,
    stop: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs/prepare_cast.py", "source=my data"])
    handler, add, directory = signal.getsignal(signal.SIGTERM), module.Progress.add, tmp_path / "d"

    def interrupted(self: module.Progress, done: int, failed: int) -> None:
        add(self, done, failed)
        if stop == "ctrl-c":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module.Progress, "add", interrupted)
        assert prepare_cast(configure()) == (130 if stop == "ctrl-c" else 143)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "stopped; to go on: python jobs/prepare_cast.py 'source=my data' name=d" in caplog.text
    assert status(directory) == "stopped"
    assert not (directory / "lease.json").exists()
    assert len(list(directory.glob("shards/*.json"))) >= 1
    with pytest.raises(DataError, match=r"not finished \(stopped\).*prepare_cast"):
        PreparedDataset.open(str(directory))
    assert prepare_cast(configure()) == 0
    assert prepare_cast(configure(name="undisturbed")) == 0
    assert document(directory) == document(tmp_path / "undisturbed")


def test_a_corrupt_record_is_named_and_the_others_arrive(
    tmp_path: Path, golden: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(golden / "cast_rlds", source)
    (shard,) = source.rglob("cast_filtered_dataset-train.tfrecord*")
    flip_byte(shard, record=1, byte=1000)
    config, directory = configure(source=str(source), crc="full"), tmp_path / "d"
    assert prepare_cast(config) == 1, "one of twelve records is more than five per cent"
    out = capsys.readouterr().out
    (problem,) = document(directory)["problems"]
    assert "cast_filtered_dataset-train-00000-of-00001: record 1" in problem
    assert f"problem: {problem}" in out
    whole = [
        facts(s)
        for one in find_shards(str(golden / "cast_rlds"))
        for s in read_shard(one, ReadOptions(), Tally())
        if not s.sample_id.startswith("cast_filtered_dataset/train/00000-of-00001:00001/")
    ]
    assert [facts(s) for s in all_samples(directory)] == sorted(whole)
    assert prepare_cast(configure(source=str(source), crc="full", max_error_rate=0.2)) == 0


def test_no_samples_left_names_the_filters_and_frees_the_settings(tmp_path: Path, configure: Configure) -> None:
    directory = tmp_path / "d"
    with pytest.raises(DataError, match=r"no sample is left of .*: 12 episodes, .* windows past their episode's end"):
        prepare_cast(configure(action=ActionStepsConfig(num_steps=50)))
    assert not (directory / "dataset.json").exists()
    assert left_behind(directory) == []
    assert prepare_cast(configure()) == 0, "other settings may be tried under the same name"
    assert PreparedDataset.open(str(directory)).horizon == 8


@pytest.mark.parametrize("was_there", [True, False])
def test_a_refused_source_leaves_nothing(
    tmp_path: Path, golden: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, was_there: bool
) -> None:
    source, directory = tmp_path / "source", tmp_path / "d"
    source.mkdir()
    (source / "drives.jsonl").write_text(
        '{"image_path": "a.png", "text": "go", "action": [[0, 0]], "scale_m": "abc"}\n'
    )
    if was_there:
        directory.mkdir()
    with pytest.raises(DataError, match=r"drives\.jsonl: row 0"):
        prepare_cast(configure(source=str(source)))
    assert directory.exists() == was_there
    assert not was_there or not [p for p in directory.rglob("*") if p.is_file()]
    assert prepare_cast(configure()) == 0, "other settings may be tried under the same name"

    # What earlier runs have done stays.
    before = times(directory)
    (directory / "run.json").unlink()
    with pytest.raises(DataError, match=r"drives\.jsonl: row 0"):
        prepare_cast(configure(source=str(source)))
    assert times(directory) == before
    assert (directory / "config.yaml").exists()


def test_recordings_are_kept_apart(tmp_path: Path, configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_cast(configure(split_by="recording", val_share=0.4, padding="keep")) == 0
    held = document(tmp_path / "d")
    assert sum(r["white"] for r in held["counts"]) == 42, "the second half of six counterfactual episodes, but its end"
    assert sum(r["padding"] for r in held["counts"]) == 12, "the last step of each episode"
    assert sum(held["recordings"]["by_split"].values()) == 6, "of the same drives in both sub-datasets"
    assert held["recordings"]["shared"] == 0
    assert set(held["recordings"]["by_split"]) == {"train", "val"}
    assert "split again by recording" in capsys.readouterr().out
    found = all_samples(tmp_path / "d")
    apart = [{s.recording for s in found if s.split == split} for split in ("train", "val")]
    assert not apart[0] & apart[1]
    assert len(found) == sum(r["samples"] for r in held["counts"])


def test_corridors(tmp_path: Path, configure: Configure) -> None:
    assert prepare_cast(configure(source="synthetic", pictures=40, val_pictures=10)) == 0
    dataset = PreparedDataset.open(str(tmp_path / "d"))
    assert {(f.dataset, f.split) for f in dataset.files} == {
        (name, split) for name in ("corridors", "corridors_counterfactual") for split in ("train", "val")
    }
    assert dataset.rows("train") > 80
    assert dataset.document["recordings"]["shared"] == 0


def test_a_shard_that_kills_its_worker_ends_the_job(tmp_path: Path, golden: Path) -> None:
    """Ray's default is to try again for ever."""
    from vla_ray.pipelines.prepare_shards import MAX_STARTS, prepare_shards

    deaths = tmp_path / "deaths"

    def deadly(shard: Shard, options: ReadOptions, tally: Tally) -> Iterator[Sample]:  # a local one travels by value
        with deaths.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
        yield from ()

    location = Location.of(tmp_path / "d")
    shards = find_shards(str(golden / "cast_rlds"))[:1]
    with Lease.acquire(location, command="test") as lease, pytest.raises(ClusterError, match=r"shard .* was killed 3"):
        list(prepare_shards(shards, ShardPreparer(location, ReadOptions(), 64, deadly), lease.token))
    assert len(deaths.read_text()) == MAX_STARTS


def test_a_worker_that_does_not_see_the_lease_refuses(tmp_path: Path, golden: Path) -> None:
    from vla_ray.pipelines.prepare_shards import prepare_shards

    preparer = ShardPreparer(Location.of(tmp_path / "d"), ReadOptions(), 64, read_shard)
    with pytest.raises(ClusterError, match="does not see this run's lease"):
        list(prepare_shards(find_shards(str(golden / "cast_rlds"))[:1], preparer, "token"))
    assert not (tmp_path / "d").exists()


def test_a_source_on_the_hub_is_downloaded_once(
    tmp_path: Path, golden: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, cache_dir: str) -> Path:
        asked.append(repo)
        return golden / "cast_rlds"

    monkeypatch.setattr(module, "download", download)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert prepare_cast(configure(source="someone/some-dataset", name=None)) == 0
    assert asked == ["someone/some-dataset"]
    assert document(tmp_path / "some-dataset")["source"] == "someone/some-dataset"


@pytest.mark.usefixtures("no_ray")
def test_refusals(tmp_path: Path, golden: Path, configure: Configure) -> None:
    """Before anything is written."""
    with pytest.raises(DataError, match="nowhere"):
        prepare_cast(configure(source=str(tmp_path / "nowhere")))
    assert not (tmp_path / "d").exists()
    source = tmp_path / "source"
    shutil.copytree(golden / "cast_rlds", source)
    for changes in ({"name": "source"}, {"output_dir": str(source)}):
        with pytest.raises(ConfigError, match="into its own source"):
            prepare_cast(configure(source=str(source), **changes))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes.txt, so it is no prepared dataset"):
        prepare_cast(configure())
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["notes.txt"]
    with Lease.acquire(Location.of(tmp_path / "held"), command="the other driver"):
        with pytest.raises(RunError, match=r"in use by another driver.*the other driver"):
            prepare_cast(configure(name="held"))
        assert [p.name for p in (tmp_path / "held").iterdir()] == ["lease.json"]


def test_a_finished_run_is_recognised_in_half_a_second() -> None:
    """So nothing heavy may be imported before it is."""
    code = (
        "import sys, vla_ray.pipelines.prepare_cast; sys.exit(' '.join({'ray', 'torch', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_names() -> None:
    assert default_name("synthetic") == "corridors"
    assert default_name("catglossop/CAST-dataset") == "CAST-dataset"
    assert default_name("/data/my set/") == "my_set"
    assert default_name("s3://bucket/cast_filtered_dataset.tar.gz") == "cast_filtered_dataset"


@pytest.mark.slow
def test_a_killed_driver_is_replaced(tmp_path: Path, repo: Path, configure: Configure) -> None:
    """At any moment: what a resumed run makes equals what an undisturbed one does."""
    temp = Path(f"/tmp/vrp{os.getpid()}")
    settings = ["source=synthetic", f"output_dir={tmp_path}", "name=killed", "pictures=1500", "val_pictures=100"]
    command = [sys.executable, "jobs/prepare_cast.py", *settings, "cluster.num_cpus=2", "cluster.object_store_mb=150"]
    environment = {**os.environ, "RAY_TMPDIR": str(temp), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    directory = tmp_path / "killed"

    def start() -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(command, cwd=repo, env=environment, stdout=log, stderr=log, start_new_session=True)

    job, end = start(), time.monotonic() + 120
    try:
        while len(list(directory.glob("shards/*.json"))) < 3:
            assert job.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.02)
        job.kill()
        job.wait()
        assert status(directory) == "running"
        before = times(directory)
        again = start()
        assert again.wait(180) == 0, (tmp_path / "log").read_text()
    finally:
        job.kill()
        shutil.rmtree(temp, ignore_errors=True)
    log = (tmp_path / "log").read_text()
    assert "Taking over" in log
    records = {path for path in before if path.startswith("shards/")}
    assert len(records) < len(list(directory.glob("shards/*.json"))), "it was killed in the middle"
    assert {p: t for p, t in times(directory).items() if p in records} == {p: before[p] for p in records}
    assert left_behind(directory) == []

    undisturbed = configure(source="synthetic", name="undisturbed", pictures=1500, val_pictures=100)
    assert prepare_cast(undisturbed) == 0
    assert document(directory) == document(tmp_path / "undisturbed")
