"""Settings of the jobs over scenes: capture, explain, faithfulness, all of them in a row, their report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vla_ray.config.knobs import at_least, choose, knob, resolve_path
from vla_ray.config.shared import RunConfig
from vla_ray.errors import ConfigError


@dataclass(frozen=True)
class FramesConfig(RunConfig):
    """A run over scenes: which frames, and what of their predicted trajectory or text is explained."""

    scene_dir: Any = knob("", "a scene, a root of scenes, a list of these, or a glob; local or s3://")
    explain_mode: str = knob("action", "action | text")
    kinematic_metric: Any = knob("curv_energy", "one or a list: what is explained of the predicted trajectory")
    text_token_strategy: Any = knob("max", "max | last | index: which generated token is explained")
    text_token_index: int = knob(0, "for text_token_strategy=index")
    image_subdir: str | None = knob(None, "where a scene keeps its frames, if not directly, in images/ or in frames/")
    speed_subdir: str | None = knob(None, "where a scene keeps <stem>.txt with the speed in m/s")
    default_speed_mps: float = knob(0.0, "for frames without a recorded speed")
    limit: int | None = knob(None, "use only the first N frames")
    every: int = knob(1, "use every N-th frame of each scene")

    def __post_init__(self) -> None:
        scenes = [self.scene_dir] if isinstance(self.scene_dir, str) else list(self.scene_dir or [])
        if not any(scenes):
            raise ConfigError("scene_dir is empty; give a scene, a root of scenes, a list, or a glob")
        object.__setattr__(self, "scene_dir", [resolve_path(str(s)) for s in scenes])
        super().__post_init__()
        at_least("limit", self.limit, 1)
        at_least("every", self.every, 1)
        at_least("default_speed_mps", self.default_speed_mps, 0)


@dataclass(frozen=True)
class CaptureConfig(FramesConfig):
    """Frames in, attention and gradients of explained actions out, or the relevance itself."""

    payload: str = knob(
        "relevance", "full (attention and gradient of every head) | reduced (means over heads) | relevance"
    )
    payload_dtype: str = knob("auto", "of a full payload: auto (the model's) | float32 | float16 | bfloat16")
    methods: Any = knob(("relevancy", "relevancy_signed"), "what relevance payloads hold; --help of explain lists all")

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("payload", self.payload, ("full", "reduced", "relevance"))
        choose("payload_dtype", self.payload_dtype, ("auto", "float32", "float16", "bfloat16"))


@dataclass(frozen=True)
class ExplainConfig(FramesConfig):
    """Maps of which pixels an action came from: from a capture's payloads, or online from frames.

    Methods: relevancy, relevancy_positive, relevancy_negative, relevancy_signed, relevancy_lm, relevancy_vit,
    attention_x_gradient[_lm], rollout[_lm|_vit], raw_attention[_lm|_vit], raw_attention_last_lm, gradient_x_input,
    integrated_gradients, occlusion, iss, original_raw|rollout|flow|generic (full payloads), lrp.
    """

    source: str = knob("auto", "payloads (of the capture of this name) | online | auto: payloads where there are any")
    maps: str = knob("maps", "name of the maps in the run; other methods or options need another one")
    methods: Any = knob("relevancy", "one or a list of the methods above")
    strength: float = knob(0.2, "of relevancy: how much one hop moves; relevance payloads have their own")
    ig_steps: int = knob(32, "first number of steps of integrated_gradients; doubled until it is complete to 5 %")
    iss_samples: int = knob(1000, "most masks of iss")
    seed: int = knob(0, "of random masks")
    overlays: bool = knob(True, "draw pictures, overlays/<method>/<scene>/<stem>.png")
    report: bool = knob(True, "write report/index.html")

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("source", self.source, ("auto", "payloads", "online"))
        at_least("ig_steps", self.ig_steps, 1)
        at_least("iss_samples", self.iss_samples, 32)
        if self.strength <= 0:
            raise ConfigError(f"strength={self.strength:g} must be positive; 0.2 is the default.")


@dataclass(frozen=True)
class FaithfulnessConfig(RunConfig):
    """Measure the maps of a run: do their cells move the trajectory, do they lie on what truly matters?

    The model is that of the run. `model.device` and everything about replicas is as given here.
    """

    run: str | None = knob(None, "name of a run that has maps; null: the bundled scenes, explained first")
    maps: str = knob("maps", "name of the maps in the run")
    scores: str = knob("faithfulness", "name of the scores in the run")
    reference: str = knob("relevancy", "the method whose blobs random maps have, whose mean is the prior")
    masks_subdir: str = knob("truth/masks", "where a scene keeps masks of what matters, <stem>.png; may be missing")
    num_random: int = knob(5, "random maps per frame")
    regenerate: int = knob(8, "frames on which the text is also written anew for every changed picture")
    randomise: int = knob(8, "frames on which the model's weights are randomised, stage by stage")
    frames: int | None = knob(None, "measure N frames, spread evenly over the run; null: all")
    seed: int = knob(0, "of random maps and orders")
    report: bool = knob(True, "write report/index.html again, with the tables")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_random", self.num_random, 1)
        for name in ("regenerate", "randomise"):
            at_least(name, getattr(self, name), 0)
        at_least("frames", self.frames, 1)


@dataclass(frozen=True)
class PipelineConfig(FramesConfig):
    """Capture, maps by several methods, faithfulness, report: one command, resumed at whatever stage it was.

    Each stage is what its own job does with the settings of the same names; their --help says more.
    """

    methods: Any = knob(
        ("relevancy", "relevancy_signed", "attention_x_gradient_lm", "rollout", "gradient_x_input"),
        "one or a list; attention methods are captured, the others asked of the model",
    )
    maps: str = knob("maps", "name of the maps in the run")
    scores: str = knob("faithfulness", "name of the scores in the run")
    payload: str = knob("relevance", "full | reduced | relevance")
    strength: float = knob(0.2, "of relevancy: how much one hop moves; of full and reduced payloads only")
    masks_subdir: str = knob("truth/masks", "where a scene keeps masks of what matters; may be missing")
    num_random: int = knob(5, "random maps per frame, to compare with")
    regenerate: int = knob(8, "frames on which the text is also written anew")
    randomise: int = knob(8, "frames on which the model's weights are randomised")
    measure: int | None = knob(None, "measure the maps of N frames, spread evenly over the run; 0: none; null: all")
    seed: int = knob(0, "of random masks, maps and orders")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("measure", self.measure, 0)


@dataclass(frozen=True)
class ReportConfig:
    """Write overlays and report/index.html again from a run's maps and tables. Needs neither Ray nor a model."""

    output_dir: str = knob("", "where runs are kept; local or s3://")
    run: str | None = knob(None, "name of a run that has maps; null: the bundled scenes, explained first")
    maps: str = knob("maps", "name of the maps in the run")
    scores: str = knob("faithfulness", "name of the scores in the run; there may be none")
    overlays: bool = knob(True, "draw pictures, overlays/<method>/<scene>/<stem>.png")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "outputs"))
