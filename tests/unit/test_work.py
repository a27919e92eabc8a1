"""The protocol around a batch: committed once, found again after a death, poison frames isolated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from vla_ray.data.scenes import FrameRef
from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import StorageError
from vla_ray.schema import FAILED, OK
from vla_ray.stages.decode import pack, unpack
from vla_ray.stages.work import Loaded, Row, Worker, WorkFrame, WorkItem
from vla_ray.storage.attempts import Prior, clear_in_flight, consolidate
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import Ledger, read_metrics

GEOMETRY = TileGeometry(8, 8, 8, 4, 4, ((0, 0, 4, 4),), False)
TARGETS = ("curv_energy", "acc_energy")


class Death(BaseException):
    """Stands for SIGKILL: nothing catches it and nothing is cleaned up."""


class FakeReplica:
    """Dies on, or raises for, the frames it is told to."""

    def __init__(self, kills: Sequence[str] = (), raises: Sequence[str] = ()) -> None:
        self.kills, self.raises, self.calls = set(kills), set(raises), []

    def process(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        ids = [f.frame.ref.frame_id for f in frames]
        self.calls.append(ids)
        if self.kills & set(ids):
            raise Death
        if self.raises & set(ids):
            raise ValueError("bad\nframe")
        return [{"frame_id": i, "target": t, "status": OK} for i in ids for t in targets]

    def failed(self, frame: Loaded, target: str, error_type: str, error: str) -> Row:
        ref = frame.frame.ref
        return {"frame_id": ref.frame_id, "target": target, "status": FAILED, "error_type": error_type, "error": error}


def frame(stem: str, prior: Prior | None = None) -> WorkFrame:
    ref = FrameRef(f"s/{stem}", "s", stem, f"/images/{stem}.png", 1.0)
    return WorkFrame(ref, "s_action", prior) if prior else WorkFrame(ref, "s_action")


def item(*stems: str) -> WorkItem:
    return WorkItem(tuple(frame(s) for s in stems), TARGETS)


def loaded(work: WorkItem, bad: str | None = None) -> list[Loaded]:
    return [
        Loaded(f, error_type="ImageError", error="broken")
        if f.ref.stem == bad
        else Loaded(f, np.zeros((1, 4, 4, 3), np.uint8), GEOMETRY)
        for f in work.frames
    ]


@pytest.fixture
def run_dir(tmp_path: Path) -> Location:
    return Location.of(tmp_path / "run")


def rows(run_dir: Location) -> dict[tuple[str, str], tuple[str, str | None, int]]:
    table = read_metrics(run_dir, ["frame_id", "target", "status", "error_type", "attempt"])
    return {(r["frame_id"], r["target"]): (r["status"], r["error_type"], r["attempt"]) for r in table.to_pylist()}


def attempts_left(run_dir: Location) -> list[str]:
    return [e.name for e in (run_dir / "attempts").list()]


def test_a_batch_is_committed_once(run_dir: Location) -> None:
    replica, work = FakeReplica(), item("a", "b")
    summary = Worker(replica, run_dir, "driver")(work, loaded(work))
    assert summary.statuses == {OK: 4}
    again = Worker(replica, run_dir, "driver")(work, loaded(work))  # Ray gives a task to a new actor
    assert again == summary
    assert replica.calls == [["s/a", "s/b"]]
    assert len(rows(run_dir)) == 4
    assert attempts_left(run_dir) == []


def test_undecodable_and_raising_frames_fail_alone(run_dir: Location) -> None:
    work = item("a", "b", "c", "d")
    replica = FakeReplica(raises=["s/c"])
    summary = Worker(replica, run_dir, "driver")(work, loaded(work, bad="b"))
    assert summary.statuses == {OK: 4, FAILED: 4}
    result = rows(run_dir)
    assert result["s/b", "curv_energy"][:2] == (FAILED, "ImageError")
    assert result["s/c", "acc_energy"][:2] == (FAILED, "ValueError")
    assert result["s/d", "acc_energy"][:2] == (OK, None)
    errors = read_metrics(run_dir, ["error"])["error"].to_pylist()
    assert "bad frame" in errors, "reasons are one line"


def test_storage_errors_stop_the_run_and_commit_nothing(run_dir: Location) -> None:
    class Full(FakeReplica):
        def process(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
            raise StorageError("no space left")

    work = item("a", "b")
    with pytest.raises(StorageError):
        Worker(Full(), run_dir, "driver")(work, loaded(work))
    assert rows(run_dir) == {}


def test_a_poison_frame_becomes_a_failed_row_on_the_fourth_start(run_dir: Location) -> None:
    work = item("a", "poison", "c")
    replica = FakeReplica(kills=["s/poison"])
    for _ in range(3):
        with pytest.raises(Death):
            Worker(replica, run_dir, "driver")(work, loaded(work))
    summary = Worker(replica, run_dir, "driver")(work, loaded(work))
    assert summary.statuses == {OK: 4, FAILED: 2}
    assert replica.calls == [["s/a", "s/poison", "s/c"]] * 2 + [["s/a"], ["s/poison"], ["s/c"]]
    result = rows(run_dir)
    assert len(result) == 6
    assert result["s/poison", "curv_energy"][:2] == (FAILED, "WorkerDied")
    assert result["s/c", "curv_energy"] == (OK, None, 4)
    assert attempts_left(run_dir) == []
    counts = Ledger(run_dir).load().counts
    assert (counts[OK], counts[FAILED]) == (4, 2)


def test_a_poison_frame_alone_in_its_batch(run_dir: Location) -> None:
    work = item("poison")
    replica = FakeReplica(kills=["s/poison"])
    for _ in range(3):
        with pytest.raises(Death):
            Worker(replica, run_dir, "driver")(work, loaded(work))
    assert Worker(replica, run_dir, "driver")(work, loaded(work)).statuses == {FAILED: 2}
    assert len(replica.calls) == 3


def test_one_death_under_an_earlier_driver_is_no_proof(run_dir: Location) -> None:
    """Drivers are killed too; a frame that was running then is not to blame."""
    work, replica = item("a"), FakeReplica(kills=["s/a"])
    for _ in range(3):
        with pytest.raises(Death):
            Worker(replica, run_dir, "first")(work, loaded(work))
    prior = consolidate(run_dir)["s/a"]
    assert prior == Prior(starts=4, solo=1)
    replica.kills.clear()  # it was the driver's death, not the frame
    resumed = WorkItem((frame("a", prior),), TARGETS)
    assert Worker(replica, run_dir, "second")(resumed, loaded(resumed)).statuses == {OK: 2}


def test_two_deaths_alone_under_earlier_drivers_are(run_dir: Location) -> None:
    work = WorkItem((frame("a", Prior(starts=6, solo=2)),), TARGETS)
    replica = FakeReplica(kills=["s/a"])
    assert Worker(replica, run_dir, "third")(work, loaded(work)).statuses == {FAILED: 2}
    assert replica.calls == []


def test_a_clean_stop_is_no_evidence(run_dir: Location) -> None:
    work, replica = item("a", "b"), FakeReplica(kills=["s/a"])
    with pytest.raises(Death):
        Worker(replica, run_dir, "driver")(work, loaded(work))
    clear_in_flight(run_dir, "driver")
    assert consolidate(run_dir) == {}


def test_items_travel_as_text() -> None:
    work = WorkItem(
        (WorkFrame(FrameRef("s/a", "s", "a", "/a.png", 3.5, ((1.0, 2.0), (3.0, 4.0)), "Why?"), "d", Prior(2, 1)),),
        TARGETS,
    )
    assert WorkItem.from_json(work.to_json()) == work


def test_pack_and_unpack() -> None:
    work = item("a", "b", "c")
    before = loaded(work, bad="b")
    notes, tiles = pack(before, tile_size=4)
    after = unpack(work, notes, tiles)
    assert tiles.shape == (2, 4, 4, 3)
    for x, y in zip(before, after, strict=True):
        assert (x.error_type, x.geometry) == (y.error_type, y.geometry)
        assert x.tiles is y.tiles is None or np.array_equal(x.tiles, y.tiles)
    assert pack([before[1]], tile_size=4)[1].shape == (0, 4, 4, 3)
