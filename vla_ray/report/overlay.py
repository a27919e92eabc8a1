"""A map over its picture, with what the model predicted and said: the pictures of the report, of talks and of papers.

Colour and opacity both grow with the value, so the picture stays visible where nothing matters. Values are divided by
a scale that the caller gives, the scene's (`scene_scale`), so that frames compare. What was cropped away before the
model saw the picture is dimmed and never coloured. Pictures of one size give overlays of one size.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import matplotlib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from vla_ray.data.camera import SIMLINGO_CAMERA, Camera
from vla_ray.errors import TargetError
from vla_ray.explain.heatmap import HeatMap
from vla_ray.report.colors import oklab_to_srgb
from vla_ray.report.lettering import fit, font, wrap
from vla_ray.report.trajectory import draw_plan, mark_route, mark_speed
from vla_ray.storage.files import Location, write_atomic

ByteArray = NDArray[np.uint8]
Color = tuple[int, int, int]

__all__ = [
    "COMMENTARY_LINES",
    "OPACITY",
    "Caption",
    "color_bar",
    "colored",
    "draw",
    "save_png",
    "scene_scale",
]

PERCENTILE = 99.0  # of a scene's |values|: what is shown at full strength
OPACITY = 0.6
COMMENTARY_LINES = 2
INK, FAINT, WARNING, PAPER = (24, 26, 30), (110, 114, 122), (176, 32, 32), (255, 255, 255)

_DIMMED = 0.5
# Signed maps, in OKLab: the ends are as light and as colourful as sRGB can make both of these hues. Orange, not red: it
# must not be taken for a light.
_HUES, _CHROMA, _MIDDLE, _ENDS = (258.0, 55.0), 0.16, 0.45, 0.68
_DOT = "  \u00b7  "


@dataclass(frozen=True, slots=True)
class Caption:
    """What stands below a picture: names as in the metrics, `value` of the target in `unit`, speed in m/s."""

    frame_id: str
    method: str
    target: str
    value: float | None = None
    unit: str = ""
    speed_mps: float | None = None
    commentary: str = ""


@dataclass(frozen=True, slots=True)
class _Legend:
    """What the picture above the caption shows; `scale=None`: there is no map."""

    scale: float | None
    signed: bool
    opacity: float
    route: bool
    speed: bool


def scene_scale(maps: Iterable[HeatMap]) -> float:
    """The 99th percentile of |values| over a scene's maps, which `draw` shows at full strength.

    The largest one where more than 99 % are zero, and 1 where all are zero or there is no map: any scale shows nothing.
    """
    values = [np.abs(heat.combined().values).ravel() for heat in maps]
    everything = np.concatenate(values) if values else np.zeros(1)
    return float(np.percentile(everything, PERCENTILE)) or float(everything.max()) or 1.0


def draw(
    rgb: ByteArray,
    heat: HeatMap | None,
    *,
    scale: float = 1.0,
    route: ArrayLike | None = None,
    speed_wps: ArrayLike | None = None,
    camera: Camera | None = None,
    caption: Caption | None = None,
    signed: bool = False,
    opacity: float = OPACITY,
    width: int | None = None,
) -> ByteArray:
    """uint8 [H', W', 3]: the picture under its map and the plan, above its caption.

    Args:
        rgb: uint8 [H, W, 3].
        heat: None where the target has no gradient: the caption says so, and the picture is left as it is.
        scale: the |value| shown at full strength, and all above it.
        route, speed_wps: [n, 2] in metres, x forward, y right; points outside of the picture are left out.
        camera: None: SimLingo's.
        caption: None: no strip, so that the overlay is as large as the picture.
        signed: two colours, for what works for the target and what works against it.
        opacity: of the strongest colour.
        width: of the result; the picture's own if None.

    Raises:
        TargetError: the map is of a picture of another size, or holds values that are not finite.
    """
    seen = rgb if heat is None else colored(rgb, heat, scale=scale, signed=signed, opacity=opacity)
    image = Image.fromarray(np.ascontiguousarray(seen))
    if width is not None and width != image.width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    draw_plan(image, route, speed_wps, camera or SIMLINGO_CAMERA)
    if caption is None:
        return np.asarray(image)
    legend = _Legend(None if heat is None else scale, signed, opacity, route is not None, speed_wps is not None)
    return np.concatenate([np.asarray(image), np.asarray(_strip(image.width, caption, legend))])


def colored(
    rgb: ByteArray, heat: HeatMap, *, scale: float, signed: bool = False, opacity: float = OPACITY
) -> ByteArray:
    """uint8 [H, W, 3]: the picture under its map. Arguments and errors as in `draw`."""
    height, width = heat.geometry.height, heat.geometry.width
    if rgb.shape != (height, width, 3):
        raise TargetError(
            f"the map is of a picture of {width} x {height} pixels, this one has {rgb.shape[1]} x {rgb.shape[0]}: "
            "map and picture are of different frames, or the picture was resized."
        )
    bad = sum(int((~np.isfinite(part)).sum()) for part in (heat.values, heat.thumbnail) if part is not None)
    if bad:
        raise TargetError(f"the map has {bad} values that are not finite.")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}; it must be a finite number > 0")
    kept = heat.geometry.kept_height
    out = rgb.astype(np.float32)
    out[kept:] *= _DIMMED
    out[:kept] = _blend(out[:kept], heat.on_picture()[:kept] / scale, signed, opacity)
    return np.rint(out).astype(np.uint8)


def _blend(
    under: NDArray[np.float32], values: NDArray[np.float32], signed: bool, opacity: float
) -> NDArray[np.float32]:
    """Colours over [H, W, 3]; a value of 1 has the full colour and opacity, 0 (without sign: and below) has none."""
    values = np.clip(values, -1 if signed else 0, 1)
    table = _colors(signed)
    at = (values + 1) / 2 if signed else values
    over = table[np.rint(at * (len(table) - 1)).astype(np.intp)]
    alpha = opacity * np.abs(values)[..., None]
    return np.asarray(under * (1 - alpha) + over * alpha, np.float32)


@lru_cache(maxsize=2)
def _colors(signed: bool) -> NDArray[np.float32]:
    """[n, 3] in 0..255, even to the eye: inferno without its black and white ends, or blue to grey to orange."""
    if not signed:
        return np.asarray(matplotlib.colormaps["inferno"](np.linspace(0.2, 0.92, 256))[:, :3] * 255, np.float32)
    at = np.linspace(-1, 1, 511)[:, None]
    hue = np.radians(np.where(at < 0, *_HUES))
    chroma = _CHROMA * np.abs(at)
    lightness = _MIDDLE + (_ENDS - _MIDDLE) * np.abs(at)
    lab = np.concatenate([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    return np.asarray(oklab_to_srgb(lab) * 255, np.float32)


# The caption ---------------------------------------------------------------------------------------------------


def color_bar(width: int, height: int, signed: bool = False, opacity: float = OPACITY) -> ByteArray:
    """uint8 [height, width, 3]: the colours as they look on a grey picture, from 0 (or -scale) on the left to scale."""
    values = np.linspace(-1.0 if signed else 0.0, 1.0, width, dtype=np.float32)
    grey = np.full((height, width, 3), 150.0, np.float32)
    return np.rint(_blend(grey, np.tile(values, (height, 1)), signed, opacity)).astype(np.uint8)


def _strip(width: int, caption: Caption, legend: _Legend) -> Image.Image:
    """Frame and method, target and speed, legend, and the commentary's lines, whether or not it fills them."""
    size = min(22, max(11, round(width / 50)))
    face, step, margin = font(size), round(1.45 * size), round(0.8 * size)
    strip = Image.new("RGB", (width, (3 + COMMENTARY_LINES) * step + round(0.9 * size)), PAPER)
    pen, room = ImageDraw.Draw(strip), width - 2 * margin

    def put(line: int, text: str, color: Color = INK, x: float = margin, bold: bool = False) -> float:
        """Writes and returns where it ends. Anchored at the ascender, so that lines lie still whatever the letters."""
        pen.text((x, round(0.5 * size) + line * step), text, fill=color, font=font(size, bold), anchor="la")
        return x + face.getlength(text)

    method = fit(caption.method, face, 0.5 * room)
    put(0, method, FAINT, width - margin - face.getlength(method))
    put(0, fit(caption.frame_id, font(size, True), room - face.getlength(method) - size, keep_end=True), bold=True)
    value = "" if caption.value is None else f" = {caption.value:.4g} {_superscript(caption.unit)}"
    speed = "" if caption.speed_mps is None else f"{_DOT}speed {caption.speed_mps:.1f} m/s"
    put(1, fit(f"{caption.target}{value}{speed}", face, room))
    if legend.scale is None:
        message = f"degenerate: {caption.target} has no gradient here, so there is no map"
        put(2, fit(message, face, room), WARNING)
    else:
        low, high = f"-{legend.scale:.2g}" if legend.signed else "0", f"{legend.scale:.2g}"
        bar_width = round(min(0.2 * room, room - face.getlength(low + high) - size))
        x = float(margin)
        if bar_width >= size:
            x = put(2, low, FAINT) + 0.4 * size
            bar = color_bar(bar_width, size, legend.signed, legend.opacity)
            strip.paste(Image.fromarray(bar), (round(x), round(0.6 * size) + 2 * step))
            x = put(2, high, FAINT, x + bar_width + 0.4 * size) + 1.5 * size
        middle, radius = 2 * step + 1.1 * size, 0.22 * size
        for shown, name, mark in ((legend.route, "route", mark_route), (legend.speed, "speed waypoints", mark_speed)):
            if shown and x + 2.9 * size + face.getlength(name) <= width - margin:
                mark(strip, [(x + gap * size, middle, radius) for gap in (0.2, 1.2, 2.2)])
                x = put(2, name, FAINT, x + 2.9 * size) + 1.2 * size
    for line, text in enumerate(wrap(caption.commentary, face, room, COMMENTARY_LINES), start=3):
        put(line, text)
    return strip


def _superscript(unit: str) -> str:
    return unit.replace("^2", "\u00b2").replace("^3", "\u00b3")


def save_png(loc: Location, rgb: ByteArray) -> int:
    """Write a picture, whole or not at all, and return its size in bytes."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return write_atomic(loc, buffer.getvalue())
