"""The poison-frame protocol, played through with workers and drivers that die."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla_ray.storage import attempts as attempts_module
from vla_ray.storage.attempts import WHOLE_ATTEMPTS, Attempts, Prior, clear_in_flight, consolidate, forget
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import fragment_name

BATCH = fragment_name([("s/1", "a"), ("s/2", "a")])
ALONE = fragment_name([("s/1", "a")])


@pytest.fixture
def run_dir(tmp_path: Path) -> Location:
    return Location.of(tmp_path) / "run"


def markers(run_dir: Location) -> list[str]:
    return [entry.name for entry in (run_dir / "attempts").list()]


def test_starts_count_up_and_a_commit_forgets_them(run_dir: Location) -> None:
    attempts = Attempts(run_dir, "d1")
    assert [attempts.begin(BATCH, ["s/1", "s/2"], solo=False, prior=0) for _ in range(3)] == [1, 2, 3]
    assert attempts.begin(BATCH, ["s/1", "s/2"], solo=False, prior=5) == 9
    assert markers(run_dir) == [f"{BATCH}.{n}.d1.json" for n in (1, 2, 3, 4)]
    other = Attempts(run_dir, "d1")
    other.begin(ALONE, ["s/1"], solo=True, prior=0)
    attempts.finish(BATCH)
    assert markers(run_dir) == [f"{ALONE}.1.d1.json"]
    assert attempts.begin(BATCH, ["s/1", "s/2"], solo=False, prior=0) == 1
    attempts.finish("never begun")


def test_a_worker_gets_it_by_pickle(run_dir: Location) -> None:
    attempts = pickle.loads(pickle.dumps(Attempts(run_dir, "d1")))
    assert attempts.begin(BATCH, ["s/1"], solo=False, prior=0) == 1
    assert attempts.begin(BATCH, ["s/1"], solo=False, prior=0) == 2


def test_a_start_is_on_disk_before_it_returns(run_dir: Location) -> None:
    code = (
        "import os, signal, sys\n"
        "from vla_ray.storage.files import Location\n"
        "from vla_ray.storage.attempts import Attempts\n"
        f"Attempts(Location.of({str(run_dir)!r}), 'd1').begin({BATCH!r}, ['s/1', 's/2'], solo=False, prior=0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -signal.SIGKILL
    assert Attempts(run_dir, "d1").begin(BATCH, ["s/1", "s/2"], solo=False, prior=0) == 2
    content = json.loads((run_dir / "attempts" / f"{BATCH}.1.d1.json").read_bytes())
    assert (content["frames"], content["solo"]) == (["s/1", "s/2"], False)


def test_a_solo_death_under_this_driver_is_proof(run_dir: Location) -> None:
    attempts = Attempts(run_dir, "d1")
    attempts.begin(BATCH, ["s/1", "s/2"], solo=False, prior=0)
    attempts.begin(ALONE, ["s/1"], solo=True, prior=0)
    assert attempts.died_alone("s/1")
    assert not attempts.died_alone("s/2")  # only ever started with others
    assert not Attempts(run_dir, "d2").died_alone("s/1")  # d1 may have died itself
    attempts.finish(ALONE)
    assert not attempts.died_alone("s/1")


def test_a_solo_death_under_earlier_drivers_takes_two(run_dir: Location) -> None:
    verdicts = []
    for driver in ("d1", "d2", "d3"):
        prior = consolidate(run_dir).get("s/1", Prior())
        worker = Attempts(run_dir, driver)
        verdicts.append(worker.died_alone("s/1", prior))
        worker.begin(ALONE, ["s/1"], solo=True, prior=prior.starts)  # and the driver dies
    assert verdicts == [False, False, True]


def play(run_dir: Location, driver: str, frames: list[str], poison: str, starts: list[str]) -> dict[str, str]:
    """A worker whose process dies when it meets `poison`, started again and again, as Ray does."""
    priors = consolidate(run_dir)
    worker = Attempts(run_dir, driver)
    batch_id = fragment_name([(f, "a") for f in frames])
    outcome: dict[str, str] = {}
    for _ in range(10):
        known = [priors.get(f, Prior()) for f in frames]
        attempt = worker.begin(batch_id, frames, solo=False, prior=max(p.starts for p in known))
        if attempt <= WHOLE_ATTEMPTS:
            starts.append("whole")
            if poison in frames:
                continue
            outcome = dict.fromkeys(frames, "ok")
        else:
            for frame, prior in zip(frames, known, strict=True):
                if frame in outcome:
                    continue
                alone = fragment_name([(frame, "a")])
                if worker.died_alone(frame, prior):
                    outcome[frame] = "WorkerDied"
                else:
                    starts.append(frame)
                    worker.begin(alone, [frame], solo=True, prior=prior.starts)
                    if frame == poison:
                        break
                    outcome[frame] = "ok"
                worker.finish(alone)
            else:
                worker.finish(batch_id)
                return outcome
            continue
        worker.finish(batch_id)
        return outcome
    raise AssertionError(f"endless: {starts}")


@pytest.mark.parametrize("frames", [["s/1", "s/2", "s/3"], ["s/2"]])
def test_a_poison_frame_ends_as_a_failed_row_and_its_neighbours_live(run_dir: Location, frames: list[str]) -> None:
    starts: list[str] = []
    outcome = play(run_dir, "d1", frames, "s/2", starts)
    assert outcome == {f: "WorkerDied" if f == "s/2" else "ok" for f in frames}
    assert starts == ["whole", "whole", *frames]  # every frame alone once, the poison never again
    assert markers(run_dir) == []


def test_a_good_batch_costs_one_start(run_dir: Location) -> None:
    starts: list[str] = []
    assert play(run_dir, "d1", ["s/1", "s/2"], "none", starts) == {"s/1": "ok", "s/2": "ok"}
    assert starts == ["whole"]
    assert markers(run_dir) == []


def test_drivers_that_die_send_a_batch_to_frame_by_frame_but_condemn_nobody(run_dir: Location) -> None:
    for driver in ("d1", "d2"):
        prior = consolidate(run_dir).get("s/1", Prior()).starts
        Attempts(run_dir, driver).begin(BATCH, ["s/1", "s/2"], solo=False, prior=prior)
    starts: list[str] = []
    assert play(run_dir, "d3", ["s/1", "s/2"], "none", starts) == {"s/1": "ok", "s/2": "ok"}
    assert starts == ["s/1", "s/2"]


def leave_markers(run_dir: Location) -> None:
    worker = Attempts(run_dir, "d1")
    worker.begin(BATCH, ["s/1", "s/2"], solo=False, prior=0)
    worker.begin(BATCH, ["s/1", "s/2"], solo=False, prior=0)
    worker.begin(ALONE, ["s/1"], solo=True, prior=0)


COUNTED = {"s/1": Prior(3, 1), "s/2": Prior(2, 0)}


def test_consolidation_adds_up_over_drivers(run_dir: Location) -> None:
    assert consolidate(run_dir) == {}
    assert not run_dir.exists()
    leave_markers(run_dir)
    assert consolidate(run_dir) == COUNTED
    assert markers(run_dir) == ["prior.json"]
    assert consolidate(run_dir) == COUNTED
    Attempts(run_dir, "d2").begin(ALONE, ["s/1"], solo=True, prior=3)
    assert consolidate(run_dir) == {**COUNTED, "s/1": Prior(4, 2)}


class CrashError(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_crash_during_consolidation_counts_nothing_twice(
    run_dir: Location, monkeypatch: pytest.MonkeyPatch, call: int, after: bool
) -> None:
    leave_markers(run_dir)
    calls = 0

    def guarded(action: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call and not after:
                raise CrashError
            result = action(*args)
            if calls == call:
                raise CrashError
            return result

        return wrapper

    monkeypatch.setattr(attempts_module, "write_json", guarded(attempts_module.write_json))
    monkeypatch.setattr(Location, "delete", guarded(Location.delete))
    with pytest.raises(CrashError):
        consolidate(run_dir)  # one write, three deletions
    monkeypatch.undo()
    assert consolidate(run_dir) == COUNTED
    assert markers(run_dir) == ["prior.json"]


def test_a_clean_stop_leaves_no_evidence_of_this_driver(run_dir: Location) -> None:
    leave_markers(run_dir)
    Attempts(run_dir, "d2").begin(BATCH, ["s/1", "s/2"], solo=False, prior=0)
    clear_in_flight(run_dir, "d1")
    assert markers(run_dir) == [f"{BATCH}.1.d2.json"]
    clear_in_flight(run_dir, "d2")
    assert consolidate(run_dir) == {}


def test_retrying_failed_frames_starts_from_nothing(run_dir: Location) -> None:
    leave_markers(run_dir)
    consolidate(run_dir)
    leave_markers(run_dir)
    forget(run_dir)
    assert markers(run_dir) == []
    assert consolidate(run_dir) == {}


def test_temporary_files_of_dead_writers_are_no_markers(run_dir: Location) -> None:
    leave_markers(run_dir)
    (run_dir.local_path / "attempts" / f".{BATCH}.1.d1.json.1-0123456789abcdef.tmp").write_bytes(b"{")
    assert consolidate(run_dir) == COUNTED
    assert markers(run_dir) == ["prior.json"]
