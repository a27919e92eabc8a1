"""A report of heat maps that opens from disk in any browser: index.html, and beside it pictures and map data.

No server and no network: style, code and what tables need are inlined in index.html; a frame's maps lie in
data/<n>.js, which the page loads as plain scripts when it needs them (a page from disk may not fetch), so that a report
of thousands of frames opens at once. Maps keep their own grid, as 8-bit numbers, and are coloured by the browser.
index.html is written last and an older one is removed first: a report is whole or absent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_ray.data.camera import Camera
from vla_ray.errors import ImageError, StorageError
from vla_ray.report.page_data import safe_json, scale_of
from vla_ray.report.page_parts import (
    CHUNK_CHARS,
    WRITERS,
    Figure,
    MapKey,
    MapValues,
    ShownMap,
    Table,
    chunk_script,
    common_index,
    figure_file,
    fill_template,
    map_entries,
    map_name,
    map_values,
    small_copy,
)
from vla_ray.storage.files import Location, write_atomic
from vla_ray.targets import KINEMATICS

__all__ = ["Figure", "ShownFrame", "ShownMap", "ShownTarget", "Table", "write_page"]

logger = logging.getLogger(__name__)

CHUNK_FRAMES = 64  # a chunk of map data ends here, or at CHUNK_CHARS


@dataclass(frozen=True, slots=True)
class ShownTarget:
    """The value of one target. `status`: ok | degenerate | failed; `error` as "ImageError: ..." if it failed."""

    name: str
    unit: str
    value: float | None
    status: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ShownFrame:
    """One frame as predicted and explained.

    Attributes:
        image: the original picture; None if it cannot be read.
        text: the generated commentary.
        route: [20, 2] metres, x forward, y right; [0, 2] if the frame failed.
        speed_wps: [10, 2], the same, one every 0.25 s.
        metrics: columns of the metrics table.
    """

    frame_id: str
    scene: str
    stem: str
    image: Location | None
    text: str
    speed_mps: float
    route: np.ndarray
    speed_wps: np.ndarray
    camera: Camera
    metrics: Mapping[str, float | str | None]
    targets: Sequence[ShownTarget]
    maps: Sequence[ShownMap]


def write_page(
    directory: Location,
    title: str,
    facts: Mapping[str, str],
    methods: Mapping[str, str],
    scenes: Iterable[tuple[str, Sequence[ShownFrame]]],
    tables: Sequence[Table] = (),
    figures: Sequence[Figure] = (),
) -> int:
    """Write a report and return its number of frames.

    A picture that cannot be read leaves its frame without one, with a warning.

    Args:
        directory: gets index.html, images/<scene>/<stem>.jpg, data/<n>.js and figures/<n>.png.
        facts: about the run, in the order to show.
        methods: name to description in one line, in the order to show.
        scenes: consumed one by one; only one scene's maps are in memory.

    Raises:
        TargetError: a map is not finite, or a frame has two maps of one target and method.
        StorageError: `directory` cannot be written.
    """
    index_file = directory / "index.html"
    index_file.delete()
    book = _Book(directory, methods)
    for scene, frames in scenes:
        if frames:
            book.add_scene(scene, frames)
    if book.unread:
        logger.warning("%d pictures are missing in the report; the first: %s", len(book.unread), book.unread[0])
    for number, figure in enumerate(figures):
        write_atomic(directory / figure_file(number), figure.png)
    index = {**common_index(facts, tables, figures), **book.index()}
    write_atomic(index_file, fill_template("page.html", title, index))
    return len(book.frames)


class _Book:
    """What index.html says about all frames, gathered scene by scene, while pictures and map data are written."""

    def __init__(self, directory: Location, methods: Mapping[str, str]) -> None:
        self.directory = directory
        self.methods = dict(methods)
        self.targets: dict[str, str] = {}  # name to unit
        self.columns: dict[str, str] = {}  # of the metrics table: name to unit
        self.scenes: list[dict[str, Any]] = []
        self.frames: list[list[Any]] = []
        self.unread: list[str] = []
        self.chunks = 0

    def index(self) -> dict[str, Any]:
        return {
            "methods": list(self.methods.items()),
            "targets": list(self.targets.items()),
            "columns": list(self.columns.items()),
            "scenes": self.scenes,
            "frames": self.frames,
        }

    def add_scene(self, scene: str, frames: Sequence[ShownFrame]) -> None:
        with ThreadPoolExecutor(WRITERS) as pool:
            sizes = list(pool.map(lambda frame: self._picture(scene, frame), frames))
        maps = [map_values(frame.frame_id, frame.maps) for frame in frames]
        scales = _scene_scales(maps)
        entry = {
            "name": scene,
            "first": len(self.frames),
            "count": len(frames),
            "range": _range(frames),
            "scales": {map_name(key): scale for key, scale in scales.items()},
        }
        geometry = next((m.map.geometry for frame in frames for m in frame.maps), None)
        chunk: list[str] = []
        for frame, size, values in zip(frames, sizes, maps, strict=True):
            if len(chunk) >= CHUNK_FRAMES or sum(map(len, chunk)) >= CHUNK_CHARS:
                self._write_chunk(chunk)
                chunk = []
            # A degenerate frame has no map to say what was cropped: its scene's camera did not change.
            own = frame.maps[0].map.geometry if frame.maps else geometry
            shape = size or (None if own is None else (own.width, own.height))
            kept = None if own is None else own.kept_height / own.height
            self.frames.append(self._row(frame, size is not None, shape, kept))
            chunk.append(safe_json(_details(frame, shape, values, scales)))
        self._write_chunk(chunk)
        self.scenes.append(entry)
        for key in ((m.target, m.method) for frame in frames for m in frame.maps):
            self.targets.setdefault(key[0], "")
            self.methods.setdefault(key[1], "")

    def _row(self, frame: ShownFrame, has_picture: bool, size: tuple[int, int] | None, kept: float | None) -> list[Any]:
        for target in frame.targets:
            self.targets.setdefault(target.name, target.unit)
        for name in frame.metrics:
            self.columns.setdefault(name, KINEMATICS[name].unit if name in KINEMATICS else "")
        return [
            frame.frame_id,
            frame.stem,
            self.chunks,
            has_picture,
            size,
            kept,
            frame.speed_mps,
            frame.text,
            [frame.metrics.get(name) for name in self.columns],
            [[t.name, t.value, t.status, t.error] for t in frame.targets],
        ]

    def _write_chunk(self, frames: Sequence[str]) -> None:
        write_atomic(self.directory / f"data/{self.chunks}.js", chunk_script(self.chunks, frames))
        self.chunks += 1

    def _picture(self, scene: str, frame: ShownFrame) -> tuple[int, int] | None:
        """Write the small copy; (width, height) of the original, None if there is none."""
        if frame.image is None:
            return None
        try:
            content, size = small_copy(frame.image)
        except (ImageError, StorageError) as error:
            self.unread.append(str(error))
            return None
        write_atomic(self.directory / f"images/{scene}/{frame.stem}.jpg", content)
        return size


# Maps ----------------------------------------------------------------------------------------------------------


def _scene_scales(maps: Sequence[MapValues]) -> dict[MapKey, float]:
    keys = dict.fromkeys(key for values in maps for key in values)
    return {key: scale_of(np.concatenate([v[key].ravel() for v in maps if key in v])) for key in keys}


def _details(
    frame: ShownFrame, size: tuple[int, int] | None, values: MapValues, scales: Mapping[MapKey, float]
) -> dict[str, Any]:
    """What data/<n>.js holds of a frame."""
    lines: dict[str, Any] = {}
    for name, points in (("route", frame.route), ("speed", frame.speed_wps)):
        points = np.asarray(points, np.float64).reshape(-1, 2)
        lines[name] = np.round(points, 3).tolist()
        lines[f"{name}_px"] = [] if size is None else np.round(frame.camera.project(points, *size), 1).tolist()
    return {**lines, "maps": map_entries(frame.maps, values, scales)}


def _range(frames: Iterable[ShownFrame]) -> list[float]:
    """[least x, greatest x, greatest |y|] in metres of all points, for axes that stay put within a scene."""
    points = np.concatenate([np.asarray(p, float).reshape(-1, 2) for f in frames for p in (f.route, f.speed_wps)])
    points = np.concatenate([points[np.isfinite(points).all(1)], np.zeros((1, 2))])
    return [float(points[:, 0].min()), float(points[:, 0].max()), float(np.abs(points[:, 1]).max())]
