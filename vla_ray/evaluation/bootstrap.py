"""Means over frames with confidence intervals over scenes.

Frames of one scene resemble each other, so resampling frames gives intervals that are far too narrow. Whole scenes are
drawn instead (cluster bootstrap, percentile interval), seeded, so that a table is the same every time it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over frames. `low` and `high` are None together, and `reason` says why.

    Attributes:
        frames, scenes: that had a value.
    """

    mean: float | None
    low: float | None
    high: float | None
    frames: int
    scenes: int
    reason: str | None = None

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        return f"{self.mean:.2f}" if self.low is None else f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def mean_with_interval(
    values: Sequence[float | None],
    scenes: Sequence[str],
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """The mean over frames, every frame alike, and its interval from resampled scenes.

    Args:
        values: one for each frame; None where the frame has none (excluded, no mask), which is left out.
        scenes: the scene of each frame.

    Raises:
        ValueError: a value is not finite, or the two differ in length.
    """
    known = [(v, s) for v, s in zip(values, scenes, strict=True) if v is not None]
    if not known:
        return Estimate(None, None, None, 0, 0, "no frame has a value")
    numbers = np.array([v for v, _ in known], np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{int((~np.isfinite(numbers)).sum())} of {len(numbers)} values are not finite")
    names, which = np.unique([s for _, s in known], return_inverse=True)
    mean, count = float(numbers.mean()), len(names)
    if count < 2:
        return Estimate(mean, None, None, len(numbers), count, "one scene: there is nothing to resample")
    sums, frames = np.bincount(which, numbers), np.bincount(which)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)
    means = (draws @ sums) / (draws @ frames)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), len(numbers), count)


def paired_difference(
    first: Sequence[float | None],
    second: Sequence[float | None],
    scenes: Sequence[str],
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Mean of first - second over the frames that have both, with its interval from resampled scenes.

    Two methods on the same frames are compared by this, not by whether their own intervals overlap: what makes a frame
    hard for both cancels. Zero outside the interval: they differ. Arguments as for `mean_with_interval`.
    """
    differences = [None if a is None or b is None else a - b for a, b in zip(first, second, strict=True)]
    return mean_with_interval(differences, scenes, samples, level, seed)
