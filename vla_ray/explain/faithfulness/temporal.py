"""Do maps of consecutive frames agree more than maps of any two frames of the scene?

Agreement alone says little: the horizon is always in the same place. So the mean over pairs of frames that are not
neighbours is taken off. A map may also change because the plan does; pairs with a calm trajectory are given apart.
Maps are compared cell by cell; they are not warped by the ego's motion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vla_ray.explain.faithfulness.grid import MapArray, on_grid
from vla_ray.explain.faithfulness.similarity import standard_ranks

CALM_M = 0.5  # mean change of the trajectory (ego frame) between two frames
_OTHER_PAIRS = 10  # drawn at most, for every consecutive pair


@dataclass(frozen=True, slots=True)
class Temporal:
    """Rank correlations of a scene's maps. A number is None where no pair gives it; `reason` says why.

    Attributes:
        consistency: consecutive - others; higher is better.
        consecutive, others: mean correlation of neighbouring frames, and of pairs of frames further apart.
        calm: consecutive - others, over the `calm_pairs` neighbours whose trajectory changes less than CALM_M.
        change_m: per consecutive pair the mean distance (m) of their trajectories' points.
        jitter: mean absolute difference of consecutive unit-mass maps, summed over cells, halved: 0 equal, 1 disjoint.
    """

    consistency: float | None
    consecutive: float | None
    others: float | None
    calm: float | None
    calm_pairs: int
    change_m: tuple[float, ...]
    jitter: float | None
    reason: str | None


def temporal_consistency(maps: Sequence[MapArray], trajectories: ArrayLike, seed: int = 0) -> Temporal:
    """Consistency of the maps of one scene's frames, in order.

    Args:
        maps: one for each frame, by one method for one target; all on the first one's grid.
        trajectories: [frames, points, 2] in metres, those that the target reads.
        seed: of the pairs drawn from a long scene.
    """
    frames = len(maps)
    if frames < 2:
        return _nothing((), "a scene of one frame has no consecutive frames" if frames else "a scene without frames")
    paths = np.asarray(trajectories, np.float64)
    change = tuple(np.linalg.norm(np.diff(paths, axis=0), axis=-1).mean(-1).tolist())
    shape = (maps[0].shape[0], maps[0].shape[1])
    aligned = [on_grid(m, shape).astype(np.float64) for m in maps]
    ranks = [standard_ranks(m) for m in aligned]
    pairs = [(i, i + 1) for i in range(frames - 1)]
    near = {pair: value for pair in pairs if (value := _correlation(ranks, pair)) is not None}
    if not near:
        return _nothing(change, "no two consecutive frames have maps that vary")
    far = [v for pair in _others(frames, seed) if (v := _correlation(ranks, pair)) is not None]
    consecutive = float(np.mean(list(near.values())))
    others = float(np.mean(far)) if far else None
    calm = [value for (i, _), value in near.items() if change[i] < CALM_M]
    return Temporal(
        consistency=None if others is None else consecutive - others,
        consecutive=consecutive,
        others=others,
        calm=float(np.mean(calm)) - others if calm and others is not None else None,
        calm_pairs=len(calm),
        change_m=change,
        jitter=_jitter(aligned),
        reason="a scene of two frames has no frames further apart" if others is None else None,
    )


def _nothing(change_m: tuple[float, ...], reason: str) -> Temporal:
    return Temporal(None, None, None, None, 0, change_m, None, reason)


def _correlation(ranks: Sequence[NDArray[np.float64] | None], pair: tuple[int, int]) -> float | None:
    a, b = ranks[pair[0]], ranks[pair[1]]
    return None if a is None or b is None else float((a * b).mean())


def _others(frames: int, seed: int) -> list[tuple[int, int]]:
    """Pairs of frames that are not neighbours; all of them in a short scene, a draw in a long one."""
    first, second = np.triu_indices(frames, k=2)
    most = _OTHER_PAIRS * frames
    chosen = np.arange(len(first))
    if len(first) > most:
        chosen = np.random.default_rng(seed).choice(len(first), most, replace=False)
    return list(zip(first[chosen].tolist(), second[chosen].tolist(), strict=True))


def _jitter(maps: Sequence[NDArray[np.float64]]) -> float | None:
    masses = [np.abs(m) / total if (total := np.abs(m).sum()) > 0 else None for m in maps]
    steps = [float(np.abs(a - b).sum() / 2) for a, b in pairwise(masses) if a is not None and b is not None]
    return float(np.mean(steps)) if steps else None
