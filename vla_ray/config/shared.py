"""Settings that several jobs have: the driving model, Ray, W&B, what every run over frames needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vla_ray.config.knobs import at_least, choose, knob, resolve_path
from vla_ray.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    config: str | None = knob(None, "training configuration; null: ../../.hydra/config.yaml seen from the checkpoint")
    checkpoint: str = knob("", "pytorch_model.pt in the released layout")
    variant_dir: str | None = knob(
        None, "InternVL2 variant with tokenizer and config.json; null: beside the checkpoint, or the hub"
    )
    device: str = knob("auto", "auto | cpu | cuda")
    dtype: str = knob("auto", "auto (bfloat16 on cuda, float32 on cpu) | float32 | bfloat16 | float16")
    max_new_tokens: int = knob(100, "longest generated text")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            return  # OmegaConf makes an empty one to merge values into; users of a model refuse it
        choose("model.device", self.device, ("auto", "cpu", "cuda"))
        choose("model.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        at_least("model.max_new_tokens", self.max_new_tokens, 1)
        object.__setattr__(self, "checkpoint", resolve_path(self.checkpoint))
        # <root>/.hydra/config.yaml and <root>/checkpoints/epoch=NNN.ckpt/pytorch_model.pt, as released.
        config = self.config or str(Path(self.checkpoint).parent.parent.parent / ".hydra" / "config.yaml")
        object.__setattr__(self, "config", resolve_path(config))
        if self.variant_dir is not None:
            object.__setattr__(self, "variant_dir", resolve_path(self.variant_dir))


@dataclass(frozen=True)
class SplineConfig:
    enabled: bool = knob(False, "smooth and resample the trajectory before the kinematics")
    smoothing: float = knob(0.0, "Whittaker lambda")
    num_samples: int = knob(0, "points after resampling; 0: as many as before")


@dataclass(frozen=True)
class ClusterConfig:
    address: str | None = knob(
        None, "of a running cluster ('auto' finds it); null: RAY_ADDRESS, else Ray in this process"
    )
    num_cpus: int | None = knob(None, "CPUs of a local Ray; null: all of the machine's")
    object_store_mb: int = knob(512, "object store of a local Ray")
    dashboard: bool = knob(False, "start the dashboard with a local Ray")


@dataclass(frozen=True)
class WandbConfig:
    # What may be typed for the whole: wandb=true.
    SHORTHAND: ClassVar[dict[str, tuple[str, str]]] = {
        "true": ("mode", "online"),
        "false": ("mode", "disabled"),
        "online": ("mode", "online"),
        "offline": ("mode", "offline"),
        "disabled": ("mode", "disabled"),
    }

    mode: str = knob("disabled", "disabled | offline | online; wandb=true means online")
    project: str = knob("vla_ray", "project name")
    entity: str | None = knob(None, "team or user")

    def __post_init__(self) -> None:
        choose("wandb.mode", self.mode, ("disabled", "offline", "online"))


@dataclass(frozen=True)
class WorkConfig:
    """What every run of batches through replicas has: where results go, on how much of the cluster."""

    output_dir: str = knob("", "where runs are kept; local or s3://")
    run: str | None = knob(None, "name; an existing one is resumed; null: <job>_<YYMMDD_HHMMSS>")
    max_error_rate: float = knob(0.05, "a run with a larger share of failed frames exits with 1")
    retry_failed: bool = knob(False, "do failed frames again")
    dry_run: bool = knob(False, "say what would be done, and stop")
    replicas: int | None = knob(None, "model replicas; null: one per GPU, or by CPUs and memory")
    gpus_per_replica: float = knob(1.0, "GPUs of one replica; 0.5: two share a GPU and half of its memory each")
    batch_size: int | None = knob(None, "frames per batch; null: by device and payload")
    cluster: ClusterConfig = knob(ClusterConfig, "Ray")
    wandb: WandbConfig = knob(WandbConfig, "Weights & Biases summary")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "outputs"))
        at_least("replicas", self.replicas, 1)
        if self.gpus_per_replica <= 0:
            raise ConfigError(
                f"gpus_per_replica={self.gpus_per_replica:g} must be positive; without GPUs use model.device=cpu"
            )
        at_least("batch_size", self.batch_size, 1)
        if not 0 <= self.max_error_rate <= 1:
            raise ConfigError(f"max_error_rate={self.max_error_rate:g} is no share: it must lie between 0 and 1.")


@dataclass(frozen=True)
class RunConfig(WorkConfig):
    """A run of the driving model over frames."""

    model: ModelConfig = knob(ModelConfig, "the model")
    spline: SplineConfig = knob(SplineConfig, "trajectory smoothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model.checkpoint:
            raise ConfigError("model.checkpoint is empty; give the path of a pytorch_model.pt, or model=simlingo-tiny")
