"""What the model is called with, from what a batch holds."""

from __future__ import annotations

from torch import Tensor

from vla_ray.models.paligemma.processing import IMAGE_MEAN, IMAGE_STD


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] between -1 and 1."""
    return ((pixels.float() / 255 - IMAGE_MEAN) / IMAGE_STD).permute(0, 3, 1, 2)


def positions(mask: Tensor) -> Tensor:
    """Position ids [B, L]: 1 at the first token that is no padding, as transformers' generate counts."""
    return (mask.cumsum(-1) - 1).clamp(min=0) + 1
