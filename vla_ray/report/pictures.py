"""Pictures of a scene's maps: an overlay for every frame, method and target, and rows of a contact sheet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from vla_ray.data.images import decode_rgb
from vla_ray.data.masks import read_labels
from vla_ray.data.synthetic import MASKS
from vla_ray.errors import VlaRayError
from vla_ray.report.overlay import ByteArray, Caption, draw, save_png, scene_scale
from vla_ray.report.page import ShownFrame, ShownMap, ShownTarget
from vla_ray.report.sheet import Panel, SheetRow
from vla_ray.schema import DEGENERATE
from vla_ray.storage.files import Location
from vla_ray.targets import KINEMATICS

logger = logging.getLogger(__name__)

OVERLAY_WIDTH = 960
THREADS = 4


def draw_scene(directory: Location, frames: Sequence[ShownFrame]) -> int:
    """Write overlays/<method>/<scene>/<stem>.png, with several targets <stem>_<target>.png; returns how many."""
    methods = dict.fromkeys((m.method, m.target) for frame in frames for m in frame.maps)
    scales = {
        key: scene_scale(m.map for frame in frames for m in frame.maps if (m.method, m.target) == key)
        for key in methods
    }
    several = len({target.name for frame in frames for target in frame.targets}) > 1
    with ThreadPoolExecutor(THREADS) as pool:
        work = partial(_draw_frame, directory, scales=scales, several=several)
        return sum(pool.map(work, frames))


def _draw_frame(directory: Location, frame: ShownFrame, scales: dict[tuple[str, str], float], several: bool) -> int:
    rgb = _pixels(frame)
    if rgb is None:
        return 0
    targets = {target.name: target for target in frame.targets}
    pictures: list[tuple[str, ShownTarget, ShownMap | None]] = [(m.method, targets[m.target], m) for m in frame.maps]
    for method, name in scales:
        if name in targets and targets[name].status == DEGENERATE:
            pictures.append((method, targets[name], None))
    for method, target, shown in pictures:
        suffix = f"_{target.name}" if several else ""
        picture = draw(
            rgb,
            shown.map if shown else None,
            scale=scales[method, target.name],
            route=frame.route,
            speed_wps=frame.speed_wps,
            camera=frame.camera,
            caption=Caption(
                frame.frame_id, method, target.name, target.value, target.unit, frame.speed_mps, frame.text
            ),
            signed=shown is not None and shown.direction == "signed",
            width=min(OVERLAY_WIDTH, max(448, rgb.shape[1])),
        )
        save_png(directory / method / frame.scene / f"{frame.stem}{suffix}.png", picture)
    return len(pictures)


def sheet_row(frames: Sequence[ShownFrame], target: str, methods: Sequence[str], mask: str | None) -> SheetRow | None:
    """A scene's row: its middle frame that has a map of every method; None if there is none.

    Args:
        mask: its mask image, outlined where it shows what matters for the target.
    """
    frame = middle_frame(frames, target, methods)
    rgb = None if frame is None else _pixels(frame)
    if frame is None or rgb is None:
        return None
    panels = {}
    for method in methods:
        own = {f.frame_id: m for f in frames for m in f.maps if (m.target, m.method) == (target, method)}
        shown = own[frame.frame_id]
        scale = scene_scale(m.map for m in own.values())
        panels[method] = Panel(shown.map, scale, shown.direction == "signed")
    value = next(t for t in frame.targets if t.name == target)
    head = KINEMATICS[target].head if target in KINEMATICS else "speed"
    labels = None if mask is None else read_labels(mask)
    wanted = 1 + MASKS.index("markings" if head == "route" else "cause")
    # A mask of another size is an error where maps are measured; here it is left out.
    outline = labels == wanted if labels is not None and labels.shape == rgb.shape[:2] else None
    return SheetRow(
        label=frame.frame_id,
        rgb=rgb,
        panels=panels,
        mask=outline,
        note=f"{target} = {value.value:.3g} {value.unit}; {frame.text}",
        route=frame.route,
        speed_wps=frame.speed_wps,
        camera=frame.camera,
    )


def middle_frame(frames: Sequence[ShownFrame], target: str, methods: Sequence[str]) -> ShownFrame | None:
    """The middle one of the frames that have a map of every method."""
    whole = [f for f in frames if {m.method for m in f.maps if m.target == target} >= set(methods)]
    return whole[len(whole) // 2] if whole else None


def _pixels(frame: ShownFrame) -> ByteArray | None:
    try:
        assert frame.image is not None
        return decode_rgb(frame.image.read_bytes(), str(frame.image))
    except VlaRayError as error:
        if any(target.status != "failed" for target in frame.targets):
            logger.warning("no picture of %s: %s", frame.frame_id, error)
        return None
