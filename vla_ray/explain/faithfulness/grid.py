"""Maps and masks brought to one grid of canvas cells, so that methods of different resolution compare."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import TargetError
from vla_ray.explain.heatmap import resample

MapArray = NDArray[np.floating]


def on_grid(values: MapArray, shape: tuple[int, int]) -> MapArray:
    """A map [r, c] on `shape`: a coarser one is repeated cell by cell, a finer one summed over each cell.

    Repetition keeps equal values exactly equal, so that ties stay ties.

    Raises:
        TargetError: the map is not two-dimensional, or a value is not finite.
    """
    values = finite(values)
    if values.shape[0] > shape[0] or values.shape[1] > shape[1]:
        return resample(values.astype(np.float32), shape)
    rows, columns = (np.arange(n) * m // n for n, m in zip(shape, values.shape, strict=True))
    return values[rows[:, None], columns[None, :]]


def finite(values: MapArray) -> MapArray:
    """The map as a float array [r, c], or TargetError."""
    values = np.asarray(values)
    values = values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float64)
    if values.ndim != 2:
        raise TargetError(f"a map has rows and columns, this one has the shape {values.shape}.")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise TargetError(f"the map has {bad} of {values.size} values that are not finite; it cannot be scored.")
    return values


def coverage(mask_HW: NDArray[np.bool_], geometry: TileGeometry, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Which share of every canvas cell a mask of the original picture covers, [rows, columns] in [0, 1].

    Rows of the picture that were cropped away before the model saw it count for nothing.

    Raises:
        TargetError: the mask is not of the picture's size.
    """
    mask = np.asarray(mask_HW)
    if mask.shape != (geometry.height, geometry.width):
        size = " x ".join(str(n) for n in mask.shape)
        raise TargetError(
            f"the mask is {size}, the picture {geometry.height} x {geometry.width} (height x width); "
            "give a mask of the original picture's size."
        )
    seen = mask[: geometry.kept_height].astype(np.float32)
    return np.clip(resample(seen, shape) * (shape[0] * shape[1] / seen.size), 0, 1).astype(np.float32)
