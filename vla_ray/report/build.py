"""Everything to look at, from a run's directory: overlays of each method, and the page that shows them all."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from vla_ray.data.images import decode_rgb
from vla_ray.errors import RunError, VlaRayError
from vla_ray.report.overlay import Caption, draw, save_png, scene_scale
from vla_ray.report.page import Figure, ShownFrame, ShownMap, ShownTarget, Table, write_page
from vla_ray.report.shown import method_order, read_scenes
from vla_ray.schema import DEGENERATE
from vla_ray.storage.files import Location, read_json

logger = logging.getLogger(__name__)

OVERLAY_WIDTH = 960
THREADS = 4


@dataclass(frozen=True, slots=True)
class Built:
    """What was written: frames on the page, pictures beside it."""

    frames: int
    overlays: int
    page: Location | None


def build_report(run: Location, maps: str = "maps", overlays: bool = True, page: bool = True) -> Built:
    """Write `overlays/` and `report/` of a run from its maps, and from its faithfulness tables if there are any.

    Raises:
        RunError: the run has no maps.
    """
    document = read_json(run / maps / "run.json")
    if document is None:
        raise RunError(f"{run / maps} holds no maps. Make them first: python jobs/explain.py run={run.name}")
    names = document["settings"]["methods"]
    drawn = 0

    def scenes() -> Iterator[tuple[str, Sequence[ShownFrame]]]:
        nonlocal drawn
        for scene, frames in read_scenes(run / maps):
            if overlays:
                drawn += draw_scene(run / "overlays", frames)
            yield scene, frames

    if not page:
        count = sum(len(frames) for _, frames in scenes())
        return Built(count, drawn, None)
    tables, figures = faithfulness_parts(run)
    count = write_page(
        run / "report",
        f"{run.name}: which pixels the action came from",
        _facts(document),
        method_order(set(names)),
        scenes(),
        tables,
        figures,
    )
    return Built(count, drawn, run / "report" / "index.html")


def faithfulness_parts(run: Location) -> tuple[list[Table], list[Figure]]:
    """Tables and figures that the faithfulness job left in this run."""
    content = read_json(run / "faithfulness" / "summary.json")
    if content is None:
        return [], []
    tables = [Table(**table) for table in content["tables"]]
    figures = []
    for figure in content["figures"]:
        png = (run / "faithfulness" / figure["file"]).try_read_bytes()
        if png is not None:
            figures.append(Figure(figure["title"], figure["note"], png))
    return tables, figures


def _facts(document: dict[str, Any]) -> dict[str, str]:
    counts = ", ".join(f"{n:,} {status}" for status, n in sorted(document["counts"].items()) if n)
    settings = document["settings"]
    facts = {
        "rows": counts,
        "maps": "from stored payloads" if settings["source"] == "payloads" else "made online",
        "computed": document["updated"][:16].replace("T", " "),
        "vla_ray": document["versions"]["vla_ray"],
        "commit": str((document.get("git") or {}).get("commit") or "-")[:12],
        "command": document["command"],
    }
    if settings.get("strength"):
        facts["strength"] = f"{settings['strength']:g}"
    return facts


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
    try:
        assert frame.image is not None
        rgb = decode_rgb(frame.image.read_bytes(), str(frame.image))
    except VlaRayError as error:
        if any(target.status != "failed" for target in frame.targets):
            logger.warning("no overlay of %s: %s", frame.frame_id, error)
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
