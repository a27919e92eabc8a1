"""Changes of a training picture that keep its action true, or change it accordingly.

A mirrored corridor asks for the mirrored action: y changes its sign, and the instruction's left and right are swapped.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from vla_ray.config.train import AugmentConfig

_PAIRS: tuple[str, ...] = (
    "left right",
    "leftmost rightmost",
    "leftward rightward",
    "leftwards rightwards",
    "lefthand righthand",
)
_PAIRS += ("leftside rightside", "topleft topright", "clockwise counterclockwise")
_SIDES = {a: b for pair in _PAIRS for a, b in (pair.split(), pair.split()[::-1])}
# What is no side stays: "stop right before the door", "the chair right next to you"; but "turn right behind the chair".
_NO_SIDE = (
    r"\b(?:stop|wait|stay|stand|halt|park)\w* right(?= (?:before|after|at|by|next|in|behind|beside|here|there)\b)"
    r"|(?<!turn )(?<!go )(?<!bear )(?<!keep )(?<!move )(?<!adjust )"
    r"\bright (?:away|now|here|there|next to|in front|beside)\b"
)
_TURNING = r"\b(?:counter|anti)[- ]?clockwise\b"
_TEXT = re.compile(rf"(?P<kept>{_NO_SIDE})|(?P<turning>{_TURNING})|[A-Za-z]+", re.IGNORECASE)


def augment(
    rgb: NDArray[np.uint8],
    instruction: str,
    actions: NDArray[np.float32],
    settings: AugmentConfig,
    generator: np.random.Generator,
) -> tuple[NDArray[np.uint8], str, NDArray[np.float32]]:
    """A changed picture [H, W, 3] with what is to be done in it, and actions [H, 2] (y left)."""
    # All are drawn, used or not: switching one off leaves the others as they were.
    mirrored = generator.random() < settings.mirror
    gain, contrast, dx, dy = generator.uniform(-1, 1, 4)
    if mirrored:
        rgb, instruction, actions = rgb[:, ::-1], swap_sides(instruction), actions * np.array([1, -1], actions.dtype)
    if settings.shift:
        rgb = _shift(rgb, round(dx * settings.shift * rgb.shape[1]), round(dy * settings.shift * rgb.shape[0]))
    if settings.brightness or settings.contrast:
        pixels = rgb.astype(np.float32) * (1 + gain * settings.brightness)
        mean = pixels.mean()
        pixels = (pixels - mean) * (1 + contrast * settings.contrast) + mean
        rgb = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(rgb), instruction, actions


def swap_sides(text: str) -> str:
    """The instruction for the mirrored picture: left <-> right in every form, letter case kept."""

    def swap(match: re.Match[str]) -> str:
        word = match[0]
        other = "clockwise" if match["turning"] else None if match["kept"] else _SIDES.get(word.lower())
        if other is None:
            return word
        return other.upper() if word.isupper() else other.title() if word[0].isupper() else other

    return _TEXT.sub(swap, text)


def _shift(rgb: NDArray[np.uint8], dx: int, dy: int) -> NDArray[np.uint8]:
    """The border is repeated where nothing is known."""
    rows = np.clip(np.arange(rgb.shape[0]) - dy, 0, rgb.shape[0] - 1)
    columns = np.clip(np.arange(rgb.shape[1]) - dx, 0, rgb.shape[1] - 1)
    return rgb[rows[:, None], columns]
