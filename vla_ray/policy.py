"""The few lines for a notebook: load a policy, ask it about a picture, see which pixels the action came from.

    from vla_ray.policy import Frame, SimLingo, explain

    policy = SimLingo.load("checkpoints/simlingo-tiny/checkpoints/epoch=013.ckpt/pytorch_model.pt")
    explanation = explain(policy, Frame("frame_0003.png", speed_mps=5.2), target="longitudinal_progress")
    explanation.prediction.text, explanation.prediction.speed_wps   # what it says, and plans
    explanation.map.on_picture()                                    # [height, width], NaN where it saw nothing
    explanation.overlay()                                           # a PIL image

No Ray, no files written: the same stages that the jobs run on a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vla_ray.attention import IMPLEMENTATION
from vla_ray.config import ModelConfig
from vla_ray.data.camera import SIMLINGO_CAMERA, Camera
from vla_ray.data.frame_table import TargetPoints
from vla_ray.data.images import decode_rgb
from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import ConfigError, TargetError
from vla_ray.explain.chain import STRENGTH
from vla_ray.explain.heatmap import HeatMap
from vla_ray.explain.methods import DEFAULT_METHOD, folds_of, parse_methods
from vla_ray.explain.question import Question
from vla_ray.models.simlingo import Processor, load_model, load_processor
from vla_ray.models.simlingo import SimLingo as SimLingoModel
from vla_ray.models.simlingo.checkpoint import read_state
from vla_ray.models.simlingo.config import read_config
from vla_ray.report.overlay import Caption, draw, scene_scale
from vla_ray.report.shown import SHARES
from vla_ray.schema import KINEMATIC_COLUMNS
from vla_ray.stages.fitting import DTYPES
from vla_ray.stages.maps import MadeMap, fold_maps
from vla_ray.stages.payloads import token_spans
from vla_ray.stages.pixel_maps import PixelOptions, pixel_maps
from vla_ray.stages.visit import Explained, Visit
from vla_ray.storage.files import Location
from vla_ray.targets import KINEMATICS, Spline, Target, named_target


@dataclass(frozen=True)
class Frame:
    """A picture and what the prompt may say about it.

    Attributes:
        image: a path or URI, or pixels [H, W, 3] uint8.
        target_points: the next two route nodes, metres (forward, right).
        question: asked instead of the default one.
    """

    image: str | PathLike[str] | NDArray[np.uint8]
    speed_mps: float = 0.0
    target_points: TargetPoints | None = None
    question: str | None = None
    camera: Camera = SIMLINGO_CAMERA

    @property
    def rgb(self) -> NDArray[np.uint8]:
        """The pixels. ImageError if they cannot be read."""
        if isinstance(self.image, np.ndarray):
            return self.image
        location = Location.of(fspath(self.image))
        return decode_rgb(location.read_bytes(), str(location))


@dataclass(frozen=True)
class Prediction:
    """What the policy says and plans: route [20, 2] and speed waypoints [10, 2] (every 0.25 s), metres, x forward, y
    right; `scalars`: the nine kinematic ones."""

    text: str
    route: NDArray[np.float32]
    speed_wps: NDArray[np.float32]
    scalars: Mapping[str, float]


@dataclass(frozen=True)
class Explanation:
    """A prediction, and which cells of the picture one scalar of it came from.

    Attributes:
        value: of the target, in `unit`.
        map: None for a degenerate target: it has no gradient here, so there is nothing to explain.
        direction: which evidence the map shows: positive (raises the scalar), negative, signed, none.
        shares: of the relevance in the language model: image, text, prompt, queries (attention methods only).
        details: what else the method reports, such as completeness_error.
    """

    frame: Frame
    prediction: Prediction
    target: str
    unit: str
    value: float
    method: str
    map: HeatMap | None
    direction: str = "none"
    shares: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, object] = field(default_factory=dict)

    def overlay(self, scale: float | None = None) -> Image.Image:
        """The map over the picture, with the planned route and speed waypoints.

        Args:
            scale: the value at full colour; None: the 99th percentile of this map. Give one to compare frames.
        """
        p, f = self.prediction, self.frame
        maps = [] if self.map is None else [self.map]
        picture = draw(
            f.rgb,
            self.map,
            scale=scene_scale(maps) if scale is None else scale,
            route=p.route,
            speed_wps=p.speed_wps,
            camera=f.camera,
            caption=Caption("", self.method, self.target, self.value, self.unit, f.speed_mps, p.text),
            signed=self.direction == "signed",
        )
        return Image.fromarray(picture)


class SimLingo:
    """A SimLingo policy: model, tokenizer and tiles together. Make one with `load`."""

    def __init__(self, model: SimLingoModel, processor: Processor, max_new_tokens: int = 100) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        model.set_attention(IMPLEMENTATION)

    @classmethod
    def load(
        cls,
        checkpoint: str | PathLike[str],
        config: str | PathLike[str] | None = None,
        variant_dir: str | PathLike[str] | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> SimLingo:
        """A checkpoint in the released layout.

        Args:
            checkpoint: pytorch_model.pt.
            config: its training configuration; None: ../../.hydra/config.yaml seen from the checkpoint.
            variant_dir: InternVL2 variant with tokenizer and config.json; None: beside the checkpoint, or the hub.
            device, dtype: auto is a GPU in bfloat16 if there is one, else the CPU in float32.

        Raises:
            CheckpointError: a file is missing or does not fit.
        """
        settings = ModelConfig(
            config=None if config is None else fspath(config),
            checkpoint=fspath(checkpoint),
            variant_dir=None if variant_dir is None else fspath(variant_dir),
            device=device,
            dtype=dtype,
        )
        place = settings.device
        if place == "auto":
            place = "cuda" if torch.cuda.is_available() else "cpu"
        precision = settings.dtype
        if precision == "auto":
            precision = "bfloat16" if place == "cuda" else "float32"
        shapes = {name: tuple(tensor.shape) for name, tensor in read_state(settings.checkpoint).items()}
        found = read_config(str(settings.config), settings.variant_dir, shapes)
        processor = load_processor(found)
        model = load_model(found, settings.checkpoint, processor.placeholder_id, place, DTYPES[precision])
        return cls(model, processor, settings.max_new_tokens)

    def predict(self, frame: Frame) -> Prediction:
        """What the policy says and plans for a frame."""
        return self._prediction(self._visit(frame, ())[0])

    def explain(
        self,
        frame: Frame,
        target: str = "curv_energy",
        method: str = DEFAULT_METHOD,
        strength: float = STRENGTH,
        spline: Spline | None = None,
        options: PixelOptions | None = None,
    ) -> Explanation:
        """See `explain`."""
        chosen = parse_methods(method)
        if len(chosen) != 1 or chosen[0].kind == "original":
            raise ConfigError(f"method={method!r}: give one method, and not an original_* one (they need a payload).")
        (wanted,) = chosen
        about, spline = named_target(target), spline or Spline()
        visit, tiles, geometry = self._visit(frame, folds_of(chosen), strength)
        explained = visit.explain(about, spline, keep_graph=False)
        value = float(explained.scalar_B[0])
        if not explained.finite[0]:
            raise TargetError(f"{target} is {value}, or its gradient is not finite: there is nothing to explain.")
        unit = KINEMATICS[target].unit if target in KINEMATICS else "logit"
        prediction = self._prediction(visit, spline)
        if explained.is_degenerate(0):
            return Explanation(frame, prediction, target, unit, value, method, None)
        if wanted.kind == "fold":
            spans, seed = token_spans(visit, self.processor, 0), visit.seed_row(explained, 0)
            relevance = visit.relevance(explained, 0).cpu()
            (made,) = fold_maps(chosen, relevance, about, value, geometry, spans, seed)
        else:
            question = self._question(visit, about, spline, explained)
            (made,) = pixel_maps(chosen, question, tiles, geometry, options or PixelOptions())
        return _explanation(frame, prediction, target, unit, value, made)

    def _visit(
        self, frame: Frame, folds: tuple[str, ...], strength: float = STRENGTH
    ) -> tuple[Visit, NDArray[np.uint8], TileGeometry]:
        tiles, geometry = self.processor.tiler(frame.rgb)
        prompt = self.processor.prompt(len(tiles), frame.speed_mps, frame.target_points, frame.question)
        visit = Visit(self.model, self.processor, [tiles], [prompt], self.max_new_tokens, folds, strength)
        return visit, tiles, geometry

    def _prediction(self, visit: Visit, spline: Spline | None = None) -> Prediction:
        decision, scalars = visit.decision, visit.kinematics(spline or Spline())
        return Prediction(
            self.processor.decode(visit.texts[0]),
            decision.route_B202[0].detach().cpu().numpy(),
            decision.speed_B102[0].detach().cpu().numpy(),
            {name: float(scalars[name][0]) for name in KINEMATIC_COLUMNS},
        )

    def _question(self, visit: Visit, target: Target, spline: Spline, explained: Explained) -> Question:
        return Question(
            self.model, self.processor, visit.prompts[0], visit.texts[0], target, spline, explained.tokens[0]
        )


def explain(
    policy: SimLingo,
    frame: Frame | str | PathLike[str] | NDArray[np.uint8],
    target: str = "curv_energy",
    method: str = DEFAULT_METHOD,
    strength: float = STRENGTH,
    spline: Spline | None = None,
    options: PixelOptions | None = None,
) -> Explanation:
    """Which pixels a scalar of the predicted action, or a generated token, came from.

    Args:
        frame: a Frame, or a picture (path or pixels) about which nothing else is known.
        target: a kinematic scalar (targets/kinematics.py), or text_max, text_last, text_<i>.
        method: one of METHODS.
        strength: of relevancy, see explain/chain.py.
        spline: smooths the trajectory before its kinematics.
        options: of gradient and perturbation methods.

    Raises:
        TargetError: an unknown target or method, or one with nothing to explain.
        ImageError, SceneError: the picture or the prompt.
    """
    asked = frame if isinstance(frame, Frame) else Frame(frame)
    return policy.explain(asked, target, method, strength, spline, options)


def _explanation(
    frame: Frame, prediction: Prediction, target: str, unit: str, value: float, made: MadeMap
) -> Explanation:
    shares = {part: made.columns[f"share_{part}"] for part in SHARES if f"share_{part}" in made.columns}
    details = {k: v for k, v in made.columns.items() if not k.startswith("share_")}
    if made.standard_error is not None:
        details["standard_error"] = made.standard_error
    return Explanation(
        frame, prediction, target, unit, value, made.method.name, made.heat, made.direction, shares, details
    )
