"""Statistics of actions that can be collected shard by shard and added up, without keeping the actions.

Mean and spread are exact (merged as in Chan, Golub and LeVeque 1979, so that no small spread drowns in a large mean).
Quantiles and clip rates come from a histogram on a fixed grid: quantiles and bounds are right to half a grid step,
and exact for values on the grid, as 0 (stops) and 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

GRID = 200  # points per unit
REACH = 20  # units; what lies beyond is counted, and its extremes are known
QUANTILES = (0.005, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.995)

_POINTS = np.arange(-REACH * GRID, REACH * GRID + 1) / GRID  # values are counted at the nearest of these
_BELOW, _ABOVE = 0, len(_POINTS) + 1  # columns of the counts beside those of the points
_ROWS = 3  # x, y, length of a step
_STEP = 2

Pair = NDArray[np.float64]


class ActionStatistics:
    """Of deltas in waypoint spacings: per dimension [2] (x forward, y left), and of their length."""

    __slots__ = ("_count", "_counts", "_max", "_mean", "_min", "_squares")

    def __init__(self) -> None:
        self._count = 0
        self._counts = np.zeros((_ROWS, len(_POINTS) + 2), np.int64)
        self._mean = np.zeros(_ROWS)
        self._squares = np.zeros(_ROWS)  # sum of squared distances from the mean
        self._min = np.full(_ROWS, np.inf)
        self._max = np.full(_ROWS, -np.inf)

    def add(self, actions: ArrayLike) -> None:
        """Count deltas [..., 2], in units. They must be finite."""
        xy = np.asarray(actions, np.float64).reshape(-1, 2)
        if not len(xy):
            return
        values = np.stack([xy[:, 0], xy[:, 1], np.hypot(xy[:, 0], xy[:, 1])])
        added = ActionStatistics()
        columns = np.clip(np.rint(values * GRID) + (REACH * GRID + 1), _BELOW, _ABOVE).astype(np.int64)
        for row in range(_ROWS):
            added._counts[row] = np.bincount(columns[row], minlength=_ABOVE + 1)
        added._count = len(xy)
        added._mean = values.mean(axis=1)
        added._squares = np.square(values - added._mean[:, None]).sum(axis=1)
        added._min, added._max = values.min(axis=1), values.max(axis=1)
        self.merge(added)

    def merge(self, other: ActionStatistics) -> None:
        """Count what the other one has counted, too."""
        if not other._count:
            return
        total = self._count + other._count
        apart = other._mean - self._mean
        self._squares += other._squares + np.square(apart) * (self._count * other._count / total)
        self._mean += apart * (other._count / total)
        self._count = total
        self._counts += other._counts
        self._min, self._max = np.minimum(self._min, other._min), np.maximum(self._max, other._max)

    def with_mirror(self) -> ActionStatistics:
        """Of the same deltas and their mirror images, y negated: what training with mirrored pictures sees."""
        mirror = ActionStatistics()
        mirror._count, mirror._counts, mirror._mean = self._count, self._counts.copy(), self._mean.copy()
        mirror._squares, mirror._min, mirror._max = self._squares.copy(), self._min.copy(), self._max.copy()
        mirror._counts[1] = self._counts[1, ::-1]
        mirror._mean[1] *= -1
        mirror._min[1], mirror._max[1] = -self._max[1], -self._min[1]
        mirror.merge(self)
        return mirror

    @property
    def count(self) -> int:
        """Number of deltas."""
        return self._count

    @property
    def mean(self) -> Pair:
        self._need_some()
        return self._mean[:_STEP].copy()

    @property
    def std(self) -> Pair:
        """Of the population: divided by the count."""
        self._need_some()
        return np.sqrt(self._squares[:_STEP] / self._count)

    @property
    def minimum(self) -> Pair:
        self._need_some()
        return self._min[:_STEP].copy()

    @property
    def maximum(self) -> Pair:
        self._need_some()
        return self._max[:_STEP].copy()

    @property
    def median_step(self) -> float:
        """Median length of a delta, in units."""
        return self._quantile(_STEP, 0.5)

    def quantile(self, q: float) -> Pair:
        """The smallest value that at least a share q of the deltas does not exceed, per dimension [2]."""
        return np.array([self._quantile(row, q) for row in range(_STEP)])

    def clip_rate(self, low: ArrayLike, high: ArrayLike) -> Pair:
        """Share of deltas outside of [low, high], per dimension [2]; each bound is one number or [2].

        For bounds beyond the grid this is an upper bound, unless nothing lies outside.
        """
        self._need_some()
        # Each column's value; those off the grid are judged by whether anything lies outside at all.
        values = np.concatenate([[-np.inf], _POINTS, [np.inf]])
        rates = np.zeros(2)
        for row, (least, most) in enumerate(zip(np.broadcast_to(low, 2), np.broadcast_to(high, 2), strict=True)):
            outside = np.zeros(len(values), np.bool_)
            if self._min[row] < least:
                outside |= values < least
            if self._max[row] > most:
                outside |= values > most
            rates[row] = self._counts[row, outside].sum() / self._count
        return rates

    def summary(self) -> dict[str, Any]:
        """What people want to know, JSON values only; an empty one knows its count alone."""
        if not self._count:
            return {"count": 0}
        low, high = self.quantile(QUANTILES[0]), self.quantile(QUANTILES[-1])
        return {
            "count": self._count,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "min": self.minimum.tolist(),
            "max": self.maximum.tolist(),
            "median_step": self.median_step,
            "quantiles": {f"{q:g}": self.quantile(q).tolist() for q in QUANTILES},
            "clip_rate_1": self.clip_rate(-1.0, 1.0).tolist(),
            "clip_rate_quantiles": self.clip_rate(low, high).tolist(),
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON values only."""
        known = {"count": self._count, "mean": self._mean.tolist(), "squares": self._squares.tolist()}
        if self._count:
            known |= {"min": self._min.tolist(), "max": self._max.tolist()}
        return {**known, "grid": [GRID, REACH], "histograms": [_to_text(counts) for counts in self._counts]}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ActionStatistics:
        """What to_dict gave. ValueError or KeyError if it was not."""
        if values["grid"] != [GRID, REACH]:
            raise ValueError(f"the histogram has the grid {values['grid']}, not {[GRID, REACH]}")
        self = ActionStatistics()
        self._count = int(values["count"])
        self._mean, self._squares = np.array(values["mean"], np.float64), np.array(values["squares"], np.float64)
        if self._count:
            self._min, self._max = np.array(values["min"], np.float64), np.array(values["max"], np.float64)
        for counts, text in zip(self._counts, values["histograms"], strict=True):
            for item in text.split():
                column, _, number = item.partition(":")
                counts[int(column)] = int(number)
        return self

    def _quantile(self, row: int, q: float) -> float:
        self._need_some()
        if not 0 <= q <= 1:
            raise ValueError(f"q={q} is no share: it must lie between 0 and 1")
        low, high = float(self._min[row]), float(self._max[row])
        rank = max(1, int(np.ceil(q * self._count - 1e-9)))
        if rank == 1:
            return low
        if rank == self._count:
            return high
        below, above = int(self._counts[row, _BELOW]), int(self._counts[row, _ABOVE])
        if rank <= below:  # off the grid: as if spread evenly up to the extreme
            return float(low + (-REACH - low) * rank / below)
        if rank > self._count - above:
            return float(high - (high - REACH) * (self._count - rank) / above)
        column = int(np.searchsorted(np.cumsum(self._counts[row]), rank))
        return float(np.clip(_POINTS[column - 1], low, high))

    def _need_some(self) -> None:
        if not self._count:
            raise ValueError("no actions were counted: there are no statistics")


def _to_text(counts: NDArray[np.int64]) -> str:
    """`column:count` of what is not zero: one line of JSON instead of thousands."""
    return " ".join(f"{column}:{counts[column]}" for column in np.flatnonzero(counts))
