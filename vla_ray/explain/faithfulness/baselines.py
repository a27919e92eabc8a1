"""Maps that know nothing of the frame, or nothing of its content: what every method must beat.

A random map of the same statistics has the blobs of a real one in the wrong places. The mean map knows where causes
usually are; on driving scenes it comes close to good methods in many measures, so it stands in every table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla_ray.errors import TargetError
from vla_ray.explain.faithfulness.grid import MapArray, finite, on_grid

How = Literal["roll", "blocks"]
BLOCK = 4  # cells


def random_maps(values: MapArray, count: int, seed: int = 0, how: How = "roll") -> list[MapArray]:
    """Maps with the same values and, as far as possible, the same blobs, elsewhere.

    Args:
        how: `roll` shifts the map cyclically by a random offset, never by none; `blocks` permutes its 4 x 4 blocks
            (what a grid leaves over at its right and lower border stays).
    """
    values, rng = finite(values), np.random.default_rng(seed)
    if how == "blocks":
        return [_shuffled(values, rng) for _ in range(count)]
    rows, columns = values.shape
    offsets = rng.integers(1, max(2, rows * columns), size=count)
    return [np.roll(values, (int(o // columns), int(o % columns)), (0, 1)) for o in offsets]


def _shuffled(values: MapArray, rng: np.random.Generator) -> MapArray:
    rows, columns = (extent // BLOCK for extent in values.shape)
    out = values.copy()
    inner = values[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)
    mixed = rng.permutation(inner.reshape(-1, BLOCK, BLOCK)).reshape(inner.shape).swapaxes(1, 2)
    out[: rows * BLOCK, : columns * BLOCK] = mixed.reshape(rows * BLOCK, columns * BLOCK)
    return out


def mean_map(maps: Iterable[MapArray]) -> MapArray:
    """The prior: mean of the maps' positive parts, each brought to a sum of one. Maps without positive mass count zero.

    Take it over other scenes than the one it is compared on, or over all; all maps lie on the first one's grid.
    """
    shares = [_unit_mass(finite(values)) for values in maps]
    if not shares:
        raise TargetError("a mean map needs at least one map.")
    shape = (shares[0].shape[0], shares[0].shape[1])
    return np.mean([on_grid(share, shape) for share in shares], axis=0)


def _unit_mass(values: MapArray) -> NDArray[np.float64]:
    positive = np.clip(values, 0, None).astype(np.float64)
    return positive / (positive.sum() or 1.0)
