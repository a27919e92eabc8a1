"""The model that training starts from, on disk before any worker starts; and what training it will take."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PaliGemmaConfig

from vla_ray.config.train import TINY, TrainConfig
from vla_ray.models.paligemma import lora
from vla_ray.models.paligemma.cost import (
    count_parameters,
    flops_per_sample,
    lora_parameters,
    released_config,
    sharded_bytes,
    training_bytes,
)
from vla_ray.models.paligemma.pretrained import RELEASED, check_architecture, find_model
from vla_ray.training.checkpoints import RunFiles
from vla_ray.training.spec import TrainSpec, halves_base


def prepare_base(config: TrainConfig, files: RunFiles) -> Path:
    """The directory of the model; built or downloaded now if need be.

    Raises:
        CheckpointError: nothing of that name, no way to the hub, or another kind of model.
    """
    if config.model.name == TINY:
        if not files.initial.exists():
            from vla_ray.models.paligemma.tiny import build_tiny

            new = files.initial.with_name(".initial.new")
            shutil.rmtree(new, ignore_errors=True)
            build_tiny(new, seed=config.training.seed)
            new.rename(files.initial)
        return files.initial
    directory = find_model(config.model.name)
    if not (directory / lora.CONFIG).is_file():
        check_architecture(directory)
    return directory.resolve()


def report_plan(spec: TrainSpec) -> str:
    """What a run would do: samples, steps, what learns, how much memory the weights take. Nothing is written."""
    config, steps = spec.config, spec.steps()
    total, order = spec.total(steps), steps.order
    t, rank = config.training, config.lora.rank if config.lora.enabled else 0
    lines = [
        f"dry run of {spec.directory}",
        f"  {order.samples:,} samples of {len(order.groups):,} row groups, {t.num_epochs:g} epochs",
        f"  {total:,} steps of {steps.global_batch} samples: {t.batch_size} x {t.gradient_accumulation_steps} "
        f"accumulated x {config.workers} workers ({config.parallel})",
    ]
    model: Any = released_config() if config.model.name == RELEASED else None
    if (Path(spec.base) / "config.json").is_file():
        model = PaliGemmaConfig.from_pretrained(spec.base)
    if model is not None:
        counts = count_parameters(model)
        trained = lora_parameters(model, rank) if rank else counts.total - counts.of(t.freeze)
        memory = training_bytes(model, t.freeze, rank, frozen_bytes=2 if halves_base(config) else 4)
        if config.parallel == "fsdp":
            memory = sharded_bytes(model, config.workers, t.freeze, rank)
        tokens = (model.vision_config.image_size // model.vision_config.patch_size) ** 2 + _TEXT_TOKENS
        flops = flops_per_sample(model, tokens, spec.tokenizer.num_tokens + 1, t.freeze, rank)
        lines += [
            f"  {trained / 1e6:,.1f} of {counts.total / 1e6:,.1f} M parameters learn; {memory / 1e9:,.2f} GB a worker "
            "for weights, gradients and optimiser, activations on top",
            f"  {flops / 1e12:,.3g} TFLOP a sample, {flops * steps.global_batch * total / 1e15:,.3g} PFLOP in all",
        ]
    return "\n".join(lines) + "\n"


_TEXT_TOKENS = 32  # of an instruction and an action: near enough for a plan
