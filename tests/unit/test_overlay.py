"""Overlays: colour where the map is, nowhere else; captions that always fit; frames without a map that say so."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_ray.data.camera import Camera
from vla_ray.data.tiles import Tiler
from vla_ray.errors import TargetError
from vla_ray.explain.heatmap import HeatMap
from vla_ray.report.overlay import PAPER, WARNING, Caption, colored, draw, save_png, scene_scale
from vla_ray.report.trajectory import ROUTE, SPEED
from vla_ray.storage.files import Location

WIDTH, HEIGHT, KEPT = 448, 224, 157
GREY = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
CAPTION = Caption("town/frame_0001", "relevancy", "curv_energy", 0.125, "1/m^2", 5.0, "Keep going.")


def heat(values: np.ndarray, thumbnail: np.ndarray | None = None) -> HeatMap:
    geometry = Tiler(448, 2, cut_bottom=True, use_thumbnail=False)(GREY)[1]
    return HeatMap(np.asarray(values, np.float32), geometry, thumbnail)


def one_cell(value: float = 1.0, row: int = 4, column: int = 12) -> HeatMap:
    values = np.zeros((8, 16))
    values[row, column] = value
    return heat(values)


def strip_of(**options: object) -> np.ndarray:
    return draw(GREY, one_cell(), **{"caption": CAPTION} | options)[HEIGHT:]  # type: ignore[arg-type]


def has(picture: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((picture == color).all(-1).any())


# Colour


def test_only_what_matters_is_coloured() -> None:
    changed = (colored(GREY, one_cell(), scale=1.0) != GREY).any(-1)[:KEPT]
    rows, columns = np.nonzero(changed)
    cell_h, cell_w = KEPT / 8, WIDTH / 16
    assert 4.5 * cell_h == pytest.approx(rows.mean() + 0.5, abs=1)
    assert 12.5 * cell_w == pytest.approx(columns.mean() + 0.5, abs=1)
    assert rows.min() >= 3 * cell_h - 1  # smoothing reaches at most to the neighbours' middles
    assert columns.max() <= 14 * cell_w + 1


def test_nothing_matters_nothing_changes_above_the_crop() -> None:
    picture = np.random.default_rng(0).integers(0, 256, GREY.shape, dtype=np.uint8)
    np.testing.assert_array_equal(colored(picture, heat(np.zeros((8, 16))), scale=1.0)[:KEPT], picture[:KEPT])


def test_the_cropped_part_is_dimmed_and_never_coloured() -> None:
    below = colored(GREY, heat(np.full((8, 16), 9.0)), scale=1.0)[KEPT:]
    assert len(np.unique(below)) == 1  # grey stays grey
    assert 40 < below[0, 0, 0] < 100


def test_stronger_values_cover_more_up_to_the_scale() -> None:
    def at(value: float, **options: float) -> np.ndarray:
        return colored(GREY, heat(np.full((8, 16), value)), scale=2.0, **options)[10, 10].astype(float)

    # On a uniform map the change of the picture grows with the value...
    changes = [np.abs(at(v) - 128).sum() for v in (0, 0.2, 0.8, 1.4, 2.0)]
    assert changes == sorted(changes)
    assert changes[0] == 0
    # ... until the scale, whatever comes after it; and with the opacity.
    np.testing.assert_array_equal(at(2.0), at(50.0))
    assert np.abs(at(2.0, opacity=0.3) - 128).sum() < changes[-1]
    np.testing.assert_array_equal(at(2.0, opacity=0.0), [128] * 3)


def test_equal_values_look_equal_in_two_frames_of_a_scene() -> None:
    weak, strong = heat(np.tile(np.linspace(0, 1, 16), (8, 1))), heat(np.tile(np.linspace(0, 2, 16), (8, 1)))
    a, b = (colored(GREY, h, scale=2.0)[:KEPT] for h in (weak, strong))
    assert (a[:, -1] == colored(GREY, heat(np.full((8, 16), 1.0)), scale=2.0)[0, 0]).all()
    assert not (a[:, -1] == b[:, -1]).all()


def test_colours_are_even_to_the_eye() -> None:
    """Luminance grows steadily with the value, so a map is also read in print and by the colour-blind."""
    black, ramp = np.zeros_like(GREY), np.tile(np.linspace(0, 1, 16), (8, 1))
    for signed, values in ((False, ramp), (True, ramp), (True, -ramp)):
        full = colored(black, heat(values), scale=1.0, signed=signed, opacity=1.0)[80].astype(float)
        assert (np.diff(full @ [0.2126, 0.7152, 0.0722]) > -1.0).all()
        assert full[-1].sum() > 300


def test_signs() -> None:
    def middle(value: float, signed: bool) -> np.ndarray:
        return colored(GREY, heat(np.full((8, 16), value)), scale=1.0, signed=signed)[10, 10].astype(int)

    (r, _, b), (r2, _, b2) = middle(1.0, True), middle(-1.0, True)
    assert r > b + 60
    assert b2 > r2 + 60
    np.testing.assert_array_equal(middle(-1.0, False), [128] * 3)


def test_a_thumbnails_share_is_shown_too() -> None:
    thumbnail = np.zeros((4, 4), np.float32)
    thumbnail[1, 0] = 4.0
    picture = colored(GREY, heat(np.zeros((8, 16)), thumbnail), scale=0.5)
    assert has(picture[:KEPT, : WIDTH // 4], (128, 128, 128))
    assert (picture[50, 50] != 128).any()
    assert (picture[:KEPT, WIDTH // 2 :] == 128).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refusals(bad: float) -> None:
    with pytest.raises(TargetError, match="1 values that are not finite"):
        draw(GREY, one_cell(bad), scale=1.0)
    with pytest.raises(TargetError, match="of a picture of 448 x 224 pixels, this one has 448 x 200") as caught:
        draw(GREY[:200], one_cell(), scale=1.0)
    assert "\n" not in str(caught.value)
    for scale in (0.0, -1.0, bad):
        with pytest.raises(ValueError, match="scale is"):
            draw(GREY, one_cell(), scale=scale)


def test_the_scenes_scale() -> None:
    values = np.arange(128).reshape(8, 16) / 127
    assert scene_scale([heat(values)]) == pytest.approx(0.99, abs=1e-6)
    assert scene_scale(iter([heat(values), heat(-3 * values)])) == pytest.approx(
        np.percentile(np.concatenate([values, 3 * values]), 99), rel=1e-6
    )
    assert scene_scale([one_cell(0.25), heat(np.zeros((8, 16)))]) == 0.25  # sparser than the percentile can see
    assert scene_scale([heat(np.zeros((8, 16)))]) == 1.0
    assert scene_scale([]) == 1.0


# The plan


def test_the_plan_lies_where_the_camera_sees_it() -> None:
    camera = Camera(fov_deg=85, height_m=1.5, behind_m=0.0, pitch_rad=-0.05)
    route = np.stack([np.arange(20.0), np.zeros(20)], -1)
    speed = np.array([[4.0, 1.0], [8.0, -1.0]])
    picture = draw(GREY, None, route=route, speed_wps=speed, camera=camera)
    for points, color in ((route[3:], ROUTE), (speed, SPEED)):
        for u, v in camera.project(points, WIDTH, HEIGHT):
            assert (picture[int(v), int(u)] == color).all()
    # Antialiased: between line and edge lie mixtures of the two, and nothing is drawn far from the plan.
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    assert (picture[: HEIGHT // 4] == 128).all()


def test_simlingos_camera_is_the_default() -> None:
    speed = [[6.0, 0.5]]
    np.testing.assert_array_equal(
        draw(GREY, None, speed_wps=speed), draw(GREY, None, speed_wps=speed, camera=Camera(110, 2.0, 1.5))
    )


@pytest.mark.parametrize(
    "points",
    [
        [[-5.0, 0.0], [-9.0, 1.0]],  # behind
        [[10.0, 60.0], [10.0, 70.0]],  # to the side
        [[np.nan, 1.0], [1e30, 1e31], [np.inf, 0.0], [5.0, -1e12]],
        np.zeros((0, 2)),
    ],
)
def test_what_is_not_in_the_picture_is_left_out(points: object) -> None:
    np.testing.assert_array_equal(draw(GREY, None, route=points, speed_wps=points), GREY)  # type: ignore[arg-type]


def test_a_line_stops_at_a_point_without_a_place() -> None:
    whole = draw(GREY, None, route=[[4.0, -3.0], [4.0, 0.0], [4.0, 3.0]])
    broken = draw(GREY, None, route=[[4.0, -3.0], [np.nan, 0.0], [4.0, 3.0]])
    assert has(whole[:, WIDTH // 2 - 20 : WIDTH // 2 + 20], ROUTE)
    assert not has(broken[:, WIDTH // 2 - 20 : WIDTH // 2 + 20], ROUTE)


# The caption


def test_without_a_caption_the_overlay_is_as_large_as_the_picture() -> None:
    assert draw(GREY, one_cell()).shape == GREY.shape
    assert draw(GREY, one_cell(), width=896).shape == (448, 896, 3)
    assert draw(GREY, one_cell(), width=896, caption=CAPTION).shape[1] == 896


def test_a_degenerate_frame_is_marked_and_its_picture_untouched() -> None:
    overlay = draw(GREY, None, caption=CAPTION)
    np.testing.assert_array_equal(overlay[:HEIGHT], GREY)
    assert has(overlay[HEIGHT:], WARNING)
    with_map = draw(GREY, one_cell(), caption=CAPTION)
    assert not has(with_map[HEIGHT:], WARNING)
    assert overlay.shape == with_map.shape


def test_everything_said_is_in_the_caption() -> None:
    usual = strip_of()
    for change in (
        {"frame_id": "town/frame_0002"},
        {"method": "rollout"},
        {"target": "curv_diff"},
        {"value": 0.126},
        {"value": None},
        {"unit": "m"},
        {"speed_mps": 5.1},
        {"speed_mps": None},
        {"commentary": "Stop."},
    ):
        assert (strip_of(caption=replace(CAPTION, **change)) != usual).any(), change  # type: ignore[arg-type]
    assert (strip_of(scale=2.0) != usual).any()  # the bar's label
    assert (strip_of(signed=True) != usual).any()
    assert has(strip_of(route=[[5, 0]]), ROUTE)
    assert not has(usual, ROUTE)


def test_frames_of_one_size_give_overlays_of_one_size() -> None:
    shapes = {strip_of(caption=Caption("s/f", "m", "t", commentary="word " * n)).shape for n in (0, 5, 40, 500)}
    assert len(shapes) == 1


ODD = [
    "",
    "unbreakable" * 300,
    "word " * 400,
    "\u4f60\u597d\u4e16\u754c" * 100,
    "\u0645\u0631\u062d\u0628\u0627 " * 100,
    "\U0001f697\u200d\U0001f6a6" * 80,
    "a\nb\tc\x00d\x1b[31m\u2028e\u202ef",
    "half a pair \ud800 and \udfff",
    "e\u0301" * 500,
    "".join(map(chr, np.random.default_rng(0).integers(1, 0x2FFFF, 600).tolist())),
]


@pytest.mark.parametrize("width", [40, 200, 448, 960])
@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_any_text_fits(text: str, width: int) -> None:
    caption = Caption(text, text, text, 1e300, text, 1e9, text)
    for here in (one_cell(), None):
        strip = draw(GREY, here, caption=caption, width=width, route=[[5, 0]], speed_wps=[[5, 0]])[
            round(HEIGHT * width / WIDTH) :
        ]
        border = 4  # of at least 9 pixels margin: an accent may reach over its letter
        for edge in (strip[:, :border], strip[:, -border:], strip[-border // 2 :]):
            assert (edge == PAPER).all()


# Files


def test_save_png(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    size = save_png(Location.of(str(tmp_path / "overlays/relevancy/town/a.png")), picture)
    (file,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert file.stat().st_size == size
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file.read_bytes()))), picture)
