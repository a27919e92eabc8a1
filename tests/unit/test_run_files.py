"""Checkpoint directories are whole or absent, whatever died while one was written, and wherever the disk ended."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vla_ray.errors import CheckpointError, StorageError
from vla_ray.training.checkpoints import RunFiles


def write(value: str) -> Callable[[Path], None]:
    return lambda directory: (directory / "model").write_text(value) and None


def save(files: RunFiles, step: int, best: int | None) -> None:
    state = {"step": step, "best": None if best is None else {"step": best, "loss": 1.0}}
    files.save_last(write(f"of step {step}"), state)


def hidden(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob(".*"))


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may be larger than 50 kB; the system says so like a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    files, large = RunFiles(tmp_path), torch.zeros(100_000)
    save(files, 1, None)
    with pytest.raises(StorageError, match=r"Cannot write .*last: the disk may be full"):
        files.save_last(write("of step 2"), {"step": 2, "best": None, "optimizer": large})
    with pytest.raises(StorageError, match=r"Cannot write .*last: the disk may be full"):
        files.save_last(lambda d: save_file({"w": large}, d / "model.safetensors"), {"step": 2, "best": None})
    with pytest.raises(StorageError, match=r"Cannot write .*last: file too large"):
        files.save_last(lambda d: (d / "model").write_text("x" * 60_000) and None, {"step": 2, "best": None})
    assert files.load_state()["step"] == 1
    assert (files.last / "model").read_text() == "of step 1"
    files.recover()
    assert hidden(tmp_path) == []


def test_leftovers_of_a_crash_go(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    save(files, 1, None)
    for name in (".last.old", ".last.new", ".best_model.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    files.recover()
    assert hidden(tmp_path) == []
    assert files.load_state()["step"] == 1


def test_the_older_checkpoint_comes_back_after_a_crash_between_two_renames(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    save(files, 1, None)
    files.last.rename(tmp_path / ".last.old")
    (tmp_path / ".last.new").mkdir()
    files.recover()
    assert files.load_state()["step"] == 1
    assert hidden(tmp_path) == []


def test_a_crash_between_last_and_best_loses_no_best(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    save(files, 1, 1)
    files.copy_last_to_best()
    save(files, 2, 2)  # and then it died
    assert (files.best / "model").read_text() == "of step 1"
    files.recover()
    assert (files.best / "model").read_text() == "of step 2"
    save(files, 3, 2)
    files.recover()
    assert (files.best / "model").read_text() == "of step 2"
    assert not (files.best / "training_state.pt").exists()


def test_a_damaged_state_is_no_reason_to_touch_anything(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    save(files, 1, 1)
    (files.last / "training_state.pt").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"training_state\.pt cannot be read"):
        files.recover()
    assert (files.last / "model").read_text() == "of step 1"
