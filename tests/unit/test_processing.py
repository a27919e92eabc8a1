"""Tiles and prompts beyond what the golden frames show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vla_ray.data.tiles import TileGeometry, Tiler, tile_grid
from vla_ray.models.simlingo.processing import default_question, normalise


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (1024, 359, (2, 1)),  # CARLA's frame after the crop
        (960, 378, (2, 1)),
        (448, 448, (1, 1)),
        (500, 448, (1, 1)),
        (300, 900, (1, 2)),
        (10_000, 1, (2, 1)),
        (1, 1, (1, 1)),
        (672, 448, (2, 1)),  # aspect 1.5, a tie: more than half the pixels of two tiles
        (300, 200, (1, 1)),  # the same tie, fewer pixels
    ],
)
def test_grid(width: int, height: int, grid: tuple[int, int]) -> None:
    assert tile_grid(width, height, 448, max_tiles=2) == grid


def test_tiles_and_geometry() -> None:
    rgb = np.zeros((100, 200, 3), np.uint8)
    rgb[:, :100, 0] = 255  # left half red
    tiles, geometry = Tiler(32, 2, cut_bottom=True, use_thumbnail=False)(rgb)
    assert tiles.shape == (2, 32, 32, 3)
    assert tiles[0, :, :28, 0].min() == 255
    assert tiles[1, :, 4:, 0].max() == 0
    assert geometry == TileGeometry(100, 200, 70, 32, 64, ((0, 0, 32, 32), (32, 0, 64, 32)), False)
    assert TileGeometry.from_dict(geometry.to_dict()) == geometry


def test_thumbnail_is_the_last_tile_and_only_with_two() -> None:
    tiler = Tiler(32, 2, cut_bottom=False, use_thumbnail=True)
    tiles, geometry = tiler(np.zeros((50, 100, 3), np.uint8))
    assert (len(tiles), geometry.thumbnail, geometry.boxes[-1]) == (3, True, (0, 0, 64, 32))
    assert tiler(np.zeros((50, 50, 3), np.uint8))[1].num_tiles == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_smallest_pictures(shape: tuple[int, int]) -> None:
    tiles, geometry = Tiler(32, 2, cut_bottom=True, use_thumbnail=False)(np.full((*shape, 3), 7, np.uint8))
    assert geometry.kept_height >= 1
    assert (tiles == 7).all()


def test_normalise() -> None:
    x = normalise(np.full((1, 2, 2, 3), 255, np.uint8))
    assert x.shape == (1, 3, 2, 2)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(x[0, :, 0, 0], expected)


def test_default_question() -> None:
    assert default_question(5, None) == "Current speed: 5.0 m/s. Command: follow the road. What should the ego do next?"
    assert "Target waypoint: <TARGET_POINT><TARGET_POINT>." in default_question(5, ((1, 2), (3, 4)))
