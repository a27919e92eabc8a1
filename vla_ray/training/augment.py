"""Changes of a training picture that keep its action true, or change it accordingly.

A mirrored corridor asks for the mirrored action: y changes its sign, and the instruction's left and right are swapped.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vla_ray.config.train import AugmentConfig
from vla_ray.data.cast.instructions import swap_sides


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


def _shift(rgb: NDArray[np.uint8], dx: int, dy: int) -> NDArray[np.uint8]:
    """The border is repeated where nothing is known."""
    rows = np.clip(np.arange(rgb.shape[0]) - dy, 0, rgb.shape[0] - 1)
    columns = np.clip(np.arange(rgb.shape[1]) - dx, 0, rgb.shape[1] - 1)
    return rgb[rows[:, None], columns]
