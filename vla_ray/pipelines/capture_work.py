"""A capture's work: from what is left of a run to summaries, by a plan of SimLingo replicas on Ray.

Importing this loads transformers and Ray (seconds), so capture.py does it only when there is work.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Generator, Sequence
from functools import partial

import torch

from vla_ray.cluster import connect
from vla_ray.config import CaptureConfig
from vla_ray.errors import StorageError
from vla_ray.models.simlingo.checkpoint import read_state, verify
from vla_ray.models.simlingo.config import read_config
from vla_ray.models.simlingo.processing import load_processor, make_tiler
from vla_ray.pipelines.driver import Todo
from vla_ray.pipelines.engine import run_items
from vla_ray.pipelines.resources import make_plan
from vla_ray.stages.capture import CaptureReplica, CaptureSpec
from vla_ray.stages.decode import Decoder
from vla_ray.stages.payloads import DTYPES, estimate_bytes
from vla_ray.stages.work import Summary
from vla_ray.storage.files import Location, free_bytes
from vla_ray.targets import Spline, Target

logger = logging.getLogger(__name__)


class CaptureWork:
    """Called with what is to do, yields summaries.

    Constructing it checks the checkpoint against its configuration, from the file's header alone.

    Raises:
        CheckpointError: they do not fit each other.
    """

    def __init__(self, config: CaptureConfig, targets: Sequence[Target]) -> None:
        self.config, self.targets = config, tuple(targets)
        self.spline = Spline(**dataclasses.asdict(config.spline))
        model = config.model
        shapes = {name: tuple(tensor.shape) for name, tensor in read_state(model.checkpoint).items()}
        self.model = read_config(str(model.config), model.variant_dir, shapes)
        self.parameters = verify(self.model, shapes, model.checkpoint)
        load_processor(self.model)  # a tokenizer that does not fit should not wait for Ray to say so

    def __call__(self, todo: Todo) -> Generator[Summary, None, None]:
        config = self.config
        with connect(config.cluster) as cluster:
            device = config.model.device
            if device == "auto":
                device = "cuda" if cluster.num_gpus >= 1 else "cpu"
            dtype = self._dtype(device)
            todo.pin("model.dtype", dtype)
            plan = make_plan(
                cluster,
                device,
                config.replicas,
                config.batch_size,
                model_bytes=self.parameters * DTYPES[dtype].itemsize,
                # Probabilities and gradients as in a full payload, and as much again in other activations.
                frame_bytes=2.0 * estimate_bytes("full", self.model, DTYPES[dtype]),
                gpus_per_replica=config.gpus_per_replica,
            )
            spec = CaptureSpec(
                run_dir=todo.location,
                model=self.model,
                checkpoint=config.model.checkpoint,
                device=device,
                dtype=dtype,
                payload=config.payload,
                payload_dtype=self._payload_dtype(device),
                targets=self.targets,
                several_targets=todo.several_targets,
                spline=self.spline,
                max_new_tokens=config.model.max_new_tokens,
                threads=plan.threads,
                gpu_share=min(1.0, config.gpus_per_replica),
            )
            logger.info("%s (%s)", plan, dtype)
            yield from run_items(
                todo.items(plan.batch_size),
                Decoder(make_tiler(self.model)),
                partial(CaptureReplica, spec),
                todo.location,
                todo.token,
                plan,
                "SimLingoCapture",
            )

    def facts(self, location: Location, num_frames: int) -> list[str]:
        """For a dry run: model, size and free space."""
        size, free = self._payload_bytes(), free_bytes(location)
        room = "" if free is None else f"; {_size(free)} are free"
        return [
            f"model: {self.config.model.checkpoint} ({self.parameters / 1e6:,.1f} M parameters)",
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
                f"{location} has {_size(free)} free. Use payload=reduced, limit=N, every=N or another disk."
            )

    def _payload_bytes(self) -> int:
        device = self.config.model.device
        if device == "auto":  # not asked of Ray yet: this machine's GPU is the best guess
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return estimate_bytes(self.config.payload, self.model, DTYPES[self._payload_dtype(device)])

    def _payload_dtype(self, device: str) -> str:
        return self._dtype(device) if self.config.payload_dtype == "auto" else self.config.payload_dtype

    def _dtype(self, device: str) -> str:
        if self.config.model.dtype != "auto":
            return self.config.model.dtype
        return "bfloat16" if device == "cuda" else "float32"


def _size(count: float) -> str:
    """Bytes as people read them: 1.3 MB, 3.8 GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
