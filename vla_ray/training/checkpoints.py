"""Where a training run keeps what it has learnt: `last/`, `best_model/`, and its logs.

A checkpoint directory is whole or absent: written beside its place and renamed. It holds the model as transformers
saves it, so `PaliGemmaForConditionalGeneration.from_pretrained` reads it, its processor and `tokenizers.pt`; `last/`
also holds `training_state.pt`, with which training goes on exactly where it was.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vla_ray.errors import CheckpointError
from vla_ray.storage.files import Location, write_atomic
from vla_ray.storage.location import make_directory, storage_errors, sync_directory

STATE = "training_state.pt"
_FORMAT = "vla_ray.training_state.1"


class RunFiles:
    """The files of one run below its directory, on a disk that all workers see."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.last, self.best = directory / "last", directory / "best_model"
        self.initial, self.merged = directory / "initial", directory / "merged"
        self.log, self.examples = directory / "logs" / "train.jsonl", directory / "logs" / "examples.jsonl"

    def recover(self) -> None:
        """After a crash: between two renames the older directory is still whole; what is left over goes.

        Raises:
            CheckpointError: see `load_state`.
        """
        for final in (self.last, self.best):
            old = _old(final)
            if not final.exists() and old.exists():
                old.rename(final)
            for leftover in (old, _new(final)):
                shutil.rmtree(leftover, ignore_errors=True)
        if self.last.exists():
            state = self.load_state()
            if state["best"] and state["best"]["step"] == state["step"]:
                self.copy_last_to_best()  # the death may have come just before

    def save_last(self, write_model: Callable[[Path], None], state: Mapping[str, Any]) -> None:
        """Replace `last/`. `write_model` fills the directory that it is given."""

        def write(directory: Path) -> None:
            write_model(directory)
            torch.save({"format": _FORMAT, **state}, directory / STATE)

        self._replace(self.last, write)

    def copy_last_to_best(self) -> None:
        """`last/` without its training state becomes `best_model/`; files are linked where the disk can."""

        def write(directory: Path) -> None:
            for file in sorted(self.last.iterdir()):
                if file.name != STATE:
                    try:
                        (directory / file.name).hardlink_to(file)
                    except OSError:
                        shutil.copy2(file, directory / file.name)

        self._replace(self.best, write)

    def save_merged(self, write_model: Callable[[Path], None]) -> None:
        """Replace `merged/`."""
        self._replace(self.merged, write_model)

    def load_state(self) -> dict[str, Any]:
        """What `save_last` was given. CheckpointError if it is damaged."""
        path = self.last / STATE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # torch raises a dozen kinds for a file that is not what it should be
            raise CheckpointError(
                f"{path} cannot be read ({' '.join(str(e).split())[:160]}). Delete {self.last} to start again from the "
                "beginning, or restore it."
            ) from e
        if state.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is of the format {state.get('format')!r}, this version reads {_FORMAT!r}.")
        return state

    def cut_logs(self, step: int) -> None:
        """Forget lines of steps after `step`: they are done again."""
        for path in (self.log, self.examples):
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
                write_atomic(Location.of(path), "".join(f"{line}\n" for line in kept).encode())

    def append_log(self, line: Mapping[str, Any]) -> None:
        _append(self.log, line)

    def append_examples(self, line: Mapping[str, Any]) -> None:
        _append(self.examples, line)

    def _replace(self, final: Path, write: Callable[[Path], None]) -> None:
        with storage_errors("write", Location.of(final)):
            new, old = _new(final), _old(final)
            shutil.rmtree(new, ignore_errors=True)
            make_directory(new)
            try:
                write(new)
            except (RuntimeError, SafetensorError) as e:  # how torch and safetensors say that the disk is full
                shutil.rmtree(new, ignore_errors=True)
                raise OSError(f"the disk may be full ({' '.join(str(e).split())[:160]})") from e
            for file in _files(new):
                file.chmod(0o644)  # safetensors writes 0600, which would hide results from colleagues
                _sync(file)
            sync_directory(new)
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
            new.rename(final)
            sync_directory(final.parent)
            shutil.rmtree(old, ignore_errors=True)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with storage_errors("write", Location.of(path)):
        make_directory(path.parent)
        with path.open("a") as file:  # one write call: a reader sees whole lines
            file.write(json.dumps(_finite(line)) + "\n")


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """NaN is no JSON: what is unknown is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def _step(line: str) -> float:
    """Of a log line; one that a crash cut short counts as late."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _new(final: Path) -> Path:
    return final.with_name(f".{final.name}.new")


def _files(directory: Path) -> Iterator[Path]:
    return (p for p in directory.rglob("*") if p.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
