"""Jobs as a user runs them: `python jobs/<job>.py key=value ...`, in a process of their own or, quicker, in this."""

from __future__ import annotations

import logging
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

JOB_SECONDS = 150


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    code: int
    out: str
    err: str

    def refused(self, name: str) -> str:
        """The one line of an expected error: exit code 2, nothing on stdout, and beside it nothing but log lines."""
        assert self.code == 2, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if not line[:2].isdigit()]  # log lines begin with a time
        assert len(lines) == 1, self.err
        assert lines[0].startswith(f"{name}: ")
        return lines[0]


@pytest.fixture
def process(repo: Path) -> Iterator[Callable[..., Ended]]:
    """Run a job by subprocess from the repository's root."""
    temp = Path(f"/tmp/ve{os.getpid()}")  # Ray's sockets need a short path

    def run(job: str, *overrides: str, seconds: int = JOB_SECONDS) -> Ended:
        environment = {**os.environ, "RAY_TMPDIR": str(temp), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, f"jobs/{job}.py", *overrides]
        done = subprocess.run(
            command, cwd=repo, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    yield run
    shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture
def here(
    repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Ended]]:
    """Run a job in this process, for what ends before Ray is needed; touching Ray is an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("this must be refused before Ray starts")

    monkeypatch.setattr("vla_ray.pipelines.model_work.connect", refuse)
    handlers, level = logging.root.handlers[:], logging.root.level

    def run(job: str, *overrides: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *overrides])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(repo / f"jobs/{job}.py"), run_name="__main__")
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    yield run
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
