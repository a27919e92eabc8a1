"""Every knob of every job: its type, its default, and one line on what it means.

YAML files under configs/ hold values only. A job gets one of these objects, frozen, with relative paths resolved.
Relative paths typed by the user are taken from VLA_RAY_ROOT when it is set, else from the current directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_ray.errors import ConfigError, nearest


def _knob(default: Any, help: str) -> Any:
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def resolve_path(path: str) -> str:
    """An absolute path or a URI. Relative paths start at VLA_RAY_ROOT or the current directory."""
    if "://" in path:
        return path
    base = Path(os.environ.get("VLA_RAY_ROOT") or Path.cwd())
    return os.path.normpath(base / Path(path).expanduser())


def _choose(setting: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{setting}={value!r} is unknown; known: {', '.join(known)}.{nearest(value, known)}")


def _at_least(setting: str, value: float | None, low: float) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{setting}={value:g} is too small: it must be at least {low:g}.")


@dataclass(frozen=True)
class ModelConfig:
    config: str | None = _knob(None, "training configuration; null: ../../.hydra/config.yaml seen from the checkpoint")
    checkpoint: str = _knob("", "pytorch_model.pt in the released layout")
    variant_dir: str | None = _knob(
        None, "InternVL2 variant with tokenizer and config.json; null: beside the checkpoint, or the hub"
    )
    device: str = _knob("auto", "auto | cpu | cuda")
    dtype: str = _knob("auto", "auto (bfloat16 on cuda, float32 on cpu) | float32 | bfloat16 | float16")
    max_new_tokens: int = _knob(100, "longest generated text")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            return  # OmegaConf makes an empty one to merge values into; users of a model refuse it
        _choose("model.device", self.device, ("auto", "cpu", "cuda"))
        _choose("model.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _at_least("model.max_new_tokens", self.max_new_tokens, 1)
        object.__setattr__(self, "checkpoint", resolve_path(self.checkpoint))
        # <root>/.hydra/config.yaml and <root>/checkpoints/epoch=NNN.ckpt/pytorch_model.pt, as released.
        config = self.config or str(Path(self.checkpoint).parent.parent.parent / ".hydra" / "config.yaml")
        object.__setattr__(self, "config", resolve_path(config))
        if self.variant_dir is not None:
            object.__setattr__(self, "variant_dir", resolve_path(self.variant_dir))


@dataclass(frozen=True)
class SplineConfig:
    enabled: bool = _knob(False, "smooth and resample the trajectory before the kinematics")
    smoothing: float = _knob(0.0, "Whittaker lambda")
    num_samples: int = _knob(0, "points after resampling; 0: as many as before")


@dataclass(frozen=True)
class ClusterConfig:
    address: str | None = _knob(
        None, "of a running cluster ('auto' finds it); null: RAY_ADDRESS, else Ray in this process"
    )
    num_cpus: int | None = _knob(None, "CPUs of a local Ray; null: all of the machine's")
    object_store_mb: int = _knob(512, "object store of a local Ray")
    dashboard: bool = _knob(False, "start the dashboard with a local Ray")


@dataclass(frozen=True)
class WandbConfig:
    mode: str = _knob("disabled", "disabled | offline | online")
    project: str = _knob("vla_ray", "project name")
    entity: str | None = _knob(None, "team or user")

    def __post_init__(self) -> None:
        _choose("wandb.mode", self.mode, ("disabled", "offline", "online"))


@dataclass(frozen=True)
class RunConfig:
    """What every run over frames has: where results go, with which model, on how much of the cluster."""

    output_dir: str = _knob("", "where runs are kept; local or s3://")
    run: str | None = _knob(None, "name; an existing one is resumed; null: <job>_<YYMMDD_HHMMSS>")
    max_error_rate: float = _knob(0.05, "a run with a larger share of failed frames exits with 1")
    retry_failed: bool = _knob(False, "do failed frames again")
    dry_run: bool = _knob(False, "say what would be done, and stop")
    replicas: int | None = _knob(None, "model replicas; null: one per GPU, or by CPUs and memory")
    gpus_per_replica: float = _knob(1.0, "GPUs of one replica; 0.5: two share a GPU and half of its memory each")
    batch_size: int | None = _knob(None, "frames per batch; null: by device and payload")
    model: ModelConfig = _knob(ModelConfig, "the model")
    spline: SplineConfig = _knob(SplineConfig, "trajectory smoothing")
    cluster: ClusterConfig = _knob(ClusterConfig, "Ray")
    wandb: WandbConfig = _knob(WandbConfig, "Weights & Biases summary")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "outputs"))
        if not self.model.checkpoint:
            raise ConfigError("model.checkpoint is empty; give the path of a pytorch_model.pt, or model=simlingo-tiny")
        _at_least("replicas", self.replicas, 1)
        if self.gpus_per_replica <= 0:
            raise ConfigError(
                f"gpus_per_replica={self.gpus_per_replica:g} must be positive; without GPUs use model.device=cpu"
            )
        _at_least("batch_size", self.batch_size, 1)
        if not 0 <= self.max_error_rate <= 1:
            raise ConfigError(f"max_error_rate={self.max_error_rate:g} is no share: it must lie between 0 and 1.")


@dataclass(frozen=True)
class FramesConfig(RunConfig):
    """A run over scenes: which frames, and what of their predicted trajectory or text is explained."""

    scene_dir: Any = _knob("", "a scene, a root of scenes, a list of these, or a glob; local or s3://")
    explain_mode: str = _knob("action", "action | text")
    kinematic_metric: Any = _knob("curv_energy", "one or a list: what is explained of the predicted trajectory")
    text_token_strategy: Any = _knob("max", "max | last | index: which generated token is explained")
    text_token_index: int = _knob(0, "for text_token_strategy=index")
    image_subdir: str | None = _knob(None, "where a scene keeps its frames, if not directly, in images/ or in frames/")
    speed_subdir: str | None = _knob(None, "where a scene keeps <stem>.txt with the speed in m/s")
    default_speed_mps: float = _knob(0.0, "for frames without a recorded speed")
    limit: int | None = _knob(None, "use only the first N frames")
    every: int = _knob(1, "use every N-th frame of each scene")

    def __post_init__(self) -> None:
        scenes = [self.scene_dir] if isinstance(self.scene_dir, str) else list(self.scene_dir or [])
        if not any(scenes):
            raise ConfigError("scene_dir is empty; give a scene, a root of scenes, a list, or a glob")
        object.__setattr__(self, "scene_dir", [resolve_path(str(s)) for s in scenes])
        super().__post_init__()
        _at_least("limit", self.limit, 1)
        _at_least("every", self.every, 1)
        _at_least("default_speed_mps", self.default_speed_mps, 0)


@dataclass(frozen=True)
class CaptureConfig(FramesConfig):
    """Frames in, attention and gradients of explained actions out, or the relevance itself."""

    payload: str = _knob(
        "relevance", "full (attention and gradient of every head) | reduced (means over heads) | relevance"
    )
    payload_dtype: str = _knob("auto", "of a full payload: auto (the model's) | float32 | float16 | bfloat16")
    methods: Any = _knob(("relevancy", "relevancy_signed"), "what relevance payloads hold; --help of explain lists all")

    def __post_init__(self) -> None:
        super().__post_init__()
        _choose("payload", self.payload, ("full", "reduced", "relevance"))
        _choose("payload_dtype", self.payload_dtype, ("auto", "float32", "float16", "bfloat16"))


@dataclass(frozen=True)
class ExplainConfig(FramesConfig):
    """Maps of which pixels an action came from: from a capture's payloads, or online from frames.

    Methods: relevancy, relevancy_positive, relevancy_negative, relevancy_signed, relevancy_lm, relevancy_vit,
    attention_x_gradient[_lm], rollout[_lm|_vit], raw_attention[_lm|_vit], raw_attention_last_lm, gradient_x_input,
    integrated_gradients, occlusion, iss, original_raw|rollout|flow|generic (full payloads), lrp.
    """

    source: str = _knob("auto", "payloads (of the capture of this name) | online | auto: payloads where there are any")
    maps: str = _knob("maps", "name of the maps in the run; other methods or options need another one")
    methods: Any = _knob("relevancy", "one or a list of the methods above")
    strength: float = _knob(0.2, "of relevancy: how much one hop moves; relevance payloads have their own")
    ig_steps: int = _knob(32, "first number of steps of integrated_gradients; doubled until it is complete to 5 %")
    iss_samples: int = _knob(1000, "most masks of iss")
    seed: int = _knob(0, "of random masks")
    overlays: bool = _knob(True, "draw pictures, overlays/<method>/<scene>/<stem>.png")
    report: bool = _knob(True, "write report/index.html")

    def __post_init__(self) -> None:
        super().__post_init__()
        _choose("source", self.source, ("auto", "payloads", "online"))
        _at_least("ig_steps", self.ig_steps, 1)
        _at_least("iss_samples", self.iss_samples, 32)
        if self.strength <= 0:
            raise ConfigError(f"strength={self.strength:g} must be positive; 0.2 is the default.")


@dataclass(frozen=True)
class FaithfulnessConfig(RunConfig):
    """Measure the maps of a run: do their cells move the trajectory, do they lie on what truly matters?

    The model is that of the run. `model.device` and everything about replicas is as given here.
    """

    run: str | None = _knob(None, "name of a run that has maps; null: the bundled scenes, explained first")
    maps: str = _knob("maps", "name of the maps in the run")
    scores: str = _knob("faithfulness", "name of the scores in the run")
    reference: str = _knob("relevancy", "the method whose blobs random maps have, whose mean is the prior")
    masks_subdir: str = _knob("truth/masks", "where a scene keeps masks of what matters, <stem>.png; may be missing")
    num_random: int = _knob(5, "random maps per frame")
    regenerate: int = _knob(8, "frames on which the text is also written anew for every changed picture")
    randomise: int = _knob(8, "frames on which the model's weights are randomised, stage by stage")
    frames: int | None = _knob(None, "measure N frames, spread evenly over the run; null: all")
    seed: int = _knob(0, "of random maps and orders")
    report: bool = _knob(True, "write report/index.html again, with the tables")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("num_random", self.num_random, 1)
        for name in ("regenerate", "randomise"):
            _at_least(name, getattr(self, name), 0)
        _at_least("frames", self.frames, 1)


@dataclass(frozen=True)
class PipelineConfig(FramesConfig):
    """Capture, maps by several methods, faithfulness, report: one command, resumed at whatever stage it was.

    Each stage is what its own job does with the settings of the same names; their --help says more.
    """

    methods: Any = _knob(
        ("relevancy", "relevancy_signed", "attention_x_gradient_lm", "rollout", "gradient_x_input"),
        "one or a list; attention methods are captured, the others asked of the model",
    )
    maps: str = _knob("maps", "name of the maps in the run")
    scores: str = _knob("faithfulness", "name of the scores in the run")
    payload: str = _knob("relevance", "full | reduced | relevance")
    strength: float = _knob(0.2, "of relevancy: how much one hop moves; of full and reduced payloads only")
    masks_subdir: str = _knob("truth/masks", "where a scene keeps masks of what matters; may be missing")
    num_random: int = _knob(5, "random maps per frame, to compare with")
    regenerate: int = _knob(8, "frames on which the text is also written anew")
    randomise: int = _knob(8, "frames on which the model's weights are randomised")
    measure: int | None = _knob(None, "measure the maps of N frames, spread evenly over the run; 0: none; null: all")
    seed: int = _knob(0, "of random masks, maps and orders")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("measure", self.measure, 0)


@dataclass(frozen=True)
class ReportConfig:
    """Write overlays and report/index.html again from a run's maps and tables. Needs neither Ray nor a model."""

    output_dir: str = _knob("", "where runs are kept; local or s3://")
    run: str | None = _knob(None, "name of a run that has maps; null: the bundled scenes, explained first")
    maps: str = _knob("maps", "name of the maps in the run")
    scores: str = _knob("faithfulness", "name of the scores in the run; there may be none")
    overlays: bool = _knob(True, "draw pictures, overlays/<method>/<scene>/<stem>.png")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "outputs"))


@dataclass(frozen=True)
class ShowConfig:
    """Print what a payload, a metrics table or a run directory holds."""

    path: str = _knob("", "a payload .pt, a run directory, a .parquet file, or a folder of runs")

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path is empty; give a payload or a run directory: python jobs/show.py path=outputs/demo")
        object.__setattr__(self, "path", resolve_path(self.path))


@dataclass(frozen=True)
class ScenesConfig:
    """Render synthetic driving scenes, with masks of what truly causes each action."""

    output_dir: str = _knob("", "root of the scenes")
    demo: bool = _knob(False, "write the bundled demo's scenes instead; the other keys below are ignored")
    scenes: int = _knob(2, "number of scenes, each a drive")
    frames: int = _knob(20, "frames per scene, 0.25 s apart")
    seed: int = _knob(0, "of the first scene; the next ones count up")
    cause: str | None = _knob(None, "clear | red_light | lead_car | pedestrian; null: drawn")
    target_points: bool = _knob(True, "whether frames carry target points")
    decisive: bool = _knob(False, "single frames in which one thing clearly decides the stop, a scene each")
    question: str | None = _knob(None, "asked in every frame, {speed} filled in; null: the default one")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "outputs/scenes"))
        _at_least("scenes", self.scenes, 1)
        _at_least("frames", self.frames, 1)
        _at_least("seed", self.seed, 0)


@dataclass(frozen=True)
class TinyDriverConfig:
    """Train the tiny driver from nothing on synthetic scenes, and measure it on held-out ones."""

    output_dir: str = _knob("", "where the checkpoint goes, in the released layout")
    steps: int = _knob(3600, "optimiser steps of 32 frames; the default takes about 15 minutes on 2 cores")
    frames: int = _knob(16_000, "training frames to render")
    held_out: int = _knob(400, "frames to measure on")
    seed: int = _knob(0, "of weights and batches")
    threads: int = _knob(2, "CPU threads")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "outputs/simlingo-tiny"))
        for name in ("steps", "frames", "held_out", "threads"):
            _at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class BenchmarkConfig:
    """What things cost. Benches: relevance (against plain forward + backward; sizes tiny, mid)."""

    bench: str = _knob("relevance", "what is measured")
    size: Any = _knob("tiny", "one or a list of: tiny (`model`), mid (random weights, 12 layers, 1025 vision tokens)")
    rounds: int = _knob(5, "each side is run so often, the plain one before and after it")
    threads: int = _knob(1, "of torch; more than one also measure what else the machine does")
    memory: bool = _knob(True, "measure peak memory, each side in a process of its own (Linux)")
    output_dir: str = _knob("", "benchmarks/<bench>_<time>.json goes there; local or s3://")
    model: ModelConfig = _knob(ModelConfig, "of size tiny")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "outputs"))
        for name in ("rounds", "threads"):
            _at_least(name, getattr(self, name), 1)
