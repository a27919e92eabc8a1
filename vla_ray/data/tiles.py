"""Cutting a picture into the square tiles that a vision tower reads, and remembering where they lie.

InternVL's dynamic resolution with SimLingo's crop, on uint8 arrays. No torch here: decode tasks use it alone, and stay
small. `TileGeometry` is what brings a map back onto the original picture.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

CUT_BOTTOM = 4.8  # sixteenths of the picture's height that show the bonnet; whole rows, rounded down


@dataclass(frozen=True, slots=True)
class TileGeometry:
    """How tiles lie on the picture. Pixels; boxes are (left, top, right, bottom) on the resized canvas.

    original picture (height x width) -> first `kept_height` rows -> resized to canvas -> cut into boxes.
    A thumbnail, when there is one, is the last tile and shows the whole canvas.
    """

    height: int
    width: int
    kept_height: int
    canvas_height: int
    canvas_width: int
    boxes: tuple[tuple[int, int, int, int], ...]
    thumbnail: bool

    @property
    def num_tiles(self) -> int:
        return len(self.boxes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TileGeometry:
        return cls(**{**values, "boxes": tuple(tuple(box) for box in values["boxes"])})


class Tiler:
    """Cuts pictures into tiles.

    Args:
        image_size: side of a tile.
        max_tiles: the most tiles besides the thumbnail.
        cut_bottom: drop the bottom 4.8/16 of the picture, as in SimLingo's training.
        use_thumbnail: append the whole picture as one more tile where there are several.
    """

    def __init__(self, image_size: int, max_tiles: int, cut_bottom: bool, use_thumbnail: bool) -> None:
        self.image_size, self.max_tiles = image_size, max_tiles
        self.cut_bottom, self.use_thumbnail = cut_bottom, use_thumbnail

    def __call__(self, rgb_HW3: np.ndarray) -> tuple[np.ndarray, TileGeometry]:
        """uint8 [H, W, 3] -> uint8 tiles [T, S, S, 3] and where they lie."""
        height, width = rgb_HW3.shape[:2]
        # A picture of one or two rows keeps one: an empty one cannot be resized.
        kept = max(1, int(height - height * CUT_BOTTOM // 16)) if self.cut_bottom else height
        size = self.image_size
        cols, rows = tile_grid(width, kept, size, self.max_tiles)
        image = Image.fromarray(rgb_HW3[:kept])
        canvas = np.asarray(image.resize((size * cols, size * rows), Image.Resampling.BICUBIC))
        boxes = [(size * c, size * r, size * (c + 1), size * (r + 1)) for r in range(rows) for c in range(cols)]
        tiles = [canvas[top:bottom, left:right] for left, top, right, bottom in boxes]
        thumbnail = self.use_thumbnail and len(tiles) > 1
        if thumbnail:
            tiles.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
            boxes.append((0, 0, size * cols, size * rows))
        geometry = TileGeometry(height, width, kept, size * rows, size * cols, tuple(boxes), thumbnail)
        return np.stack(tiles), geometry


def tile_grid(width: int, height: int, size: int, max_tiles: int) -> tuple[int, int]:
    """Columns and rows whose aspect is nearest to the picture's (InternVL's dynamic resolution).

    On a tie the larger grid wins only if the picture has more than half of its pixels.
    """
    grids = sorted(
        {(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles},
        key=lambda g: (g[0] * g[1], g),
    )
    best, best_difference = (1, 1), math.inf
    for cols, rows in grids:
        difference = abs(width / height - cols / rows)
        larger_on_tie = difference == best_difference and width * height > 0.5 * size * size * cols * rows
        if difference < best_difference or larger_on_tie:
            best, best_difference = (cols, rows), difference
    return best
