"""Settings of jobs/infer.py: which policy, on which samples, asked what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vla_ray.config.knobs import at_least, choose, knob, resolve_path
from vla_ray.config.prepare import SourceDataConfig
from vla_ray.config.shared import WorkConfig
from vla_ray.config.train import TINY, PolicyModelConfig
from vla_ray.errors import ConfigError
from vla_ray.schema import GIVEN

DECODES = ("greedy", "expected")


@dataclass(frozen=True)
class TrainedModelConfig(PolicyModelConfig):
    name: str = knob(
        "", "a run of jobs/train.py, a checkpoint of it, or tiny: the newest tiny policy that was trained, else bundled"
    )
    base: str | None = knob(None, "where the base of adapters is, if not where it was when they were learnt")
    tokenizers: str | None = knob(None, "tokenizers.pt of a model whose directory has none")
    steps: str = knob("growing", "of decoding: growing (key-value cache) | static (one shape) | compiled, on cuda")
    dtype: str = knob("auto", "auto (bfloat16 on cuda, float32 on cpu) | float32 | bfloat16 | float16")

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("model.steps", self.steps, ("growing", "static", "compiled"))
        choose("model.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        for setting in ("name", "base"):  # a name on the hub stays one
            value = getattr(self, setting)
            if value and value != TINY and Path(resolve_path(value)).exists():
                object.__setattr__(self, setting, resolve_path(value))
        if self.tokenizers is not None:
            object.__setattr__(self, "tokenizers", resolve_path(self.tokenizers))


@dataclass(frozen=True)
class InferConfig(WorkConfig):
    """Ask a policy about every sample of a dataset; with no arguments the bundled corridors.

    Writes <output_dir>/<run>/: predictions.csv (the original script's columns), predictions.parquet (with confidence,
    units and scale), images/. Sources that are not prepared yet are prepared first, into data.cache_dir.
    """

    source: str | None = knob(None, "a prepared dataset, or what jobs/prepare_cast.py takes; null: bundled corridors")
    split: str = knob("val", "which samples; a dataset without this split and with one only is asked whole")
    every: int = knob(1, "use every N-th sample")
    limit: int | None = knob(None, "use only the first N samples")
    instructions: Any = knob(
        (GIVEN,), "one or a list of: given, permuted, opposite, atomic (six commands), or texts of your own"
    )
    decode: str = knob("greedy", "greedy (the likeliest bin) | expected (the mean over bins, by their probability)")
    samples: int = knob(0, "predictions drawn for each sample beside the decoded one, for minADE")
    temperature: float = knob(1.0, "of drawn predictions")
    seed: int = knob(0, "of drawn predictions and of permuted instructions")
    images: bool = knob(True, "keep the pictures, images/sample_<number>_<hash>.jpg")
    checkpoints_dir: str = knob("", "where jobs/train.py keeps its runs, for model.name=tiny")
    model: TrainedModelConfig = knob(TrainedModelConfig, "the policy")
    data: SourceDataConfig = knob(SourceDataConfig, "the source's files")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is not None and not self.source:
            object.__setattr__(self, "source", None)
        object.__setattr__(self, "checkpoints_dir", resolve_path(self.checkpoints_dir or "checkpoints"))
        choose("decode", self.decode, DECODES)
        at_least("every", self.every, 1)
        at_least("limit", self.limit, 1)
        at_least("samples", self.samples, 0)
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature:g} must be positive; 1 draws as the policy believes.")
        if not self.model.name:
            raise ConfigError("model.name is empty; give a run of jobs/train.py, or model=paligemma-tiny.")

    def named(self, name: str, source: str) -> InferConfig:
        """The same with a policy's directory and a dataset's."""
        return replace(self, source=source, model=replace(self.model, name=name))
