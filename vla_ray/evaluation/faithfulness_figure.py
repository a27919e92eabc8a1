"""Deletion curves of all methods in one figure."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt

from vla_ray.explain.methods import METHODS
from vla_ray.stages.scores import PRIOR, RANDOM

_BASELINES = {PRIOR: ("0.35", "--"), RANDOM: ("0.6", ":")}


def curves_figure(scores: pd.DataFrame, target: str) -> bytes:
    """PNG: displacement against the share of hidden cells, on a square-root axis, for SCORES of one target."""
    curves = scores[scores["measure"] == "deleted"]
    means = curves.groupby(["subject", "at"])["value"].mean()
    subjects = [s for s in [*METHODS, PRIOR, RANDOM] if s in means.index.get_level_values(0)]
    figure, axes = plt.subplots(figsize=(8, 4.6), dpi=150)
    colours = plt.get_cmap("tab20")
    for i, subject in enumerate(subjects):
        curve = means[subject]
        colour, line = _BASELINES.get(subject, (colours(i % 20), "-"))
        axes.plot(curve.index, curve.values, line, color=colour, lw=1.6, label=subject)
    axes.axvspan(0, 0.08, color="0.93", zorder=0)
    axes.set_xscale("function", functions=(lambda x: x**0.5, lambda x: x**2))
    axes.set_xticks(
        [0, 0.02, 0.08, 0.2, 0.4, 0.6, 0.8, 1.0], ["0", "2 %", "8 %", "20 %", "40 %", "60 %", "80 %", "100 %"]
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cells hidden, most relevant first (square-root axis; early deletion is the grey part)")
    axes.set_ylabel("displacement / all hidden")
    axes.set_title(target)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if subjects:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
