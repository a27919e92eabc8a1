"""Scene directories on any filesystem -> a list of frames, in a stable order, with everything known about each.

`scene_dir` is one scene, a root of scenes, a glob, or a list of these. A scene holds .png, .jpg or .jpeg files in the
named sub-directory, else directly, else in `images/` or `frames/`; a directory with none of these is a root, and its
children are scenes. `frames.jsonl` (see frame_table.py) and speed files add what the pixels do not say; for a frame
that has both, the table's speed counts. Images are not opened: 100,000 frames take a second or two.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from vla_ray.data.camera import Camera
from vla_ray.data.frame_table import TABLE_NAME, Row, TargetPoints, as_target_points, read_table
from vla_ray.data.patterns import expand
from vla_ray.errors import ConfigError, SceneError
from vla_ray.storage.files import Entry, Location

logger = logging.getLogger(__name__)

EXTENSIONS = (".png", ".jpg", ".jpeg")
PLACES = ("", "images", "frames")  # where a scene's images are, in this order; the named sub-directory comes first
THREADS = 16  # listings and small reads in flight: an object store answers each in tens of milliseconds

T = TypeVar("T")

_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True, slots=True)
class FrameRef:
    """One frame: where its image is, and what the prompt may say about it.

    Attributes:
        frame_id: `<scene>/<stem>`, unique in a discovery and safe as a relative path.
        image: absolute path or URI.
        target_points: the next two route nodes, metres (forward, right); None if unknown.
        question: the text to ask instead of the default one.
        camera: what took the picture, for drawing; None if unknown.
    """

    frame_id: str
    scene: str
    stem: str
    image: str
    speed_mps: float
    target_points: TargetPoints | None = None
    question: str | None = None
    camera: Camera | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        points = self.target_points
        return {
            "frame_id": self.frame_id,
            "scene": self.scene,
            "stem": self.stem,
            "image": self.image,
            "speed_mps": self.speed_mps,
            "target_points": None if points is None else [list(point) for point in points],
            "question": self.question,
            "camera": None if self.camera is None else self.camera.to_dict(),
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> FrameRef:
        points, camera = values["target_points"], values["camera"]
        known = {"target_points": points and as_target_points(points), "camera": camera and Camera(**camera)}
        return FrameRef(**values | known)


@dataclass(frozen=True, slots=True)
class _Scene:
    location: Location
    images: tuple[str, ...]  # paths relative to the scene
    rows: dict[str, Row]


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts frame_2 before frame_10; the name itself decides between frame_1 and frame_01."""
    return [int(part) if i % 2 else part for i, part in enumerate(_DIGITS.split(name))], name


def discover(
    scene_dir: str | Sequence[str],
    image_subdir: str | None = None,
    speed_subdir: str | None = None,
    default_speed_mps: float = 0.0,
) -> list[FrameRef]:
    """All frames below `scene_dir`, by scene and then by stem, both in natural order.

    Args:
        scene_dir: one or several of: a scene, a root of scenes, a glob of these; local paths or URIs.
        image_subdir: sub-directory of a scene that holds its images, looked at before all other places.
        speed_subdir: sub-directory of a scene with `<stem>.txt` files, each one number in m/s.
        default_speed_mps: for frames whose speed is nowhere; one warning says how many.

    Raises:
        SceneError: nothing found, an ambiguous scene or stem, or a table or speed file that cannot be read.
    """
    if not (math.isfinite(default_speed_mps) and default_speed_mps >= 0):
        raise ConfigError(f"default_speed_mps is {default_speed_mps}; give a finite number >= 0 (metres per second)")
    image_subdir = image_subdir.strip("/") if image_subdir else None
    speed_subdir = speed_subdir.strip("/") if speed_subdir else None
    given = [scene_dir] if isinstance(scene_dir, str | os.PathLike) else list(scene_dir)
    if not given:
        raise SceneError("scene_dir is empty; give a scene, a root of scenes, or a glob")
    places = (image_subdir, *PLACES) if image_subdir else PLACES
    scenes: dict[str, _Scene] = {}
    for text in given:
        for scene in _find(os.fspath(text), places):
            other = scenes.setdefault(scene.location.name, scene)
            if other.location != scene.location:
                raise SceneError(
                    f"two scenes are named {scene.location.name!r}: {other.location} and {scene.location}; "
                    "frame ids would be ambiguous: rename one, or run them apart"
                )
    if image_subdir and not any(i.startswith(f"{image_subdir}/") for s in scenes.values() for i in s.images[:1]):
        logger.warning("image_subdir=%s: no scene has images there; the usual places are used", image_subdir)
    frames: list[FrameRef] = []
    without_speed = 0
    for name in sorted(scenes, key=natural_key):
        found, missing = _frames(scenes[name], speed_subdir, default_speed_mps)
        frames += found
        without_speed += missing
    if without_speed:
        logger.warning(
            "%d of %d frames have no speed (no speed_mps in %s, no %s/<stem>.txt): default_speed_mps=%g m/s is used",
            without_speed,
            len(frames),
            TABLE_NAME,
            speed_subdir or "<speed_subdir>",
            default_speed_mps,
        )
    return frames


# Finding scenes ------------------------------------------------------------------------------------------------


def _find(text: str, places: Sequence[str]) -> list[_Scene]:
    """The scenes that one element of `scene_dir` means; SceneError if there are none."""
    matches = expand(text)
    if matches is None:
        location = Location.of(text)
        if not location.is_dir():
            state = "is a file; give its directory" if location.exists() else "does not exist; check the path"
            raise SceneError(f"scene_dir {location} {state}")
        locations = [location]
    elif matches:
        locations = matches
    else:
        raise SceneError(f"scene_dir {text!r} matches no directory; check the pattern")
    scenes: list[_Scene] = []
    children: list[Location] = []
    for location, (scene, entries) in zip(locations, _look_at(locations, places), strict=True):
        if scene is not None:
            scenes.append(scene)
        else:
            children += [location / e.name for e in entries if e.is_dir and not e.name.startswith(".")]
    for child, (scene, _) in zip(children, _look_at(children, places), strict=True):
        if scene is not None:
            scenes.append(scene)
        else:
            logger.debug("%s holds no images: not a scene", child)
    if not scenes:
        below = ", ".join(f"{place}/" for place in places if place)
        raise SceneError(
            f"no frames found in {text}: looked for {', '.join(EXTENSIONS)} files in it, in {below} "
            f"and in the same places of its {len(children)} sub-directories; check scene_dir or name image_subdir"
        )
    return scenes


def _look_at(locations: Sequence[Location], places: Sequence[str]) -> list[tuple[_Scene | None, list[Entry]]]:
    return _each(lambda location: _look(location, places), locations)


def _look(location: Location, places: Sequence[str]) -> tuple[_Scene | None, list[Entry]]:
    """The scene at this directory, or None, and what lies in the directory."""
    entries = location.list()
    directories = {entry.name for entry in entries if entry.is_dir}
    images: list[str] = []
    for place in places:
        if not place:
            images = _images(entries)
        elif place.split("/")[0] in directories:
            images = [f"{place}/{name}" for name in _images((location / place).list())]
        if images:
            break
    has_table = any(entry.name == TABLE_NAME and not entry.is_dir for entry in entries)
    rows = read_table(location / TABLE_NAME) if has_table else {}
    if not images and not rows:
        return None, entries
    _check_name(location.name, location)
    return _Scene(location, tuple(images), rows), entries


def _images(entries: Iterable[Entry]) -> list[str]:
    return [e.name for e in entries if not e.is_dir and _is_image(e.name)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _check_name(name: str, path: object) -> None:
    """A scene's name and a stem become parts of output paths."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise SceneError(f"{path}: {name!r} cannot be part of a frame id (no '..', '/' or '\\'); rename it")


# The frames of a scene -----------------------------------------------------------------------------------------


def _frames(scene: _Scene, speed_subdir: str | None, default_speed_mps: float) -> tuple[list[FrameRef], int]:
    """The scene's frames in order, and how many of them got the default speed."""
    by_stem: dict[str, str] = {}
    for image in (*scene.images, *_only_in_table(scene)):
        stem = image.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        other = by_stem.setdefault(stem, image)
        if other != image:
            raise SceneError(
                f"two images of scene {scene.location} have the stem {stem!r}: {other} and {image}; "
                "frame ids would be ambiguous: rename or remove one"
            )
    speeds = {image: row.speed_mps for image, row in scene.rows.items() if row.speed_mps is not None}
    if speed_subdir:
        unknown = [stem for stem, image in by_stem.items() if image not in speeds]
        speeds |= {by_stem[stem]: v for stem, v in _read_speeds(scene.location / speed_subdir, unknown).items()}
    name, prefix = scene.location.name, f"{str(scene.location).rstrip('/')}/"
    frames = []
    for stem in sorted(by_stem, key=natural_key):
        _check_name(stem, prefix + by_stem[stem])
        row = scene.rows.get(by_stem[stem])
        frames.append(
            FrameRef(
                frame_id=f"{name}/{stem}",
                scene=name,
                stem=stem,
                image=prefix + by_stem[stem],
                speed_mps=speeds.get(by_stem[stem], default_speed_mps),
                target_points=row.target_points if row else None,
                question=row.question if row else None,
                camera=row.camera if row else None,
            )
        )
    return frames, len(frames) - len(speeds)


def _only_in_table(scene: _Scene) -> list[str]:
    """Images that the table names outside the image directory. Each must exist; every directory is listed once."""
    listed: dict[str, set[str]] = {}
    known = set(scene.images)
    others = [row for image, row in scene.rows.items() if image not in known]
    for row in others:
        where, _, file = row.image.rpartition("/")
        if where not in listed:
            directory = scene.location / where if where else scene.location
            listed[where] = {entry.name for entry in directory.list() if not entry.is_dir}
        if file not in listed[where] or not _is_image(file):
            problem = "is no visible .png, .jpg or .jpeg file" if file in listed[where] else "does not exist"
            raise SceneError(
                f"{scene.location / TABLE_NAME}, line {row.line}: image {row.image!r} {problem}; "
                f"expected the path of an image relative to {scene.location}"
            )
    return [row.image for row in others]


def _read_speeds(directory: Location, stems: Sequence[str]) -> dict[str, float]:
    """Speeds in m/s of those stems that have a file in the directory; which need not exist."""
    files = {entry.name for entry in directory.list() if not entry.is_dir}
    present = [stem for stem in stems if f"{stem}.txt" in files]
    return dict(zip(present, _each(_read_speed, [directory / f"{stem}.txt" for stem in present]), strict=True))


def _read_speed(location: Location) -> float:
    text = location.read_bytes().decode("utf-8-sig", errors="replace").strip()
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not (math.isfinite(speed) and speed >= 0):
        raise SceneError(f"{location}: found {text[:40]!r}; expected one finite number >= 0 (metres per second)")
    return speed


def _each(function: Callable[[Location], T], locations: Sequence[Location]) -> list[T]:
    """The function's results in order: several at a time from an object store, one by one (3x faster) from a disk."""
    if all(location.is_local for location in locations):
        return [function(location) for location in locations]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, locations))
