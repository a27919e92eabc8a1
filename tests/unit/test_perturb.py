"""Hiding cells hides exactly them, in tiles and thumbnail alike; the blur knows no tile borders."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from vla_ray.data.tiles import TileGeometry, Tiler
from vla_ray.explain.perturb import (
    Probe,
    ask_in_batches,
    blurred,
    canvas,
    canvas_grid,
    cut,
    displacement,
    hide,
    mean_colour,
)
from vla_ray.explain.question import Answer

SIDE = 8
BOXES = ((0, 0, 8, 8), (8, 0, 16, 8))
GEOMETRY = TileGeometry(8, 16, 8, 8, 16, BOXES, thumbnail=False)
WITH_THUMBNAIL = TileGeometry(8, 16, 8, 8, 16, (*BOXES, (0, 0, 16, 8)), thumbnail=True)


def answer(n: int, x: Tensor) -> Answer:
    return Answer(x.view(n, 1, 1).expand(n, 20, 2), x.view(n, 1, 1).expand(n, 10, 2), x)


def noisy_picture(height: int = 96, width: int = 192) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_cell_is_hidden_where_it_lies_and_nowhere_else() -> None:
    pixels, baseline = torch.rand(2, 3, SIDE, SIDE), torch.rand(2, 3, SIDE, SIDE)
    masks = torch.eye(32, dtype=torch.bool).view(32, 4, 8)
    pictures = hide(pixels, baseline, masks, GEOMETRY)
    assert pictures.shape == (32, 2, 3, SIDE, SIDE)
    for n, picture in enumerate(pictures):
        row, column = divmod(n, 8)
        expected = pixels.clone()
        tile, x, y = column // 4, 2 * (column % 4), 2 * row
        expected[tile, :, y : y + 2, x : x + 2] = baseline[tile, :, y : y + 2, x : x + 2]
        assert torch.equal(picture, expected), (row, column)


def test_a_cell_may_span_tiles_and_be_hidden_in_part() -> None:
    pixels, baseline = torch.ones(2, 3, SIDE, SIDE), torch.zeros(2, 3, SIDE, SIDE)
    middle = hide(pixels, baseline, torch.tensor([[[0.0, 0.25, 0.25, 0.0]]]), GEOMETRY)[0]
    assert torch.equal(middle[0, 0, 0], torch.tensor([1.0] * 4 + [0.75] * 4))
    assert torch.equal(middle[1, 0, 0], torch.tensor([0.75] * 4 + [1.0] * 4))
    whole = hide(torch.rand(2, 3, SIDE, SIDE), baseline + 0.3, torch.ones(1, 4, 8), GEOMETRY)[0]
    assert torch.equal(whole, baseline + 0.3)


def test_the_thumbnail_loses_the_same_part_of_the_scene() -> None:
    pixels, baseline = torch.ones(3, 3, SIDE, SIDE), torch.zeros(3, 3, SIDE, SIDE)
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[0, 1, 5] = True  # canvas rows 2-3, columns 10-11
    picture = hide(pixels, baseline, mask, WITH_THUMBNAIL)[0, :, 0]
    assert (picture[1] == 0).nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    assert (picture[2] == 0).nonzero().tolist() == [[2, 5], [3, 5]]
    assert bool((picture[0] == 1).all())


def test_the_blur_is_that_of_the_whole_canvas() -> None:
    tiles, geometry = Tiler(48, 2, cut_bottom=False, use_thumbnail=False)(noisy_picture())
    assert geometry.num_tiles == 2
    assert np.array_equal(cut(canvas(tiles, geometry), geometry), tiles)
    whole = Image.fromarray(canvas(tiles, geometry)).filter(ImageFilter.GaussianBlur(3))  # 48 / 16
    assert np.array_equal(canvas(blurred(tiles, geometry), geometry), np.asarray(whole))
    # A picture that is black left of the border and white right of it: a seam would stay sharp.
    step = np.stack([np.zeros((48, 48, 3), np.uint8), np.full((48, 48, 3), 255, np.uint8)])
    soft = canvas(blurred(step, geometry), geometry)[24, 46:50, 0].astype(int)
    assert soft[0] > 60
    assert soft[-1] < 195
    assert np.abs(np.diff(soft)).max() < 60
    assert np.array_equal(blurred(step, geometry, sigma=0), step)


def test_the_thumbnail_is_blurred_by_as_much_of_the_scene() -> None:
    tiles, geometry = Tiler(48, 2, cut_bottom=False, use_thumbnail=True)(noisy_picture())
    tiles = tiles.copy()
    tiles[0], tiles[1] = 0, 255
    tiles[2, :, :24], tiles[2, :, 24:] = 0, 255
    soft = blurred(tiles, geometry)
    small = Image.fromarray(canvas(soft, geometry)).resize((48, 48), Image.Resampling.BOX)
    assert np.abs(np.asarray(small).astype(int) - soft[2].astype(int)).max() < 16


def test_mean_colour_is_that_of_the_canvas() -> None:
    tiles, geometry = Tiler(48, 2, cut_bottom=False, use_thumbnail=True)(noisy_picture())
    tiles = tiles.copy()
    tiles[0], tiles[1], tiles[2] = 10, 30, 200
    assert np.array_equal(mean_colour(tiles, geometry), np.full_like(tiles, 20))


def test_canvas_grid() -> None:
    assert canvas_grid(GEOMETRY, 4) == (4, 8)
    assert canvas_grid(WITH_THUMBNAIL, 4) == (4, 8)
    assert canvas_grid(TileGeometry(9, 9, 9, 8, 8, BOXES[:1], False), 4) == (4, 4)


def test_pictures_are_made_a_batch_at_a_time_and_without_a_graph() -> None:
    log: list[str] = []

    def ask(pixels: Tensor) -> Answer:
        log.append(f"asked {len(pixels)}")
        assert not torch.is_grad_enabled()
        return answer(len(pixels), pixels.mean((1, 2, 3, 4)))

    def batches() -> Iterator[Tensor]:
        for n in (3, 2):
            log.append(f"made {n}")
            yield torch.full((n, 2, 3, SIDE, SIDE), float(n), requires_grad=True)

    got = ask_in_batches(ask, batches())
    assert log == ["made 3", "asked 3", "made 2", "asked 2"]
    assert got.scalar.tolist() == [3, 3, 3, 2, 2]
    assert got.scalar.dtype == torch.float64
    assert not got.route.requires_grad
    log.clear()
    masks = torch.rand(7, 4, 8) < 0.5
    probe = Probe(ask, torch.ones(2, 3, SIDE, SIDE), torch.zeros(2, 3, SIDE, SIDE), GEOMETRY, batch=3)
    torch.testing.assert_close(probe(masks).scalar, 1 - masks.double().mean((1, 2)), rtol=0, atol=1e-6)
    assert log == ["asked 3", "asked 3", "asked 1"]


def test_displacement_is_in_metres_and_blind_to_the_spacing_of_a_route() -> None:
    x = torch.linspace(0, 19, 20, dtype=torch.float64)
    route = torch.stack([x, 0 * x], -1)[None]
    uneven = torch.stack([x**2 / 19, 0 * x], -1)[None]
    shifted = route + torch.tensor([0.0, 3.0])
    speed = torch.zeros(1, 10, 2, dtype=torch.float64)
    original = Answer(route, speed, torch.zeros(1))
    moved = Answer(
        torch.cat([route, uneven, shifted]), torch.cat([speed, speed + 1, speed]), torch.zeros(3, dtype=torch.float64)
    )
    torch.testing.assert_close(
        displacement(moved, original, "route"), torch.tensor([0.0, 0.0, 3.0]).double(), atol=1e-3, rtol=0
    )
    expected = torch.tensor([0.0, 2**0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(displacement(moved, original, "speed"), expected)
    torch.testing.assert_close(displacement(moved, original, None), expected)  # a text target
