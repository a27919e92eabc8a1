"""Several sets of predictions side by side, on the samples that all of them have, with paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vla_ray.errors import DataError
from vla_ray.evaluation.bootstrap import Estimate
from vla_ray.evaluation.policy.figures import comparison
from vla_ray.evaluation.policy.intervals import Resampler, wilcoxon_p
from vla_ray.evaluation.policy.language import INDEPENDENT, p_text
from vla_ray.evaluation.policy.metrics import BASELINES, Scores, score
from vla_ray.evaluation.policy.metrics import score_all as score_with_baselines
from vla_ray.evaluation.policy.predictions import Predictions, common_samples
from vla_ray.evaluation.policy.report import text_table, write_document
from vla_ray.evaluation.policy.summary import LABELS, OVER_STEPS, Cell, PlainTable, Summary, show, summarise
from vla_ray.storage.files import Location, write_atomic

TEXT, JSON, FIGURE = "comparison.txt", "comparison.json", "comparison.png"
TITLE, NOTE = "Comparison", "Means and paired differences on the same samples; bars: 95 % intervals."
DRAWN = ("ade", "fde")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Attributes:
    text: for the terminal.
    names: one for each set, made distinct.
    summaries: of each, on the common samples.
    differences: metric -> that set minus the first, for each set but the first.
    samples: how many are common.
    """

    text: str
    names: tuple[str, ...]
    tables: tuple[PlainTable, ...]
    figures: tuple[tuple[str, str, bytes], ...]
    summaries: tuple[Summary, ...]
    differences: Mapping[str, Sequence[Estimate]]
    samples: int
    files: tuple[Location, ...]


def compare_predictions(many: Sequence[Predictions], out: Location) -> Comparison:
    """Tables, figure and text of at least two sets.

    Targets and the median step, scales, and recordings are those of the first that has them.

    Raises:
        DataError: fewer than two, no sample in common, other horizons, or no common sample that all predicted.
    """
    if len(many) < 2:
        raise DataError(f"{len(many)} set of predictions cannot be compared. Give two or more: results=[a.csv,b.csv]")
    sets = _on_common_ground(many)
    names = distinct_names(sets)
    base = sets[0]
    resampler = Resampler(next((p.groups for p in sets if p.groups is not None), base.sample_id))
    with_baselines = score_with_baselines(base)
    scores = [with_baselines[""], *(score(p.predicted, p.target, p.valid, p.scale_m, p.samples) for p in sets[1:])]
    summaries = [summarise({"": s, **{b: with_baselines[b] for b in BASELINES}}, resampler) for s in scores]
    differences = _differences(scores, resampler)
    counts = int(base.scored.sum())
    tables = (_means(names, summaries, base, many), _difference_table(names, scores, differences))
    means = {m: [s.estimates[""][m] for s in summaries] for m in DRAWN}
    beside = {b: {m: summaries[0].estimates[b][m] for m in DRAWN} for b in BASELINES}
    picture = comparison(names, means, beside, {m: differences[m] for m in DRAWN})
    text = _text(names, summaries, differences, counts)
    out.mkdir()
    write_atomic(out / TEXT, "\n".join([text, "", *(text_table(t) for t in tables)]).encode())
    write_atomic(out / FIGURE, picture)
    document = {
        "samples": counts,
        "sets": [{"name": n, "predictions": str(p.location)} for n, p in zip(names, sets, strict=True)],
        "summaries": [s.estimates for s in summaries],
        "differences_from_the_first": differences,
    }
    write_document(out / JSON, document)
    files = tuple(out / name for name in (TEXT, FIGURE, JSON))
    figures = ((TITLE, NOTE, picture),)
    return Comparison(text, tuple(names), tables, figures, tuple(summaries), differences, counts, files)


def distinct_names(sets: Sequence[Predictions]) -> list[str]:
    """Names of tables: of the runs, with a number where two are alike."""
    names = [p.name for p in sets]
    return [n if names.count(n) == 1 else f"{n} ({names[: i + 1].count(n)})" for i, n in enumerate(names)]


def _on_common_ground(many: Sequence[Predictions]) -> list[Predictions]:
    """The same samples, targets and scales for all: those that every set predicted and that have a target."""
    sets = common_samples(many)
    truth = next((p for p in sets if p.valid.any()), None)
    if truth is None:
        raise DataError(f"{' and '.join(str(p.location) for p in sets)} have no targets to compare them by.")
    for other in sets:
        both = truth.valid & other.valid
        if not np.allclose(truth.target[both], other.target[both], atol=1e-3):
            raise DataError(
                f"{other.location} has other targets than {truth.location} for the same sample_id: they are of "
                "different datasets or units. Predict both on the same dataset."
            )
    scale = next((p.scale_m for p in sets if np.isfinite(p.scale_m).any()), truth.scale_m)
    valid = np.logical_and.reduce([p.valid for p in sets if p.valid.any()])  # only a Parquet file knows what is padding
    all_ok = np.logical_and.reduce([p.predicted_ok for p in sets]) & valid.any(axis=1)
    if not all_ok.any():
        raise DataError(f"no sample was predicted by all of {', '.join(str(p.location) for p in sets)}.")
    rows = np.flatnonzero(all_ok)
    step, source = truth.median_step, truth.median_from
    return [
        replace(p, target=truth.target, valid=valid, scale_m=scale, median_step=step, median_from=source).take(rows)
        for p in sets
    ]


def _differences(scores: Sequence[Scores], resampler: Resampler) -> dict[str, list[Estimate]]:
    """Metric -> set minus first. Of rmse, of the roots of single samples."""
    shared = [name for name in LABELS if all(name in s.columns for s in scores)]
    found: dict[str, list[Estimate]] = {name: [] for name in shared}
    for other in scores[1:]:
        values = np.stack([other.columns[n] - scores[0].columns[n] for n in shared], axis=1)
        ones = np.ones_like(other.weights)
        weights = np.stack([other.weights if n in OVER_STEPS else ones for n in shared], axis=1)
        for name, estimate in zip(shared, resampler.estimates(values, weights), strict=True):
            found[name].append(estimate)
    return found


def _means(
    names: Sequence[str], summaries: Sequence[Summary], base: Predictions, many: Sequence[Predictions]
) -> PlainTable:
    rows: list[tuple[Cell, ...]] = []
    for metric, label in LABELS.items():
        own = [s.estimates[""].get(metric) for s in summaries]
        if any(e is not None and e.frames for e in own):
            beside = [summaries[0].estimates[b].get(metric) for b in BASELINES]
            rows.append((label, *("-" if e is None else show(e, 3) for e in (*own, *beside))))
    sizes = ", ".join(f"{len(p)} in {n}" for n, p in zip(names, many, strict=True))
    note = (
        f"{len(base)} samples that all predicted ({sizes}). Mean [95 % interval]. "
        f"Straight: ahead by {base.median_step:.2f} units a step, the median of {base.median_from}."
    )
    return PlainTable("Side by side", note, ("metric", *names, *BASELINES), tuple(rows))


def _difference_table(
    names: Sequence[str], scores: Sequence[Scores], differences: Mapping[str, Sequence[Estimate]]
) -> PlainTable:
    rows: list[tuple[Cell, ...]] = []
    for metric, estimates in differences.items():
        if any(e.frames for e in estimates):
            cells: list[Cell] = []
            for other, estimate in zip(scores[1:], estimates, strict=True):
                p = wilcoxon_p(other.columns[metric] - scores[0].columns[metric])
                cells += [show(estimate, 3), p_text(p).removeprefix("= ")]
            rows.append((LABELS[metric], *cells))
    heads = [head for name in names[1:] for head in (f"{name} - {names[0]}", "p")]
    note = (
        "Paired by sample; 0 outside the interval: they differ. "
        f"p: signed-rank test over samples, {INDEPENDENT}. RMSE: of the roots of single samples."
    )
    return PlainTable("Paired differences", note, ("metric", *heads), tuple(rows))


def _text(
    names: Sequence[str], summaries: Sequence[Summary], differences: Mapping[str, Sequence[Estimate]], count: int
) -> str:
    lines = [f"Comparison Summary: {count} common samples, units of waypoint spacings"]
    for i, (name, summary) in enumerate(zip(names, summaries, strict=True)):
        numbers = summary.estimates[""]
        line = f"  {name}: ADE {show(numbers['ade'])}, FDE {show(numbers['fde'])}"
        if i:
            line += f", ADE difference from {names[0]} {show(differences['ade'][i - 1])}"
        lines.append(line)
    return "\n".join(lines)
