"""What the model is called with, from what a batch holds."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_ray.models.paligemma.processing import IMAGE_MEAN, IMAGE_STD


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] between -1 and 1."""
    return ((pixels.float() / 255 - IMAGE_MEAN) / IMAGE_STD).permute(0, 3, 1, 2)


def positions(mask: Tensor) -> Tensor:
    """Position ids [B, L]: 1 at the first token that is no padding, as transformers' generate counts."""
    return (mask.cumsum(-1) - 1).clamp(min=0) + 1


def with_placeholders(
    ids: Tensor, mask: Tensor, types: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts [B, L] followed by `count` placeholder tokens, as part of the prompt: all see each other and are seen.

    Args:
        types: all 0.
        first: token of the first placeholder; each place has its own.

    Returns:
        ids, mask, types [B, L + count].
    """
    own = torch.arange(first, first + count, device=ids.device).expand(len(ids), count)
    return (
        torch.cat([ids, own], 1),
        torch.cat([mask, torch.ones_like(own)], 1),
        torch.cat([types, torch.zeros_like(own)], 1),
    )
