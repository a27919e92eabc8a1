"""Draws a scene: the picture, and for every pixel which kind of thing it shows.

A pinhole camera at the ego's origin, 1.5 m above the ground, looking along x; the picture is drawn at twice its size
and averaged, the ids are drawn at its size. No randomness beyond the scene's own fields: equal scenes, equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from vla_ray.data.synthetic.world import (
    CAUSE_KIND,
    DISTRACTORS,
    FloatArray,
    Kind,
    Scene,
    Thing,
    heading,
    road_to_ego,
)
from vla_ray.errors import ConfigError, nearest

ByteArray = NDArray[np.uint8]
Shape = Callable[..., None]

FOV_DEG, CAMERA_HEIGHT_M = 85.0, 1.5
ASPECT = 2  # width over height
_NEAR_M = 0.9  # ground nearer than this is below the picture
_THING_NEAR_M = 2.0
_VIEW_M = 90.0
_OVERSAMPLE = 2
_LEFT_KERB_M, _RIGHT_KERB_M = -5.9, 2.4  # lateral offsets of the asphalt's edges

MASKS = ("cause", "markings", "distractor")


def focal_px(width: int) -> float:
    """Focal length in pixels of a picture `width` pixels wide."""
    return float(width / (2 * np.tan(np.radians(FOV_DEG / 2))))


def project(scene: Scene, points: ArrayLike, width: int = 448) -> NDArray[np.float64]:
    """Ego-frame points [..., 2] on the ground, or [..., 3] with height (m), to pixels [..., 2] (u right, v down)."""
    p = np.asarray(points, np.float64)
    z = p[..., 2] if p.shape[-1] == 3 else np.zeros(p.shape[:-1])
    f, x = focal_px(width), np.maximum(p[..., 0], 0.8)
    centre = width / ASPECT / 2 + f * scene.look.pitch
    return np.stack([width / 2 + f * p[..., 1] / x, centre + f * (CAMERA_HEIGHT_M - z) / x], -1)


class _Canvas:
    """Draws every shape into the picture (oversampled) and its kind into the ids."""

    def __init__(self, scene: Scene, width: int) -> None:
        self.scene, self.width, self.height = scene, width, width // ASPECT
        self.f = focal_px(width)
        self.horizon = self.height / 2 + self.f * scene.look.pitch
        self._rgb = Image.fromarray(_backdrop(scene, width, self.horizon))
        self._ids = Image.new("L", (width, self.height))
        self._draw, self._label = ImageDraw.Draw(self._rgb), ImageDraw.Draw(self._ids)

    def polygon(self, pixels: ArrayLike, color: Sequence[int], kind: Kind | None) -> None:
        """`kind=None`: paint only, the ids keep what is there (shadows, windows)."""
        p = np.asarray(pixels, np.float64)
        self._draw.polygon([(u, v) for u, v in (p * _OVERSAMPLE).tolist()], fill=tuple(color))
        if kind is not None:
            self._label.polygon([(u, v) for u, v in p.tolist()], fill=int(kind))

    def _box(self, shape: str, corners: tuple[float, ...], color: Sequence[int], kind: Kind | None) -> None:
        u0, v0, u1, v1 = corners
        u0, u1, v0, v1 = min(u0, u1), max(u0, u1), min(v0, v1), max(v0, v1)
        k = _OVERSAMPLE
        getattr(self._draw, shape)([u0 * k, v0 * k, u1 * k, v1 * k], fill=tuple(color))
        if kind is not None:
            getattr(self._label, shape)([u0, v0, u1, v1], fill=int(kind))

    def rectangle(self, corners: tuple[float, ...], color: Sequence[int], kind: Kind | None) -> None:
        self._box("rectangle", corners, color, kind)

    def ellipse(self, corners: tuple[float, ...], color: Sequence[int], kind: Kind | None) -> None:
        self._box("ellipse", corners, color, kind)

    def strip(
        self, e0: float, e1: float, color: Sequence[int], kind: Kind, s0: float = -4.0, s1: float = _VIEW_M
    ) -> None:
        """The band of road between two lateral offsets and two arc lengths (m from the ego)."""
        s = self.scene.ego_s + np.linspace(s0, s1, max(2, int((s1 - s0) / 0.75)))
        left, right = road_to_ego(self.scene, s, np.array([[e0], [e1]]))
        seen = (left[:, 0] > _NEAR_M) & (right[:, 0] > _NEAR_M)
        if seen.sum() > 1:
            edge = np.concatenate([left[seen], right[seen][::-1]])
            self.polygon(project(self.scene, edge, self.width), color, kind)

    def finish(self) -> tuple[ByteArray, ByteArray]:
        small = np.asarray(self._rgb.reduce(_OVERSAMPLE), np.float32) * self.scene.look.brightness
        rows = slice(max(0, int(self.horizon)), None)
        o = self.scene.look.noise_seed
        small[rows] += _grain()[o : o + self.height, o : o + self.width][rows]
        return np.clip(small, 0, 255).astype(np.uint8), np.asarray(self._ids).copy()


@lru_cache(maxsize=1)
def _grain() -> FloatArray:
    """Coarse-valued noise for the ground: visible, yet cheap to compress."""
    return np.random.default_rng(0).choice(np.array([-3, 0, 0, 3], np.float32), (1024, 1024, 1))


def _backdrop(scene: Scene, width: int, horizon: float) -> ByteArray:
    """Sky and ground, each fading towards the horizon, at the oversampled size."""
    k = _OVERSAMPLE
    rows = (np.arange(width // ASPECT * k)[:, None] + 0.5) / k
    sky, grass = np.array(scene.look.sky, float), np.array(scene.look.grass, float)
    up = np.clip((horizon - rows) / horizon, 0, 1)
    down = np.clip((rows - horizon) / 60.0, 0, 1)
    haze = np.array([214.0, 224.0, 232.0])
    colors = np.where(rows < horizon, haze + (sky - haze) * up**0.6, grass + (0.25 * haze - 0.25 * grass) * (1 - down))
    image = np.broadcast_to(colors[:, None, :], (len(rows), width * k, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def _azimuth_px(canvas: _Canvas, azimuth: float) -> float | None:
    """Column of a far-away direction, None where it is beside or behind the camera."""
    relative = azimuth - float(heading(canvas.scene, canvas.scene.ego_s))
    return canvas.width / 2 + canvas.f * float(np.tan(relative)) if abs(relative) < 1.1 else None


def _far_scenery(canvas: _Canvas) -> None:
    look, w, h, horizon = canvas.scene.look, canvas.width, canvas.height, canvas.horizon
    for azimuth, height, size in look.clouds:
        u = _azimuth_px(canvas, azimuth)
        if u is not None:
            v, g = (0.08 + height * 0.5) * horizon, (0.05 + 0.07 * size) * w
            for du, dv, r in ((-0.62, 0.04, 0.55), (0.0, -0.06, 0.75), (0.6, 0.03, 0.6)):
                box = (u + (du - r) * g, v + (dv - r * 0.32) * g, u + (du + r) * g, v + (dv + r * 0.34) * g)
                canvas.ellipse(box, (240, 243, 247), Kind.CLOUD)
    azimuths = np.arctan((np.arange(0, w + 8, 8) - w / 2) / canvas.f)
    turned = azimuths + float(heading(canvas.scene, canvas.scene.ego_s))
    a, b, rise = look.hills
    ridge = rise * (0.03 + 0.018 * np.sin(3.1 * turned + a) + 0.012 * np.sin(7.3 * turned + b)) * h
    line = np.stack([np.arange(0, w + 8, 8), horizon - ridge], -1)
    color = [int(0.45 * g + 0.55 * s) for g, s in zip(look.grass, (150, 170, 190), strict=True)]
    canvas.polygon([(0, horizon + 1), *line.tolist(), (w + 8, horizon + 1)], color, None)
    for azimuth, width, height, shade in look.skyline:
        u = _azimuth_px(canvas, azimuth)
        if u is None:
            continue
        g, top = (0.03 + 0.06 * width) * w, (0.04 + 0.12 * height) * h
        wall = np.array([142, 134, 130]) + int(70 * (shade - 0.5))
        canvas.rectangle((u, horizon - top, u + g, horizon), wall.tolist(), Kind.BUILDING)
        for row in np.arange(horizon - top + 3, horizon - 3, 5.0):
            for column in np.arange(u + 3, u + g - 3, 5.0):
                canvas.rectangle((column, row, column + 2, row + 2.2), (wall - 38).tolist(), None)


def _road(canvas: _Canvas) -> None:
    scene, look = canvas.scene, canvas.scene.look
    white = (232, 232, 227)
    canvas.strip(_LEFT_KERB_M - 3.2, _RIGHT_KERB_M + 3.2, (168, 163, 155), Kind.BACKGROUND)
    canvas.strip(_LEFT_KERB_M - 0.2, _RIGHT_KERB_M + 0.2, (126, 124, 120), Kind.BACKGROUND)
    canvas.strip(_LEFT_KERB_M, _RIGHT_KERB_M, (look.asphalt, look.asphalt, look.asphalt + 3), Kind.ROAD)
    canvas.strip(1.67, 1.89, white, Kind.MARKING)
    canvas.strip(-5.37, -5.15, white, Kind.MARKING)
    paint = (226, 184, 62) if look.yellow_centre else white
    for s in np.arange((-scene.ego_s + look.dash_phase_m) % 6.0 - 6.0, 80.0, 6.0):
        canvas.strip(-1.85, -1.65, paint, Kind.MARKING, s, s + 3.5)
    for thing in scene.things:
        if thing.kind in (Kind.RED_LIGHT, Kind.GREEN_LIGHT):
            ahead = thing.s - scene.ego_s
            canvas.strip(-1.6, 1.6, (226, 226, 224), Kind.STOP_LINE, ahead - 1.4, ahead - 0.9)


class _Brush:
    """Draws in metres around a foot point on the ground: `a` to the right, `z` up."""

    def __init__(self, canvas: _Canvas, x: float, y: float) -> None:
        self.canvas = canvas
        u, v = project(canvas.scene, [x, y], canvas.width)
        self.u, self.v, self.scale = float(u), float(v), canvas.f / x

    def at(self, a: float, z: float) -> tuple[float, float]:
        return self.u + a * self.scale, self.v - z * self.scale

    def box(self, a: float, z0: float, b: float, z1: float, color: Sequence[int], kind: Kind | None) -> None:
        self.canvas.rectangle((*self.at(a, z0), *self.at(b, z1)), color, kind)

    def disc(self, a: float, z0: float, b: float, z1: float, color: Sequence[int], kind: Kind | None) -> None:
        self.canvas.ellipse((*self.at(a, z0), *self.at(b, z1)), color, kind)

    def shape(self, points: Sequence[tuple[float, float]], color: Sequence[int], kind: Kind | None) -> None:
        self.canvas.polygon([self.at(a, z) for a, z in points], color, kind)

    def shadow(self, half_width: float, color: Sequence[int] = (52, 53, 55)) -> None:
        depth = 0.08 * half_width + 0.03
        self.disc(-half_width, -depth, half_width, depth, color, None)


def _darker(color: Sequence[int], by: float = 0.72) -> list[int]:
    return [int(c * by) for c in color]


_LAMPS = {Kind.LEAD_CAR: (255, 34, 24), Kind.PARKED_CAR: (112, 28, 28), Kind.ONCOMING_CAR: (255, 250, 218)}


def _car(brush: _Brush, thing: Thing) -> None:
    g, kind, color = thing.size, thing.kind, thing.color
    w, h = 0.93 * g, 1.5 * g
    brush.shadow(w + 0.12)
    for side in (-1, 1):
        brush.box(side * w * 0.98, 0.0, side * (w - 0.28), 0.5, (22, 22, 24), kind)
    brush.box(-w, 0.28, w, 0.92 * g, color, kind)
    brush.box(-w, 0.2, w, 0.42, (40, 40, 42), kind)
    brush.shape([(-w * 0.93, 0.92 * g), (-w * 0.68, h), (w * 0.68, h), (w * 0.93, 0.92 * g)], color, kind)
    glass = [(-w * 0.8, 0.96 * g), (-w * 0.61, h - 0.1), (w * 0.61, h - 0.1), (w * 0.8, 0.96 * g)]
    brush.shape(glass, (58, 74, 90), None)
    for side in (-1, 1):
        brush.box(side * w, 0.6, side * (w - 0.34), 0.84, _LAMPS[kind], None)
    brush.box(-0.26, 0.48, 0.26, 0.6, (232, 232, 222), None)


def _person(brush: _Brush, thing: Thing) -> None:
    g, kind = thing.size, thing.kind
    brush.shadow(0.34)
    for side in (-1, 1):
        brush.box(side * 0.24 * g, 0.0, side * 0.03 * g, 0.86 * g, (38, 40, 52), kind)
        brush.box(side * 0.4 * g, 0.8 * g, side * 0.28 * g, 1.42 * g, _darker(thing.color), kind)
    brush.box(-0.29 * g, 0.8 * g, 0.29 * g, 1.46 * g, thing.color, kind)
    brush.disc(-0.18 * g, 1.44 * g, 0.18 * g, 1.83 * g, (222, 172, 136), kind)


def _traffic_light(brush: _Brush, thing: Thing) -> None:
    red = thing.kind == Kind.RED_LIGHT
    brush.box(-0.08, 0.0, 0.08, 2.5, (74, 75, 78), Kind.LIGHT_POLE)
    brush.box(-0.43, 2.4, 0.43, 4.5, (26, 27, 28), thing.kind)
    lenses = (
        (4.12, (255, 38, 28) if red else (68, 18, 18)),
        (3.45, (68, 54, 14)),
        (2.78, (14, 58, 28) if red else (46, 255, 100)),
    )
    for z, color in lenses:
        brush.disc(-0.31, z - 0.31, 0.31, z + 0.31, color, None)


def _billboard(brush: _Brush, thing: Thing) -> None:
    g = thing.size
    for side in (-1, 1):
        brush.box(side * 1.3 * g - 0.1, 0.0, side * 1.3 * g + 0.1, 2.6, (92, 92, 94), Kind.POLE)
    brush.box(-2.2 * g, 2.4, 2.2 * g, 4.8 * g, (235, 235, 232), thing.kind)
    brush.box(-2.08 * g, 2.52, 2.08 * g, 4.8 * g - 0.12, thing.color, None)
    brush.box(-1.7 * g, 3.5, 0.9 * g, 3.8, (242, 242, 240), None)
    brush.box(-1.7 * g, 2.9, 1.5 * g, 3.2, (34, 34, 36), None)


def _tree(brush: _Brush, thing: Thing) -> None:
    g = thing.size
    brush.shadow(1.1 * g, (62, 76, 50))
    brush.box(-0.18, 0.0, 0.18, 2.4, (88, 64, 44), thing.kind)
    for a, z, r, tone in ((-0.8, 2.7, 1.3, 0.86), (0.8, 2.9, 1.25, 0.93), (0.0, 4.1, 1.5, 1.0)):
        color = _darker(thing.color, tone)
        brush.disc((a - r) * g, (z - r) * g, (a + r) * g, (z + r) * g, color, thing.kind)


def _lamp_post(brush: _Brush, thing: Thing) -> None:
    brush.box(-0.07, 0.0, 0.07, 6.2, (98, 100, 104), thing.kind)
    brush.box(-0.07, 6.1, 1.5, 6.22, (98, 100, 104), thing.kind)


_DRAW: dict[Kind, Callable[[_Brush, Thing], None]] = {
    Kind.LEAD_CAR: _car,
    Kind.PARKED_CAR: _car,
    Kind.ONCOMING_CAR: _car,
    Kind.PEDESTRIAN: _person,
    Kind.WALKER: _person,
    Kind.RED_LIGHT: _traffic_light,
    Kind.GREEN_LIGHT: _traffic_light,
    Kind.BILLBOARD: _billboard,
    Kind.TREE: _tree,
    Kind.POLE: _lamp_post,
}


def render(scene: Scene, width: int = 448) -> tuple[ByteArray, ByteArray]:
    """The picture, uint8 [width/2, width, 3], and the `Kind` of every pixel, uint8 [width/2, width]."""
    canvas = _Canvas(scene, width)
    _far_scenery(canvas)
    _road(canvas)
    feet = road_to_ego(scene, np.array([t.s for t in scene.things]), np.array([t.e for t in scene.things]))
    for (x, y), thing in sorted(zip(feet.tolist(), scene.things, strict=True), key=lambda item: -item[0][0]):
        if x > _THING_NEAR_M and abs(y) < 4 * x:
            _DRAW[thing.kind](_Brush(canvas, x, y), thing)
    return canvas.finish()


def causal_mask(scene: Scene, ids: ByteArray, what: str = "cause") -> NDArray[np.bool_]:
    """Which pixels matter to the expert, bool [H, W].

    * `cause`: the thing that makes the ego slow down: the light's head and its pole, the lead car, the pedestrian. It
      decides the speed waypoints and the commentary; empty on a clear road.
    * `markings`: lane markings and road edges, from which the route's shape is read. Only *given that* the prompt
      names no target points: these tell the route's shape as well, and a model that gets them may ignore the markings.
      (That is why training drops them at random.)
    * `distractor`: scenery that the expert never reads.
    The three are disjoint. In none of them: asphalt, sky and ground, stop lines (they tell where to stop, but stand
    before green lights too) and green lights (their colour is read, but they cause no stop).
    """
    if what not in MASKS:
        raise ConfigError(f"unknown mask {what!r}: one of {', '.join(MASKS)}.{nearest(what, MASKS)}")
    if what == "distractor":
        return np.isin(ids, DISTRACTORS)
    if what == "markings":
        return np.asarray(ids == Kind.MARKING)
    if scene.cause == "clear":
        return np.zeros(ids.shape, bool)
    wanted = [CAUSE_KIND[scene.cause]] + [Kind.LIGHT_POLE] * (scene.cause == "red_light")
    return np.isin(ids, wanted)
