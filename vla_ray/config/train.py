"""Settings of fine-tuning a PaliGemma policy. Names follow the original scripts; what they lacked is ours."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from vla_ray.config.knobs import at_least, choose, knob, resolve_path
from vla_ray.config.shared import ClusterConfig, WandbConfig
from vla_ray.errors import ConfigError

TINY = "tiny"  # the name of the model that is built offline
PARTS = ("vision", "projector", "embeddings", "language")


@dataclass(frozen=True)
class PolicyModelConfig:
    name: str = knob("", "tiny (built offline), a directory, or a name on the hub such as google/paligemma-3b-mix-224")
    max_text_length: int = knob(128, "longest instruction in tokens; longer ones are cut")
    device: str = knob("auto", "auto | cpu | cuda")

    def __post_init__(self) -> None:
        choose("model.device", self.device, ("auto", "cpu", "cuda"))
        at_least("model.max_text_length", self.max_text_length, 1)
        if self.name.startswith((".", "/", "~")):
            object.__setattr__(self, "name", resolve_path(self.name))


@dataclass(frozen=True)
class ActionConfig:
    vocab_size: int = knob(256, "bins per coordinate, on <loc0000> ...; at most 1024")
    num_steps: int = knob(8, "steps of an action")
    action_bounds: Any = knob(None, "[low,high] of normalised actions; null: [-1,1], for mean_std [-3,3]")
    normalizer: str = knob("quantile", "quantile (0.5 .. 99.5 % of the actions become -1 .. 1) | mean_std | none")
    max_clip_rate: float = knob(0.05, "refuse bounds that cut off a larger share of the training actions")

    def __post_init__(self) -> None:
        choose("action.normalizer", self.normalizer, ("quantile", "mean_std", "none"))
        at_least("action.vocab_size", self.vocab_size, 2)
        at_least("action.num_steps", self.num_steps, 1)
        if self.action_bounds is not None:
            object.__setattr__(self, "action_bounds", _bounds(self.action_bounds))


def _bounds(given: Any) -> tuple[float, float]:
    try:
        values = [given] if isinstance(given, (str, int, float)) else list(given)
        numbers = [float(v) for v in values]
        low, high = (-abs(numbers[0]), abs(numbers[0])) if len(numbers) == 1 else numbers
    except (TypeError, ValueError) as e:
        raise ConfigError(f"action.action_bounds={given!r} are no bounds; give [-1,1], or 3 for [-3,3].") from e
    if not low < high:
        raise ConfigError(f"action.action_bounds=[{low:g},{high:g}]: the first must be smaller than the second.")
    return low, high


@dataclass(frozen=True)
class TrainDataConfig:
    path: str | None = knob(None, "a prepared dataset (jobs/prepare_cast.py); null: the bundled corridors, made first")
    train_split: str = knob("train", "split to train on")
    val_split: str = knob("val", "split to validate on")
    weights: Any = knob(None, "sampling weights of sub-datasets, [cast_filtered=0.4,atomic_stop=0.1]; null: by size")
    num_workers: int = knob(1, "Ray actors that decode and tokenise, per training worker")
    window: int = knob(16, "row groups that are shuffled together; more mix better and need more memory")

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", resolve_path(self.path))
        for name in ("num_workers", "window"):
            at_least(f"data.{name}", getattr(self, name), 1)
        if self.weights is not None:
            object.__setattr__(self, "weights", parse_weights(self.weights) or None)


def parse_weights(given: Any) -> dict[str, float]:
    """`[name=0.4,...]` or a mapping. ConfigError if a weight is no positive number."""
    entries = [given] if isinstance(given, (str, int, float)) else given
    pairs = given.items() if hasattr(given, "items") else (str(entry).partition("=")[::2] for entry in entries)
    weights = {}
    for name, value in pairs:
        try:
            weight = float(value)
        except ValueError:
            weight = 0.0
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"data.weights: {name}={value!r} is no positive number; write data.weights=[one=0.4,other=0.1]."
            )
        weights[str(name).strip()] = weight
    return weights


@dataclass(frozen=True)
class AugmentConfig:
    """Of training pictures. A mirrored picture gets mirrored actions, and left and right swapped in its instruction."""

    mirror: float = knob(0.5, "probability of mirroring")
    brightness: float = knob(0.2, "largest relative change; 0: none")
    contrast: float = knob(0.2, "largest relative change; 0: none")
    shift: float = knob(0.0, "largest shift of the picture, as a share of its side; the border is repeated")

    def __post_init__(self) -> None:
        for name in ("mirror", "brightness", "contrast", "shift"):
            _within(f"augment.{name}", getattr(self, name), 0, 1)


@dataclass(frozen=True)
class LoraConfig:
    enabled: bool = knob(False, "train low-rank adapters of the language model's linear layers, nothing else")
    rank: int = knob(16, "of the adapters")
    alpha: int = knob(32, "their output is scaled by alpha / rank")
    dropout: float = knob(0.0, "of the adapters' input")
    merged: bool = knob(False, "at the end write merged/ too: best_model/ with the adapters folded into its weights")

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 1)
        at_least("lora.alpha", self.alpha, 1)
        _within("lora.dropout", self.dropout, 0, 1)


@dataclass(frozen=True)
class TrainingConfig:
    batch_size: int = knob(0, "samples of one pass of one worker; 0: 8, for the tiny model 32")
    gradient_accumulation_steps: int = knob(1, "passes before an optimiser step")
    learning_rate: float = knob(0.0, "the largest; 0: 2e-5, for adapters 1e-4, for the tiny model 8e-3")
    min_learning_rate: float = knob(0.0, "share of it at the end of the cosine")
    num_epochs: float = knob(1.0, "passes over the training split")
    max_steps: int | None = knob(None, "stop after so many optimiser steps; null: after num_epochs")
    warmup_ratio: float = knob(0.05, "share of the steps with a rising learning rate")
    weight_decay: float = knob(1e-4, "of matrices; norms, biases and embeddings do not decay")
    betas: Any = knob((0.9, 0.999), "of AdamW")
    eps: float = knob(1e-8, "of AdamW")
    max_grad_norm: float = knob(1.0, "gradients are scaled down to this norm")
    freeze: Any = knob((), "parts that do not learn: vision, projector, embeddings, language")
    loss_over: str = knob("vocabulary", "softmax over the whole vocabulary | actions: over the action bins alone")
    decoding: str = knob("autoregressive", "autoregressive, token by token | parallel: all in one pass (OpenVLA-OFT)")
    precision: str = knob("auto", "auto (bfloat16 on cuda) | float32 | bfloat16: autocast; weights learn in float32")
    activation_checkpointing: bool = knob(False, "compute activations again instead of keeping them: less memory")
    seed: int = knob(0, "of weights, sample order and augmentation")
    logging_steps: int = knob(10, "a line in logs/train.jsonl each N steps")
    eval_steps: int = knob(200, "validate each N steps, and at the end")
    save_steps: int = knob(200, "write last/ each N steps, and at the end")
    eval_samples: int = knob(256, "validation samples for loss and token accuracy")
    eval_decode: int = knob(128, "of these, how many are decoded, for ADE and FDE")

    def __post_init__(self) -> None:
        names = ("gradient_accumulation_steps", "logging_steps", "eval_steps", "save_steps")
        for name in (*names, "eval_samples", "eval_decode", "max_steps"):
            at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("num_epochs", "max_grad_norm", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"training.{name}={getattr(self, name):g} must be positive.")
        for name in ("batch_size", "learning_rate", "weight_decay", "seed"):
            _within(f"training.{name}", getattr(self, name), 0)
        for name in ("warmup_ratio", "min_learning_rate"):
            _within(f"training.{name}", getattr(self, name), 0, 1)
        choose("training.precision", self.precision, ("auto", "float32", "bfloat16"))
        choose("training.loss_over", self.loss_over, ("vocabulary", "actions"))
        choose("training.decoding", self.decoding, ("autoregressive", "parallel"))
        parts = [str(p) for p in ([self.freeze] if isinstance(self.freeze, (str, int)) else self.freeze or ())]
        for part in parts:
            choose("training.freeze", part, PARTS)
        object.__setattr__(self, "freeze", tuple(parts))
        object.__setattr__(self, "betas", _betas(self.betas))


def _within(setting: str, value: float, low: float, high: float = math.inf) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ConfigError(f"{setting}={value:g} must be {allowed}.")


def _betas(given: Any) -> tuple[float, float]:
    try:
        first, second = (float(b) for b in given)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"training.betas={given!r} are no two numbers; write training.betas=[0.9,0.999].") from e
    for beta in (first, second):
        if not 0 <= beta < 1:
            raise ConfigError(f"training.betas=[{first:g},{second:g}]: both must be at least 0 and below 1.")
    return first, second


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a PaliGemma policy on a prepared dataset; with no arguments a tiny one on bundled corridors.

    The run is <output_dir>/<run>/: last/, best_model/, logs/, each checkpoint with its tokenizers.pt. The same command
    resumes it. Batches of all workers together make one optimiser step: batch_size * accumulation * workers samples.
    """

    output_dir: str = knob("", "where runs are kept")
    run: str | None = knob(None, "name; an existing one is resumed; null: train_<YYMMDD_HHMMSS>")
    workers: int = knob(2, "training processes, one per GPU where there are GPUs")
    parallel: str = knob("ddp", "ddp | fsdp (FSDP2: weights, gradients and optimiser spread over the workers)")
    max_failures: int = knob(3, "how often a dead worker is replaced before the run fails")
    dry_run: bool = knob(False, "say what would be trained, with memory and steps, and stop")
    model: PolicyModelConfig = knob(PolicyModelConfig, "the model")
    action: ActionConfig = knob(ActionConfig, "actions as tokens")
    data: TrainDataConfig = knob(TrainDataConfig, "samples")
    augment: AugmentConfig = knob(AugmentConfig, "of pictures")
    lora: LoraConfig = knob(LoraConfig, "adapters")
    training: TrainingConfig = knob(TrainingConfig, "the loop")
    cluster: ClusterConfig = knob(ClusterConfig, "Ray")
    wandb: WandbConfig = knob(WandbConfig, "Weights & Biases curves")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "checkpoints"))
        at_least("workers", self.workers, 1)
        at_least("max_failures", self.max_failures, 0)
        choose("parallel", self.parallel, ("ddp", "fsdp"))
        if not self.model.name:
            raise ConfigError("model.name is empty; give model=paligemma-tiny, model=paligemma-3b or a directory.")

        steps = self.action.num_steps
        if self.training.decoding == "parallel" and steps > 64:
            raise ConfigError(
                f"training.decoding=parallel has placeholders for 64 steps; action.num_steps is {steps}. Use "
                "training.decoding=autoregressive."
            )
        self._fill_in()

    def _fill_in(self) -> None:
        """What is good for a model, where nothing was said."""
        tiny = self.model.name == TINY
        usual: dict[str, Any] = {
            "batch_size": 32 if tiny else 8,
            "learning_rate": 8e-3 if tiny else 1e-4 if self.lora.enabled else 2e-5,
        }
        missing = {name: value for name, value in usual.items() if not getattr(self.training, name)}
        object.__setattr__(self, "training", replace(self.training, **missing))

    @property
    def global_batch(self) -> int:
        """Samples of one optimiser step."""
        return self.training.batch_size * self.training.gradient_accumulation_steps * self.workers
