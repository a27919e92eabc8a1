"""A run of maps as the report and the overlays see it: scene by scene, each frame with its values, maps and camera."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from vla_ray.data.camera import SIMLINGO_CAMERA
from vla_ray.data.scenes import FrameRef, natural_key
from vla_ray.errors import RunError
from vla_ray.explain.methods import METHODS
from vla_ray.report.page import ShownFrame, ShownMap, ShownTarget
from vla_ray.schema import FAILED, KINEMATIC_COLUMNS, MAPS
from vla_ray.stages.maps import read_map
from vla_ray.storage.files import Location, read_json
from vla_ray.storage.fragments import read_rows
from vla_ray.storage.ledger import read_metrics
from vla_ray.targets import KINEMATICS

SHARES = ("image", "text", "prompt", "queries")
_SHOWN_METRICS = (*KINEMATIC_COLUMNS, "route_length", "route_end_x", "route_end_y")


def unit_of(target: str) -> str:
    """The unit of a target's value."""
    return KINEMATICS[target].unit if target in KINEMATICS else "logit"


def read_scenes(maps_run: Location) -> Iterator[tuple[str, list[ShownFrame]]]:
    """Scenes in natural order, one in memory at a time.

    Raises:
        RunError: there are no maps here.
    """
    table = read_metrics(maps_run)
    if not table.num_rows:
        raise RunError(f"{maps_run} holds no maps. Make them first: python jobs/explain.py run=NAME")
    document = read_json(maps_run / "run.json") or {}
    order = {name: i for i, name in enumerate(document.get("fingerprint", {}).get("targets", ()))}
    for scene in sorted(pc.unique(table["scene"]).to_pylist(), key=natural_key):
        rows = table.filter(pc.equal(table["scene"], scene)).to_pylist()
        rows.sort(key=lambda row: order.get(row["target"], len(order)))  # as they were asked for
        maps = read_scene_maps(maps_run, rows)
        by_frame: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_frame.setdefault(row["frame_id"], []).append(row)
        ids = sorted(by_frame, key=natural_key)
        yield scene, [_frame(by_frame[frame_id], maps) for frame_id in ids]


def read_scene_maps(
    maps_run: Location, rows: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(frame, target) -> rows of MAPS, of those metrics rows that name a file."""
    wanted = {(row["frame_id"], row["target"]): row["payload_path"] for row in rows if row["payload_path"]}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path, table in read_rows(maps_run, wanted.values(), MAPS):
        for row in table.to_pylist():
            key = (row["frame_id"], row["target"])
            if wanted.get(key) == path:
                found.setdefault(key, []).append(row)
    return found


def _frame(
    rows: Sequence[Mapping[str, Any]], maps: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
) -> ShownFrame:
    first = rows[0]
    ref = FrameRef.from_dict(json.loads(first["frame"]))
    done = next((row for row in rows if row["route"]), first)
    return ShownFrame(
        frame_id=ref.frame_id,
        scene=ref.scene,
        stem=ref.stem,
        image=Location.of(ref.image),
        text=done["text"] or "",
        speed_mps=ref.speed_mps,
        route=np.array(done["route"] or (), np.float32).reshape(-1, 2),
        speed_wps=np.array(done["speed_wps"] or (), np.float32).reshape(-1, 2),
        camera=ref.camera or SIMLINGO_CAMERA,
        metrics={name: done[name] for name in _SHOWN_METRICS},
        targets=[
            ShownTarget(
                row["target"],
                unit_of(row["target"]),
                row["target_scalar"],
                row["status"],
                f"{row['error_type']}: {row['error']}" if row["status"] == FAILED else None,
            )
            for row in rows
        ],
        maps=[
            ShownMap(m["target"], m["method"], m["direction"], read_map(m), shares(m))
            for row in rows
            for m in maps.get((row["frame_id"], row["target"]), ())
        ],
    )


def shares(row: Mapping[str, Any]) -> dict[str, float]:
    """Of a row of MAPS: where the language model's relevance lies."""
    return {part: row[f"share_{part}"] for part in SHARES if row[f"share_{part}"] is not None}


def method_order(names: set[str]) -> dict[str, str]:
    """Name -> one line on what it is, in the registry's order."""
    return {name: f"{m.summary} ({m.source})" for name, m in METHODS.items() if name in names}
