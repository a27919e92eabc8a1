"""Checks that need maps and rows only, no model: do maps differ by target, are they steady in time, does the text agree
with the action?
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from vla_ray.evaluation.bootstrap import mean_with_interval
from vla_ray.explain.faithfulness.consistency import commentary_consistency
from vla_ray.explain.faithfulness.sanity import between_targets
from vla_ray.explain.faithfulness.temporal import temporal_consistency
from vla_ray.report.page import ShownFrame, Table
from vla_ray.report.shown import SHARES, read_scenes
from vla_ray.schema import MAPS
from vla_ray.storage.files import Location
from vla_ray.storage.fragments import read_rows
from vla_ray.storage.ledger import read_metrics
from vla_ray.targets import KINEMATICS

_ACCOUNTS = {"share_cls": "on CLS (vision)", "completeness_error": "completeness error", "forwards": "forwards"}
Values = dict[tuple[str, str], list[tuple[str, float | None]]]


def map_checks(maps: Location) -> list[Table]:
    """Tables of consistency in time and between targets; empty ones where there is one frame or one target."""
    steady: Values = {}
    alike: Values = {}
    for scene, frames in read_scenes(maps):
        for target, method in dict.fromkeys((m.target, m.method) for f in frames for m in f.maps):
            steady.setdefault((target, method), []).append((scene, _steadiness(frames, target, method)))
        for frame in frames:
            for method in dict.fromkeys(m.method for m in frame.maps):
                own = {m.target: m.map.combined().values for m in frame.maps if m.method == method}
                for (a, b), found in between_targets(own).items():
                    alike.setdefault((f"{a} / {b}", method), []).append((scene, found.spearman))
    return [
        _table(
            "Steadiness in time",
            "Rank correlation of consecutive frames' maps minus that of frames further apart, by scene. Maps are not "
            "warped for the ego's motion.",
            ["target", "method", "consecutive - others"],
            steady,
        ),
        _table(
            "Maps of different targets",
            "Rank correlation of the maps of two targets of one frame. Near 1: the method ignores what it explains.",
            ["targets", "method", "similarity"],
            alike,
        ),
    ]


def accounts_table(maps: Location) -> Table:
    """What methods say of themselves: where relevance lies in the language model, completeness, their own cost."""
    rows = read_metrics(maps, ["frame_id", "target", "payload_path"]).to_pylist()
    own = {(row["frame_id"], row["target"]): row["payload_path"] for row in rows if row["payload_path"]}
    columns = {**{f"share_{part}": f"on {part}" for part in SHARES}, **_ACCOUNTS}
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for path, table in read_rows(maps, own.values(), MAPS):
        for row in table.select(["frame_id", "target", "method", *columns]).to_pylist():
            if own.get((row["frame_id"], row["target"])) != path:
                continue
            found = values.setdefault((row["target"], row["method"]), {name: [] for name in columns})
            for name in columns:
                if row[name] is not None:
                    found[name].append(row[name])
    shown = [name for name in columns if any(found[name] for found in values.values())]
    return Table(
        "What the methods say of themselves",
        "Means over frames. Shares: where the relevance that has moved lies in the language model. Completeness error: "
        "|sum of the map - change of the scalar| / |change|. Forwards: passes of a method's own.",
        ["target", "method", *(columns[name] for name in shown)],
        [
            [*key, *(float(np.mean(found[name])) if found[name] else None for name in shown)]
            for key, found in values.items()
        ],
    )


def _steadiness(frames: list[ShownFrame], target: str, method: str) -> float | None:
    head = KINEMATICS[target].head if target in KINEMATICS else "speed"
    chosen = [(f, m.map.combined().values) for f in frames for m in f.maps if (m.target, m.method) == (target, method)]
    shapes = {values.shape for _, values in chosen}
    if len(shapes) != 1:
        return None
    trajectories = np.stack([f.route if head == "route" else f.speed_wps for f, _ in chosen])
    return temporal_consistency([values for _, values in chosen], trajectories).consistency


def _table(title: str, note: str, columns: list[str], values: Values) -> Table:
    rows: list[list[str | float | int | None]] = []
    for (first, method), pairs in values.items():
        estimate = mean_with_interval([v for _, v in pairs], [s for s, _ in pairs])
        if estimate.mean is not None:
            rows.append([first, method, str(estimate)])
    return Table(title, note, columns, rows)


def commentary_table(maps: Location) -> Table:
    """How often the predicted trajectory does what the generated text says."""
    counts: dict[str, Counter[str]] = {}
    for _, frames in read_scenes(maps):
        for frame in frames:
            if not len(frame.route) or not len(frame.speed_wps):
                continue
            found = commentary_consistency(frame.text, frame.route, frame.speed_wps, frame.speed_mps)
            said = " and ".join(part for part in (found.claim.pace, found.claim.way) if part) or "no claim"
            counts.setdefault(said, Counter())[found.outcome] += 1
    rows: list[list[str | float | int | None]] = []
    for said, found_outcomes in sorted(counts.items(), key=lambda item: -item[1].total()):
        total, wrong = found_outcomes.total(), found_outcomes["contradicted"]
        rows.append([said, total, wrong, f"{wrong / total:.0%}" if said != "no claim" else None])
    return Table(
        "Does it do what it says?",
        "The commentary's claim about speed and direction against the predicted trajectory, by frame.",
        ["says", "frames", "contradicted by the action", "share"],
        rows,
    )
