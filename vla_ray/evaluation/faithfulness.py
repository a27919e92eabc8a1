"""From scores of frames to tables with confidence intervals over scenes, for each target and method.

Faithfulness (what hiding cells does to the trajectory) and plausibility (where maps lie) stand side by side and are
never merged into one number. Baselines are rows like any method: random maps of the same blobs, and the mean map of
other scenes, which no claim about a frame can do without beating.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vla_ray.evaluation.bootstrap import Estimate, mean_with_interval, paired_difference
from vla_ray.evaluation.faithfulness_figure import curves_figure
from vla_ray.evaluation.map_checks import accounts_table, commentary_table, map_checks
from vla_ray.explain.faithfulness.dependence import PERTURBATIONS, Moved, depends_on_image
from vla_ray.explain.methods import METHODS
from vla_ray.report.page import Table
from vla_ray.schema import SCORES
from vla_ray.stages.scores import PRIOR, RANDOM
from vla_ray.storage.files import Location, write_atomic, write_json
from vla_ray.storage.fragments import read_rows
from vla_ray.storage.ledger import read_metrics
from vla_ray.targets import KINEMATICS

# Column of the table -> measure, and what it says.
MEASURES = {
    "early deletion": ("early", "mean displacement while the first 8 % of cells are hidden / with all hidden"),
    "- prior": ("early - prior", "the same minus the prior's, paired by frame"),
    "MoRF - LeRF": ("gap", "area between hiding the most and the least relevant cells first"),
    "lift": ("lift", "relevance on the true cause / its area; 1 is chance"),
    "lift elsewhere": ("lift_elsewhere", "the same against another frame's mask of the same cause: position alone"),
    "pointing": ("pointing", "share of frames whose strongest cell is on the cause or next to it"),
    "distractors": ("nuisance_lift", "relevance on scenery / its area; 1 is chance, lower is better"),
    "as occlusion": ("occlusion", "rank correlation with the occlusion map"),
    "early, text anew": ("early_regenerated", "early deletion while the text is written anew"),
}


@dataclass(frozen=True, slots=True)
class Summary:
    """What a faithfulness run says.

    Attributes:
        tables: for the report.
        estimates: one row per (target, subject, measure): mean, low, high, frames, scenes.
        figures: (title, note, PNG).
        text: the verdicts in a few lines, for the terminal.
    """

    tables: tuple[Table, ...]
    estimates: pd.DataFrame
    figures: tuple[tuple[str, str, bytes], ...]
    text: str
    warnings: tuple[str, ...] = field(default=())


def summarise(run: Location, maps: Location) -> Summary:
    """Tables of a faithfulness run and of the maps it measured."""
    rows = read_metrics(run, ["frame_id", "target", "payload_path"])
    paths = [p for p in rows["payload_path"].to_pylist() if p]
    wanted = {
        (f, t): p
        for f, t, p in zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True)
        if p is not None
    }
    parts = []
    for path, table in read_rows(run, paths, SCORES):
        frame = table.to_pandas()
        mine = [wanted.get(key) == path for key in zip(frame["frame_id"], frame["target"], strict=True)]
        parts.append(frame[mine])
    scores = pd.concat(parts) if parts else pa.Table.from_pylist([], SCORES).to_pandas()
    tables, estimates, figures, lines, warnings = [], [], [], [], []
    for target in dict.fromkeys(scores["target"]):
        mine = scores[scores["target"] == target]
        found = _estimates(mine)
        estimates.append(found.assign(target=target))
        tables.append(_method_table(target, found))
        verdict, table = _dependence(target, mine)
        tables.append(table)
        lines.append(f"  {target}: {verdict}")
        if "does not depend" in verdict:
            warnings.append(f"{target}: {verdict}")
        figures.append((f"Deletion curves, {target}", _CURVES_NOTE, curves_figure(mine, target)))
        if (mine["measure"] == "randomised_similarity").any():
            tables.append(_randomisation(target, mine))
    tables += [accounts_table(maps), *map_checks(maps)]
    tables.append(commentary_table(maps))
    joined = pd.concat(estimates, ignore_index=True) if estimates else pd.DataFrame()
    text = "\n".join([*lines, *(_headline(joined))])
    return Summary(tuple(t for t in tables if t.rows), joined, tuple(figures), text, tuple(warnings))


_CURVES_NOTE = (
    "Displacement of the trajectory, relative to everything hidden, while the most relevant cells are hidden first "
    "(mean over frames). The steeper at the left, the better."
)


def _estimates(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and interval of every measure of every method and baseline of one target."""
    plain = scores[scores["at"].isna() & (scores["measure"] != "randomised_similarity")]
    found = []
    for (subject, measure), part in plain.groupby(["subject", "measure"], sort=False):
        found.append({"subject": subject, "measure": measure, **_interval(part)})
    early = plain[plain["measure"] == "early"]
    early = early.pivot_table(index=["scene", "frame_id"], columns="subject", values="value")
    for subject in early.columns if PRIOR in early.columns else ():
        if subject != PRIOR:
            scenes = early.index.get_level_values("scene").tolist()
            difference = paired_difference(_plain(early[subject]), _plain(early[PRIOR]), scenes)
            found.append({"subject": subject, "measure": "early - prior", **_numbers(difference)})
    return pd.DataFrame(found)


def _interval(part: pd.DataFrame) -> dict[str, Any]:
    return _numbers(mean_with_interval(_plain(part["value"]), part["scene"].tolist()))


def _plain(values: Iterable[float]) -> list[float | None]:
    return [None if v is None or not np.isfinite(v) else float(v) for v in values]


def _numbers(e: Estimate) -> dict[str, Any]:
    return {"mean": e.mean, "low": e.low, "high": e.high, "frames": e.frames, "scenes": e.scenes}


def _cell(row: Mapping[Any, Any] | None) -> str | None:
    if row is None or row["mean"] is None or not np.isfinite(row["mean"]):
        return None
    digits = 1 if abs(row["mean"]) >= 10 else 2
    if row["low"] is None or not np.isfinite(row["low"]):
        return f"{row['mean']:.{digits}f}"
    return f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def _method_table(target: str, estimates: pd.DataFrame) -> Table:
    by_key = {(r["subject"], r["measure"]): r for r in estimates.to_dict("records")}
    subjects = [s for s in [*METHODS, PRIOR, RANDOM] if (s, "early") in by_key or (s, "lift") in by_key]
    columns = {name: m for name, (m, _) in MEASURES.items() if any((s, m) in by_key for s in subjects)}
    rows = [[s, *(_cell(by_key.get((s, m))) for m in columns.values())] for s in subjects]
    frames = max((int(r["frames"]) for r in by_key.values()), default=0)
    scenes = max((int(r["scenes"]) for r in by_key.values()), default=0)
    scored = int(by_key[subjects[0], "early"]["frames"]) if subjects and (subjects[0], "early") in by_key else 0
    note = f"{frames} frames of {scenes} scenes; mean [95 % interval, scenes resampled]. "
    if scored < frames:
        note += f"Curves of {scored} of them: in the others hiding everything moves the trajectory less than 0.1 m. "
    note += "; ".join(f"{name}: {MEASURES[name][1]}" for name in columns) + "."
    return Table(f"Maps of {target}", note, ["method", *columns], rows)


def _dependence(target: str, scores: pd.DataFrame) -> tuple[str, Table]:
    """Does the action depend on the picture at all?"""
    head = KINEMATICS[target].head if target in KINEMATICS else None
    moved = scores[scores["subject"].isin(PERTURBATIONS)]
    rows: list[list[str | float | int | None]] = []
    means: dict[str, Moved] = {}
    for name in PERTURBATIONS:
        cells = dict(list(moved[moved["subject"] == name].groupby("measure")))
        if "route_m" not in cells:
            continue
        means[name] = Moved(cells["route_m"]["value"].mean(), cells["speed_m"]["value"].mean(), 0.0)
        keys = ("route_m", "speed_m", "route_m_regenerated", "speed_m_regenerated")
        rows.append([name, *(_cell(_interval(cells[key])) if key in cells else None for key in keys)])
    if not means:
        return "no frame was measured", Table(f"Dependence on the picture, {target}", "", [], [])
    verdict = str(depends_on_image(means, head))
    column = "route_m" if head == "route" else "speed_m"
    worst = moved[moved["measure"] == column].groupby("frame_id")["value"].max()
    share = float((worst >= depends_on_image(means, head).threshold_m).mean())
    note = (
        f"Mean displacement in metres when the whole picture is changed. {verdict[0].upper()}{verdict[1:]}. "
        f"{share:.0%} of the frames move by the threshold or more under some change."
    )
    columns = ["picture", "route (m)", "speed waypoints (m)", "route, text anew", "speed waypoints, text anew"]
    return f"{verdict} ({share:.0%} of the frames)", Table(f"Dependence on the picture, {target}", note, columns, rows)


def _randomisation(target: str, scores: pd.DataFrame) -> Table:
    part = scores[scores["measure"] == "randomised_similarity"]
    rows = [[str(stage), _cell(_interval(p))] for stage, p in part.groupby("subject", sort=False)]
    note = (
        "Rank correlation of the map with that of the model whose weights are replaced by noise from the heads down to "
        "this stage. A method that shows the model, not the picture, falls towards 0."
    )
    return Table(f"Weights randomised, {target}", note, ["down to", "similarity"], rows)


def _headline(estimates: pd.DataFrame) -> list[str]:
    """Early deletion of every method against the prior's, in words."""
    lines: list[str] = []
    if estimates.empty:
        return lines
    for (target, subject), part in estimates.groupby(["target", "subject"], sort=False):
        by_measure = {row["measure"]: row for row in part.to_dict("records")}
        early, over = by_measure.get("early"), by_measure.get("early - prior")
        if subject in METHODS and early is not None:
            against = "" if over is None else f", {_cell(over)} above the prior"
            lift = by_measure.get("lift")
            on_cause = "" if lift is None else f", lift on the cause {_cell(lift)}"
            lines.append(f"    {target} by {subject}: early deletion {_cell(early)}{against}{on_cause}")
    return lines


def write_summary(run: Location, summary: Summary) -> None:
    """table.parquet, table.md, figures, and summary.json, which the report reads; the last one last."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(summary.estimates, preserve_index=False), sink)
    write_atomic(run / "table.parquet", sink.getvalue().to_pybytes())
    write_atomic(run / "table.md", "\n".join(markdown(t) for t in summary.tables).encode())
    figures = []
    for i, (title, note, png) in enumerate(summary.figures):
        write_atomic(run / f"curves_{i}.png", png)
        figures.append({"title": title, "note": note, "file": f"curves_{i}.png"})
    write_json(run / "summary.json", {"tables": [asdict(t) for t in summary.tables], "figures": figures})


def markdown(table: Table) -> str:
    """A table as Markdown, with its title and note."""
    lines: list[str] = [f"## {table.title}", "", table.note, ""]
    lines.append("| " + " | ".join(table.columns) + " |")
    lines.append("|" + "---|" * len(table.columns))
    lines += ["| " + " | ".join(_shown(v) for v in row) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _shown(value: str | float | int | None) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
