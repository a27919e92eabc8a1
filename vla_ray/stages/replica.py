"""What every SimLingo replica has in common: a loaded model, batches that are halved when they do not fit, and rows.

A workload subclasses `ModelReplica` and says what one batch of decoded frames gives.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vla_ray.attention import IMPLEMENTATION
from vla_ray.explain.chain import STRENGTH
from vla_ray.models.simlingo import SimLingoConfig, load_model, load_processor
from vla_ray.models.simlingo.processing import Prompt
from vla_ray.schema import FAILED, KINEMATIC_COLUMNS
from vla_ray.stages.fitting import DTYPES, Fitting, set_up_process
from vla_ray.stages.visit import Visit
from vla_ray.stages.work import Loaded, Row
from vla_ray.targets import Spline, Target


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All that loading a model needs; plain values, so it travels to an actor.

    Attributes:
        threads: of this process; None leaves torch's choice.
        gpu_share: the part of the GPU's memory that this replica may use.
    """

    model: SimLingoConfig
    checkpoint: str
    device: str
    dtype: str
    max_new_tokens: int = 100
    threads: int | None = None
    gpu_share: float = 1.0


class ModelReplica(Fitting):
    """See stages/work.py for the protocol it serves."""

    def __init__(self, spec: ModelSpec, targets: Sequence[Target], spline: Spline) -> None:
        super().__init__()
        set_up_process(spec.device, spec.threads, spec.gpu_share)
        self.model_spec, self.spline = spec, spline
        self.targets = {t.name: t for t in targets}
        self.processor = load_processor(spec.model)
        self.model = load_model(
            spec.model, spec.checkpoint, self.processor.placeholder_id, spec.device, DTYPES[spec.dtype]
        )
        self.model.set_attention(IMPLEMENTATION)

    @abstractmethod
    def run(self, frames: Sequence[Loaded], targets: Sequence[Target]) -> list[Row]:
        """Rows of one batch of decoded frames, results written."""

    def attempt(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        return self.run(frames, [self.targets[name] for name in targets])

    def failed(self, frame: Loaded, target: str, error_type: str, error: str) -> Row:
        return failed(about(frame, self.targets[target]), error_type, error)

    def prompt(self, frame: Loaded) -> Prompt:
        """The prompt of a decoded frame."""
        ref = frame.ref
        assert frame.tiles is not None
        return self.processor.prompt(len(frame.tiles), ref.speed_mps, ref.target_points, ref.question)

    def visit(
        self,
        frames: Sequence[Loaded],
        folds: Sequence[str] | None,
        strength: float = STRENGTH,
        texts: Sequence[Sequence[int]] | None = None,
    ) -> Visit:
        """Text (or the given one), trajectory and graph of a batch."""
        tiles = [x.tiles for x in frames if x.tiles is not None]
        prompts = [self.prompt(x) for x in frames]
        return Visit(self.model, self.processor, tiles, prompts, self.model_spec.max_new_tokens, folds, strength, texts)

    def shared_columns(self, visit: Visit, frames: Sequence[Loaded]) -> list[Row]:
        """Columns that do not depend on the target."""
        scalars = {name: values.tolist() for name, values in visit.kinematics(self.spline).items()}
        decision, count = visit.decision, len(frames)
        route, speed = decision.route_B202.detach().cpu(), decision.speed_B102.detach().cpu()
        # From the vehicle, which is at the origin, through every predicted point.
        lengths = torch.cat([torch.zeros(count, 1, 2), route], 1).diff(dim=1).norm(dim=-1).sum(1)
        return [
            {
                **{name: scalars[name][b] for name in KINEMATIC_COLUMNS},
                "text": self.processor.decode(visit.texts[b]),
                "text_ids": list(visit.texts[b]),
                "route": route[b].flatten().tolist(),
                "speed_wps": speed[b].flatten().tolist(),
                "geometry": json.dumps(frame.geometry.to_dict()) if frame.geometry else None,
                "route_end_x": float(route[b, -1, 0]),
                "route_end_y": float(route[b, -1, 1]),
                "route_length": float(lengths[b]),
                "num_tiles": visit.tile_slices[b].stop - visit.tile_slices[b].start,
                "num_prompt_tokens": decision.prompt_lengths[b],
                "num_generated_tokens": decision.text_lengths[b],
                "generate_s": visit.generate_s / count,
                "forward_s": visit.forward_s / count,
            }
            for b, frame in enumerate(frames)
        ]


def about(frame: Loaded, target: Target) -> Row:
    """The columns that every row has, failed ones included."""
    ref = frame.ref
    return {
        "frame_id": ref.frame_id,
        "target": target.name,
        "scene": ref.scene,
        "tag": ref.stem,
        "image_path": ref.image,
        "frame": json.dumps(ref.to_dict()),
        "mode": target.mode,
        "input_speed_mps": ref.speed_mps,
        "decode_s": frame.decode_s,
    }


def failed(row: Row, error_type: str, error: str) -> Row:
    """A row that says why there is no result."""
    return {**row, "status": FAILED, "error_type": error_type, "error": error}
