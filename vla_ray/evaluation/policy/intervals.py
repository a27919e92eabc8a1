"""Confidence intervals of many columns at once, from one set of draws, and the two tests that go with them.

As evaluation/bootstrap.py: whole recordings are drawn, not samples. Here a table has hundreds of numbers over
thousands of samples, so draws are made once and shared, which also pairs every difference. A mean may weigh its samples
(by valid steps), and NaN is "does not apply".
"""

from __future__ import annotations

from collections.abc import Sequence
from math import erfc, sqrt

import numpy as np
from numpy.typing import NDArray

from vla_ray.evaluation.bootstrap import LEVEL, Estimate

SAMPLES = 1000
_CHUNK = 100  # draws multiplied at once: what bounds the memory

Floats = NDArray[np.floating]


class Resampler:
    """Draws of groups, the same for every table of a report."""

    def __init__(self, groups: Sequence[str], samples: int = SAMPLES, level: float = LEVEL, seed: int = 0) -> None:
        names, self._which = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        self.groups, self._level = len(names), level
        rng, count = np.random.default_rng(seed), self.groups
        self._draws = np.empty((samples, count), np.uint8)  # more than 255 of one group: never
        for draw in self._draws:
            draw[:] = np.bincount(rng.integers(count, size=count), minlength=count)

    def estimates(self, values: Floats, weights: Floats | None = None) -> list[Estimate]:
        """Weighted means of the columns of values [N, M], each over the samples where it is not NaN.

        Args:
            weights: [N] or [N, M]; 1 if not given.
        """
        known = np.isfinite(values)
        weighing = known * (1.0 if weights is None else weights if weights.ndim == 2 else weights[:, None])
        sums, totals = self._sum(np.where(known, values, 0) * weighing), self._sum(weighing)
        per_group = self._sum(known.astype(float))
        means = np.full((len(self._draws), values.shape[1]), np.nan)
        for at in range(0, len(means), _CHUNK):
            draws = self._draws[at : at + _CHUNK].astype(np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                means[at : at + _CHUNK] = (draws @ sums) / (draws @ totals)
        tails = [(1 - self._level) / 2, (1 + self._level) / 2]
        found = []
        for column in range(values.shape[1]):
            number, total = int(known[:, column].sum()), totals[:, column].sum()
            if not number or not total:
                found.append(Estimate(None, None, None, 0, 0, "no sample has a value"))
                continue
            mean, groups = float(sums[:, column].sum() / total), int((per_group[:, column] > 0).sum())
            drawn = means[:, column]
            drawn = drawn[np.isfinite(drawn)]
            if groups < 2:
                found.append(Estimate(mean, None, None, number, groups, "one recording: nothing to resample"))
                continue
            low, high = np.quantile(drawn, tails)
            # Rounding may put the mean of equal values outside; an error bar cannot be negative.
            found.append(Estimate(mean, min(float(low), mean), max(float(high), mean), number, groups))
        return found

    def estimate(self, values: Floats, weights: Floats | None = None) -> Estimate:
        """Of one column [N]."""
        return self.estimates(values[:, None], weights)[0]

    def _sum(self, values: Floats) -> Floats:
        """[groups, M] sums of rows [N, M]."""
        found = np.zeros((self.groups, values.shape[1]))
        np.add.at(found, self._which, values)
        return found


def binomial_p(successes: int, trials: int) -> float:
    """Two-sided exact p of that many successes if each had a chance of one half."""
    if not trials:
        return 1.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    tail = np.arange(max(successes, trials - successes), trials + 1)
    logs = log_factorial[trials] - log_factorial[tail] - log_factorial[trials - tail] - trials * np.log(2)
    return float(min(1.0, 2 * np.exp(logs).sum()))


def wilcoxon_p(differences: Floats) -> float:
    """Two-sided p of the signed-rank test that paired differences are symmetric about 0.

    Normal approximation with the correction for ties and no zeros, as the usual tables recommend from about 20 pairs;
    exact by the sign test below that.
    """
    known = differences[np.isfinite(differences) & (differences != 0)]
    count = len(known)
    if count < 20:
        return binomial_p(int((known > 0).sum()), count)
    ranked = ranks(np.abs(known))
    _, ties = np.unique(np.abs(known), return_counts=True)
    variance = count * (count + 1) * (2 * count + 1) / 24 - float((ties.astype(float) ** 3 - ties).sum()) / 48
    if variance <= 0:
        return 1.0
    z = (ranked[known > 0].sum() - count * (count + 1) / 4) / sqrt(variance)
    return float(erfc(abs(z) / sqrt(2)))


def ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[which]


def rank_correlation(one: Floats, other: Floats) -> float | None:
    """Spearman's, over the pairs that are both finite; None where one of them is constant."""
    known = np.isfinite(one) & np.isfinite(other)
    if known.sum() < 3:
        return None
    a, b = ranks(one[known]), ranks(other[known])
    if not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])
