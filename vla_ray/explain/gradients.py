"""Maps from the gradient at the pixels: gradient x input, and integrated gradients with their completeness error.

They need nothing of the model but an `Ask`, so they work on any function of the tiles, and they are the yardstick of
completeness: integrated gradients distribute y(x) - y(x0), and say by how much they failed to.

Shape suffixes: N pictures, T tiles of a picture, S tile side in pixels, G cells per tile side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vla_ray.errors import TargetError
from vla_ray.explain.question import Ask

Sign = Literal["absolute", "signed"]

# Differences of y below this share of y itself are rounding of float32: no error is measured against less.
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class IntegratedGradients:
    """What integrated gradients found, and how far to trust it.

    Attributes:
        values_TGG: signed share of each cell in `difference`, in units of y.
        difference: y(picture) - y(baseline).
        completeness_error: |sum of values - difference| / |difference|; zero is exact.
        steps: points on the line from baseline to picture that were used.
    """

    values_TGG: Tensor
    difference: float
    completeness_error: float
    steps: int


def input_gradient(ask: Ask, pixels_NT3SS: Tensor) -> Tensor:
    """d scalar / d pixels of every picture, [N, T, 3, S, S]; pictures do not mix.

    Raises:
        TargetError: the scalar has no gradient path to the pixels, or the gradient is not finite.
    """
    with torch.enable_grad():
        leaf = pixels_NT3SS.detach().requires_grad_()
        scalar_N = ask(leaf).scalar
        if not scalar_N.requires_grad:
            raise TargetError(
                "the scalar has no gradient: nothing between it and the pixels is differentiable. Use a method that "
                "only asks (occlusion, iss), or ask with gradients on."
            )
        (gradient,) = torch.autograd.grad(scalar_N.sum(), leaf, materialize_grads=True)
    if not bool(torch.isfinite(gradient).all()):
        raise TargetError("the gradient of the scalar at the pixels is not finite: there is no map to show.")
    return gradient


def gradient_x_input(
    ask: Ask, pixels_T3SS: Tensor, grid: int, baseline_T3SS: Tensor | None = None, sign: Sign = "absolute"
) -> Tensor:
    """(x - x0) * dy/dx summed over channels, then its mean over each cell's pixels: [T, G, G]. One backward.

    Args:
        pixels_T3SS: normalised tiles.
        grid: cells per tile side.
        baseline_T3SS: x0; None is zero, which in normalised tiles is the mean colour.
        sign: `absolute` takes |.| of every pixel before the mean, `signed` lets pixels of a cell cancel.

    Raises:
        TargetError: see input_gradient().
    """
    step = pixels_T3SS if baseline_T3SS is None else pixels_T3SS - baseline_T3SS
    product_TSS = (step * input_gradient(ask, pixels_T3SS[None])[0]).sum(1)
    return patch_mean(product_TSS.abs() if sign == "absolute" else product_TSS, grid)


def integrated_gradients(
    ask: Ask,
    pixels_T3SS: Tensor,
    baseline_T3SS: Tensor,
    grid: int,
    steps: int = 32,
    tolerance: float = 0.05,
    max_steps: int = 256,
    batch_size: int = 8,
) -> IntegratedGradients:
    """Integrated gradients (Sundararajan et al. 2017) by the midpoint rule, steps doubled until they are complete.

    (x - x0) * mean over i of dy/dx at x0 + (i - 1/2)/m (x - x0), summed over channels and each cell's pixels, so that
    all cells together are y(x) - y(x0) up to the completeness error. At most 2 * max_steps backwards.

    Args:
        pixels_T3SS, baseline_T3SS: normalised tiles; a blurred picture keeps the baseline near what the model knows.
        grid: cells per tile side.
        steps: m of the first try.
        tolerance: the completeness error that is good enough.
        max_steps: m is not doubled beyond this; the error that remains is returned, not hidden.
        batch_size: pictures per forward; it does not change the result.

    Raises:
        TargetError: see input_gradient(), or y is not finite at one of the two ends.
    """
    with torch.no_grad():
        first, last = (float(ask(end[None]).scalar[0]) for end in (baseline_T3SS, pixels_T3SS))
    difference = last - first
    if not math.isfinite(difference):
        raise TargetError(f"the scalar is {first} at the baseline and {last} at the picture: it must be finite.")
    floor = max(abs(difference), ROUNDING * (abs(first) + abs(last)), 1e-30)
    step = pixels_T3SS - baseline_T3SS
    while True:
        gradient_T3SS = _mean_gradient(ask, baseline_T3SS, step, steps, batch_size)
        product_TSS = (step.double() * gradient_T3SS).sum(1)
        error = abs(float(product_TSS.sum()) - difference) / floor
        if error < tolerance or 2 * steps > max_steps:
            values = (patch_mean(product_TSS, grid) * (product_TSS.shape[-1] // grid) ** 2).to(pixels_T3SS.dtype)
            return IntegratedGradients(values, difference, error, steps)
        steps *= 2


def _mean_gradient(ask: Ask, start: Tensor, step: Tensor, steps: int, batch_size: int) -> Tensor:
    """Mean gradient at the midpoints of `steps` equal parts of the line, float64."""
    total = torch.zeros_like(start, dtype=torch.float64)
    places = (torch.arange(steps, device=start.device, dtype=torch.float64) + 0.5) / steps
    for chunk in places.to(start.dtype).split(batch_size):
        total += input_gradient(ask, start + chunk.view(-1, 1, 1, 1, 1) * step).sum(0)
    return total / steps


def patch_mean(values_TSS: Tensor, grid: int) -> Tensor:
    """Mean over the pixels of each of grid x grid cells, [T, G, G].

    Raises:
        ValueError: the cells do not divide the tile.
    """
    side = values_TSS.shape[-1]
    if side % grid:
        raise ValueError(f"a tile of {side} pixels cannot be divided into {grid} cells")
    return torch.nn.functional.avg_pool2d(values_TSS[:, None], side // grid)[:, 0]
