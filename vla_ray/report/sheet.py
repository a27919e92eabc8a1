"""A contact sheet: frames down, methods across, for papers and the README.

Every column is equally wide and every map follows the rules of overlay.py: one scale per scene and column (the caller
gives it with the map), cropped parts dimmed, a degenerate frame said to be one instead of coloured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

from vla_ray.data.camera import SIMLINGO_CAMERA, Camera
from vla_ray.errors import TargetError, nearest
from vla_ray.explain.heatmap import HeatMap
from vla_ray.report.lettering import fit, font
from vla_ray.report.overlay import FAINT, INK, OPACITY, PAPER, WARNING, ByteArray, color_bar, colored
from vla_ray.report.trajectory import draw_plan

PICTURE = "picture"  # header of the first column
OUTLINE = (255, 64, 160)
MIN_CELL_PX = 32

_OUTLINE_PX = 2
_SUPERSAMPLED = 4


@dataclass(frozen=True, slots=True)
class Panel:
    """A map in the sheet: `heat=None` where the target has no gradient; `scale` as in `overlay.draw`."""

    heat: HeatMap | None
    scale: float = 1.0
    signed: bool = False


@dataclass(frozen=True, slots=True)
class SheetRow:
    """A frame.

    Attributes:
        label: stands above the row, before `note` (a commentary, a value).
        rgb: uint8 [H, W, 3].
        panels: by the sheet's columns.
        mask: bool [H, W], outlined in the picture.
        route, speed_wps: drawn into the picture, through `camera` (None: SimLingo's).
    """

    label: str
    rgb: ByteArray
    panels: Mapping[str, Panel]
    mask: NDArray[np.bool_] | None = None
    note: str = ""
    route: ArrayLike | None = None
    speed_wps: ArrayLike | None = None
    camera: Camera | None = None


def sheet(rows: Sequence[SheetRow], columns: Sequence[str], width: int = 1600, opacity: float = OPACITY) -> ByteArray:
    """uint8 [height, width, 3]: per row the picture, then the maps of `columns` in their order.

    Raises:
        TargetError: a row lacks a column, a mask is not of its picture's size, or a map does not fit its picture.
        ValueError: no rows, or columns of less than MIN_CELL_PX pixels.
    """
    if not rows:
        raise ValueError("a sheet needs at least one row")
    margin = round(width / 100)
    cell = (width - (len(columns) + 2) * margin) // (len(columns) + 1)
    lefts = [margin + k * (cell + margin) for k in range(len(columns) + 1)]
    if cell < MIN_CELL_PX:
        raise ValueError(
            f"{len(columns) + 1} columns do not fit into {width} pixels: at least {MIN_CELL_PX} are needed each"
        )
    size = min(24, max(10, cell // 22))
    line = round(1.6 * size)
    cells = [_cells(row, columns, cell, opacity) for row in rows]
    height = 2 * margin + line + sum(line + pictures[0].height + margin for pictures in cells) + line
    page = Image.new("RGB", (width, height), PAPER)
    pen, face, bold = ImageDraw.Draw(page), font(size), font(size, bold=True)
    y = margin
    for name, left in zip((PICTURE, *columns), lefts, strict=True):
        text = fit(name, bold, cell)
        pen.text((left + (cell - bold.getlength(text)) / 2, y), text, fill=INK, font=bold, anchor="la")
    y += line
    for row, pictures in zip(rows, cells, strict=True):
        label = fit(row.label, bold, width - 2 * margin)
        pen.text((margin, y + round(0.2 * size)), label, fill=INK, font=bold, anchor="la")
        x = margin + bold.getlength(label) + size
        pen.text(
            (x, y + round(0.2 * size)), fit(row.note, face, width - margin - x), fill=FAINT, font=face, anchor="la"
        )
        y += line
        for picture, left in zip(pictures, lefts, strict=True):
            page.paste(picture, (left, y))
        y += pictures[0].height + margin
    _legend(page, y, margin, size, {p.signed for row in rows for p in row.panels.values()}, opacity)
    return np.asarray(page)


def _cells(row: SheetRow, columns: Sequence[str], width: int, opacity: float) -> list[Image.Image]:
    """The row's pictures, equally large: first its own, then one per column."""
    missing = [name for name in columns if name not in row.panels]
    if missing:
        known = ", ".join(row.panels) or "none"
        raise TargetError(f"{row.label} has no map {missing[0]!r}; it has: {known}.{nearest(missing[0], row.panels)}")
    return [_picture(row, width), *(_map(row.rgb, row.panels[name], width, opacity) for name in columns)]


def _picture(row: SheetRow, width: int) -> Image.Image:
    image = _resized(row.rgb, width)
    if row.mask is not None:
        if row.mask.shape != row.rgb.shape[:2]:
            (h, w), (mask_h, mask_w) = row.rgb.shape[:2], row.mask.shape
            raise TargetError(f"{row.label}: its mask has {mask_w} x {mask_h} pixels, its picture {w} x {h}.")
        _outline(image, row.mask)
    draw_plan(image, row.route, row.speed_wps, row.camera or SIMLINGO_CAMERA)
    return image


def _outline(image: Image.Image, mask: NDArray[np.bool_]) -> None:
    """A line around the mask, in place."""
    size = (image.width * _SUPERSAMPLED, image.height * _SUPERSAMPLED)
    large = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    inside = large.point([0] * 128 + [255] * 128)
    reach = round(_OUTLINE_PX * _SUPERSAMPLED * max(1.0, image.width / 640))
    # A blurred mask is not zero within the blur's reach: this grows it, far faster than a rank filter does.
    around = inside.filter(ImageFilter.BoxBlur(reach)).point([0] + [255] * 255)
    line = np.asarray(around) & ~np.asarray(inside)
    image.paste(OUTLINE, mask=Image.fromarray(line).reduce(_SUPERSAMPLED))


def _map(rgb: ByteArray, panel: Panel, width: int, opacity: float) -> Image.Image:
    if panel.heat is not None:
        return _resized(colored(rgb, panel.heat, scale=panel.scale, signed=panel.signed, opacity=opacity), width)
    image = _resized(rgb, width)
    face = font(min(24, max(10, width // 22)))
    text = fit("degenerate: no gradient, so no map", face, width - 8)
    pen, (left, _, right, bottom) = ImageDraw.Draw(image), face.getbbox(text, anchor="la")
    x, y = (width - right + left) / 2, (image.height - bottom) / 2
    pen.rectangle([x - 4, y - 3, x + right - left + 4, y + bottom + 3], fill=PAPER)
    pen.text((x, y), text, fill=WARNING, font=face, anchor="la")
    return image


def _resized(rgb: ByteArray, width: int) -> Image.Image:
    image = Image.fromarray(rgb)
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)


def _legend(page: Image.Image, top: int, margin: int, size: int, kinds: set[bool], opacity: float) -> None:
    """One bar for each kind of map in the sheet."""
    face, pen, x = font(size), ImageDraw.Draw(page), float(margin)
    for signed in sorted(kinds):
        words = ("works against the target", "works for it") if signed else ("0", "99th percentile of the scene")
        bar = color_bar(page.width // 10, size, signed, opacity)
        for item in (words[0], bar, words[1]):
            if isinstance(item, str):
                text = fit(item, face, page.width - margin - x)
                pen.text((x, top), text, fill=FAINT, font=face, anchor="la")
                x += face.getlength(text) + 0.5 * size
            else:
                page.paste(Image.fromarray(item), (round(x), top + round(0.1 * size)))
                x += item.shape[1] + 0.5 * size
        x += 1.5 * size
