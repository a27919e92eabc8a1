"""AdamW, and the learning rate over the steps."""

from __future__ import annotations

import math

import torch
from torch import nn

from vla_ray.config.train import TrainingConfig


def make_optimizer(module: nn.Module, settings: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over what requires grad (Loshchilov & Hutter 2019); only matrices decay, embeddings do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and "embed" not in name and "lm_head" not in name
            (decayed if decays else free).append(parameter)
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, settings.weight_decay), (free, 0.0))
        if params
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=all(p.device.type == "cuda" for p in [*decayed, *free]),
    )


def learning_rate(step: int, total: int, settings: TrainingConfig) -> float:
    """Of optimiser step `step` (from 0): linear warm-up, then half a cosine to `min_learning_rate` times the peak."""
    warmup = math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    low = settings.min_learning_rate
    return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
