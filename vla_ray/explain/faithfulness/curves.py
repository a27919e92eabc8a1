"""Deletion and insertion on trajectories: hide cells in a map's order, and measure metres.

Cells go most relevant first (deletion, MoRF) or are kept most relevant first (insertion). Keeping the top q is deleting
the least relevant 1 - q, so insertion and LeRF are one curve read from its two ends: it is measured once, and
AUC(insertion) = 1 - AUC(LeRF) exactly. Curves are relative to the displacement with everything hidden; where that is
below `NO_EFFECT_M` the picture has no effect to attribute, and the frame is excluded, not scored.

Headline: `early` deletion. The full gap is nearly saturated by a map that only knows where causes usually are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from vla_ray.errors import TargetError
from vla_ray.explain.faithfulness.grid import MapArray, on_grid
from vla_ray.explain.perturb import NO_EFFECT_M, Probe, displacement
from vla_ray.explain.question import Answer

FloatArray = NDArray[np.float64]

# Dense at the start, where methods differ. On a grid of n cells a step is a whole number of cells.
STEPS = (0.0, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48, 0.64, 0.8, 0.9, 1.0)
EARLY = 0.08
ERASER_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # DeYoung et al. 2020


@dataclass(frozen=True, slots=True)
class CurveScores:
    """Scores of one map on one frame. All but the last two are relative to hiding everything.

    They may exceed 1: hiding a part can move the trajectory further than hiding the whole picture does.

    Attributes:
        early: mean displacement over the first 8 % of deleted cells; higher is better.
        deletion_auc: (MoRF) higher is better.
        insertion_auc: higher is better. lerf_auc: 1 - insertion_auc; lower is better.
        gap: deletion_auc - lerf_auc (ABPC); cancels what the baseline picture itself does.
        comprehensiveness, sufficiency: mean displacement when 1, 5, 10, 20 and 50 % are deleted (higher is better), or
            when only they are kept (lower is better).
        flip_auc: area under |scalar change| along the deletion, relative to its largest; None if it never moves.
        flip_mean: area under the signed change, in the scalar's unit; negative where the map's cells supported it.
    """

    early: float
    deletion_auc: float
    insertion_auc: float
    lerf_auc: float
    gap: float
    comprehensiveness: float
    sufficiency: float
    flip_auc: float | None
    flip_mean: float


@dataclass(frozen=True, slots=True)
class Curve:
    """One map's curves; `scores` is None where the frame is excluded.

    Attributes:
        shares: [k] of the cells, from 0 to 1.
        deleted_m, kept_m: [k] metres of displacement with the most relevant share hidden, and with only it shown.
        scalar_change: [k] of the scalar along the deletion.
    """

    shares: FloatArray
    deleted_m: FloatArray
    kept_m: FloatArray
    scalar_change: FloatArray
    scores: CurveScores | None


@dataclass(frozen=True, slots=True)
class FrameCurves:
    """Attributes:
    curves: by the names of the maps.
    all_hidden_m: displacement with everything hidden. excluded: it is below the floor, nothing is scored.
    scalar, all_hidden_scalar: the explained scalar of the picture and with everything hidden.
    shape: the common grid. forwards: pictures asked about.
    """

    curves: dict[str, Curve]
    all_hidden_m: float
    excluded: bool
    scalar: float
    all_hidden_scalar: float
    shape: tuple[int, int]
    forwards: int


def evaluate_maps(
    probe: Probe,
    maps: Mapping[str, MapArray],
    head: str | None,
    shape: tuple[int, int],
    steps: Sequence[float] = STEPS,
    floor_m: float = NO_EFFECT_M,
    seed: int = 0,
) -> FrameCurves:
    """Curves of several maps of one frame: methods, random maps and the prior side by side.

    The picture itself and the one with everything hidden are asked about once for all; with the default steps every map
    costs 28 more forwards.

    Args:
        maps: name -> [rows, columns], signed or not; cells go by value, largest first. Coarser maps are repeated.
        head: whose trajectory the target reads (`Target.head`).
        shape: the common grid, normally that of the patches (`canvas_grid`).
        seed: of the order among equal cells, the same for every map.

    Raises:
        TargetError: a map is not finite, which is named.
    """
    cells = shape[0] * shape[1]
    counts = np.unique([0, cells, *(round(q * cells) for q in steps)])
    inner = torch.from_numpy(counts[1:-1])
    ends = torch.zeros(2, cells, dtype=torch.bool)
    ends[1] = True
    masks = [ends]
    for name, values in maps.items():
        place = torch.from_numpy(_places(_named(name, values, shape), seed))
        masks += [place < inner[:, None], place >= inner[:, None]]
    stacked = torch.cat(masks).view(-1, *shape)
    answer = probe(stacked)
    moved = displacement(answer, Answer(answer.route[:1], answer.speed[:1], answer.scalar[:1]), head).numpy()
    change = (answer.scalar - answer.scalar[0]).numpy()
    excluded = bool(moved[1] < floor_m)
    curves, start, size = {}, 2, len(inner)
    for name in maps:
        deleted, kept = slice(start, start + size), slice(start + size, start + 2 * size)
        start = kept.stop
        parts = _joined(moved, 0, deleted, 1), _joined(moved, 1, kept, 0), _joined(change, 0, deleted, 1)
        curves[name] = Curve(counts / cells, *parts, None if excluded else _scores(counts / cells, *parts))
    scalar, all_hidden_scalar = answer.scalar[:2].tolist()
    return FrameCurves(curves, float(moved[1]), excluded, scalar, all_hidden_scalar, shape, len(stacked))


def average(scores: Sequence[CurveScores]) -> CurveScores | None:
    """Mean of several maps' scores, for the random maps of a frame; None of none."""
    if not scores:
        return None
    means: dict[str, float | None] = {}
    for field in fields(CurveScores):
        values = [v for s in scores if (v := getattr(s, field.name)) is not None]
        means[field.name] = float(np.mean(values)) if values else None
    return CurveScores(**means)  # type: ignore[arg-type]  # only flip_auc can be None, and may


def _named(name: str, values: MapArray, shape: tuple[int, int]) -> MapArray:
    try:
        return on_grid(values, shape)
    except TargetError as e:
        raise TargetError(f"map {name!r}: {e}") from e


def _places(values: MapArray, seed: int) -> NDArray[np.int64]:
    """[cells] place of every cell in the order, 0 for the most relevant."""
    noise = np.random.default_rng(seed).random(values.size)
    place = np.empty(values.size, np.int64)
    place[np.lexsort((noise, -values.ravel()))] = np.arange(values.size)
    return place


def _joined(values: FloatArray, first: int, inner: slice, last: int) -> FloatArray:
    return np.concatenate([values[[first]], values[inner], values[[last]]])


def _scores(shares: FloatArray, deleted_m: FloatArray, kept_m: FloatArray, change: FloatArray) -> CurveScores:
    deleted, kept = deleted_m / deleted_m[-1], kept_m / deleted_m[-1]
    deletion, lerf = _area(shares, deleted), _area(shares, kept)
    largest = float(np.abs(change).max())
    return CurveScores(
        early=_area(shares, deleted, EARLY) / EARLY,
        deletion_auc=deletion,
        insertion_auc=1 - lerf,
        lerf_auc=lerf,
        gap=deletion - lerf,
        comprehensiveness=float(np.interp(ERASER_SHARES, shares, deleted).mean()),
        sufficiency=float(np.interp(ERASER_SHARES, shares, kept).mean()),
        flip_auc=_area(shares, np.abs(change) / largest) if largest > 0 else None,
        flip_mean=_area(shares, change),
    )


def _area(x: FloatArray, y: FloatArray, upto: float = 1.0) -> float:
    """Area under straight lines through the points, from 0 to `upto`."""
    inside = x < upto
    ends = np.append(x[inside], upto), np.append(y[inside], np.interp(upto, x, y))
    return float(np.trapezoid(ends[1], ends[0]))
