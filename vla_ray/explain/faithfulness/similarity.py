"""How alike two maps are, without asking where they point.

Rank correlation for the whole map, and two overlaps for what a person sees of it: of the positive mass, and of the
strongest tenth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vla_ray.explain.faithfulness.grid import MapArray, finite, on_grid

TOP_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Similarity:
    """Attributes:
    spearman: rank correlation with ties averaged; None where a map is constant and ranks nothing.
    overlap: shared positive mass when both maps sum to one, 1 for equal maps; None where a map has none.
    top_overlap: intersection over union of the strongest tenth of the cells, as far as they stand out at all; None
        where both maps are constant.
    """

    spearman: float | None
    overlap: float | None
    top_overlap: float | None


def similarity(a: MapArray, b: MapArray) -> Similarity:
    """Two maps of one canvas; the coarser one is repeated onto the finer one's grid."""
    a, b = finite(a), finite(b)
    shape = max(a.shape[0], b.shape[0]), max(a.shape[1], b.shape[1])
    a, b = on_grid(a, shape), on_grid(b, shape)
    masses = [np.clip(m, 0, None) / total for m in (a, b) if (total := float(np.clip(m, 0, None).sum())) > 0]
    overlap = float(np.minimum(*masses).sum()) if len(masses) == 2 else None
    tops = [_top(a), _top(b)]
    either = tops[0] | tops[1]
    return Similarity(spearman(a, b), overlap, len(tops[0] & tops[1]) / len(either) if either else None)


def _top(values: MapArray) -> set[int]:
    # Cells at the minimum are left out: in a map of mostly zeros they would tie, and be chosen by where they lie.
    order = np.argsort(-values, axis=None, kind="stable")[: max(1, round(TOP_SHARE * values.size))]
    return set(order[values.ravel()[order] > values.min()].tolist())


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Rank correlation of two equally large arrays, ties averaged; None where one of them is constant."""
    x, y = standard_ranks(a), standard_ranks(b)
    return None if x is None or y is None else float(np.clip((x * y).mean(), -1, 1))


def standard_ranks(values: ArrayLike) -> NDArray[np.float64] | None:
    """Average ranks of all values with mean 0 and deviation 1, flattened; None for a constant array."""
    _, inverse, counts = np.unique(np.asarray(values).ravel(), return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return None
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return np.asarray((ranks - ranks.mean()) / ranks.std())
