"""Jobs in processes of their own, each with a Ray of its own, that tests may kill in every way."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from vla_ray.data.synthetic import write_scene
from vla_ray.storage import payload as payload_file
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import read_metrics

FAULTS = Path(__file__).resolve().parent.parent / "faults"
FRAMES = 50  # of each of the two scenes
TIMEOUT = 200


class Capture:
    """`python jobs/capture.py` in a process group of its own."""

    def __init__(self, repo: Path, command: Sequence[str], temp: Path, faults: Path) -> None:
        self.temp = temp
        environment = {
            **os.environ,
            "PYTHONPATH": str(FAULTS),
            "VLA_RAY_TEST_FAULTS": str(faults),
            "RAY_TMPDIR": str(temp),
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
        }
        # To files: pipes that Ray's processes inherit stay open after a killed driver.
        self.out, self.err = (faults.with_name(f"{temp.name}.{name}") for name in ("out", "err"))
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=repo, env=environment, stdout=out, stderr=err, start_new_session=True
            )

    def wait(self) -> int:
        return self.process.wait(TIMEOUT)

    def until(self, ready: Callable[[], bool]) -> None:
        """Wait for something while the job runs."""
        end = time.monotonic() + TIMEOUT
        while not ready():
            assert self.process.poll() is None, f"the job ended early:\n{self.err.read_text()}"
            assert time.monotonic() < end, f"waited too long:\n{self.err.read_text()}"
            time.sleep(0.05)

    def signal(self, number: int, group: bool = False) -> None:
        if group:
            os.killpg(self.process.pid, number)  # as a terminal does it for Ctrl-C
        else:
            self.process.send_signal(number)

    def ray_processes(self) -> list[psutil.Process]:
        """What still runs of this job's Ray: its processes know the temporary directory."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ", "status"]):
            command, environment = process.info["cmdline"] or [], process.info["environ"] or {}
            ours = any(f"{self.temp}/" in part for part in command) or environment.get("RAY_TMPDIR") == str(self.temp)
            if ours and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != self.process.pid:
                found.append(process)
        return found

    def end(self) -> None:
        """After a test: nothing of the job survives it."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()
        for process in self.ray_processes():
            process.kill()
        shutil.rmtree(self.temp, ignore_errors=True)


class Run:
    """One run directory and the jobs on it."""

    def __init__(self, repo: Path, scenes: Path, directory: Path) -> None:
        self.repo, self.scenes, self.directory = repo, scenes, directory
        self.faults, self.jobs = directory / "faults.json", []
        self.path = directory / "out" / "r"
        self.counter = itertools.count()

    def start(self, *overrides: str, **faults: Any) -> Capture:
        arguments = (
            f"scene_dir={self.scenes}",
            f"output_dir={self.directory / 'out'}",
            "run=r",
            "replicas=2",
            "batch_size=4",
        )
        return self.start_command([sys.executable, "jobs/capture.py", *arguments, *overrides], **faults)

    def start_command(self, command: Sequence[str], **faults: Any) -> Capture:
        self.faults.write_text(json.dumps(faults))
        temp = Path(f"/tmp/vc{os.getpid()}-{next(self.counter)}")  # Ray's sockets need a short path
        job = Capture(self.repo, command, temp, self.faults)
        self.jobs.append(job)
        return job

    @property
    def document(self) -> dict[str, Any]:
        return json.loads((self.path / "run.json").read_text())

    def committed(self) -> int:
        """Batches whose rows are durable: fragments wait in the ledger until rows are folded."""
        return len([p for p in self.path.glob("ledger/*.parquet") if not p.name.startswith(".")])

    def rows(self) -> dict[str, dict[str, Any]]:
        table = read_metrics(Location.of(self.path)).to_pylist()
        rows = {row["frame_id"]: row for row in table}
        assert len(rows) == len(table), "a frame has two rows"
        return rows

    def verify(self, failed: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """Every frame has exactly one row, every row's payload is whole, and nothing else is left. Returns the rows."""
        rows = self.rows()
        assert set(rows) == {f"{scene}/frame_{i:04d}" for scene in ("a", "b") for i in range(FRAMES)}
        assert {frame for frame, row in rows.items() if row["status"] == "failed"} == set(failed)
        paths = {row["payload_path"] for row in rows.values()} - {None}
        assert len(paths) == 2 * FRAMES - len(failed)
        assert paths == {str(p.relative_to(self.path)) for p in self.path.glob("*/*.pt")}
        for row in rows.values():
            if row["payload_path"]:
                content = payload_file.load(Location.of(self.path / row["payload_path"]), mmap=False)
                assert content["meta"]["frame_id"] == row["frame_id"]
                assert content["target_scalar"] == row["target_scalar"]
        left = [
            *self.path.rglob(".*"),
            *self.path.glob("ledger/*"),
            *self.path.glob("attempts/*"),
            *self.path.glob("lease*"),
        ]
        assert left == []
        assert self.document["status"] == "finished"
        counts = self.document["counts"]
        assert counts["failed"] == len(failed)
        assert counts["ok"] + counts["degenerate"] == 2 * FRAMES - len(failed)
        return rows


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of synthetic frames."""
    root = tmp_path_factory.mktemp("scenes")
    write_scene(root / "a", range(FRAMES), width=224)
    write_scene(root / "b", range(1000, 1000 + FRAMES), width=224)
    return root


@pytest.fixture
def run(repo: Path, scenes: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(repo, scenes, tmp_path)
    yield run
    for job in run.jobs:
        job.end()
