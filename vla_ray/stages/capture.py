"""A SimLingo replica: batches of tiles in, one payload per frame and target on disk, rows out."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vla_ray.attention import IMPLEMENTATION
from vla_ray.models.simlingo import SimLingoConfig, load_model, load_processor
from vla_ray.schema import DEGENERATE, FAILED, KINEMATIC_COLUMNS, OK
from vla_ray.stages.payloads import DTYPES, KINDS, NonFiniteTarget, build_payload
from vla_ray.stages.visit import Explained, Visit
from vla_ray.stages.work import Loaded, Row
from vla_ray.storage import payload as payload_file
from vla_ray.storage.files import Location
from vla_ray.targets import Spline, Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CaptureSpec:
    """All a replica needs; plain values, so it travels to an actor.

    Attributes:
        targets: of this driver; an item may ask for fewer.
        several_targets: payloads are named by their target as well, because the run has or had others.
        payload_dtype: of full payloads.
        threads: of this process; None leaves torch's choice.
        gpu_share: the part of the GPU's memory that this replica may use.
    """

    run_dir: Location
    model: SimLingoConfig
    checkpoint: str
    device: str
    dtype: str
    payload: str
    payload_dtype: str
    targets: tuple[Target, ...]
    several_targets: bool
    spline: Spline
    max_new_tokens: int = 100
    threads: int | None = None
    gpu_share: float = 1.0


class CaptureReplica:
    """See stages/work.py for the protocol it serves."""

    def __init__(self, spec: CaptureSpec) -> None:
        if spec.threads:
            torch.set_num_threads(spec.threads)
        torch.backends.cudnn.allow_tf32 = False  # float32 is the parity mode; convolutions would round to 10 bits
        if spec.device == "cuda" and spec.gpu_share < 1:
            torch.cuda.set_per_process_memory_fraction(spec.gpu_share)
        self.max_batch: int | None = None  # learnt when a batch did not fit
        self.spec, self.run_dir = spec, spec.run_dir
        self.targets = {t.name: t for t in spec.targets}
        self.processor = load_processor(spec.model)
        self.model = load_model(
            spec.model, spec.checkpoint, self.processor.placeholder_id, spec.device, DTYPES[spec.dtype]
        )
        self.model.set_attention(IMPLEMENTATION)

    def process(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        """Rows of all frames and targets. A batch too large for the GPU's memory is halved, for good, until it fits."""
        size = self.max_batch or len(frames)
        if len(frames) > size:
            parts = [frames[i : i + size] for i in range(0, len(frames), size)]
            return [row for part in parts for row in self.process(part, targets)]
        try:
            return self._visit(frames, [self.targets[name] for name in targets])
        except torch.cuda.OutOfMemoryError:
            if len(frames) == 1:
                raise
        except torch.AcceleratorError:
            # An illegal access or a hardware fault: every later call in this process would fail, frame after frame.
            logger.exception("the GPU failed; ending this process, its batch is tried again by a new one")
            os._exit(1)
        torch.cuda.empty_cache()  # outside the handler, where the exception no longer holds the tensors
        self.max_batch = (len(frames) + 1) // 2
        logger.warning("%d frames do not fit into GPU memory; from now on %d at a time", len(frames), self.max_batch)
        return self.process(frames, targets)

    def failed(self, frame: Loaded, target: str, error_type: str, error: str) -> Row:
        return {
            **self._about(frame, self.targets[target]),
            "status": FAILED,
            "error_type": error_type,
            "error": error,
        }

    def _about(self, frame: Loaded, target: Target) -> Row:
        ref = frame.frame.ref
        return {
            "frame_id": ref.frame_id,
            "target": target.name,
            "scene": ref.scene,
            "tag": ref.stem,
            "image_path": ref.image,
            "mode": target.mode,
            "input_speed_mps": ref.speed_mps,
            "decode_s": frame.decode_s,
        }

    def _visit(self, frames: Sequence[Loaded], targets: Sequence[Target]) -> list[Row]:
        prompts = []
        for x in frames:
            assert x.tiles is not None
            ref = x.frame.ref
            prompts.append(self.processor.prompt(len(x.tiles), ref.speed_mps, ref.target_points, ref.question))
        visit = Visit(
            self.model,
            self.processor,
            [x.tiles for x in frames if x.tiles is not None],
            prompts,
            self.spec.max_new_tokens,
            kinds=KINDS if self.spec.payload == "relevance" else None,
        )
        shared = self._shared_columns(visit, len(frames))
        rows = []
        for i, target in enumerate(targets):
            explained = visit.explain(target, self.spec.spline, keep_graph=i + 1 < len(targets))
            for b, frame in enumerate(frames):
                rows.append({**self._about(frame, target), **shared[b], **self._explain(visit, explained, b, frame)})
            del explained  # a full set of gradients: it must not live on beside the next one
        return rows

    def _shared_columns(self, visit: Visit, count: int) -> list[Row]:
        """Columns that do not depend on the target."""
        scalars = {name: values.tolist() for name, values in visit.kinematics(self.spec.spline).items()}
        route = visit.decision.route_B202.detach().cpu()
        # From the vehicle, which is at the origin, through every predicted point.
        lengths = torch.cat([torch.zeros(count, 1, 2), route], 1).diff(dim=1).norm(dim=-1).sum(1)
        return [
            {
                **{name: scalars[name][b] for name in KINEMATIC_COLUMNS},
                "text": self.processor.decode(visit.texts[b]),
                "route_end_x": float(route[b, -1, 0]),
                "route_end_y": float(route[b, -1, 1]),
                "route_length": float(lengths[b]),
                "num_tiles": visit.tile_slices[b].stop - visit.tile_slices[b].start,
                "num_prompt_tokens": visit.decision.prompt_lengths[b],
                "num_generated_tokens": visit.decision.text_lengths[b],
                "generate_s": visit.generate_s / count,
                "forward_s": visit.forward_s / count,
            }
            for b in range(count)
        ]

    def _explain(self, visit: Visit, explained: Explained, b: int, frame: Loaded) -> dict[str, Any]:
        scalar = float(explained.scalar_B[b])
        columns: dict[str, Any] = {"target_scalar": scalar, "backward_s": explained.seconds / len(visit.texts)}
        assert frame.geometry is not None
        start = time.perf_counter()
        try:
            if not explained.finite[b]:
                name = explained.target.name
                raise NonFiniteTarget(
                    f"the gradient of {name} is not finite" if math.isfinite(scalar) else f"{name} is {scalar}"
                )
            content = build_payload(
                self.spec.payload,
                visit,
                explained,
                b,
                frame.frame.ref,
                frame.geometry,
                self.processor,
                self.spec.spline,
                DTYPES[self.spec.payload_dtype],
            )
        except NonFiniteTarget as e:
            return {**columns, "status": FAILED, "error_type": "NonFiniteTarget", "error": str(e)}
        path = f"{frame.frame.directory}/{self.payload_name(frame.frame.ref.stem, explained.target)}"
        size = payload_file.save(self.run_dir / path, content)
        return {
            **columns,
            "status": DEGENERATE if explained.is_degenerate(b) else OK,
            "payload_path": path,
            "payload_bytes": size,
            "write_s": time.perf_counter() - start,
        }

    def payload_name(self, stem: str, target: Target) -> str:
        """`<stem>_<mode>.pt`; with several targets in the run `<stem>_<mode>_<target>.pt`."""
        suffix = f"_{target.name}" if self.spec.several_targets else ""
        return f"{stem}_{target.mode}{suffix}.pt"
