"""Tables of metrics: means with intervals, the baselines beside every number.

A table is plain (title, note, columns, rows), as reports take it; estimates stay beside it for JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.cast.instructions import KINDS, kind
from vla_ray.evaluation.bootstrap import Estimate
from vla_ray.evaluation.policy.intervals import Resampler, binomial_p
from vla_ray.evaluation.policy.metrics import BASELINES, RELIABLE, Scores
from vla_ray.evaluation.policy.predictions import Predictions

Floats = NDArray[np.floating]
Cell = str | float | int | None

# Column -> what it is called and its unit. The first four are those of the original, over (sample, step).
LABELS = {
    "mse": "MSE of deltas, units^2",
    "mae": "MAE of deltas, units",
    "rmse": "RMSE of deltas, units",
    "success_rate_0.05": "steps within 0.05 units",
    "success_rate_0.1": "steps within 0.1 units",
    "success_rate_0.2": "steps within 0.2 units",
    "success_rate_0.5": "steps within 0.5 units",
    "ade": "ADE, units",
    "fde": "FDE, units",
    "min_ade": "minADE of the samples, units",
    "ade_m": "ADE, m",
    "fde_m": "FDE, m",
    "success_fde_0.5": "end within 0.5 units",
    "success_fde_1": "end within 1 unit",
    "success_fde_2": "end within 2 units",
    "success_fde_0.25_m": "end within 0.25 m",
    "success_fde_0.5_m": "end within 0.5 m",
    "success_fde_1_m": "end within 1 m",
    "miss": "missed by more than 2 units",
    "heading_error": "heading error at the end, degrees",
    "turn_side": "right side, of those that turn",
    "cosine": "cosine of positions",
}
OVER_STEPS = ("mse", "mae", "rmse", "success_rate_0.05", "success_rate_0.1", "success_rate_0.2", "success_rate_0.5")
UNITS = "deltas in waypoint spacings; metres = value * scale_m"


@dataclass(frozen=True, slots=True)
class PlainTable:
    """What report.page.Table is made of."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over samples: subject ("" is the policy, then the baselines) -> metric -> estimate."""

    estimates: Mapping[str, Mapping[str, Estimate]]

    def mean(self, metric: str, subject: str = "") -> float | None:
        found = self.estimates[subject].get(metric)
        return None if found is None else found.mean


def summarise(scores: Mapping[str, Scores], resampler: Resampler) -> Summary:
    """Means of every column. Those of deltas are over (sample, step), the others over samples."""
    found = {}
    for subject, mine in scores.items():
        names = list(mine.columns)
        values = np.stack([mine.columns["mse" if n == "rmse" else n] for n in names], axis=1)
        weights = np.stack([mine.weights if n in OVER_STEPS else np.ones_like(mine.weights) for n in names], axis=1)
        estimates = dict(zip(names, resampler.estimates(values, weights), strict=True))
        estimates["rmse"] = _root(estimates["rmse"])  # the root of the mean: of the whole set, not a mean of roots
        found[subject] = estimates
    return Summary(found)


def summary_table(summary: Summary, predictions: Predictions) -> PlainTable:
    p = predictions
    rows: list[tuple[Cell, ...]] = []
    for name, label in LABELS.items():
        own = summary.estimates[""].get(name)
        if own is not None and own.frames:
            rows.append(
                (
                    label,
                    own.frames,
                    show(own, 3),
                    # A baseline has one trajectory, which is the best of its draws.
                    *(show(summary.estimates[b]["ade" if name == "min_ade" else name], 3) for b in BASELINES),
                )
            )
    step = f"{p.median_step:.2f} units a step, the median of {p.median_from}"
    note = (
        f"Mean [95 % interval over {_what(p)}]. MSE, MAE, RMSE and steps: deltas of single steps, over (sample, step). "
        "All others: positions, cumulative sums, of samples whose steps are all valid. "
        f"Straight: ahead by {step}."
    )
    return PlainTable("Metrics", note, ("metric", "n", p.name, *BASELINES), tuple(rows))


def axis_table(scores: Mapping[str, Scores], resampler: Resampler) -> tuple[PlainTable, dict[str, list[Estimate]]]:
    """Errors of deltas per axis; also mean |dx| and |dy| of every subject, for the figure."""
    rows: list[tuple[Cell, ...]] = []
    absolute: dict[str, list[Estimate]] = {subject: [] for subject in scores}
    for at, axis in enumerate(("x (forward)", "y (left)")):
        parts = []
        for subject, mine in scores.items():
            error = mine.errors[..., at]
            values = np.stack([_step_mean(v) for v in (np.abs(error), error**2, error)], axis=1)
            parts.append(resampler.estimates(values, mine.weights))
            absolute[subject].append(parts[-1][0])
        for k, name in enumerate(("MAE", "RMSE", "bias")):
            shown = [_root(e[k]) if name == "RMSE" else e[k] for e in parts]
            rows.append((axis, name, *(show(e, 3) for e in shown)))
    note = "Units, over (sample, step). Bias: predicted - target."
    return PlainTable("Errors per axis", note, ("axis", "error", "predicted", *BASELINES), tuple(rows)), absolute


def step_table(scores: Mapping[str, Scores], resampler: Resampler) -> tuple[PlainTable, dict[str, list[Estimate]]]:
    """Errors per step; also the displacement of every subject at every step, for the figure."""
    moved = {subject: resampler.estimates(mine.displacement) for subject, mine in scores.items()}
    absolute = resampler.estimates(np.abs(scores[""].errors).reshape(len(scores[""].errors), -1))
    rows: list[tuple[Cell, ...]] = []
    for k in range(scores[""].errors.shape[1]):
        x, y = absolute[2 * k], absolute[2 * k + 1]
        rows.append((k + 1, show(x, 3), show(y, 3), *(show(e[k]) for e in moved.values())))
    note = "|dx|, |dy|: of the step's own delta. Displacement: between positions, all that went before included. Units."
    columns = ("step", "|dx|", "|dy|", "displacement", *(f"{b}, displacement" for b in BASELINES))
    return PlainTable("Errors per step", note, columns, tuple(rows)), moved


def kind_table(
    predictions: Predictions, scores: Mapping[str, Scores], resampler: Resampler
) -> tuple[PlainTable, dict[str, dict[str, Any]]]:
    """Metrics per kind of instruction; also the estimates: kind -> column -> estimate, for figures and JSON."""
    kinds = np.array([kind(text) for text in predictions.instruction])
    found: dict[str, dict[str, Any]] = {}
    rows: list[tuple[Cell, ...]] = []
    for name in [k for k in KINDS if (kinds == k).any()]:
        mine = kinds == name

        def estimate(column: str, subject: str = "", mine: NDArray[np.bool_] = mine) -> Estimate:
            return resampler.estimate(np.where(mine, scores[subject].columns[column], np.nan))

        own = {c: estimate(c) for c in ("ade", "fde", "success_fde_1", "turn_side")}
        base = {b: estimate("ade", b) for b in BASELINES}
        found[name] = {"n": int((mine & predictions.scored).sum()), **own, **{f"ade {b}": e for b, e in base.items()}}
        rows.append((name, found[name]["n"], *(show(e) for e in own.values()), *(show(e) for e in base.values())))
    columns = ("instruction", "n", "ADE", "FDE", "end within 1 unit", "right side", *(f"{b}, ADE" for b in BASELINES))
    note = "Units. The kind is read from the words; right side: of samples that end at least 1 unit to a side."
    return PlainTable("By kind of instruction", note, columns, tuple(rows)), found


def turn_side(predictions: Predictions, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Share of turning samples that end on the right side, against a coin and against always the likelier side."""
    known = np.isfinite(scores[""].columns["turn_side"])
    right = int(np.nansum(scores[""].columns["turn_side"]))
    count = int(known.sum())
    if not count:
        return {"n": 0}
    left = int((predictions.target[known].sum(1)[:, 1] > 0).sum())
    return {
        "n": count,
        "right": right,
        "accuracy": right / count,
        "p_coin": binomial_p(right, count),
        "always_one_side": max(left, count - left) / count,
        "least_units": RELIABLE,
    }


def show(estimate: Estimate, digits: int = 2) -> str:
    if estimate.mean is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _root(estimate: Estimate) -> Estimate:
    """A root keeps the order, so that of an interval's ends is its interval."""
    mean, low, high = (None if v is None else sqrt(v) for v in (estimate.mean, estimate.low, estimate.high))
    return replace(estimate, mean=mean, low=low, high=high)


def _step_mean(values: Floats) -> Floats:
    """[N] means of [N, H] over what is not NaN."""
    known = np.isfinite(values)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, values, 0).sum(1) / np.maximum(count, 1), np.nan)


def _what(predictions: Predictions) -> str:
    return "samples" if predictions.groups is None else "recordings"
