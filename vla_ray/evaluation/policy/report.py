"""The files of an evaluation that people and programs read: two texts, JSON, and Parquet with a row for each sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla_ray.data.cast.instructions import kind
from vla_ray.evaluation.bootstrap import Estimate
from vla_ray.evaluation.policy.intervals import Resampler
from vla_ray.evaluation.policy.metrics import BASELINES, STEP_TAUS, Scores
from vla_ray.evaluation.policy.predictions import Predictions
from vla_ray.evaluation.policy.summary import UNITS, Cell, PlainTable, Summary, show
from vla_ray.schema import ACTION_UNITS
from vla_ray.storage.files import Location, write_atomic

Floats = NDArray[np.floating]
BINS = 5


def summary_line(summary: Summary | None, predictions: Predictions) -> str:
    """What a job prints: the original's four numbers, then what they mean beside the baselines."""
    p = predictions
    counts = f"{int(p.scored.sum())} of {len(p)} samples"
    if summary is None:
        why = "no sample was predicted" if not p.predicted_ok.any() else "no sample has both a prediction and a target"
        return f"Evaluation Summary: no metrics, {why} ({int(p.predicted_ok.sum())} of {len(p)} predicted)."
    names = {"mse": "MSE", "mae": "MAE", "rmse": "RMSE", "success_rate_0.1": "Success Rate (0.1)"}
    first = ", ".join(f"{label}: {summary.mean(name):.4f}" for name, label in names.items())
    lines = [f"Evaluation Summary: {first} ({counts}; {UNITS})"]
    for name in ("ade", "fde"):
        own = summary.estimates[""][name]
        if own.mean is not None:
            beside = ", ".join(f"{b} {show(summary.estimates[b][name])}" for b in BASELINES)
            metres = summary.estimates[""][f"{name}_m"]
            in_m = f" = {show(metres)} m" if metres.mean is not None and metres.frames == own.frames else ""
            lines.append(f"  {name.upper()} {show(own)} units{in_m} (without a model: {beside})")
    return "\n".join(lines)


def report_text(
    predictions: Predictions,
    summary: Summary | None,
    tables: Sequence[PlainTable],
    warnings: Sequence[str],
) -> str:
    """evaluation_report.txt: what was measured, in which units, the original's numbers, then every table."""
    p = predictions
    lines = [
        "Evaluation report",
        "=================",
        f"predictions:  {p.location}",
        *(f"{name + ':':<13} {p.metadata[name]}" for name in ("checkpoint", "dataset", "decode") if name in p.metadata),
        f"units:        {UNITS}",
        "              x forward, y left, in the robot frame of the first step",
        f"samples:      {len(p)}, {int(p.predicted_ok.sum())} predicted, {int(p.scored.sum())} scored; what failed is "
        "never scored as zeros",
        f"steps:        {p.num_steps}; {int((p.scored & ~p.valid.all(axis=1)).sum())} samples have steps that do not "
        "count (after the end of an episode): left out of step metrics, these samples of ADE and FDE",
        *(f"note:         {text}" for text in warnings),
        "",
    ]
    if summary is None:
        lines.append(summary_line(summary, p))
    else:
        for name, label in (("mse", "MSE"), ("mae", "MAE"), ("rmse", "RMSE")):
            lines.append(f"{label}: {summary.mean(name):.6f}")
        lines += [f"Success Rate ({tau:g}): {summary.mean(f'success_rate_{tau:g}'):.4f}" for tau in STEP_TAUS]
    return "\n".join([*lines, "", *(text_table(t) for t in tables)])


def text_table(table: PlainTable) -> str:
    cells = [list(table.columns)] + [["-" if c is None else str(c) for c in row] for row in table.rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(table.columns))]
    shown = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    shown.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([table.title, "~" * len(table.title), *shown, table.note, ""]) + "\n"


def length_tables(predictions: Predictions, scores: Scores, resampler: Resampler) -> list[PlainTable]:
    """The original's analysis: errors by the length of the instruction, in characters and in words, five bins each."""
    texts = predictions.instruction
    found = []
    for title, lengths in (
        ("By length of the instruction, characters", np.array([len(t) for t in texts])),
        ("By length of the instruction, words", np.array([len(t.split()) for t in texts])),
    ):
        rows: list[tuple[Cell, ...]] = []
        for low, high, mine in length_bins(lengths):
            columns = [np.where(mine, scores.columns[name], np.nan) for name in ("mse", "mae", "ade", "fde")]
            estimates = resampler.estimates(np.stack(columns, axis=1))
            name = f"{low}" if low == high else f"{low} to {high}"
            rows.append((name, int((mine & predictions.scored).sum()), *(show(e, 3) for e in estimates)))
        note = "Five bins of equal width; those without a sample are left out. Units."
        found.append(PlainTable(title, note, ("length", "n", "MSE", "MAE", "ADE", "FDE"), tuple(rows)))
    return found


def length_bins(lengths: NDArray[np.integer]) -> list[tuple[int, int, NDArray[np.bool_]]]:
    """(least, greatest, members) of at most BINS bins of equal width; one bin if all are equal."""
    edges = np.linspace(lengths.min(), lengths.max(), BINS + 1)
    place = np.clip(np.searchsorted(edges, lengths, side="left") - 1, 0, BINS - 1)
    bins = [place == k for k in range(BINS)]
    return [(int(lengths[b].min()), int(lengths[b].max()), b) for b in bins if b.any()]


def sample_table(predictions: Predictions, scores: Mapping[str, Scores] | None, confidence: Floats | None) -> pa.Table:
    """metrics.parquet: a row for each sample, in the order of the predictions; null where a metric does not apply."""
    p = predictions
    columns: dict[str, pa.Array] = {
        "sample_id": pa.array(p.sample_id, pa.string()),
        "instruction": pa.array(p.instruction, pa.string()),
        "kind": pa.array([kind(text) for text in p.instruction], pa.string()),
        "dataset": pa.array(p.dataset, pa.string()),
        "recording": pa.array(p.recording, pa.string()),
        "status": pa.array(np.where(p.predicted_ok, "ok", "failed").tolist(), pa.string()),
        "error": pa.array(p.error, pa.string()),
        "scored": pa.array(p.scored),
    }
    if scores is not None:
        columns |= {name: _nullable(values) for name, values in scores[""].columns.items()}
        for b in BASELINES:
            for name in ("ade", "fde"):
                columns[f"{name} {b}".replace(" ", "_")] = _nullable(scores[b].columns[name])
    if confidence is not None:
        columns["confidence"] = _nullable(confidence)
    return pa.table(columns).replace_schema_metadata({"units": ACTION_UNITS})


def write_parquet(location: Location, table: pa.Table) -> None:
    def write(stream: BinaryIO) -> None:
        pq.write_table(table, stream)

    write_atomic(location, write)


def write_document(location: Location, document: Mapping[str, Any]) -> None:
    """Plain JSON: estimates become objects, NaN becomes null."""
    write_atomic(location, json.dumps(_plain(document), indent=1, allow_nan=False).encode() + b"\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return {"n" if k == "frames" else "groups" if k == "scenes" else k: v for k, v in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _nullable(values: Floats) -> pa.Array:
    return pa.array(values.astype(np.float64), mask=~np.isfinite(values))
