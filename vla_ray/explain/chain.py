"""The chain scalar -> query rows -> language model -> projector -> vision tower -> patches.

A map must not depend on the unit of the scalar, nor on how large gradients happen to be in a model: the relevancy
product mixes orders of the gradient, and where hops are strong it spreads over everything. So the gradient is scaled,
frame by frame, such that one hop through the language model, all layers together, moves `strength` times the seed:
sum_l w^T mean_h |P * dP| = strength. (The gradient's own RMS, the obvious unit, leaves one hop moving 0.5 times the
seed in one model and 5 times in another of the same architecture.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla_ray.models.simlingo.model import pixel_shuffle

STRENGTH = 0.2


@dataclass(frozen=True, slots=True)
class Seed:
    """Where relevance starts: n rows that the scalar reads.

    Attributes:
        weights: |<h_k, dy/dh_k>|, summing to 1; all zero for a scalar without gradient.
        scores: the signed products <h_k, dy/dh_k>.
        grad_rms: RMS of dy/dh over these rows.
    """

    weights: Tensor
    scores: Tensor
    grad_rms: float


def seed_of(hidden_NH: Tensor, gradient_NH: Tensor) -> Seed:
    """The gradient-weighted seed of the rows that a scalar reads.

    Args:
        hidden_NH, gradient_NH: their features after the last norm, and d scalar / d features.
    """
    precision = torch.promote_types(gradient_NH.dtype, torch.float32)
    gradient = gradient_NH.detach().to(precision)
    scores = (hidden_NH.detach().to(precision) * gradient).sum(-1)
    total = float(scores.abs().sum())
    weights = scores.abs() / total if total > 0 else torch.zeros_like(scores)
    return Seed(weights, scores, float(gradient.square().mean().sqrt()))


def hop_scale(first_hop_B: Tensor, num_layers: int, strength: float = STRENGTH) -> Tensor:
    """[B]: what gradients are multiplied with, so that one hop moves `strength` times the seed; 0 where none moves any.

    Args:
        first_hop_B: mean over layers of the mass of w^T mean_h |P * dP|, for seeds w that sum to one.
    """
    moved = first_hop_B.double() * num_layers
    return torch.where(moved > 0, strength / moved.clamp_min(torch.finfo(moved.dtype).tiny), 0.0)


def patch_groups(grid: int, factor: int) -> Tensor:
    """[tokens, factor^2]: the patches behind each image token, as the pixel shuffle places patch numbers."""
    numbers = torch.arange(grid * grid, dtype=torch.float32).view(1, grid, grid, 1)
    return pixel_shuffle(numbers, factor)[0].flatten(0, 1).long()


def cross_projector(relevance_TN: Tensor, groups: Tensor, cls: bool = True) -> Tensor:
    """Relevance of image tokens [T, N] -> seed rows of the vision tower [T, 1 + patches], or [T, patches].

    A token hands its relevance to its patches in equal shares, so mass is preserved; the projector mixes channels,
    never tokens, and drops the CLS token, which starts at zero.

    Args:
        cls: whether the tower has a CLS token, its first.
    """
    tiles, size, first = len(relevance_TN), groups.shape[1], int(cls)
    seed = relevance_TN.new_zeros(tiles, first + groups.numel())
    columns = (groups.to(relevance_TN.device).flatten() + first).expand(tiles, -1)
    return seed.scatter_add(1, columns, (relevance_TN / size).repeat_interleave(size, 1))


def uniform_seed(num_tiles: int, num_patches: int, cls: bool = True) -> Tensor:
    """[T, 1 + patches] or [T, patches]: every patch of the picture alike, summing to 1, the CLS token at zero; what
    leaves the language model out."""
    seed = torch.full((num_tiles, int(cls) + num_patches), 1.0 / (num_tiles * num_patches))
    seed[:, : int(cls)] = 0
    return seed
