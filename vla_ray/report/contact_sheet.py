"""Samples of a dataset as a person would check them: the picture, what was asked, and the way the robot then took.

One card per sample. Its plan is the view from above in the robot frame, x (forward) up and y (left) to the left, equal
scales both ways and the same on every card of a sheet, so that a turn and a stop can be told apart at a glance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.trajectory import positions
from vla_ray.data.images import decode_rgb
from vla_ray.report.lettering import fit, font, wrap
from vla_ray.report.overlay import FAINT, INK, PAPER
from vla_ray.report.trajectory import mark_route

COLUMNS = 6
SIDE = 152  # pixels of a picture, and of a plan

_GAP, _MARGIN, _LETTERS = 6, 14, 12
_LINE = round(1.35 * _LETTERS)
_WORDS = 2  # lines of the instruction
_GRID, _AXIS = (226, 229, 234), (176, 182, 192)
_LINES = 5  # of the grid, at most, each way
_BEHIND = 0.14  # share of a plan that lies behind the robot
_DOT = 2.0


def contact_sheet(samples: Sequence[Sample], columns: int = COLUMNS) -> Image.Image:
    """An RGB picture with a card per sample, row by row in their order, and what the grids mean below.

    Raises:
        ImageError: a sample's picture cannot be decoded.
        ValueError: no samples, or less than one column.
    """
    if not samples or columns < 1:
        raise ValueError(f"a contact sheet needs samples and columns; got {len(samples)} and {columns}")
    columns = min(columns, len(samples))
    width, height = 2 * SIDE + _GAP, SIDE + (_WORDS + 2) * _LINE
    rows = math.ceil(len(samples) / columns)
    page = Image.new(
        "RGB", (_MARGIN + columns * (width + _MARGIN), _MARGIN + rows * (height + _MARGIN) + 2 * _LINE), PAPER
    )
    reach, step = _scale(samples)
    for k, sample in enumerate(samples):
        at = _MARGIN + (k % columns) * (width + _MARGIN), _MARGIN + (k // columns) * (height + _MARGIN)
        page.paste(_card(sample, width, height, reach, step), at)
    text = f"from above, robot frame: x (forward) up, y left; grid {step:g} units, 1 unit = 1 waypoint spacing"
    face = font(_LETTERS)
    for line, words in enumerate(wrap(text + _metres(samples), face, page.width - 2 * _MARGIN, 2)):
        top = page.height - (2 - line) * _LINE - _MARGIN // 2
        ImageDraw.Draw(page).text((_MARGIN, top), words, fill=FAINT, font=face, anchor="la")
    return page


def _metres(samples: Sequence[Sample]) -> str:
    scales = sorted({round(s.scale_m, 4) for s in samples if s.scale_m is not None})
    if not scales:
        return ""
    return f" = {scales[0]:g} m" if len(scales) == 1 else f" = {scales[0]:g} to {scales[-1]:g} m"


def _scale(samples: Sequence[Sample]) -> tuple[float, float]:
    """How far forward a plan reaches, and the step of its grid, in units: so that every path fits into every plan."""
    ways = np.concatenate([np.zeros((1, 2)), *(positions(s.actions) for s in samples)])
    x, y = ways[:, 0], np.abs(ways[:, 1])
    ahead, behind = float(x.max()), float(-x.min())
    reach = max(1.0, 1.08 * ahead, 1.25 * behind * (1 - _BEHIND) / _BEHIND, 2.16 * float(y.max()) * (1 - _BEHIND))
    tenth = 10.0 ** math.floor(math.log10(reach / _LINES))
    return reach, next(tenth * k for k in (1, 2, 5, 10) if tenth * k * _LINES >= reach)


def _card(sample: Sample, width: int, height: int, reach: float, step: float) -> Image.Image:
    card = Image.new("RGB", (width, height), PAPER)
    picture = Image.fromarray(decode_rgb(sample.image, sample.sample_id))
    card.paste(_squared(picture), (0, 0))
    card.paste(_plan(sample.actions, reach, step), (SIDE + _GAP, 0))
    pen, face, bold = ImageDraw.Draw(card), font(_LETTERS), font(_LETTERS, bold=True)
    lines = wrap(sample.instruction, bold, width, _WORDS)
    for k, words in enumerate(lines):
        pen.text((0, SIDE + 4 + k * _LINE), words, fill=INK, font=bold, anchor="la")
    left = int((~sample.valid).sum())
    ended = f", ends after {len(sample.valid) - left} steps" if left else ""
    more = f", {len(sample.instructions)} wordings" if len(sample.instructions) > 1 else ""
    notes = (f"{sample.dataset}, {sample.split}{more}", f"{sample.recording}, t = {sample.t}{ended}")
    for k, words in enumerate(notes, start=len(lines)):
        pen.text((0, SIDE + 4 + k * _LINE), fit(words, face, width, keep_end=k > len(lines)), fill=FAINT, font=face)
    return card


def _squared(picture: Image.Image) -> Image.Image:
    """Fitted into the square, proportions kept; few pixels stay square pixels."""
    factor = SIDE / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    small = picture.resize(size, Image.Resampling.LANCZOS if factor < 2 else Image.Resampling.NEAREST)
    square = Image.new("RGB", (SIDE, SIDE), _GRID)
    square.paste(small, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return square


def _plan(actions: NDArray[np.float32], reach: float, step: float) -> Image.Image:
    """The path from above: grid, axes, the robot as a triangle, a dot per step."""
    plan = Image.new("RGB", (SIDE, SIDE), PAPER)
    pen, face = ImageDraw.Draw(plan), font(_LETTERS - 3)
    unit = SIDE * (1 - _BEHIND) / reach  # pixels

    def place(x: float, y: float) -> tuple[float, float]:
        return SIDE / 2 - y * unit, SIDE * (1 - _BEHIND) - x * unit

    for k in range(-_LINES, _LINES + 1):
        (across, up), color = place(k * step, k * step), _GRID if k else _AXIS
        pen.line([(0, up), (SIDE, up)], fill=color)
        pen.line([(across, 0), (across, SIDE)], fill=color)
        if k > 0 and up > _LETTERS:
            pen.text((2, up - 1), f"{k * step:g}", fill=FAINT, font=face, anchor="ls")
    pen.rectangle([0, 0, SIDE - 1, SIDE - 1], outline=_AXIS)
    u, v = place(0.0, 0.0)
    pen.polygon([(u - 5, v + 6), (u, v - 5), (u + 5, v + 6), (u, v + 3)], fill=INK)
    way = np.concatenate([np.zeros((1, 2)), positions(actions.astype(np.float64))])
    if np.abs(way).max() > 0.5 / unit:
        mark_route(plan, [(*place(x, y), _DOT) for x, y in way.tolist()])
    else:
        words = "stays" if len(actions) else "no actions"
        pen.text((u + 12, v + 3), words, fill=INK, font=font(_LETTERS - 2), anchor="ls")
    return plan
