"""What a page from disk is given: maps in 8 bits, colours as bytes, and JSON that is safe inside HTML.

Data reaches the page only through `safe_json`, whatever a model wrote or a file is called.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np

from vla_ray.explain.heatmap import FloatArray
from vla_ray.report.colors import oklab_to_srgb

SCALE_PERCENTILE = 99.0  # of |values|: what is coloured as 1; a few larger cells saturate


def scale_of(values: FloatArray) -> float:
    """The value that is coloured as 1: a percentile of |values|, or the largest where almost every cell is zero."""
    absolute = np.abs(values)
    return float(np.percentile(absolute, SCALE_PERCENTILE)) or float(absolute.max())


def quantised(values: FloatArray, signed: bool, scene_scale: float) -> dict[str, Any]:
    """A grid in 8 bits: value = number / 255 * peak, or number / 127 * peak if signed.

    The peak is the frame's own, so that a faint frame keeps its levels; what lies above both scales is cut, since it
    is never told apart.
    """
    absolute, scale = np.abs(values), scale_of(values)
    peak = min(float(absolute.max()), max(scene_scale, scale))
    steps, kind = (127, np.int8) if signed else (255, np.uint8)
    levels = np.clip(values / peak, -1, 1) * steps if peak > 0 else np.zeros_like(values)
    return {
        "rows": values.shape[0],
        "columns": values.shape[1],
        "data": base64.b64encode(np.round(levels).astype(kind).tobytes()).decode(),
        "peak": peak,
        "scale": scale,
        "mass": float(absolute.sum()),
    }


def colour_tables() -> dict[str, str]:
    """256 colours for maps without and with sign, RGB bytes in base64."""
    tables = {"sequential": _sequential(), "diverging": _diverging()}
    return {
        name: base64.b64encode(np.round(colours * 255).astype(np.uint8).tobytes()).decode()
        for name, colours in tables.items()
    }


def _sequential() -> np.ndarray:
    """RGB [256, 3] in 0..1: inferno without its black and white ends, which would look like parts of a picture."""
    return mpl.colormaps["inferno"](np.linspace(0.2, 0.92, 256))[:, :3]


def _diverging() -> np.ndarray:
    """RGB [256, 3] in 0..1: light blue, dark grey, light orange, in even steps of OKLab lightness, all within sRGB."""
    at = np.linspace(-1, 1, 256)
    strength = np.abs(at)
    lightness = 0.3 + 0.55 * strength
    chroma = 0.15 * np.minimum(1, 2.2 * strength) * (1 - 0.4 * strength**2)
    hue = np.radians(np.where(at > 0, 25 + 45 * strength, 265 - 50 * strength))
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    return oklab_to_srgb(lab)


def safe_json(value: Any) -> str:
    """JSON in ASCII without '<', '>' and '&', so that no text can end the script element it stands in.

    Floats have six digits; those that are not finite become null.
    """
    text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
