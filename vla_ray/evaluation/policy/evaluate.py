"""From predictions to everything that is said of them: tables, figures, files, and the lines that a job prints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_ray.evaluation.policy import figures
from vla_ray.evaluation.policy.calibration import calibrate
from vla_ray.evaluation.policy.intervals import Resampler
from vla_ray.evaluation.policy.language import INDEPENDENT, Language, follows_language, p_text
from vla_ray.evaluation.policy.metrics import Scores, score_all
from vla_ray.evaluation.policy.predictions import PICTURES, Predictions
from vla_ray.evaluation.policy.report import (
    length_tables,
    report_text,
    sample_table,
    summary_line,
    text_table,
    write_document,
    write_parquet,
)
from vla_ray.evaluation.policy.summary import (
    UNITS,
    PlainTable,
    Summary,
    axis_table,
    kind_table,
    show,
    step_table,
    summarise,
    summary_table,
    turn_side,
)
from vla_ray.evaluation.policy.trajectory_figures import language_fan, trajectory_examples
from vla_ray.storage.files import Location, write_atomic

logger = logging.getLogger(__name__)

Floats = NDArray[np.floating]

REPORT, ANALYSIS = "evaluation_report.txt", "instruction_analysis.txt"
JSON, PARQUET = "metrics.json", "metrics.parquet"
FIGURES = {
    "error_distributions.png": (
        "Errors",
        "Displacement of the predicted trajectory from the right one, beside standing still and going straight.",
    ),
    "trajectory_examples.png": (
        "Examples",
        "The best, median and worst by ADE, and random ones. Trajectories are beside the pictures, not in them: "
        "no camera is known.",
    ),
    "instruction_performance.png": ("By kind of instruction", "Mean and 95 % interval; baselines beside it."),
    "language_fan.png": ("Language", "The same picture with different instructions."),
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that was measured.

    Attributes:
        text: for the terminal.
        tables: for the HTML report, report.page.Table(**asdict(table)).
        figures: (title, note, PNG).
        summary: None where nothing could be scored, as scores.
        scores: "" is the policy, then the baselines: columns of values per sample, in the order of `predictions`.
        confidence: [N] mean log probability; None if unknown.
        files: what was written.
    """

    predictions: Predictions
    text: str
    tables: tuple[PlainTable, ...]
    figures: tuple[tuple[str, str, bytes], ...]
    summary: Summary | None
    scores: Mapping[str, Scores] | None
    confidence: Floats | None
    language: Language | None
    warnings: tuple[str, ...]
    files: tuple[Location, ...]


def evaluate_predictions(predictions: Predictions, out: Location, counterfactual: bool = False) -> Evaluation:
    """Measure, draw and write. Without targets there are no metrics, only examples and what language changes.

    Args:
        out: directory for REPORT, ANALYSIS, JSON, PARQUET and FIGURES; older ones of these names are replaced.
        counterfactual: test whether the instructions are followed, with the variants that the file has.
    """
    p = predictions
    resampler = Resampler(p.groups or p.sample_id)
    warnings = _warnings(p)
    tables: list[PlainTable] = []
    document: dict[str, Any] = {
        "predictions": str(p.location), "name": p.name, "units": UNITS, "num_steps": p.num_steps,
        "samples": len(p), "predicted": int(p.predicted_ok.sum()), "scored": int(p.scored.sum()),
        "whole": int((p.scored & p.valid.all(axis=1)).sum()), "median_step": p.median_step,
        "median_from": p.median_from, "metadata": dict(p.metadata), "notes": warnings,
    }  # fmt: skip
    pictures: dict[str, bytes | None] = {}
    analysis = "No sample has both a prediction and a target: there is nothing to analyse.\n"
    scores, summary, calibration = None, None, None
    if p.scored.any():
        scores = score_all(p)
        summary = summarise(scores, resampler)
        steps, moved = step_table(scores, resampler)
        axes, axis_mae = axis_table(scores, resampler)
        by_kind, kinds = kind_table(p, scores, resampler)
        side = turn_side(p, scores)
        tables += [_with_side(summary_table(summary, p), side), axes, steps, by_kind]
        calibration = calibrate(p, scores[""], resampler)
        if calibration is not None:
            tables += calibration.tables
        analysis = "\n".join(text_table(t) for t in (by_kind, *length_tables(p, scores[""], resampler)))
        document |= {
            "summary": summary.estimates, "per_step_displacement": moved, "per_axis_mae": axis_mae,
            "instruction_kinds": kinds, "turn_side": side,
            "calibration": None if calibration is None else calibration.numbers,
        }  # fmt: skip
        pictures["error_distributions.png"] = figures.error_distributions(scores, moved, axis_mae)
        pictures["instruction_performance.png"] = figures.instruction_performance(kinds)
    ade = np.full(len(p), np.nan) if scores is None else scores[""].columns["ade"]
    pictures["trajectory_examples.png"] = trajectory_examples(p, ade)
    language = None
    if counterfactual:
        language = follows_language(p, resampler)
        pictures["language_fan.png"] = language_fan(p)
        if language is None:
            warnings.append(
                "nothing shows whether instructions are followed: no other instructions were predicted. "
                "Run python jobs/evaluate.py results=... counterfactual=true"
            )
        else:
            tables += language.tables
            document["language"] = {
                "estimates": language.estimates, "without_language": language.chance, "language_use_p": language.p,
            }  # fmt: skip
    text = "\n".join([summary_line(summary, p), *_language_lines(language), *(f"  note: {w}" for w in warnings)])
    confidence = None if calibration is None else calibration.confidence
    out.mkdir()
    contents = {
        REPORT: report_text(p, summary, tables, warnings).encode(),
        ANALYSIS: analysis.encode(),
        **{name: pictures.get(name) for name in FIGURES},
    }
    for name, content in contents.items():
        if content is None:
            (out / name).delete()  # of an earlier evaluation, which it would be taken for a part of
        else:
            write_atomic(out / name, content)
    write_parquet(out / PARQUET, sample_table(p, scores, confidence))
    write_document(out / JSON, document)
    written = [name for name, content in contents.items() if content is not None]
    return Evaluation(
        p, text, tuple(tables), _figures(pictures), summary, scores, confidence, language, tuple(warnings),
        tuple(out / name for name in (*written, PARQUET, JSON)),
    )  # fmt: skip


def _warnings(p: Predictions) -> list[str]:
    found = []
    failed = int((~p.predicted_ok).sum())
    if failed:
        first = next((e for e, ok in zip(p.error, p.predicted_ok, strict=True) if e and not ok), None)
        found.append(f"{failed} of {len(p)} samples have no prediction" + (f", the first: {first}" if first else ""))
    if len(p) > int(np.isfinite(p.target).any(axis=(1, 2)).sum()) > 0:
        found.append(f"{int((~np.isfinite(p.target).any(axis=(1, 2))).sum())} of {len(p)} samples have no target")
    missing, elsewhere = p.missing_pictures()
    if missing:
        found.append(f"{missing} of {len(p)} pictures no longer exist where {p.location.name} says")
    if elsewhere:
        found.append(
            f"{elsewhere} of {len(p)} pictures are not followed to, as {p.location.name} names them outside of its own "
            f"directory; put them into {PICTURES}/ there"
        )
    unscaled = int((p.scored & ~np.isfinite(p.scale_m)).sum())
    if unscaled:
        found.append(f"the scale of {unscaled} samples is unknown: they are left out of what is in metres")
    return found


def _with_side(table: PlainTable, side: Mapping[str, Any]) -> PlainTable:
    """Turn-side accuracy has two baselines of its own."""
    if not side["n"]:
        return table
    note = (
        f"{table.note} Right side: {side['right']} of {side['n']} samples that end at least {side['least_units']:g} "
        f"unit to a side (against a coin p {p_text(side['p_coin'])}, {INDEPENDENT}; always the likelier side: "
        f"{side['always_one_side']:.2f})."
    )
    return PlainTable(table.title, note, table.columns, table.rows)


def _language_lines(language: Language | None) -> list[str]:
    if language is None:
        return []
    e = language.estimates
    parts = []
    if "language_use" in e and language.p is not None:
        parts.append(f"language use {show(e['language_use'])} (p {p_text(language.p)})")
    if "order" in e:
        parts.append(f"left > forward > right {show(e['order'])} (chance {language.chance['order']:.2f})")
    if "retrieval" in e:
        parts.append(f"retrieval {show(e['retrieval'])} (chance 0.50)")
    return ["  Language: " + ", ".join(parts)] if parts else []


def _figures(pictures: Mapping[str, bytes | None]) -> tuple[tuple[str, str, bytes], ...]:
    return tuple((*FIGURES[name], data) for name in FIGURES if (data := pictures.get(name)) is not None)
