"""Reference maps that no gradient enters: hide cells, watch what moves. Slow, and right by construction.

`occlusion` slides a window; `iss` hides random halves of the picture and takes differences of means, which is unbiased
whatever else is hidden and comes with a standard error. Both act on the function that the gradient methods explain
when they are asked with the text held fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_ray.errors import ConfigError
from vla_ray.explain.faithfulness.similarity import spearman
from vla_ray.explain.perturb import Probe, displacement, squared_distances

MapArray = NDArray[np.float32]
Effect = Literal["trajectory", "scalar"]


@dataclass(frozen=True, slots=True)
class Occlusion:
    """Attributes:
    displacement: [rows, columns] metres that hiding a window over the cell moves the trajectory.
    drop: [rows, columns] how much the scalar falls, in its own unit; negative where hiding raises it.
    forwards: pictures asked about.
    """

    displacement: MapArray
    drop: MapArray
    forwards: int


def occlusion(probe: Probe, head: str | None, shape: tuple[int, int], window: int = 2, stride: int = 1) -> Occlusion:
    """Hide a window of cells at every place; a cell's value is the mean over the windows that cover it.

    Args:
        head: whose trajectory the target reads (`Target.head`).
        shape: rows and columns of the grid, normally that of the patches (`canvas_grid`).
        window, stride: in cells; the last window of a row or column ends at the border.
    """
    if not 1 <= stride <= window <= min(shape):
        raise ConfigError(
            f"occlusion window {window}, stride {stride} on a grid of {shape[0]} x {shape[1]} cells; "
            "allowed: 1 <= stride <= window <= the grid's shorter side."
        )
    tops, lefts = (_positions(extent, window, stride) for extent in shape)
    masks = torch.zeros(len(tops) * len(lefts), *shape, dtype=torch.bool)
    for mask, (top, left) in zip(masks, ((t, f) for t in tops for f in lefts), strict=True):
        mask[top : top + window, left : left + window] = True
    original, hidden = probe(torch.zeros(1, *shape)), probe(masks)
    covered = masks.sum(0)

    def spread(values: Tensor) -> MapArray:
        return (torch.einsum("n,nrc->rc", values, masks.double()) / covered).numpy().astype(np.float32)

    moved = displacement(hidden, original, head)
    return Occlusion(spread(moved), spread(original.scalar - hidden.scalar), len(masks) + 1)


def _positions(extent: int, window: int, stride: int) -> list[int]:
    last = extent - window
    return sorted({*range(0, last + 1, stride), last})


@dataclass(frozen=True, slots=True)
class Interventional:
    """Attributes:
    scores: [rows, columns] E[effect | cell hidden] - E[effect | cell kept]; m^2, or the scalar's unit.
    errors: their standard errors.
    forwards: pictures asked about, the original included.
    reliability: share of the scores' variance over cells that is not sampling noise, from the correlation of the odd
        and the even samples' scores (Spearman-Brown); None if nothing moves.
    rank_agreement: Spearman of the same two halves. Low wherever few cells matter and the others rank by chance.
    settled: whether sampling stopped because the scores were reliable, not because it reached the limit.
    """

    scores: MapArray
    errors: MapArray
    forwards: int
    reliability: float | None
    rank_agreement: float | None
    settled: bool


def iss(
    probe: Probe,
    head: str | None,
    shape: tuple[int, int],
    cell: int = 2,
    hidden_share: float = 0.5,
    effect: Effect = "trajectory",
    reliable: float = 0.9,
    min_samples: int = 256,
    max_samples: int = 2000,
    seed: int = 0,
) -> Interventional:
    """Interventional score of every cell of a coarse grid (after arXiv 2605.00321, from summaries of the paper).

    Every cell is hidden independently with probability `hidden_share`. Its score is the difference of the mean effect
    between samples that hide and that keep it: an unbiased estimate of what hiding the cell does on average over what
    else is hidden. The effect is the mean squared distance of the trajectory's points (m^2), the paper's squared action
    error, or the absolute change of the scalar.

    Args:
        head: whose trajectory the target reads.
        shape: the patch grid; a cell of the map is `cell` x `cell` of its patches.
        reliable: stop at this reliability. Not at an agreement of ranks: on a driving scene most cells do nothing, rank
            by chance however many samples there are, and would keep the sampling going to its limit.
        min_samples, max_samples: never stop before, never go beyond.
        seed: of the masks.
    """
    if cell < 1 or shape[0] % cell or shape[1] % cell:
        raise ConfigError(f"iss cells of {cell} x {cell} patches do not divide the grid of {shape[0]} x {shape[1]}.")
    if effect not in ("trajectory", "scalar"):
        raise ConfigError(f"iss effect {effect!r}; known: trajectory, scalar.")
    if min(hidden_share, 1 - hidden_share) * min(min_samples, max_samples) < 16:
        raise ConfigError(
            f"iss hides a share of {hidden_share} in {min(min_samples, max_samples)} samples: every cell must be "
            "hidden and kept about 16 times at least; give more samples or a share nearer to 0.5."
        )
    rows, columns = shape[0] // cell, shape[1] // cell
    generator = torch.Generator().manual_seed(seed)
    original = probe(torch.zeros(1, *shape))
    masks, effects = torch.zeros(0, rows, columns, dtype=torch.bool), torch.zeros(0, dtype=torch.float64)
    reliability, settled = None, False
    while len(masks) < max_samples and not settled:
        wanted = min_samples if len(masks) < min_samples else len(masks) + max(probe.batch, 64)
        count = min(wanted, max_samples) - len(masks)
        more = torch.rand(count, rows, columns, generator=generator) < hidden_share
        answer = probe(more)
        if effect == "scalar":
            moved = (answer.scalar - original.scalar).abs()
        else:
            moved = squared_distances(answer, original, head).mean(-1)
        masks, effects = torch.cat([masks, more]), torch.cat([effects, moved])
        halves = [_contrast(masks[k::2], effects[k::2])[0].numpy() for k in (0, 1)]
        reliability = _reliability(*halves)
        settled = reliability is None or reliability > reliable
    scores, errors = (x.numpy().astype(np.float32) for x in _contrast(masks, effects))
    return Interventional(scores, errors, len(masks) + 1, reliability, spearman(*halves), settled)


def _reliability(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Of scores from all samples, when a and b come from half of them each (Spearman 1910, Brown 1910)."""
    if a.std() == 0 or b.std() == 0:
        return None
    r = float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    return 2 * r / (1 + r) if r > 0 else 0.0


def _contrast(masks_NRC: Tensor, effects_N: Tensor) -> tuple[Tensor, Tensor]:
    """Difference of the mean effect with a cell hidden and kept, and its standard error, [rows, columns] each."""
    hidden = masks_NRC.double()
    means, variances = [], []
    for chosen in (hidden, 1 - hidden):
        count = chosen.sum(0).clamp_min(1)
        mean = torch.einsum("n,nrc->rc", effects_N, chosen) / count
        squares = torch.einsum("nrc,nrc->rc", (effects_N[:, None, None] - mean).square(), chosen)
        means.append(mean)
        variances.append(squares / (count - 1).clamp_min(1) / count)
    return means[0] - means[1], (variances[0] + variances[1]).sqrt()
