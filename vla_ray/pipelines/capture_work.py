"""A capture's work: payloads by replicas on Ray, and how large they get.

Importing this loads transformers and Ray (seconds), so capture.py does it only when there is work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from functools import partial

import torch

from vla_ray.config import CaptureConfig
from vla_ray.errors import StorageError
from vla_ray.explain.methods import Method, folds_of
from vla_ray.pipelines.driver import Todo
from vla_ray.pipelines.model_work import ModelWork
from vla_ray.stages.capture import CaptureReplica, CaptureSpec
from vla_ray.stages.fitting import DTYPES
from vla_ray.stages.payloads import estimate_bytes
from vla_ray.stages.replica import ModelSpec
from vla_ray.stages.work import Summary
from vla_ray.storage.files import Location, free_bytes
from vla_ray.targets import Spline, Target


class CaptureWork:
    """Called with what is to do, yields summaries. CheckpointError: the model does not fit its configuration."""

    def __init__(self, config: CaptureConfig, targets: Sequence[Target], methods: Sequence[Method]) -> None:
        self.config, self.targets, self.folds = config, tuple(targets), folds_of(methods)
        self.work = ModelWork(config)

    def __call__(self, todo: Todo) -> Generator[Summary, None, None]:
        def make_replica(model: ModelSpec) -> partial[CaptureReplica]:
            spec = CaptureSpec(
                run_dir=todo.location,
                payload=self.config.payload,
                folds=self.folds,
                payload_dtype=self._payload_dtype(model.device),
                targets=self.targets,
                several_targets=todo.several_targets,
                spline=Spline(**dataclasses.asdict(self.config.spline)),
            )
            return partial(CaptureReplica, spec, model)

        return self.work.run(todo, "SimLingoCapture", self._frame_bytes, make_replica)

    def _frame_bytes(self, dtype: str) -> float:
        full = float(estimate_bytes("full", self.work.model, DTYPES[dtype]))
        # Probabilities and gradients as in a full payload, and as much again in other activations; or only these.
        return 0.5 * full if self.config.payload == "relevance" else 2.0 * full

    def facts(self, location: Location, num_frames: int) -> list[str]:
        """For a dry run: model, size and free space."""
        size, free = self._payload_bytes(), free_bytes(location)
        room = "" if free is None else f"; {_size(free)} are free"
        return [
            f"model: {self.config.model.checkpoint} ({self.work.parameters / 1e6:,.1f} M parameters)",
            f"payload={self.config.payload}: about {_size(size)} per frame and target, "
            f"{_size(size * num_frames * len(self.targets))} in all{room}",
        ]

    def check_disk(self, location: Location, num_frames: int) -> None:
        """Refuse a run that the disk cannot hold, counting frames that are done already as done."""
        free = free_bytes(location)
        if free is None:
            return
        written = sum(e.size for d in location.list() if d.is_dir for e in (location / d.name).list())
        needed = self._payload_bytes() * num_frames * len(self.targets) - written
        if needed > free:
            raise StorageError(
                f"payload={self.config.payload} of {num_frames:,} frames needs about {_size(needed)} more, "
                f"{location} has {_size(free)} free. Use payload=relevance, limit=N, every=N or another disk."
            )

    def _payload_bytes(self) -> int:
        device = self.config.model.device
        if device == "auto":  # not asked of Ray yet: this machine's GPU is the best guess
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = DTYPES[self._payload_dtype(device)]
        return estimate_bytes(self.config.payload, self.work.model, dtype, len(self.folds))

    def _payload_dtype(self, device: str) -> str:
        return self.work.dtype(device) if self.config.payload_dtype == "auto" else self.config.payload_dtype


def _size(count: float) -> str:
    """Bytes as people read them: 1.3 MB, 3.8 GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
