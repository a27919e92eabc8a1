"""Settings of the jobs around the others: looking at files, making scenes and the tiny driver, benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vla_ray.config.knobs import at_least, knob, resolve_path
from vla_ray.config.shared import ClusterConfig, ModelConfig
from vla_ray.errors import ConfigError


@dataclass(frozen=True)
class ShowConfig:
    """Print what a payload, a metrics table, a run directory or a prepared dataset holds (of one, samples as a PNG)."""

    path: str = knob("", "a payload .pt, a run directory, a prepared dataset, a .parquet file, or a folder of these")

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path is empty; give a payload or a run directory: python jobs/show.py path=outputs/demo")
        object.__setattr__(self, "path", resolve_path(self.path))


@dataclass(frozen=True)
class ScenesConfig:
    """Render synthetic driving scenes, with masks of what truly causes each action."""

    output_dir: str = knob("", "root of the scenes")
    demo: bool = knob(False, "write the bundled demo's scenes instead; the other keys below are ignored")
    scenes: int = knob(2, "number of scenes, each a drive")
    frames: int = knob(20, "frames per scene, 0.25 s apart")
    seed: int = knob(0, "of the first scene; the next ones count up")
    cause: str | None = knob(None, "clear | red_light | lead_car | pedestrian; null: drawn")
    target_points: bool = knob(True, "whether frames carry target points")
    decisive: bool = knob(False, "single frames in which one thing clearly decides the stop, a scene each")
    question: str | None = knob(None, "asked in every frame, {speed} filled in; null: the default one")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "outputs/scenes"))
        at_least("scenes", self.scenes, 1)
        at_least("frames", self.frames, 1)
        at_least("seed", self.seed, 0)


@dataclass(frozen=True)
class TinyDriverConfig:
    """Train the tiny driver from nothing on synthetic scenes, and measure it on held-out ones."""

    output_dir: str = knob("", "where the checkpoint goes, in the released layout")
    steps: int = knob(3600, "optimiser steps of 32 frames; the default takes about 15 minutes on 2 cores")
    frames: int = knob(16_000, "training frames to render")
    held_out: int = knob(400, "frames to measure on")
    seed: int = knob(0, "of weights and batches")
    threads: int = knob(2, "CPU threads")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "outputs/simlingo-tiny"))
        for name in ("steps", "frames", "held_out", "threads"):
            at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class BenchmarkConfig:
    """What things cost. Benches: relevance (beside plain forward + backward), train (Ray and data beside a plain loop),
    infer (batched decoding beside transformers' generate, the pipeline beside a bare loop).

    Sizes of relevance: tiny is `model`, mid has random weights, 12 layers and 1025 vision tokens. Sizes of train
    and infer: tiny is the bundled PaliGemma, mid one of 20 M random weights, 8 + 8 layers and 224 pixels; of infer
    also full, the released 3B model with random weights, where there is a GPU.
    """

    bench: str = knob("relevance", "what is measured: relevance | train | infer")
    size: Any = knob("tiny", "one or a list of: tiny, mid; infer also: full")
    rounds: int = knob(5, "each side is run so often, the plain one before and after it")
    threads: int = knob(1, "of torch; more than one also measure what else the machine does")
    memory: bool = knob(True, "relevance: measure peak memory, each side in a process of its own (Linux)")
    steps: int | None = knob(None, "train: optimiser steps of a stretch; null: by size")
    data_workers: int = knob(1, "train: Ray tasks that make batches")
    batches: Any = knob((1, 8, 32), "infer: prompts that are decoded together, one or a list of")
    output_dir: str = knob("", "benchmarks/<bench>_<time>.json goes there; local or s3://")
    model: ModelConfig = knob(ModelConfig, "relevance: of size tiny; infer: its device")
    cluster: ClusterConfig = knob(ClusterConfig, "train, infer: Ray")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "outputs"))
        for name in ("rounds", "threads", "steps", "data_workers"):
            at_least(name, getattr(self, name), 1)
        object.__setattr__(self, "batches", _batches(self.batches))


def _batches(given: Any) -> tuple[int, ...]:
    try:
        counts = tuple(int(str(n)) for n in ([given] if isinstance(given, (str, int)) else given))
    except (TypeError, ValueError) as e:
        raise ConfigError(f"batches={given!r} are no whole numbers; write batches=[1,8,32].") from e
    if not counts:
        raise ConfigError("batches is empty; write batches=[1,8,32].")
    for count in counts:
        at_least("batches", count, 1)
    return counts
