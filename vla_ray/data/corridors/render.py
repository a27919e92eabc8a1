"""Draws a corridor as the robot sees it, and for every pixel which part it shows.

A pinhole camera; far things first, near things over them, in PIL polygons without smoothing: about a millisecond a
picture. The same strokes drawn with part numbers instead of colours give the masks, so both always agree.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vla_ray.data.corridors.world import DOOR_COLORS, SIDES, Clutter, Color, Corridor, Person

SIZE = 128  # pixels, both ways
FOCAL = 60.0 / SIZE  # of the picture's width: a field of view of 94 degrees
_NEAR_M = 0.12
_FAR_SIDE_M = 2.6  # depth of a side corridor

Point = tuple[float, float, float]
Stroke = Callable[[str, Sequence[tuple[float, float]], Color, str | None], None]


class Camera:
    """Points of the corridor frame (m) to pixels of a square picture."""

    def __init__(self, corridor: Corridor, size: int = SIZE) -> None:
        self.cos, self.sin = math.cos(corridor.robot_yaw), math.sin(corridor.robot_yaw)
        self.y, self.height = corridor.robot_y, corridor.camera_height
        self.focal, self.u = FOCAL * size, size / 2
        self.v = size / 2 + self.focal * corridor.camera_pitch

    def depth(self, x: float, y: float) -> float:
        return x * self.cos + (y - self.y) * self.sin

    def _seen(self, p: Point) -> Point:
        """Depth, left, up."""
        x, y = p[0], p[1] - self.y
        return x * self.cos + y * self.sin, y * self.cos - x * self.sin, p[2] - self.height

    def _pixel(self, p: Point) -> tuple[float, float]:
        k = self.focal / p[0]
        return self.u - k * p[1], self.v - k * p[2]

    def project(self, point: Point) -> tuple[float, float]:
        """(u right, v down) of a point in front of the camera."""
        return self._pixel(self._seen(point))

    def polygon(self, points: Sequence[Point]) -> list[tuple[float, float]]:
        """A polygon's pixels; what lies behind the camera is cut off, so there may be none."""
        seen = [self._seen(p) for p in points]
        if min(p[0] for p in seen) < _NEAR_M:
            seen = _cut(seen)
        return [self._pixel(p) for p in seen]


def _cut(polygon: Sequence[Point]) -> list[Point]:
    """The part of a polygon (depth, left, up) in front of the near plane (Sutherland and Hodgman 1974)."""
    kept: list[Point] = []
    for a, b in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if a[0] >= _NEAR_M:
            kept.append(a)
        if (a[0] >= _NEAR_M) != (b[0] >= _NEAR_M):
            t = (_NEAR_M - a[0]) / (b[0] - a[0])
            kept.append((_NEAR_M, a[1] + t * (b[1] - a[1]), a[2] + t * (b[2] - a[2])))
    return kept


def parts(corridor: Corridor) -> tuple[str, ...]:
    """Names of all that is drawn; a mask of one may be empty where something stands before it."""
    names = ["floor", "ceiling", "end wall", "left wall", "right wall"]
    names += [f"{s} {corridor.wall(sign).kind}" for s, sign in SIDES.items() if corridor.wall(sign).kind != "plain"]
    names += ["person"] * (corridor.person is not None)
    return (*names, *dict.fromkeys(c.kind for c in corridor.clutter))


def render(corridor: Corridor, size: int = SIZE) -> NDArray[np.uint8]:
    """The picture, uint8 [size, size, 3]."""
    return np.asarray(_draw(corridor, size))


def png(corridor: Corridor) -> bytes:
    """The picture of SIZE pixels as a PNG file; fast rather than small."""
    file = io.BytesIO()
    _draw(corridor, SIZE).save(file, "PNG", compress_level=1)
    return file.getvalue()


def part_image(corridor: Corridor, size: int = SIZE) -> NDArray[np.uint8]:
    """uint8 [size, size]: 1 + the place in `parts(corridor)` of what each pixel shows; 0 in cracks between two."""
    number = {name: k + 1 for k, name in enumerate(parts(corridor))}
    image = Image.new("L", (size, size))
    pen = ImageDraw.Draw(image)

    def stroke(shape: str, points: Sequence[tuple[float, float]], color: Color, part: str | None) -> None:
        if part is not None:
            getattr(pen, shape)(points, fill=number[part])

    _paint(corridor, Camera(corridor, size), stroke)
    return np.asarray(image).copy()


def _draw(corridor: Corridor, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), corridor.look.wall)  # it shows in cracks of a pixel
    pen = ImageDraw.Draw(image)

    def stroke(shape: str, points: Sequence[tuple[float, float]], color: Color, part: str | None) -> None:
        getattr(pen, shape)(points, fill=color)

    _paint(corridor, Camera(corridor, size), stroke)
    return image


def _paint(corridor: Corridor, camera: Camera, stroke: Stroke) -> None:
    """Everything, far to near. `part=None` paints only: the pixels still belong to what is below."""
    brush = _Brush(corridor, camera, stroke)
    brush.ground()
    for name, side in SIDES.items():
        if corridor.wall(side).kind == "opening":
            brush.side_corridor(name, side)
    brush.end_wall()
    for name, side in SIDES.items():
        brush.side_wall(name, side)
    things: list[Person | Clutter] = [c for c in corridor.clutter if c.kind != "poster"]
    if corridor.person is not None:
        things.append(corridor.person)
    for thing in sorted(things, key=lambda t: -camera.depth(t.x, t.y)):
        brush.stand(thing)


class _Brush:
    def __init__(self, corridor: Corridor, camera: Camera, stroke: Stroke) -> None:
        self.corridor, self.camera, self.stroke, self.look = corridor, camera, stroke, corridor.look

    def shade(self, color: Color, x: float, factor: float = 1.0) -> Color:
        """Darker with the distance."""
        k = factor * (1 - self.look.fade * min(1.0, max(0.0, x) / 7.0))
        return min(255, int(color[0] * k)), min(255, int(color[1] * k)), min(255, int(color[2] * k))

    def face(self, points: Sequence[Point], color: Color, part: str | None) -> None:
        pixels = self.camera.polygon(points)
        if len(pixels) > 2:
            self.stroke("polygon", pixels, color, part)

    def level(self, x0: float, x1: float, y0: float, y1: float, z: float, color: Color, part: str | None) -> None:
        self.face([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], color, part)

    def along(self, x0: float, x1: float, y: float, z0: float, z1: float, color: Color, part: str | None) -> None:
        """An upright rectangle along the corridor."""
        self.face([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)], color, part)

    def across(self, x: float, y0: float, y1: float, z0: float, z1: float, color: Color, part: str | None) -> None:
        """An upright rectangle that faces the robot."""
        self.face([(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)], color, part)

    def steps(self, x0: float, x1: float) -> list[tuple[float, float]]:
        """Pieces that grow with the distance, one shade each."""
        bounds = [x0, *(x for x in (0.9, 1.6, 2.4, 3.4, 4.8, 6.6) if x0 < x < x1), x1]
        return list(pairwise(bounds))

    def ground(self) -> None:
        corridor, look = self.corridor, self.look
        w, h, end = corridor.half_width, corridor.height, corridor.end
        for x0, x1 in self.steps(0.0, end):
            self.level(x0, x1, -w, w, 0.0, self.shade(look.floor, x0), "floor")
            self.level(x0, x1, -w, w, h, self.shade(look.ceiling, x0), "ceiling")
        line = self.shade(look.floor, 0.0, 0.8)
        if look.pattern == "tiles":
            for k in range(int(end / 0.6)):
                x = (k + look.phase) * 0.6
                self.level(x, x + 0.03 + 0.01 * x, -w, w, 0.0, line, None)
        if look.pattern in ("tiles", "planks"):
            for k in range(-2, 3):
                self.level(0.0, end, k * 0.5 - 0.02, k * 0.5 + 0.02, 0.0, line, None)
        if look.pattern == "runner":
            self.level(0.0, end, -0.5 * w, 0.5 * w, 0.0, self.shade(look.floor, 0.0, 1.22), None)
        if look.lamps:
            for k in range(int(end / look.lamps)):
                x = (k + 0.4 + look.phase) * look.lamps
                self.level(x, min(end, x + 0.7), -0.3, 0.3, h, (255, 255, 248), None)

    def side_corridor(self, name: str, side: int) -> None:
        corridor, look, part = self.corridor, self.look, f"{name} opening"
        wall, h = corridor.wall(side), corridor.height
        near, far = side * corridor.half_width, side * (corridor.half_width + _FAR_SIDE_M)
        light = look.side_light
        self.level(wall.start, wall.end, near, far, 0.0, self.shade(look.floor, 2.0, light), part)
        self.level(wall.start, wall.end, near, far, h, self.shade(look.ceiling, 2.0, light), part)
        self.along(wall.start, wall.end, far, 0.0, h, self.shade(look.wall, 2.0, 0.85 * light), part)
        self.across(wall.end, near, far, 0.0, h, self.shade(look.wall, 2.0, light), part)

    def end_wall(self) -> None:
        corridor, look = self.corridor, self.look
        w, h, x = corridor.half_width, corridor.height, corridor.end
        self.across(x, -w, w, 0.0, h, self.shade(look.wall, x, 0.95), "end wall")
        self.across(x, -w, w, 0.0, 0.14, self.shade(look.floor, x, 0.6), None)
        if look.window:
            self.across(x, -0.62 * w, 0.62 * w, 0.85, h - 0.35, self.shade(look.wall, x, 0.6), None)
            self.across(x, -0.54 * w, 0.54 * w, 0.95, h - 0.45, (206, 228, 246), None)

    def side_wall(self, name: str, side: int) -> None:
        corridor, look, part = self.corridor, self.look, f"{name} wall"
        wall, y, h = corridor.wall(side), side * corridor.half_width, corridor.height
        light = look.light[0 if side > 0 else 1]
        pieces = [(0.0, wall.start), (wall.end, corridor.end)] if wall.kind == "opening" else [(0.0, corridor.end)]
        for x0, x1 in (step for piece in pieces for step in self.steps(*piece)):
            self.along(x0, x1, y, 0.0, h, self.shade(look.wall, x0, light), part)
        for x0, x1 in pieces:
            if look.dado:
                self.along(x0, x1, y, 0.0, 0.8, self.shade(look.wall, 2.5, 0.78 * light), None)
            # Slightly below the floor: PIL's polygons cover their outline, so the wall's last pixels would show.
            self.along(x0, x1, y, -0.02, 0.12, self.shade(look.floor, 2.0, 0.6), None)
        if wall.kind == "opening":
            edge = self.shade(look.wall, wall.start, 0.55 * light)
            for x in (wall.start - 0.05, wall.end):
                self.along(x, x + 0.05, y, 0.0, h, edge, None)
        if wall.kind == "door":
            self.door(f"{name} door", wall.start, wall.end, y, DOOR_COLORS[wall.color], light)
        for thing in corridor.clutter:
            if thing.kind == "poster" and thing.y * side > 0:
                x0, x1 = thing.x - 0.3 * thing.size, thing.x + 0.3 * thing.size
                self.along(x0, x1, y, 1.2, 1.2 + 0.7 * thing.size, thing.color, "poster")

    def door(self, part: str, x0: float, x1: float, y: float, color: Color, light: float) -> None:
        top = min(2.1, self.corridor.height - 0.15)
        self.along(x0, x1, y, 0.0, top, self.shade(self.look.wall, x0, 0.4), part)
        self.along(x0 + 0.07, x1 - 0.07, y, 0.0, top - 0.07, self.shade(color, x0, light + 0.08), part)
        middle, dark = (x0 + x1) / 2, self.shade(color, x0, 0.72 * light)
        for a, b in ((x0 + 0.2, middle - 0.06), (middle + 0.06, x1 - 0.2)):
            self.along(a, b, y, 1.15, top - 0.22, dark, part)
        self.along(x0 + 0.12, x0 + 0.24, y, 0.96, 1.04, (236, 232, 214), part)

    def stand(self, thing: Person | Clutter) -> None:
        """Upright figures face the camera: drawn in metres around their foot."""
        u, v = self.camera.project((thing.x, thing.y, 0.0))
        scale = self.camera.focal / self.camera.depth(thing.x, thing.y)

        def box(
            a: float, z0: float, b: float, z1: float, color: Color, part: str | None, shape: str = "rectangle"
        ) -> None:
            self.stroke(shape, [(u + a * scale, v - z1 * scale), (u + b * scale, v - z0 * scale)], color, part)

        if isinstance(thing, Person):
            self.person(thing, box)
        elif thing.kind == "bin":
            g, dark = thing.size, self.shade(thing.color, 0.0, 0.6)
            box(-0.24 * g, -0.03, 0.24 * g, 0.04, self.shade(self.look.floor, thing.x, 0.6), None, "ellipse")
            box(-0.19 * g, 0.0, 0.19 * g, 0.6 * g, thing.color, "bin")
            box(-0.23 * g, 0.54 * g, 0.23 * g, 0.64 * g, dark, "bin")
        else:
            g, dark = thing.size, self.shade(thing.color, 0.0, 0.6)
            for a in (-0.24, 0.18):
                box(a * g, 0.0, (a + 0.06) * g, 0.45 * g, dark, "chair")
            box(-0.24 * g, 0.42 * g, 0.24 * g, 0.5 * g, thing.color, "chair")
            box(-0.24 * g, 0.6 * g, 0.24 * g, 0.92 * g, thing.color, "chair")
            for a in (-0.22, 0.16):
                box(a * g, 0.42 * g, (a + 0.05) * g, 0.7 * g, dark, "chair")

    def person(self, who: Person, box: Callable[..., None]) -> None:
        h = who.height
        sleeve = self.shade(who.clothes, 0.0, 0.75)
        box(-0.3, -0.03, 0.3, 0.05, self.shade(self.look.floor, who.x, 0.6), None, "ellipse")
        for a, b in ((-0.2, -0.03), (0.03, 0.2)):
            box(a, 0.0, b, 0.5 * h, who.trousers, "person")
        box(-0.21, 0.46 * h, 0.21, 0.82 * h, who.clothes, "person")
        for a, b in ((-0.31, -0.21), (0.21, 0.31)):
            box(a, 0.46 * h, b, 0.81 * h, sleeve, "person")
        box(-0.06, 0.8 * h, 0.06, 0.87 * h, who.skin, "person")
        box(-0.13, 0.84 * h, 0.13, h, who.skin, "person", "ellipse")
        box(-0.13, 0.94 * h, 0.13, 1.01 * h, (48, 36, 28), "person", "ellipse")
