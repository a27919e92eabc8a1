"""Contact sheets: columns of one width, the rules of overlays in every cell, and refusals in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from vla_ray.data.tiles import Tiler
from vla_ray.errors import TargetError
from vla_ray.explain.heatmap import HeatMap
from vla_ray.report.overlay import PAPER, WARNING
from vla_ray.report.sheet import OUTLINE, Panel, SheetRow, sheet
from vla_ray.report.trajectory import ROUTE

COLUMNS = ("relevancy", "rollout")
BLUE = np.broadcast_to(np.array([40, 90, 200], np.uint8), (224, 448, 3)).copy()


def heat(values: np.ndarray) -> HeatMap:
    geometry = Tiler(448, 2, cut_bottom=True, use_thumbnail=False)(BLUE)[1]
    return HeatMap(np.asarray(values, np.float32), geometry)


def hot(value: float = 1.0) -> HeatMap:
    values = np.zeros((8, 16))
    values[2:5, 4:8] = value
    return heat(values)


def row(**changes: Any) -> SheetRow:
    panels = {"relevancy": Panel(hot()), "rollout": Panel(hot(0.5))}
    return SheetRow(**{"label": "town/frame_0001", "rgb": BLUE, "panels": panels} | changes)


def cells(rows: Sequence[SheetRow], columns: Sequence[str] = COLUMNS, width: int = 1000) -> list[list[np.ndarray]]:
    """The pictures of a sheet [rows][columns], found by what is not paper in wide runs."""
    page = sheet(rows, columns, width)
    count, margin = len(columns) + 1, round(width / 100)
    cell = (width - (count + 1) * margin) // count
    lefts = [margin + k * (cell + margin) for k in range(count)]
    filled = (page[:, lefts[0] : lefts[0] + cell] != PAPER).any(-1).mean(1) > 0.9
    edges = np.flatnonzero(np.diff(np.concatenate([[0], filled.astype(int), [0]])))
    spans = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 20]
    assert len(spans) == len(rows)
    for a, b in spans:  # the gutters are empty
        assert all((page[a:b, left - margin : left] == PAPER).all() for left in lefts)
    return [[page[a:b, left : left + cell] for left in lefts] for a, b in spans]


def test_rows_are_frames_and_columns_are_methods_of_one_width() -> None:
    found = cells([row(), row(label="town/frame_0002")])
    assert {c.shape for cs in found for c in cs} == {(160, 320, 3)}
    (picture, strong, weak), _ = found
    assert (np.abs(picture.astype(int) - [40, 90, 200]) <= 1).all()
    at = (slice(50, 55), slice(110, 115))  # inside the hot cells
    change = [np.abs(c[at].astype(int) - [40, 90, 200]).sum() for c in (picture, strong, weak)]
    assert change[0] < change[2] < change[1]
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_each_map_has_its_scenes_scale() -> None:
    panels = {"relevancy": Panel(hot(1.0), scale=1.0), "rollout": Panel(hot(7.0), scale=7.0)}
    _, a, b = cells([row(panels=panels)])[0]
    np.testing.assert_array_equal(a, b)


def test_signed_columns_have_their_own_colours() -> None:
    panels = {"relevancy": Panel(hot(-1.0), signed=True), "rollout": Panel(hot(-1.0))}
    picture, signed, unsigned = cells([row(panels=panels, rgb=np.full_like(BLUE, 128))])[0]
    assert (signed[52, 112] != picture[52, 112]).any()
    np.testing.assert_array_equal(unsigned[52, 112], picture[52, 112])


def test_a_mask_is_outlined_in_the_picture_only() -> None:
    mask = np.zeros((224, 448), bool)
    mask[80:140, 200:260] = True
    picture, first, _ = cells([row(mask=mask)])[0]
    marked = (np.abs(picture.astype(int) - OUTLINE).sum(-1) < 60).nonzero()
    scale = 320 / 448
    assert marked[0].min() == pytest.approx(80 * scale, abs=4)
    assert marked[1].max() == pytest.approx(260 * scale, abs=4)
    inside = picture[round(90 * scale) : round(130 * scale), round(210 * scale) : round(250 * scale)]
    assert (np.abs(inside.astype(int) - [40, 90, 200]) <= 1).all()  # what is outlined stays visible
    assert not (np.abs(first.astype(int) - OUTLINE).sum(-1) < 60).any()
    empty, *_ = cells([row(mask=np.zeros_like(mask))])[0]
    assert (np.abs(empty.astype(int) - [40, 90, 200]) <= 1).all()


def test_the_plan_is_drawn_into_the_picture_only() -> None:
    picture, first, _ = cells([row(route=[[x, 0.5] for x in range(1, 20)])])[0]
    assert (picture == ROUTE).all(-1).any()
    assert not (first == ROUTE).all(-1).any()


def test_a_degenerate_frame_says_so() -> None:
    picture, degenerate, _ = cells([row(panels={"relevancy": Panel(None), "rollout": Panel(hot())})])[0]
    assert (degenerate == WARNING).all(-1).any()
    np.testing.assert_array_equal(degenerate[:40], picture[:40])  # undimmed, uncoloured


def test_frames_of_different_shapes_share_a_sheet() -> None:
    rgb = np.full((400, 400, 3), 90, np.uint8)
    geometry = Tiler(448, 2, cut_bottom=True, use_thumbnail=False)(rgb)[1]
    square = HeatMap(np.ones((8, 8), np.float32), geometry)
    tall = row(rgb=rgb, panels={name: Panel(square) for name in COLUMNS})
    assert [cs[0].shape for cs in cells([row(), tall])] == [(160, 320, 3), (320, 320, 3)]


def test_long_names_and_odd_letters_fit() -> None:
    names = ["a very long name of a method " * 5, "\U0001f697\ud800" * 40]
    here = row(label="scene/" * 200, note="\u4f60\n" * 300, panels={name: Panel(hot()) for name in names})
    page = sheet([here], names, width=600)
    assert (page[:, -3:] == PAPER).all()
    assert len(cells([here], names, width=600)) == 1


def test_refusals() -> None:
    with pytest.raises(TargetError, match=r"town/frame_0001 has no map 'relevance'; .* Did you mean 'relevancy'\?"):
        sheet([row()], ["relevance"])
    with pytest.raises(TargetError, match="its mask has 448 x 100 pixels, its picture 448 x 224"):
        sheet([row(mask=np.zeros((100, 448), bool))], COLUMNS)
    with pytest.raises(TargetError, match="the map is of a picture of 448 x 224"):
        sheet([row(rgb=BLUE[:100])], COLUMNS)
    with pytest.raises(ValueError, match="at least one row"):
        sheet([], COLUMNS)
    with pytest.raises(ValueError, match="do not fit into 90 pixels"):
        sheet([row()], COLUMNS, width=90)
