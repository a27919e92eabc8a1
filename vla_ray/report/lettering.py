"""Text in pictures: any unicode, in a font that comes with matplotlib, and never wider than its place.

A model writes the text and people name the files, so nothing may be assumed of either; a glyph that the font lacks
becomes its box.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import matplotlib
from PIL import ImageFont

Font = ImageFont.FreeTypeFont

_ELLIPSIS = "\u2026"
_LONGEST = 2000  # characters that are looked at: more never fit, and measuring them takes time


@lru_cache(maxsize=32)
def font(size: int, bold: bool = False) -> Font:
    """DejaVu Sans; `size` in pixels."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def plain(text: str) -> str:
    """One line without control characters and half surrogate pairs, which no text layout takes."""
    kept = (" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text[:_LONGEST])
    return " ".join("".join(kept).split())


def fit(text: str, face: Font, width: float, keep_end: bool = False) -> str:
    """The text if it is at most `width` pixels wide, else its beginning (or its end) with an ellipsis, at worst ''."""
    text = plain(text)
    if face.getlength(text) <= width:
        return text
    if keep_end:
        kept = _most(len(text), width, lambda n: face.getlength(_ELLIPSIS + text[len(text) - n :]))
        return _ELLIPSIS + text[len(text) - kept :] if kept else ""
    kept = _most(len(text), width, lambda n: face.getlength(text[:n].rstrip() + _ELLIPSIS))
    return text[:kept].rstrip() + _ELLIPSIS if kept else ""


def wrap(text: str, face: Font, width: float, most: int) -> list[str]:
    """At most `most` lines; words that are longer than a line are broken, and what is left out leaves an ellipsis."""
    lines: list[str] = []
    text = plain(text)
    while text and len(lines) < most - 1:
        end = _most(len(text), width, partial(_length, text, face))
        if 0 < end < len(text) and (space := text.rfind(" ", 0, end + 1)) > 0:
            end = space
        if end == 0:
            return lines
        lines.append(text[:end])
        text = text[end:].lstrip()
    last = fit(text, face, width)
    return [*lines, last] if last else lines


def _length(text: str, face: Font, count: int) -> float:
    return face.getlength(text[:count])


def _most(count: int, width: float, length: Callable[[int], float]) -> int:
    """The largest n <= count with length(n) <= width, 0 if there is none."""
    return max(0, bisect_right(range(count + 1), width, key=length) - 1)
