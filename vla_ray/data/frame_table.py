"""`frames.jsonl`: what is known about the frames of a scene besides their pixels.

One JSON object per line, for one image each:

    {"image": "frames/0001.png", "speed_mps": 5.3, "target_points": [[7.5, 0.4], [21.25, 2.75]], "question": "..."}

`image` is a path relative to the scene; the other keys may be null or absent. Target points are the next two route
nodes in metres, x forward and y right of the ego vehicle. `"camera": {"fov_deg": 85, "height_m": 1.5}` tells how the
frame was taken, for drawing (see camera.py). Every mistake is a `SceneError` with file and line.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from vla_ray.data.camera import Camera
from vla_ray.errors import SceneError, nearest
from vla_ray.storage.files import Location

logger = logging.getLogger(__name__)

TABLE_NAME = "frames.jsonl"
KEYS = ("image", "speed_mps", "target_points", "question", "camera")
CAMERA = {  # the fields of Camera: open interval, and in words
    "fov_deg": (0.0, 180.0, "a number of degrees between 0 and 180"),
    "height_m": (0.0, math.inf, "a finite number of metres > 0"),
    "behind_m": (-math.inf, math.inf, "a finite number of metres"),
    "pitch_rad": (-math.inf, math.inf, "a finite number of radians"),
}

TargetPoints = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line. `image` is normalised (no `./`), None stands for what the line does not say."""

    line: int
    image: str
    speed_mps: float | None
    target_points: TargetPoints | None
    question: str | None
    camera: Camera | None


def read_table(location: Location) -> dict[str, Row]:
    """The rows of a table by image path. Blank lines are skipped, unknown keys too, with one warning per table."""
    try:
        text = location.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SceneError(
            f"{location}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    rows: dict[str, Row] = {}
    unknown: set[str] = set()
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 is legal inside a JSON string
        if not line.strip():
            continue
        row, others = _parse(location, number, line)
        if row.image in rows:
            _refuse(
                location, number, f"image {row.image!r} is listed already in line {rows[row.image].line}", "once each"
            )
        rows[row.image] = row
        unknown |= others
    if unknown:
        hints = "".join(nearest(key, KEYS) for key in sorted(unknown))
        logger.warning(
            "%s: ignoring the unknown keys %s; known: %s.%s", location, sorted(unknown), ", ".join(KEYS), hints
        )
    return rows


def _parse(location: Location, number: int, line: str) -> tuple[Row, set[str]]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({' '.join(str(error).split())})"
        raise SceneError(f"{location}, line {number}: {reason}; expected one object per line") from error
    if not isinstance(value, dict):
        _refuse(
            location, number, f"found {_shown(value)}", 'an object like {"image": "frames/0001.png", "speed_mps": 5.3}'
        )
    if "image" not in value:
        keys = ", ".join(map(repr, value)) or "none"
        _refuse(
            location, number, f"the key 'image' is missing (found: {keys})", "'image', a path relative to the scene"
        )
    image = _image(value["image"])
    if image is None:
        expected = "a path relative to the scene, without '..', to a file below it"
        _refuse(location, number, f"image is {_shown(value['image'])}", expected)
    speed = value.get("speed_mps")
    if speed is not None and not (_is_number(speed) and speed >= 0):
        _refuse(location, number, f"speed_mps is {_shown(speed)}", "a finite number >= 0 (metres per second), or null")
    points = value.get("target_points")
    if points is not None and not _are_target_points(points):
        expected = "two points [[x, y], [x, y]] of finite numbers (metres forward, metres right), or null"
        _refuse(location, number, f"target_points is {_shown(points)}", expected)
    question = value.get("question")
    if question is not None and not (isinstance(question, str) and question.strip()):
        _refuse(location, number, f"question is {_shown(question)}", "a text that is not empty, or null")
    row = Row(
        line=number,
        image=image,
        speed_mps=None if speed is None else float(speed),
        target_points=None if points is None else as_target_points(points),
        question=question,
        camera=_camera(location, number, value.get("camera")),
    )
    return row, value.keys() - set(KEYS)


def _camera(location: Location, number: int, value: Any) -> Camera | None:
    """A camera; what it leaves out is as in SimLingo's. A mistyped key would draw everything in the wrong place."""
    if value is None:
        return None
    if not isinstance(value, dict):
        expected = 'an object like {"fov_deg": 110, "height_m": 2.0, "behind_m": 1.5, "pitch_rad": 0.0}, or null'
        _refuse(location, number, f"camera is {_shown(value)}", expected)
    for key, size in value.items():
        if key not in CAMERA:
            _refuse(
                location, number, f"camera has the unknown key {key!r}", f"{', '.join(CAMERA)}.{nearest(key, CAMERA)}"
            )
        low, high, expected = CAMERA[key]
        if not (_is_number(size) and low < size < high):
            _refuse(location, number, f"camera.{key} is {_shown(size)}", expected)
    return Camera(**{key: float(size) for key, size in value.items()})


def _refuse(location: Location, number: int, found: str, expected: str) -> NoReturn:
    raise SceneError(f"{location}, line {number}: {found}; expected {expected}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _image(value: Any) -> str | None:
    if not isinstance(value, str) or value.startswith("/") or "\\" in value or "\0" in value:
        return None
    parts = [part for part in value.split("/") if part != "."]
    return "/".join(parts) if all(part and part != ".." for part in parts) and parts else None


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e308 and math.isfinite(value)  # a JSON integer may exceed every float


def _are_target_points(value: Any) -> bool:
    return _is_pair(value) and all(_is_pair(point) and all(_is_number(x) for x in point) for point in value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def as_target_points(value: Any) -> TargetPoints:
    """Nested sequences [2][2] as the tuples that a frame holds."""
    (x0, y0), (x1, y1) = value
    return (float(x0), float(y0)), (float(x1), float(y1))
