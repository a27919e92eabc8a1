"""A SimLingo replica that captures: batches of tiles in, one payload per frame and target on disk, rows out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vla_ray.schema import DEGENERATE, OK
from vla_ray.stages.fitting import DTYPES
from vla_ray.stages.payloads import NonFiniteTarget, build_payload
from vla_ray.stages.replica import ModelReplica, ModelSpec, about, failed
from vla_ray.stages.visit import Explained, Visit
from vla_ray.stages.work import Loaded, Row
from vla_ray.storage import payload as payload_file
from vla_ray.storage.files import Location
from vla_ray.targets import Spline, Target


@dataclass(frozen=True, slots=True)
class CaptureSpec:
    """What a capture replica does, beside its model.

    Attributes:
        folds: of relevance payloads.
        payload_dtype: of full payloads.
        targets: of this driver; an item may ask for fewer.
        several_targets: payloads are named by their target as well, because the run has or had others.
    """

    run_dir: Location
    payload: str
    folds: tuple[str, ...]
    payload_dtype: str
    targets: tuple[Target, ...]
    several_targets: bool
    spline: Spline


class CaptureReplica(ModelReplica):
    """See stages/work.py for the protocol it serves."""

    def __init__(self, spec: CaptureSpec, model: ModelSpec) -> None:
        super().__init__(model, spec.targets, spec.spline)
        self.spec = spec

    def run(self, frames: Sequence[Loaded], targets: Sequence[Target]) -> list[Row]:
        visit = self.visit(frames, self.spec.folds if self.spec.payload == "relevance" else None)
        shared = self.shared_columns(visit, frames)
        rows = []
        for i, target in enumerate(targets):
            explained = visit.explain(target, self.spline, keep_graph=i + 1 < len(targets))
            for b, frame in enumerate(frames):
                rows.append({**about(frame, target), **shared[b], **self._explain(visit, explained, b, frame)})
            del explained  # a full set of gradients: it must not live on beside the next one
        return rows

    def _explain(self, visit: Visit, explained: Explained, b: int, frame: Loaded) -> dict[str, Any]:
        scalar = float(explained.scalar_B[b])
        columns: dict[str, Any] = {
            "target_scalar": scalar,
            "token_index": explained.tokens[b],
            "backward_s": explained.seconds / len(visit.texts),
        }
        assert frame.geometry is not None
        start = time.perf_counter()
        try:
            check_finite(explained, b)
            content = build_payload(
                self.spec.payload,
                visit,
                explained,
                b,
                frame.ref,
                frame.geometry,
                self.processor,
                self.spline,
                DTYPES[self.spec.payload_dtype],
            )
        except NonFiniteTarget as e:
            return failed(columns, "NonFiniteTarget", str(e))
        path = f"{frame.frame.directory}/{self.payload_name(frame.ref.stem, explained.target)}"
        size = payload_file.save(self.spec.run_dir / path, content)
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


def check_finite(explained: Explained, b: int) -> None:
    """NonFiniteTarget if frame `b` has nothing that can be explained."""
    if not explained.finite[b]:
        name, scalar = explained.target.name, float(explained.scalar_B[b])
        raise NonFiniteTarget(
            f"the gradient of {name} is not finite" if math.isfinite(scalar) else f"{name} is {scalar}"
        )
