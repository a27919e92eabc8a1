"""What all report pages are made of: maps, tables and figures to show, small pictures, data scripts, and the template.

A page says what it shows in an index and in data/<n>.js; everything here turns results into pieces of these.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from vla_ray.data.images import decode_rgb
from vla_ray.errors import TargetError
from vla_ray.explain.heatmap import FloatArray, HeatMap
from vla_ray.report.page_data import colour_tables, quantised, safe_json
from vla_ray.storage.files import Location

PICTURE_WIDTH = 960  # pixels; wider pictures are scaled down
JPEG_QUALITY = 85
CHUNK_CHARS = 4_000_000  # a chunk of data ends here at the latest
SIGNED = "signed"
WRITERS = 8  # threads that decode, shrink and write pictures

MapKey = tuple[str, str]  # target, method
MapValues = dict[MapKey, FloatArray]  # on one canvas, thumbnail included


@dataclass(frozen=True, slots=True)
class ShownMap:
    """One heat map. Only a `signed` one keeps its negative values.

    Attributes:
        direction: what the map shows of the target: positive | negative | signed | none.
        shares: of the language model's relevance: image, text, prompt, queries; may be empty.
    """

    target: str
    method: str
    direction: str
    map: HeatMap
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Table:
    """A further table, shown under Results."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A further figure, shown under Results."""

    title: str
    note: str
    png: bytes


def map_values(frame_id: str, maps: Sequence[ShownMap]) -> MapValues:
    """What is shown of each map. TargetError if one is not finite, or if two are of the same target and method."""
    values: MapValues = {}
    for shown in maps:
        what = f"the map of {frame_id} for {shown.target} by {shown.method}"
        if (shown.target, shown.method) in values:
            raise TargetError(f"{what} is given twice; give one map for each target and method.")
        grid = shown.map.combined().values
        if not np.isfinite(grid).all():
            raise TargetError(f"{what} has {int((~np.isfinite(grid)).sum())} values that are not finite.")
        values[shown.target, shown.method] = grid if shown.direction == SIGNED else np.maximum(grid, 0)
    return values


def map_entries(maps: Sequence[ShownMap], values: MapValues, scales: Mapping[MapKey, float]) -> dict[str, Any]:
    """What a data script holds of a frame's maps.

    Args:
        scales: what is coloured as 1 where frames are compared; what lies above it may be cut.
    """
    entries = {}
    for shown in maps:
        key = shown.target, shown.method
        entries[map_name(key)] = {
            **quantised(values[key], shown.direction == SIGNED, scales[key]),
            "direction": shown.direction,
            "shares": dict(shown.shares),
        }
    return entries


def map_name(key: MapKey) -> str:
    """Target and method as one key of a script's object; no name holds a line break."""
    return "\n".join(key)


def small_copy(image: Location) -> tuple[bytes, tuple[int, int]]:
    """An upright JPEG of at most PICTURE_WIDTH, and (width, height) of the original.

    Raises:
        StorageError, ImageError: it cannot be read.
    """
    rgb_HW3 = decode_rgb(image.read_bytes(), str(image))
    height, width = rgb_HW3.shape[:2]
    picture = Image.fromarray(rgb_HW3)
    if width > PICTURE_WIDTH:
        small = (PICTURE_WIDTH, max(1, round(height * PICTURE_WIDTH / width)))
        picture = picture.resize(small, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue(), (width, height)


def chunk_script(number: int, details: Sequence[str]) -> bytes:
    """The content of data/<number>.js: JSON of what belongs to each frame, in the order of the index."""
    return f"vlaRayChunk({number},[{','.join(details)}]);\n".encode()


def common_index(facts: Mapping[str, str], tables: Sequence[Table], figures: Sequence[Figure]) -> dict[str, Any]:
    """What every page's index holds. Figures lie in figures/<n>.png."""
    return {
        "facts": list(facts.items()),
        "colours": colour_tables(),
        "tables": [{"title": t.title, "note": t.note, "columns": t.columns, "rows": t.rows} for t in tables],
        "figures": [{"title": f.title, "note": f.note, "file": figure_file(n)} for n, f in enumerate(figures)],
    }


def figure_file(number: int) -> str:
    return f"figures/{number}.png"


def fill_template(template: str, title: str, index: Mapping[str, Any]) -> bytes:
    """A page: its template with the title, the index, and the assets that it names, all inlined."""
    assets = resources.files("vla_ray.report") / "assets"
    given = {"title": html.escape(title), "index": safe_json(index)}

    def part(match: re.Match[str]) -> str:
        name = match[1]
        return given[name] if name in given else (assets / name).read_text()

    # In one pass: what is filled in may look like a marker.
    return re.sub(r"@@([\w.]+)@@", part, (assets / template).read_text()).encode()
