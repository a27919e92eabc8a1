"""A map over the picture: tiles put back together on the canvas, and from there onto the original picture.

The canvas is what the model saw, resized: tiles lie on it side by side, and a map has one value per cell (a patch, or
an image token). The part of the picture that was cropped away before has no value at all, not zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import TargetError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Relevance of every cell of the canvas.

    Attributes:
        values: [rows, columns] float32, all tiles of the canvas; finite, of either sign if the method is signed.
        thumbnail: [g, g] float32 of the tile that shows the whole canvas, where there is one.
    """

    values: FloatArray
    geometry: TileGeometry
    thumbnail: FloatArray | None = None

    @property
    def total(self) -> float:
        """Sum of the absolute values, the thumbnail's included."""
        extra = 0.0 if self.thumbnail is None else float(np.abs(self.thumbnail).sum())
        return float(np.abs(self.values).sum()) + extra

    def combined(self, thumbnail_weight: float = 1.0) -> HeatMap:
        """One canvas: the thumbnail's relevance is spread over the part of the canvas it shows, mass preserved."""
        if self.thumbnail is None:
            return self
        spread = resample(self.thumbnail, self.values.shape)
        return replace(self, values=self.values + thumbnail_weight * spread, thumbnail=None)

    def on_picture(self, smooth: bool = True) -> FloatArray:
        """[height, width] of the original picture, NaN where it was cropped away.

        Values are densities of a cell, interpolated (`smooth`) or repeated, so that a cell's value keeps its meaning.
        """
        g = self.geometry
        how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
        values = np.asarray(self.combined().values, np.float32)  # Pillow reads the bytes of any other type as float32
        seen = np.asarray(Image.fromarray(values, mode="F").resize((g.width, g.kept_height), how))
        return np.concatenate([seen, np.full((g.height - g.kept_height, g.width), np.nan, np.float32)])


def assemble(tiles_TGG: NDArray[np.floating], geometry: TileGeometry) -> HeatMap:
    """The map of a frame from those of its tiles, [T, g, g] or [T, g * g].

    Raises:
        TargetError: the number of tiles is not the picture's, or a value is not finite.
    """
    tiles = np.asarray(tiles_TGG, np.float32)
    if len(tiles) != geometry.num_tiles:
        raise TargetError(f"a map of {len(tiles)} tiles does not fit a picture of {geometry.num_tiles}.")
    if not np.isfinite(tiles).all():
        raise TargetError(f"the map has {int((~np.isfinite(tiles)).sum())} values that are not finite.")
    if tiles.ndim == 2:
        side = round(tiles.shape[1] ** 0.5)
        tiles = tiles.reshape(-1, side, side)
    side, thumbnail = tiles.shape[1], None
    boxes = geometry.boxes
    if geometry.thumbnail:
        tiles, thumbnail, boxes = tiles[:-1], tiles[-1].copy(), boxes[:-1]
    size = boxes[0][2] - boxes[0][0]  # tiles are square and of one size
    canvas = np.zeros((geometry.canvas_height // size * side, geometry.canvas_width // size * side), np.float32)
    for tile, (left, top, _, _) in zip(tiles, boxes, strict=True):
        row, column = top // size * side, left // size * side
        canvas[row : row + side, column : column + side] = tile
    return HeatMap(canvas, geometry, thumbnail)


def resample(values: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """The same mass on another grid: every cell is shared out over the cells it covers, by area."""
    rows, columns = (_shares(n, m) for n, m in zip(values.shape, shape, strict=True))
    return (rows.T @ values @ columns).astype(np.float32)


def _shares(source: int, target: int) -> NDArray[np.float64]:
    """[source, target]: which share of each source cell's extent lies in each target cell."""
    edges, cells = np.arange(source + 1) / source, np.arange(target + 1) / target
    low = np.maximum(edges[:-1, None], cells[None, :-1])
    high = np.minimum(edges[1:, None], cells[None, 1:])
    return np.clip(high - low, 0, None) * source
