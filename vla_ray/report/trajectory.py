"""A predicted plan, drawn into the frame's picture through its camera.

The route is a line with dots, the speed waypoints are diamonds (0.25 s apart), both with a dark edge and antialiased,
so that they are seen on bright road, on dark road and on a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from vla_ray.data.camera import Camera

Color = tuple[int, int, int]
Spot = tuple[float, float, float]  # u, v, and the radius of a mark at that distance; pixels

ROUTE: Color = (64, 224, 255)
SPEED: Color = (255, 255, 255)
EDGE: Color = (16, 20, 28)

_MARK_M = 0.1  # radius of a mark on the road
_SUPERSAMPLED = 4


def draw_plan(image: Image.Image, route: ArrayLike | None, speed_wps: ArrayLike | None, camera: Camera) -> None:
    """Route (line with dots) and speed waypoints (diamonds) into an RGB picture, in place."""
    if route is not None:
        mark_route(image, _spots(route, image, camera))
    if speed_wps is not None:
        mark_speed(image, [spot for spot in _spots(speed_wps, image, camera) if spot])


def _spots(points: ArrayLike, image: Image.Image, camera: Camera) -> list[Spot | None]:
    """Where points lie, None for those behind the camera or far outside of the picture."""
    at = np.asarray(points, np.float64).reshape(-1, 2)
    at = np.where(np.isfinite(at).all(-1, keepdims=True), at, np.nan)
    pixels = camera.project(at, image.width, image.height)
    radii = np.abs(camera.project(at + [0.0, _MARK_M], image.width, image.height) - pixels)[:, 0]
    unit = _unit(image)
    radii = np.clip(radii, 1.3 * unit, 4.0 * unit)
    size = np.array([image.width, image.height])
    near = np.all((pixels > -2 * size) & (pixels < 3 * size), axis=-1)  # false for NaN, and for what no canvas can hold
    return [(*uv, r) if ok else None for uv, r, ok in zip(pixels.tolist(), radii.tolist(), near.tolist(), strict=True)]


def mark_route(image: Image.Image, spots: Sequence[Spot | None]) -> None:
    """A line through the spots, interrupted where one is None, and a dot on each."""
    unit = _unit(image)
    lines = [(a, b) for a, b in pairwise(spots) if a and b]

    def paint(pen: ImageDraw.ImageDraw, grow: float) -> None:
        for a, b in lines:
            _line(pen, a, b, 1.4 * unit + 2 * grow)
        for spot in filter(None, spots):
            _polygon(pen, spot, grow, sides=24)

    _mark(image, ROUTE, paint)


def mark_speed(image: Image.Image, spots: Sequence[Spot]) -> None:
    """A diamond on each spot."""

    def paint(pen: ImageDraw.ImageDraw, grow: float) -> None:
        for u, v, r in spots:
            _polygon(pen, (u, v, 1.5 * r), 1.4 * grow, sides=4)

    _mark(image, SPEED, paint)


def _mark(image: Image.Image, color: Color, paint: Callable[[ImageDraw.ImageDraw, float], None]) -> None:
    """Paints what `paint(pen, grow)` draws, over the same shape grown by an edge."""
    for ink, grow in ((EDGE, 0.9 * _unit(image)), (color, 0.0)):
        mask = Image.new("L", (image.width * _SUPERSAMPLED, image.height * _SUPERSAMPLED))
        paint(ImageDraw.Draw(mask), grow)
        image.paste(ink, mask=mask.reduce(_SUPERSAMPLED))


def _unit(image: Image.Image) -> float:
    """Line widths and marks grow with the picture."""
    return max(1.0, image.width / 640)


def _line(pen: ImageDraw.ImageDraw, a: Spot, b: Spot, width: float) -> None:
    k = _SUPERSAMPLED
    pen.line([a[0] * k, a[1] * k, b[0] * k, b[1] * k], fill=255, width=round(width * k), joint="curve")


def _polygon(pen: ImageDraw.ImageDraw, spot: Spot, grow: float, sides: int) -> None:
    """A regular one that stands on a corner: a diamond, or a disc."""
    u, v, radius = spot
    turn = np.arange(sides) * 2 * np.pi / sides
    ring = np.stack([u + (radius + grow) * np.sin(turn), v + (radius + grow) * np.cos(turn)], -1)
    pen.polygon((ring * _SUPERSAMPLED).ravel().tolist(), fill=255)
