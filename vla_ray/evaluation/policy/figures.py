"""Figures of a whole set: how errors are distributed, by kind of instruction, and several sets side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vla_ray.evaluation.bootstrap import Estimate
from vla_ray.evaluation.policy.drawing import BASELINE, BASELINE_LINE, OTHERS, POLICY, SIZES, ends_of, png
from vla_ray.evaluation.policy.metrics import BASELINES, FDE_TAUS, STILL, STRAIGHT, Scores

Floats = NDArray[np.floating]
_SUBJECTS = {"": ("policy", POLICY, "-"), **{b: (b, BASELINE[b], BASELINE_LINE[b]) for b in (STRAIGHT, STILL)}}


def error_distributions(
    scores: Mapping[str, Scores], moved: Mapping[str, Sequence[Estimate]], axis_mae: Mapping[str, Sequence[Estimate]]
) -> bytes:
    """PNG, 2 x 2: ADE and FDE, displacement by step, error per axis, share of end points within a distance.

    Args:
        moved: subject -> displacement at each step.
        axis_mae: subject -> mean |dx| and |dy|.
    """
    with plt.rc_context(SIZES):
        figure, ((boxes, steps), (axis, shares)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
        _boxes(boxes, scores)
        _steps(steps, moved)
        _axis(axis, axis_mae)
        _shares(shares, scores)
        return png(figure)


def _boxes(axes: Axes, scores: Mapping[str, Scores]) -> None:
    ticks, names = [], []
    for i, metric in enumerate(("ade", "fde")):
        for j, (subject, (label, colour, _)) in enumerate(_SUBJECTS.items()):
            values = scores[subject].columns[metric]
            values = values[np.isfinite(values)]
            if not len(values):
                continue
            at = -(i * 4 + j)
            drawn = axes.boxplot(
                values, positions=[at], orientation="horizontal", widths=0.6, whis=(5, 95), showfliers=False,
                showmeans=True, patch_artist=True,
            )  # fmt: skip
            for box in drawn["boxes"]:
                box.set(facecolor=colour, alpha=0.35, edgecolor=colour)
            for line in (*drawn["whiskers"], *drawn["caps"], *drawn["medians"]):
                line.set(color=colour, lw=1.6)
            for mean in drawn["means"]:
                mean.set(marker="D", markerfacecolor="white", markeredgecolor=colour, markersize=6)
            ticks.append(at)
            names.append(f"{metric.upper()}, {label}")
    axes.set_yticks(ticks, names)
    axes.set_xlim(left=0)
    axes.set_xlabel("units; box: quartiles, whiskers: 5 to 95 %, diamond: mean")
    axes.set_title("Average and final displacement error")


def _steps(axes: Axes, moved: Mapping[str, Sequence[Estimate]]) -> None:
    for subject, (label, colour, line) in _SUBJECTS.items():
        mean, low, high = ends_of(moved[subject])
        x = np.arange(1, len(mean) + 1)
        axes.plot(x, mean, line, color=colour, lw=2, marker="o", ms=4, label=label)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axes.set_xticks(range(1, len(moved[""]) + 1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("distance between positions, units")
    axes.set_title("Displacement grows with the steps (band: 95 %)")
    axes.legend(loc="upper left")


def _axis(axes: Axes, axis_mae: Mapping[str, Sequence[Estimate]]) -> None:
    for j, (subject, (label, colour, _)) in enumerate(_SUBJECTS.items()):
        mean, low, high = ends_of(axis_mae[subject])
        x = np.arange(2) + (j - 1) * 0.26
        axes.bar(x, mean, 0.24, color=colour, alpha=0.75, label=label)
        axes.errorbar(x, mean, yerr=[mean - low, high - mean], fmt="none", ecolor="0.2", elinewidth=1.2, capsize=3)
        for at, value, top in zip(x, mean, high, strict=True):
            if np.isfinite(value):
                axes.annotate(f"{value:.2f}", (at, top), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks([0, 1], ["|dx|, forward", "|dy|, left"])
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("mean error of a step's delta, units")
    axes.set_title("Error per axis")
    axes.legend()


def _shares(axes: Axes, scores: Mapping[str, Scores]) -> None:
    finite = [v for s in scores.values() for v in s.columns["fde"][np.isfinite(s.columns["fde"])]]
    right = max(2 * FDE_TAUS[-1], float(np.quantile(finite, 0.98)) if finite else 0)
    for subject, (label, colour, line) in _SUBJECTS.items():
        values = np.sort(scores[subject].columns["fde"])
        values = values[np.isfinite(values)]
        if len(values):
            share = np.arange(len(values) + 1) / len(values)
            axes.step(
                [0, *values, max(right, values[-1])], [*share, 1], line, where="post", color=colour, lw=2, label=label
            )
            for k, tau in enumerate(FDE_TAUS if not subject else ()):
                reached = float((values < tau).mean())
                axes.plot(tau, reached, "o", color=colour, ms=6)
                axes.annotate(
                    f"{100 * reached:.0f} %",
                    (tau, reached),
                    (6, 13 * (k - len(FDE_TAUS))),
                    textcoords="offset points",
                    color=colour,
                )
    for tau in FDE_TAUS:
        axes.axvline(tau, color="0.85", lw=1, zorder=0)
    axes.set_xlim(0, right)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("final displacement error, units; lines: success at 0.5, 1, 2")
    axes.set_ylabel("samples that end this close")
    axes.set_title("End points within a distance (colours as above)")


def instruction_performance(kinds: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG, 1 x 2, for estimates of `summary.kind_table`: ADE, and whether turns go to the right side.

    Baselines are hollow and a little above and below the policy, so that equal numbers do not hide one another.
    """
    names = list(kinds)
    with plt.rc_context(SIZES):
        figure, (errors, sides) = plt.subplots(
            1, 2, figsize=(11, 1.8 + 0.5 * len(names)), layout="constrained", sharey=True
        )
        y = -np.arange(len(names), dtype=float)
        mean, low, high = ends_of([kinds[n]["ade"] for n in names])
        for b in BASELINES:
            base, _, _ = ends_of([kinds[n][f"ade {b}"] for n in names])
            marker, aside = ("D", 0.2) if b == STRAIGHT else ("s", -0.2)
            errors.plot(
                base, y + aside, marker, color=BASELINE[b], mfc="none", mew=1.8, ms=6, label=b, ls="none", clip_on=False
            )
        errors.errorbar(
            mean,
            y,
            xerr=[mean - low, high - mean],
            fmt="o",
            color=POLICY,
            ms=8,
            capsize=3,
            label="policy",
            clip_on=False,
        )
        errors.set_yticks(y, [f"{n}  (n={kinds[n]['n']})" for n in names])
        errors.set_xlim(left=0)
        errors.set_xlabel("ADE, units")
        errors.set_title("Average displacement error by instruction (bars: 95 %)")
        _below(figure, errors)
        mean, low, high = ends_of([kinds[n]["turn_side"] for n in names])
        if np.isfinite(mean).any():
            sides.errorbar(
                mean, y, xerr=[mean - low, high - mean], fmt="o", color=POLICY, ms=8, capsize=3, clip_on=False
            )
            for at, name in zip(y, names, strict=True):
                if count := kinds[name]["turn_side"].frames:
                    sides.annotate(
                        f"n={count}", (1.0, at), (8, -3), textcoords="offset points", color="0.4", fontsize=9
                    )
        else:
            sides.text(0.5, 0.5, "no sample ends 1 unit or more to a side", ha="center", transform=sides.transAxes)
        sides.axvline(0.5, color="0.5", ls=":", lw=1.5)
        sides.annotate(
            "chance", (0.5, 1), (4, -10), xycoords=("data", "axes fraction"), textcoords="offset points", color="0.4"
        )
        sides.set_xlim(0, 1.02)
        sides.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        sides.set_xlabel("of targets that end at least 1 unit to a side")
        sides.set_title("Ends on the right side")
        for axes in (errors, sides):
            axes.set_ylim(-len(names) + 0.4, 0.6)
            axes.grid(axis="y", color="0.93")
            axes.set_axisbelow(True)
        return png(figure)


def comparison(
    names: Sequence[str],
    means: Mapping[str, Sequence[Estimate]],
    baselines: Mapping[str, Mapping[str, Estimate]],
    differences: Mapping[str, Sequence[Estimate]],
) -> bytes:
    """PNG, 1 x 2: ADE and FDE of each set, and differences from the first.

    Args:
        means: metric -> one estimate for each name.
        baselines: baseline -> metric -> estimate.
        differences: metric -> one estimate for each name but the first.
    """
    with plt.rc_context(SIZES):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.9 + 0.35 * len(names) * 2), layout="constrained")
        rows = [(metric, i) for metric in means for i in range(len(names))]
        at = {row: -(k + 0.8 * list(means).index(row[0])) for k, row in enumerate(rows)}
        for (metric, i), y in at.items():
            mean, low, high = ends_of([means[metric][i]])
            colour = OTHERS[i % len(OTHERS)]
            left.errorbar(mean, [y], xerr=[mean - low, high - mean], fmt="o", color=colour, ms=8, capsize=3)
            if i:
                mean, low, high = ends_of([differences[metric][i - 1]])
                right.errorbar(mean, [y], xerr=[mean - low, high - mean], fmt="o", color=colour, ms=8, capsize=3)
        for b, by_metric in baselines.items():
            for k, metric in enumerate(means):
                value = by_metric[metric].mean
                if value is not None:
                    ends = at[metric, len(names) - 1] - 0.4, at[metric, 0] + 0.4
                    left.plot([value] * 2, ends, BASELINE_LINE[b], color=BASELINE[b], lw=2, label=None if k else b)
        left.set_yticks(list(at.values()), [f"{m.upper()}  {names[i]}" for m, i in at])
        left.set_xlim(left=0)
        left.set_xlabel("units; bars: 95 %")
        left.set_title("Displacement errors")
        _below(figure, left)
        right.axvline(0, color="0.5", lw=1.2)
        right.set_yticks([y for (_, i), y in at.items() if i], [f"{m.upper()}  {names[i]}" for m, i in at if i])
        right.set_xlabel("units; less than 0: better than the first")
        right.set_title(f"Paired difference from {names[0]}")
        for axes in (left, right):
            axes.set_ylim(min(at.values()) - 0.6, 0.6)
            axes.grid(axis="y", color="0.93")
            axes.set_axisbelow(True)
        return png(figure)


def _below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=len(labels))
