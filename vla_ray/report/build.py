"""Everything to look at, from a run's directory: overlays of each method, and the page that shows them all."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vla_ray.data.masks import MASKS_SUBDIR, find_masks
from vla_ray.data.scenes import FrameRef
from vla_ray.errors import RunError, SceneError
from vla_ray.report.overlay import save_png
from vla_ray.report.page import Figure, ShownFrame, Table, write_page
from vla_ray.report.pictures import draw_scene, middle_frame, sheet_row
from vla_ray.report.sheet import SheetRow, sheet
from vla_ray.report.shown import method_order, read_scenes
from vla_ray.storage.files import Location, read_json

logger = logging.getLogger(__name__)

SHEET_ROWS, SHEET_COLUMNS = 6, 5


@dataclass(frozen=True, slots=True)
class Built:
    """What was written: frames on the page, pictures beside it."""

    frames: int
    overlays: int
    page: Location | None


def build_report(
    run: Location, maps: str = "maps", overlays: bool = True, page: bool = True, scores: str = "faithfulness"
) -> Built:
    """Write `overlays/` and `report/` of a run from its maps, and from the faithfulness tables of these, if any.

    Args:
        scores: name of the faithfulness run whose tables are shown.

    Raises:
        RunError: the run has no maps.
    """
    document = read_json(run / maps / "run.json")
    if document is None:
        raise RunError(f"{run / maps} holds no maps. Make them first: python jobs/explain.py run={run.name}")
    if document["settings"].get("job") == "explain_policy":
        raise RunError(
            f"{run / maps} explains a policy, whose page another job writes: python jobs/evaluate.py results={run}"
        )
    names, target = document["settings"]["methods"], document["fingerprint"]["targets"][0]
    drawn, rows = 0, list[SheetRow]()

    def scenes() -> Iterator[tuple[str, Sequence[ShownFrame]]]:
        nonlocal drawn
        for scene, frames in read_scenes(run / maps):
            if overlays:
                drawn += draw_scene(run / "overlays", frames)
                row = _sheet_row(frames, target, names[:SHEET_COLUMNS]) if len(rows) < SHEET_ROWS else None
                rows.extend([] if row is None else [row])
            yield scene, frames
        if rows:
            save_png(run / "overlays" / "sheet.png", sheet(rows, names[:SHEET_COLUMNS]))

    if not page:
        count = sum(len(frames) for _, frames in scenes())
        return Built(count, drawn, None)
    measured = (read_json(run / scores / "run.json") or {}).get("settings", {}).get("maps", {})
    own = measured.get("created") == document["created"]  # numbers of other maps would pass for those of these
    tables, figures = faithfulness_parts(run, scores) if own else ([], [])
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


def _sheet_row(frames: Sequence[ShownFrame], target: str, methods: Sequence[str]) -> SheetRow | None:
    frame = middle_frame(frames, target, methods)
    if frame is None or frame.image is None:
        return None
    ref = FrameRef(frame.frame_id, frame.scene, frame.stem, str(frame.image), frame.speed_mps)
    try:
        mask = find_masks([ref], MASKS_SUBDIR).get(frame.frame_id)
        return sheet_row(frames, target, methods, mask.path if mask else None)
    except SceneError as error:  # an outline is an extra: a broken mask must not cost the pictures
        logger.warning("no outline of %s: %s", frame.frame_id, error)
        return sheet_row(frames, target, methods, None)


def faithfulness_parts(run: Location, scores: str = "faithfulness") -> tuple[list[Table], list[Figure]]:
    """Tables and figures that the faithfulness job left in this run."""
    content = read_json(run / scores / "summary.json")
    if content is None:
        return [], []
    tables = [Table(**table) for table in content["tables"]]
    figures = []
    for figure in content["figures"]:
        png = (run / scores / figure["file"]).try_read_bytes()
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
