"""Does a map point at what a mask names? Plausibility, to be read beside faithfulness and never mixed into one score.

Every number comes with what chance gives: a uniform map has lift 1, its mass near the mask is `near_area`. Signed maps
are scored by their positive part. A map without positive mass counts as uniform (all cells tie), so it gets exactly
chance instead of NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.tiles import TileGeometry
from vla_ray.explain.faithfulness.grid import MapArray, coverage, finite

FloatArray = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Localisation:
    """One map against one mask.

    Attributes:
        area: share of the canvas that the mask covers.
        mass: share of the relevance on it. lift: mass / area; 1 is chance.
        near_mass, near_area: the same for the cells the mask touches and their neighbours; `near_area` is chance.
        pointing: whether the strongest cell is among these (tolerance of one cell). The expected value where several
            cells are equally strong: how many is `ties`, 1 for a clear answer.
        rank_accuracy: of the k strongest cells, the share that the mask touches, k being how many it touches; the
            expected value where cells tie. Chance is `touched`.
        touched: share of the cells that the mask touches.
    """

    area: float
    mass: float
    lift: float
    near_mass: float
    near_area: float
    pointing: float
    ties: int
    rank_accuracy: float
    touched: float


def localise(values: MapArray, mask_HW: Mask, geometry: TileGeometry) -> Localisation | None:
    """Scores of a map [rows, columns] of the canvas; None where the mask is empty or lies in the part cropped away.

    Args:
        mask_HW: of the original picture.

    Raises:
        TargetError: the map is not finite, or the mask not of the picture's size.
    """
    positive = _positive(values)
    covered = coverage(mask_HW, geometry, (positive.shape[0], positive.shape[1])).astype(np.float64)
    if not covered.any():
        return None
    touched = covered > 0
    near = _grown(touched)
    total, area = positive.sum(), float(covered.mean())
    mass = float((positive * covered).sum() / total)
    strongest = positive == positive.max()
    return Localisation(
        area=area,
        mass=mass,
        lift=mass / area,
        near_mass=float(positive[near].sum() / total),
        near_area=float(near.mean()),
        pointing=float(near[strongest].mean()),
        ties=int(strongest.sum()),
        rank_accuracy=_rank_accuracy(positive, touched),
        touched=float(touched.mean()),
    )


@dataclass(frozen=True, slots=True)
class Nuisance:
    """Attributes:
    ratio: share of the relevance mass on task-irrelevant regions (NMR, arXiv 2605.00321); lower is better.
    area: their share of the canvas, which is chance. lift: ratio / area.
    """

    ratio: float
    area: float
    lift: float


def nuisance(values: MapArray, distractor_HW: Mask, geometry: TileGeometry) -> Nuisance | None:
    """The nuisance mass ratio of a map; None without distractors. Arguments and errors as for `localise`."""
    found = localise(values, distractor_HW, geometry)
    return None if found is None else Nuisance(found.mass, found.area, found.lift)


def _positive(values: MapArray) -> FloatArray:
    positive = np.clip(finite(values), 0, None).astype(np.float64)
    return positive if positive.any() else np.ones_like(positive)


def _grown(cells: Mask) -> Mask:
    """The cells and their eight neighbours."""
    padded = np.pad(cells, 1)
    rows, columns = cells.shape
    shifted = [padded[r : r + rows, c : c + columns] for r in range(3) for c in range(3)]
    return np.asarray(np.logical_or.reduce(shifted))


def _rank_accuracy(positive: FloatArray, touched: Mask) -> float:
    k = int(touched.sum())
    threshold = np.partition(positive.ravel(), -k)[-k]
    above, equal = positive > threshold, positive == threshold
    # Of the cells that tie at the threshold only some find room; every choice of them is as good.
    from_ties = (k - above.sum()) * touched[equal].mean()
    return float((touched[above].sum() + from_ties) / k)
