"""Trajectories of deltas, and how far apart two of them are. Deltas and distances in units of waypoint spacings.

ADE and FDE are taken between positions, the cumulative sums of deltas in the robot frame: an error early on moves
everything after it. A number alone says little; `still` and `straight` are what no model is needed for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def positions(deltas: Array) -> Array:
    """[..., H, 2] cumulative positions, the start (0, 0) left out."""
    return np.cumsum(deltas, axis=-2)


def displacement(predicted: Array, target: Array) -> Array:
    """[..., H] distance between the positions of two trajectories of deltas [..., H, 2]."""
    return np.linalg.norm(positions(predicted) - positions(target), axis=-1)


def ade(predicted: Array, target: Array) -> Array:
    """[...] average displacement error: the mean over steps."""
    return displacement(predicted, target).mean(-1)


def fde(predicted: Array, target: Array) -> Array:
    """[...] final displacement error: at the last step."""
    return displacement(predicted, target)[..., -1]


def still(target: Array) -> Array:
    """The prediction of a robot that never moves."""
    return np.zeros_like(target)


def straight(target: Array, step: float) -> Array:
    """The prediction of a robot that always goes ahead, `step` units at a time (the training median)."""
    ahead = np.zeros_like(target)
    ahead[..., 0] = step
    return ahead
