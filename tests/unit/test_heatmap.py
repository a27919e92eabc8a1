"""Maps go back to where in the picture they came from, with their mass, and never onto what was cropped away."""

from __future__ import annotations

import numpy as np
import pytest

from vla_ray.data.tiles import TileGeometry, Tiler
from vla_ray.errors import TargetError
from vla_ray.explain.heatmap import HeatMap, assemble, resample


def geometry(
    width: int, height: int, size: int = 448, max_tiles: int = 2, cut: bool = True, thumbnail: bool = False
) -> TileGeometry:
    return Tiler(size, max_tiles, cut, thumbnail)(np.zeros((height, width, 3), np.uint8))[1]


def numbered(tiles: int, side: int) -> np.ndarray:
    return np.arange(tiles * side * side, dtype=np.float32).reshape(tiles, side, side)


def test_two_tiles_lie_side_by_side() -> None:
    tiles = numbered(2, 4)
    heat = assemble(tiles, geometry(448, 224))
    assert heat.thumbnail is None
    np.testing.assert_array_equal(heat.values, np.concatenate(list(tiles), axis=1))


def test_four_tiles_lie_row_by_row() -> None:
    a, b, c, d = tiles = numbered(4, 3)
    heat = assemble(tiles, geometry(400, 400, max_tiles=4, cut=False, size=100))
    np.testing.assert_array_equal(heat.values, np.block([[a, b], [c, d]]))


def test_tall_pictures_have_their_tiles_one_above_the_other() -> None:
    tiles = numbered(2, 4)
    np.testing.assert_array_equal(assemble(tiles, geometry(200, 500)).values, np.concatenate(list(tiles), axis=0))


def test_the_thumbnail_is_kept_apart() -> None:
    tiles = numbered(3, 4)
    heat = assemble(tiles, geometry(448, 224, thumbnail=True))
    np.testing.assert_array_equal(heat.values, np.concatenate([tiles[0], tiles[1]], axis=1))
    np.testing.assert_array_equal(heat.thumbnail, tiles[2])
    assert heat.total == tiles.sum()
    tiles[2] = -1
    assert heat.thumbnail is not None
    assert heat.thumbnail.min() > 0  # a copy: maps outlive the batch that they came from


def test_tiles_may_be_flat() -> None:
    tiles = numbered(2, 5)
    np.testing.assert_array_equal(
        assemble(tiles.reshape(2, 25), geometry(448, 224)).values, assemble(tiles, geometry(448, 224)).values
    )


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_tiles_is_refused(count: int) -> None:
    with pytest.raises(TargetError, match=f"a map of {count} tiles does not fit a picture of 2"):
        assemble(numbered(count, 4), geometry(448, 224))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    tiles = numbered(2, 4)
    tiles[0, 1, 2] = tiles[1, 0, 0] = bad
    with pytest.raises(TargetError, match="2 values that are not finite"):
        assemble(tiles, geometry(448, 224))


# Other grids


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 4), (8, 16), (13, 29)])
def test_resample_preserves_mass_and_where_it_is(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32) ** 2
    there = resample(values, shape)
    assert there.shape == shape
    np.testing.assert_allclose(there.sum(), values.sum(), rtol=1e-5)
    # Halves of the picture keep their share where both grids have a line in the middle.
    if shape[1] % 2 == 0:
        np.testing.assert_allclose(there[:, : shape[1] // 2].sum(), values[:, :4].sum(), rtol=1e-5)


def test_resample_is_exact_when_grids_nest() -> None:
    values = numbered(1, 4)[0]
    fine = resample(values, (8, 12))
    np.testing.assert_allclose(fine, np.repeat(np.repeat(values, 2, 0), 3, 1) / 6, rtol=1e-6)
    np.testing.assert_allclose(resample(fine, (4, 4)), values, rtol=1e-6)
    np.testing.assert_allclose(resample(values, (2, 2)), values.reshape(2, 2, 2, 2).sum((1, 3)), rtol=1e-6)
    np.testing.assert_array_equal(resample(values, (4, 4)), values)


def test_resample_shares_a_cell_by_area() -> None:
    np.testing.assert_allclose(resample(np.array([[3.0, 3.0]], np.float32), (1, 3)), [[2, 2, 2]])
    np.testing.assert_allclose(resample(np.array([[0.0, 4.0]], np.float32), (1, 3)), [[0, 4 / 3, 8 / 3]], rtol=1e-6)


def test_a_thumbnail_is_spread_over_the_whole_canvas() -> None:
    g = geometry(448, 224, thumbnail=True)
    tiles = np.zeros((3, 4, 4), np.float32)
    tiles[2, 1, 3] = 6.0  # second row, right quarter
    both = assemble(tiles, g).combined()
    expected = np.zeros((4, 8))
    expected[1, 6:] = 3.0
    np.testing.assert_allclose(both.values, expected)
    assert both.thumbnail is None
    assert both.combined() is both
    np.testing.assert_allclose(assemble(tiles, g).combined(thumbnail_weight=0.5).values, expected / 2)


# On the picture


def test_what_was_cropped_away_has_no_value() -> None:
    g = geometry(960, 540)
    assert g.kept_height == 378
    for smooth in (True, False):
        seen = HeatMap(np.ones((32, 64), np.float32), g).on_picture(smooth)
        assert seen.shape == (540, 960)
        assert np.isnan(seen[378:]).all()
        np.testing.assert_allclose(seen[:378], 1, rtol=1e-6)
    assert np.isfinite(HeatMap(np.ones((32, 64), np.float32), geometry(960, 540, cut=False)).on_picture()).all()


@pytest.mark.parametrize("size", [(960, 540), (1024, 512), (448, 224), (333, 171)])
@pytest.mark.parametrize("cell", [(0, 0), (31, 63), (7, 31), (20, 32), (15, 50)])
def test_a_hot_cell_lands_where_it_was_seen(size: tuple[int, int], cell: tuple[int, int]) -> None:
    g, (row, column) = geometry(*size), cell
    assert (g.canvas_width, g.canvas_height) == (896, 448)
    tiles = np.zeros((2, 32, 32), np.float32)
    tiles[column // 32, row, column % 32] = 1
    heat = assemble(tiles, g)
    height, width = g.kept_height / 32, g.width / 64  # of a cell, in pixels of the picture
    for smooth in (True, False):
        seen = np.nan_to_num(heat.on_picture(smooth))
        v, u = (np.average(axis + 0.5, weights=seen) for axis in np.indices(seen.shape))
        assert abs(v - (row + 0.5) * height) < height / 2
        assert abs(u - (column + 0.5) * width) < width / 2
        hottest = np.unravel_index(seen.argmax(), seen.shape)
        assert row * height - 1 <= hottest[0] <= (row + 1) * height
        assert column * width - 1 <= hottest[1] <= (column + 1) * width


def test_without_smoothing_cells_are_boxes_of_one_value() -> None:
    seen = HeatMap(numbered(1, 4)[0][:, :4].repeat(2, 1), geometry(448, 224)).on_picture(smooth=False)
    assert set(np.unique(seen[np.isfinite(seen)])) == set(map(float, range(16)))


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_maps_of_other_precision_are_drawn_alike(kind: type) -> None:
    values = np.random.default_rng(0).uniform(size=(8, 16)).astype(np.float16)
    g = geometry(448, 224)
    np.testing.assert_array_equal(
        HeatMap(values.astype(kind), g).on_picture(), HeatMap(values.astype(np.float32), g).on_picture()
    )
