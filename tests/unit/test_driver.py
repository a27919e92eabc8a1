"""What a driver does around any work: exactly once, refuse, stop, resume. The work here is a loop in this process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_ray.config import WandbConfig
from vla_ray.data.scenes import FrameRef
from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import ClusterError, ConfigError, RunError, StorageError
from vla_ray.pipelines import driver as driver_module
from vla_ray.pipelines.driver import Driver, Job, Todo, select
from vla_ray.schema import FAILED, OK
from vla_ray.stages.work import Loaded, Row, Summary, Worker
from vla_ray.storage.attempts import Attempts
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import read_metrics
from vla_ray.tracking import Tracker, make_tracker

GEOMETRY = TileGeometry(8, 8, 8, 4, 4, ((0, 0, 4, 4),), False)


class FakeReplica:
    """Ok rows, but failed ones for the stems it is told to fail."""

    def __init__(self, bad: Sequence[str] = ()) -> None:
        self.bad = set(bad)

    def process(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        return [self._row(f, t) for f in frames for t in targets]

    def _row(self, frame: Loaded, target: str) -> Row:
        ref = frame.frame.ref
        if ref.stem in self.bad:
            return self.failed(frame, target, "ValueError", "bad frame")
        return {**self._about(ref), "target": target, "status": OK, "tag": ref.stem}

    def failed(self, frame: Loaded, target: str, error_type: str, error: str) -> Row:
        about = self._about(frame.frame.ref)
        return {**about, "target": target, "status": FAILED, "error_type": error_type, "error": error}

    def _about(self, ref: FrameRef) -> Row:
        return {"frame_id": ref.frame_id, "image_path": ref.image, "input_speed_mps": ref.speed_mps}


class FakeWork:
    """Batches of two through a Worker; `then` is raised or called when `after` of them are done and one has begun."""

    def __init__(self, bad: Sequence[str] = (), after: int | None = None, then: Any = None) -> None:
        self.bad, self.after, self.then = bad, after, then
        self.todos: list[Todo] = []
        self.closed = False

    def __call__(self, todo: Todo) -> Generator[Summary, None, None]:
        self.todos.append(todo)
        worker = Worker(FakeReplica(self.bad), todo.location, todo.token)
        try:
            for i, item in enumerate(todo.items(2)):
                if i == self.after:
                    ids = [f.ref.frame_id for f in item.frames]
                    Attempts(todo.location, todo.token).begin("ab" * 16, ids, solo=True, prior=0)
                    if isinstance(self.then, BaseException):
                        raise self.then
                    if self.then is None:
                        return
                    self.then()
                tile = np.zeros((1, 4, 4, 3), np.uint8)
                yield worker(item, [Loaded(f, tile, GEOMETRY) for f in item.frames])
        finally:
            self.closed = True

    @property
    def frames(self) -> list[str]:
        return [frame.ref.stem for frame, _ in self.todos[-1].frames]


def frames(count: int) -> list[FrameRef]:
    return [FrameRef(f"s/f{i}", "s", f"f{i}", f"/images/f{i}.png", 1.0) for i in range(count)]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(
        name="capture",
        output_dir=str(tmp_path),
        run="r",
        frames=frames(6),
        targets=["a"],
        mode="action",
        settings={"payload": "full"},
        checkpoints={},
        config_yaml="payload: full\n",
    )


def run_json(job: Job) -> dict[str, Any]:
    return json.loads(Path(job.output_dir, job.run, "run.json").read_text())


def rows(job: Job) -> list[tuple[str, str, str]]:
    table = read_metrics(Location.of(job.output_dir) / job.run, ["frame_id", "target", "status"])
    return [tuple(row.values()) for row in table.to_pylist()]


def markers(job: Job) -> list[str]:
    return sorted(p.name for p in Path(job.output_dir, job.run).glob("attempts/*"))


def test_every_row_once_and_a_finished_run_is_known_from_one_file(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = FakeWork()
    assert Driver(job).execute(work) == 0
    assert work.frames == [f"f{i}" for i in range(6)]
    assert rows(job) == [(f"s/f{i}", "a", OK) for i in range(6)]
    run = Path(job.output_dir, job.run)
    assert (run / "config.yaml").read_text() == job.config_yaml
    assert run_json(job)["counts"] == {"ok": 6, "failed": 0, "degenerate": 0}
    assert not [*run.glob("ledger/*"), *run.glob("attempts/*"), *run.glob("lease*")]
    out = capsys.readouterr().out
    assert "6 rows" in out
    assert f"python jobs/show.py path={run}" in out
    monkeypatch.setattr("vla_ray.storage.ledger._read", lambda *_: pytest.fail("no table is needed"))
    again = Driver(job)
    assert again.is_finished
    assert again.report_finished() == 0


@pytest.mark.parametrize(("bad", "rate", "code"), [(0, 0.0, 0), (1, 0.0, 1), (3, 0.5, 0), (3, 0.49, 1), (6, 1.0, 0)])
def test_the_error_budget_decides_the_exit_code(
    job: Job, bad: int, rate: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    job = replace(job, max_error_rate=rate)
    assert Driver(job).execute(FakeWork(bad=[f"f{i}" for i in range(bad)])) == code
    assert Driver(job).report_finished() == code
    out = capsys.readouterr().out
    assert ("s/f0 a: ValueError: bad frame" in out) == (bad > 0)


@pytest.mark.parametrize(("stop", "code"), [("ctrl-c", 130), ("sigterm", 143)])
def test_a_stop_is_clean_and_no_evidence(
    job: Job, stop: str, code: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs/capture.py", "scene_dir=my scene", "run=old"])
    handler = signal.getsignal(signal.SIGTERM)
    then = KeyboardInterrupt() if stop == "ctrl-c" else lambda: os.kill(os.getpid(), signal.SIGTERM)
    work = FakeWork(after=1, then=then)
    assert Driver(job).execute(work) == code
    assert work.closed
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "to go on: python jobs/capture.py 'scene_dir=my scene' run=r" in caplog.text
    assert run_json(job)["status"] == "stopped"
    assert run_json(job)["counts"]["ok"] == len(rows(job)) == 2
    assert markers(job) == []
    assert not Path(job.output_dir, job.run, "lease.json").exists()

    again = FakeWork()
    assert Driver(job).execute(again) == 0
    assert again.frames == ["f2", "f3", "f4", "f5"]
    assert len(rows(job)) == 6


def test_a_full_disk_is_no_evidence_either(job: Job) -> None:
    work = FakeWork(after=1, then=StorageError("Cannot write x: no space left on device."))
    with pytest.raises(StorageError, match=r"no space left.* 2 rows are kept; to go on: python .* run=r$"):
        Driver(job).execute(work)
    assert work.closed
    assert run_json(job)["status"] == "failed"
    assert markers(job) == []
    assert Driver(job).execute(FakeWork()) == 0


@pytest.mark.parametrize("error", [ClusterError("Ray gave up"), RuntimeError("a bug")])
def test_what_a_frame_may_have_caused_stays_evidence(job: Job, error: Exception) -> None:
    with pytest.raises(type(error)):
        Driver(job).execute(FakeWork(after=1, then=error))
    assert run_json(job)["status"] == "failed"
    assert len(markers(job)) == 1
    again = FakeWork()
    assert Driver(job).execute(again) == 0
    priors = {frame.ref.stem: frame.prior for frame, _ in again.todos[0].frames}
    assert {stem for stem, prior in priors.items() if prior.solo == 1} == {"f2", "f3"}
    assert markers(job) == [], "a finished run needs no evidence"


def test_work_that_ends_too_early_is_no_success(job: Job) -> None:
    with pytest.raises(ClusterError, match="4 of 6 rows are missing"):
        Driver(job).execute(FakeWork(after=1, then=None))
    assert run_json(job)["status"] == "failed"


def test_a_driver_that_lost_its_lease_writes_nothing_more(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "FOLD_ROWS", 2)
    lease = Path(job.output_dir, job.run, "lease.json")
    before: dict[str, Any] = {}

    def take_over() -> None:
        document = json.loads(lease.read_text())
        lease.write_text(json.dumps({**document, "token": "0" * 16}))
        before.update(run_json(job))

    with pytest.raises(RunError, match="taken over by another driver"):
        Driver(job).execute(FakeWork(after=1, then=take_over))
    assert run_json(job) == before
    assert json.loads(lease.read_text())["token"] == "0" * 16, "it is the other one's lease"


def test_rows_are_folded_on_the_way(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "FOLD_ROWS", 2)
    seen: list[dict[str, int]] = []
    work = FakeWork(after=2, then=lambda: seen.append(run_json(job)["counts"]))
    assert Driver(job).execute(work) == 0
    assert seen == [{"ok": 4, "failed": 0, "degenerate": 0}]
    assert len(list(Path(job.output_dir, job.run).glob("metrics/*.parquet"))) == 3
    assert len(rows(job)) == 6


def test_growing_by_frames_and_targets(job: Job) -> None:
    assert Driver(replace(job, frames=frames(3))).execute(FakeWork()) == 0
    more = FakeWork()
    assert Driver(job).execute(more) == 0
    assert more.frames == ["f3", "f4", "f5"]
    assert not more.todos[0].several_targets
    other = FakeWork()
    assert Driver(replace(job, targets=["b"])).execute(other) == 0
    assert other.todos[0].several_targets, "the run has another target already: file names must tell them apart"
    both = replace(job, targets=["a", "b"], frames=frames(7))
    work = FakeWork()
    assert Driver(both).execute(work) == 0
    assert work.frames == ["f6"]
    assert len(rows(job)) == 14
    # Asking for less again is finished without any work.
    assert Driver(replace(job, frames=frames(2))).execute(lambda _: pytest.fail("nothing is left to do")) == 0


def test_failed_rows_are_final_unless_retried(job: Job) -> None:
    job = replace(job, max_error_rate=1.0)
    assert Driver(job).execute(FakeWork(bad=["f1", "f4"])) == 0
    assert Driver(job).is_finished
    retry = replace(job, retry_failed=True)
    assert not Driver(retry).is_finished
    work = FakeWork()
    assert Driver(retry).execute(work) == 0
    assert work.frames == ["f1", "f4"]
    assert run_json(job)["counts"] == {"ok": 6, "failed": 0, "degenerate": 0}
    assert Driver(retry).is_finished


def test_other_settings_are_refused_with_the_difference(job: Job) -> None:
    assert Driver(job).execute(FakeWork()) == 0
    with pytest.raises(RunError, match='payload: run has "full", asked "reduced"'):
        Driver(replace(job, settings={"payload": "reduced"}))
    with pytest.raises(RunError, match="is no name for a run"):
        Driver(replace(job, run="../up"))


@pytest.mark.parametrize("changes", [{"image": "/other/f0.png"}, {"speed_mps": 2.0}])
def test_other_inputs_under_the_same_ids_are_refused(job: Job, changes: dict[str, Any]) -> None:
    assert Driver(job).execute(FakeWork()) == 0
    before = run_json(job)
    other = [replace(f, **changes) if f.stem == "f0" else f for f in frames(7)]
    with pytest.raises(RunError, match=r"holds s/f0 computed from /images/f0.png at 1.0 m/s, which is now"):
        Driver(replace(job, frames=other)).execute(FakeWork())
    assert run_json(job) == before


def test_leftovers_of_killed_writers_are_removed(job: Job) -> None:
    run = Path(job.output_dir, job.run)
    left = [".f0_action.pt.1-00000000ffffffff.tmp", ".x.parquet.1-00000000ffffffff.tmp"]

    def litter() -> None:
        scene = run / run_json(job)["scene_dirs"]["s/action"]
        scene.mkdir(exist_ok=True)
        (scene / left[0]).touch()
        (run / "ledger" / left[1]).touch()

    assert Driver(job).execute(FakeWork(after=1, then=litter)) == 0
    assert not list(run.rglob(".*.tmp"))


def test_a_dry_run_writes_nothing(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert Driver(job).report_dry_run(["a fact"]) == 0
    assert not Path(job.output_dir, job.run).exists()
    out = capsys.readouterr().out
    assert "6 frames in 1 scenes, targets: a" in out
    assert "0 rows are done, 6 are to do" in out
    assert "a fact" in out
    Driver(replace(job, frames=frames(2))).execute(FakeWork())
    Driver(job).report_dry_run([])
    assert "2 rows are done, 4 are to do" in capsys.readouterr().out


def test_every_and_limit() -> None:
    many = [FrameRef(f"{s}/{i}", s, str(i), "", 0.0) for s in "ab" for i in range(5)]
    assert [f.frame_id for f in select(many, 2, None)] == ["a/0", "a/2", "a/4", "b/0", "b/2", "b/4"]
    assert [f.frame_id for f in select(many, 3, 3)] == ["a/0", "a/3", "b/0"]


def test_items_group_frames_that_lack_the_same(job: Job) -> None:
    Driver(replace(job, frames=frames(3))).execute(FakeWork())
    work = FakeWork()
    Driver(replace(job, targets=["a", "b"])).execute(work)
    items = [([f.ref.stem for f in item.frames], item.targets) for item in work.todos[0].items(2)]
    assert items == [(["f0", "f1"], ("b",)), (["f2"], ("b",)), (["f3", "f4"], ("a", "b")), (["f5"], ("a", "b"))]


# Tracking ------------------------------------------------------------------------------------------------------


class RecordingTracker(Tracker):
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.ended: list[Any] = []

    def log(self, values: Any) -> None:
        self.logged.append(dict(values))

    def summarise(self, values: Any) -> None:
        self.summary = dict(values)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.ended.append(kind)


def test_the_tracker_hears_progress_and_the_end(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, given, identities = RecordingTracker(), {}, []

    def make(settings: WandbConfig, run: str, identity: str, config: Any, directory: Path) -> RecordingTracker:
        given.update(run=run, directory=directory, **config)
        identities.append(identity)
        return tracker

    monkeypatch.setattr(driver_module, "make_tracker", make)
    monkeypatch.setattr(driver_module, "FOLD_ROWS", 4)
    assert Driver(job).execute(FakeWork(bad=["f5"])) == 1
    assert given["run"] == "r"
    assert given["targets"] == ["a"]
    assert Path(given["directory"]) == Path(job.output_dir, "r")
    assert [(v["rows"], v["failed"]) for v in tracker.logged] == [(4, 0)]
    assert (tracker.summary["ok"], tracker.summary["failed"], tracker.summary["exit_code"]) == (5, 1, 1)
    assert Driver(replace(job, frames=frames(9))).execute(FakeWork(after=1, then=KeyboardInterrupt())) == 130
    assert tracker.ended == [None, KeyboardInterrupt], "it ends with the run, however that ends"
    assert identities[0] == identities[1], "one run directory, one run there"


def test_no_tracking_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # importing it would fail
    tracker = make_tracker(WandbConfig(), "r", "id", {}, tmp_path / "none")
    with tracker:
        tracker.log({"rows": 1})
        tracker.summarise({})
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match=r"wandb\.mode='onlin' is unknown.*Did you mean 'online'"):
        WandbConfig(mode="onlin")
