"""One driver per run: who is refused, who takes over, and who notices."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vla_ray.errors import RunError, StorageError
from vla_ray.storage import lease as lease_module
from vla_ray.storage.files import Location, write_json
from vla_ray.storage.lease import Holder, Lease, this_host

DRIVER = """
import sys
from vla_ray.storage.files import Location
from vla_ray.storage.lease import Lease
lease = Lease.acquire(Location.of(sys.argv[1]), command="python jobs/capture.py")
print(lease.token, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Location:
    return Location.of(tmp_path) / "run"


def read(run_dir: Location) -> Holder:
    return Holder(**json.loads((run_dir / "lease.json").read_bytes()))


@contextmanager
def other_driver(run_dir: Location) -> Iterator[subprocess.Popen[str]]:
    """A living driver in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert len(process.stdout.readline().strip()) == 16
        yield process
    finally:
        process.kill()
        process.communicate()


def elsewhere(run_dir: Location, age: float) -> None:
    """A holder on another machine whose heartbeat is `age` seconds old."""
    now = time.time()
    write_json(
        run_dir / "lease.json", asdict(Holder("other", "node7/boot/1", 1, 0.0, now - 900, now - age, "capture scene"))
    )


def test_acquire_and_release(run_dir: Location) -> None:
    with Lease.acquire(run_dir, command="job") as lease:
        holder = read(run_dir)
        assert (holder.token, holder.pid, holder.host, holder.command) == (lease.token, os.getpid(), this_host(), "job")
        lease.check()
        assert [e.name for e in run_dir.list()] == ["lease.json"]
    assert run_dir.list() == []
    assert "vla_ray-lease" not in {thread.name for thread in threading.enumerate()}


def test_a_second_driver_is_refused_and_told_who_holds_the_run(run_dir: Location) -> None:
    with Lease.acquire(run_dir, command="python jobs/capture.py run=a"):
        with pytest.raises(RunError) as error:
            Lease.acquire(run_dir, command="again")
        for fact in (f"pid {os.getpid()}", "since 20", "last heartbeat 0 s ago", "run=a", "another run=NAME"):
            assert fact in str(error.value)
    Lease.acquire(run_dir, command="after release").release()


def test_a_killed_driver_is_replaced_at_once_and_a_stopped_one_is_not(
    run_dir: Location, caplog: pytest.LogCaptureFixture
) -> None:
    with other_driver(run_dir) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(RunError, match=f"pid {process.pid}"):
            Lease.acquire(run_dir, command="second")
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the process table
        with caplog.at_level(logging.INFO), Lease.acquire(run_dir, command="second") as lease:
            assert read(run_dir).token == lease.token
    assert "Taking over" in caplog.text


def test_a_reused_pid_is_not_the_holder(run_dir: Location) -> None:
    with Lease.acquire(run_dir, command="x"):
        holder = read(run_dir)
    write_json(run_dir / "lease.json", asdict(replace(holder, process_start=holder.process_start - 3600)))
    Lease.acquire(run_dir, command="y").release()


def test_a_holder_elsewhere_is_judged_by_its_heartbeat(run_dir: Location) -> None:
    elsewhere(run_dir, age=50)
    with pytest.raises(RunError, match=r"host node7, pid 1.*last heartbeat 50 s ago.*free 60 s after"):
        Lease.acquire(run_dir, command="x")
    elsewhere(run_dir, age=61)
    Lease.acquire(run_dir, command="x").release()


def test_a_driver_notices_that_it_lost_the_run_and_does_not_steal_it_back(run_dir: Location) -> None:
    with Lease.acquire(run_dir, command="x") as lease:
        elsewhere(run_dir, age=0)
        for call in (lease.check, lease.beat):
            with pytest.raises(RunError, match=r"taken over by another driver \(host node7"):
                call()
    assert read(run_dir).token == "other"  # release left it alone


def test_a_deleted_run_is_lost_and_not_made_again(run_dir: Location) -> None:
    with Lease.acquire(run_dir, command="x") as lease:
        (run_dir / "lease.json").delete()
        run_dir.local_path.rmdir()
        with pytest.raises(RunError, match="is gone"):
            lease.beat()
    assert not run_dir.exists()


def test_the_heartbeat_thread_renews_and_survives_a_full_disk(
    run_dir: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beats: list[float] = []
    renewed = threading.Event()

    def flaky_write(loc: Location, value: dict[str, float]) -> int:
        beats.append(value["heartbeat"])
        if len(beats) == 2:
            raise StorageError("Cannot write lease.json: no space left on device.")
        if len(beats) == 4:
            renewed.set()
        return write_json(loc, value)

    monkeypatch.setattr(lease_module, "write_json", flaky_write)
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    with Lease.acquire(run_dir, command="x"):
        assert renewed.wait(10)
        assert read(run_dir).heartbeat > beats[0]
    assert beats == sorted(beats)
    assert "no space left" in caplog.text


def test_two_drivers_that_find_the_same_dead_holder_do_not_both_replace_it(
    run_dir: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(run_dir, age=1000)
    refused: list[str] = []

    def write_while_another_starts(loc: Location, value: object) -> int:
        monkeypatch.undo()
        with pytest.raises(RunError) as error:
            Lease.acquire(run_dir, command="second")
        refused.append(str(error.value))
        return write_json(loc, value)

    monkeypatch.setattr(lease_module, "write_json", write_while_another_starts)
    with Lease.acquire(run_dir, command="first") as lease:
        lease.check()
        assert read(run_dir).command == "first"
    assert "just starting" in refused[0]


def test_a_damaged_lease_is_never_ignored(run_dir: Location) -> None:
    for damaged in (b"", b"{}", b"[1]"):
        (run_dir.local_path).mkdir(exist_ok=True)
        (run_dir.local_path / "lease.json").write_bytes(damaged)
        with pytest.raises(RunError, match=r"lease\.json is damaged"):
            Lease.acquire(run_dir, command="x")


def test_a_place_that_cannot_hold_a_run() -> None:
    with pytest.raises(StorageError, match="Cannot create the directory /dev/null/run"):
        Lease.acquire(Location.of("/dev/null/run"), command="x")
