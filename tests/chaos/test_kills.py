"""Whatever is killed, and when: every frame exactly once, every payload whole, nothing left behind."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from typing import Any

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

POISON, POISON_PICTURE = "a/frame_0011", "b/frame_0044"


def test_processes_die_at_every_point_of_a_batch(run: Any) -> None:
    """While decoding, before a batch, half way through a payload, with payloads but no rows, and with rows the driver
    does not know of."""
    victims = {
        "decode": "a/frame_0041",
        "process": "a/frame_0003",
        "writing": "a/frame_0022",
        "processed": "b/frame_0007",
        "committed": "b/frame_0030",
    }
    job = run.start(kill_once=victims)
    assert job.wait() == 0, job.err.read_text()
    assert sorted(p.name for p in run.faults.parent.glob("killed-*")) == sorted(f"killed-{p}" for p in victims)
    rows = run.verify()
    assert {point: rows[frame]["attempt"] for point, frame in victims.items()} == {
        "decode": 1,
        "process": 2,
        "writing": 2,
        "processed": 2,
        "committed": 1,
    }


def test_frames_that_always_kill_their_process_fail_alone(run: Any) -> None:
    """One in the model's process, one in a decoder's."""
    job = run.start(kill_always=[POISON], kill_decode=[POISON_PICTURE])
    assert job.wait() == 0, job.err.read_text()
    rows = run.verify(failed=[POISON, POISON_PICTURE])
    assert {rows[frame]["error_type"] for frame in (POISON, POISON_PICTURE)} == {"WorkerDied"}
    assert "decoded" in rows[POISON_PICTURE]["error"]
    assert "100 rows" in job.out.read_text()
    assert "failed   2 rows; the first: " in job.out.read_text()
    # Done again without the poison.
    again = run.start("retry_failed=true")
    assert again.wait() == 0, again.err.read_text()
    assert "2 rows to do, 98 done before" in again.err.read_text()
    run.verify()


def test_a_killed_driver_is_replaced(run: Any) -> None:
    job = run.start(delay_s=0.3)
    job.until(lambda: run.committed() >= 5)
    job.signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert run.document["status"] == "running"
    assert (run.path / "lease.json").exists()
    before = set(run.rows())
    assert 20 <= len(before) < 100
    again = run.start()  # at once, while processes of the dead driver's Ray may still write
    assert again.wait() == 0, again.err.read_text()
    assert "Taking over" in again.err.read_text()
    end = time.monotonic() + 60
    while job.ray_processes() and time.monotonic() < end:
        time.sleep(0.2)
    assert job.ray_processes() == [], "a killed driver's local Ray ends by itself"
    rows = run.verify()
    assert {rows[frame]["attempt"] for frame in before} == {1}


@pytest.mark.parametrize("moment", ["while Ray starts", "at work"])
def test_sigterm_stops_and_says_how_to_go_on(run: Any, moment: str) -> None:
    job = run.start(delay_s=0.3)
    if moment == "while Ray starts":
        job.until(lambda: bool(job.ray_processes()))  # the first of them: in the midst of ray.init
    else:
        job.until(lambda: run.committed() >= 5)
    job.signal(signal.SIGTERM)
    assert job.wait() == 143, job.err.read_text()
    errors = job.err.read_text()
    assert "Traceback" not in errors
    assert run.document["status"] == "stopped"
    assert list(run.path.glob("attempts/*")) == []
    assert list(run.path.glob("lease*")) == []
    (command,) = (line.partition("to go on: ")[2] for line in errors.splitlines() if "to go on: " in line)
    program, *arguments = shlex.split(command)
    assert program == "python"
    again = run.start_command([sys.executable, *arguments])
    assert again.wait() == 0, again.err.read_text()
    rows = run.verify()
    assert {row["attempt"] for row in rows.values()} == {1}, "a clean stop is held against nobody"


def test_ray_itself_dies(run: Any) -> None:
    """Ray ends the driver's process without asking it; nothing of ours can be printed, and nothing is lost."""
    job = run.start(delay_s=0.3)
    job.until(lambda: run.committed() >= 5)
    raylets = [process for process in job.ray_processes() if process.name() == "raylet"]
    assert raylets
    for process in raylets:
        process.kill()
    assert job.wait() == 1
    assert run.start().wait() == 0
    run.verify()


def test_everything_at_once(run: Any) -> None:
    """One replica killed, one poison frame, the run interrupted by Ctrl-C, and then by SIGKILL: every frame once."""
    faults = {"kill_always": [POISON], "kill_once": {"processed": "b/frame_0020"}, "delay_s": 0.1}
    job = run.start(**faults)
    job.until(lambda: run.committed() >= 8)
    job.signal(signal.SIGINT, group=True)
    assert job.wait() == 130, job.err.read_text()
    assert "to go on: python jobs/capture.py" in job.err.read_text()
    job = run.start(**faults)
    done = len(run.rows())
    job.until(lambda: len(run.rows()) >= done + 8)
    job.signal(signal.SIGKILL)
    job.wait()
    job = run.start(**faults)
    assert job.wait() == 0, job.err.read_text()
    rows = run.verify(failed=[POISON])
    assert rows[POISON]["error_type"] == "WorkerDied"
    assert (run.faults.parent / "killed-processed").exists()
    # Finished: nothing starts, and nothing changes.
    document = run.document
    started = time.monotonic()
    job = run.start(**faults)
    assert job.wait() == 0
    assert "nothing to do" in job.err.read_text()
    assert not job.temp.exists(), "no Ray was started"
    assert run.document == document
    assert time.monotonic() - started < 20
