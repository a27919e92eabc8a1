"""Figures of single samples: the picture, and beside it the trajectories as seen from above, all to one scale."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vla_ray.data.cast.instructions import kind
from vla_ray.data.cast.trajectory import straight
from vla_ray.evaluation.policy.drawing import (
    BASELINE,
    COMMANDS,
    POLICY,
    SIZES,
    TARGET,
    ground,
    limits,
    path,
    png,
    show_picture,
)
from vla_ray.evaluation.policy.metrics import STRAIGHT
from vla_ray.evaluation.policy.predictions import Predictions

Floats = NDArray[np.floating]
COLUMNS = 3  # examples in a row
FANS = 4
OWN = "#009E73"


def choose_examples(predictions: Predictions, ade: Floats, seed: int = 0) -> dict[str, list[int]]:
    """Rows to show: name -> at most COLUMNS of them, each with another instruction where there is one.

    Best, median and worst by ADE, and random ones drawn from all that have a prediction; random alone without targets.
    """
    found: dict[str, list[int]] = {}
    order = [int(i) for i in np.argsort(ade, kind="stable") if np.isfinite(ade[i])]
    if len(order) > COLUMNS:
        middle = float(np.median(ade[order]))
        found["best"] = _various(predictions, order)
        found["median"] = _various(predictions, sorted(order, key=lambda i: abs(ade[i] - middle)))
        found["worst"] = _various(predictions, order[::-1])
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(predictions.predicted_ok))
    if len(drawn):
        found["random"] = _various(predictions, drawn.tolist())
    return found


def trajectory_examples(predictions: Predictions, ade: Floats) -> bytes | None:
    """PNG: rows of best, median, worst and random samples. None if nothing was predicted.

    Trajectories lie beside the picture: no camera is known that would say where in it they are.
    """
    p = predictions
    chosen = choose_examples(p, ade)
    if not chosen:
        return None
    ahead = straight(p.predicted[:1], p.median_step)[0]
    rows = [i for many in chosen.values() for i in many]
    columns = max(len(many) for many in chosen.values())
    bounds = limits([ahead, *p.predicted[rows], *p.target[rows]])
    with plt.rc_context(SIZES):
        figure, axes = _grid(len(chosen), columns)
        for (name, many), line in zip(chosen.items(), axes, strict=True):
            for k in range(columns):
                left, right = line[2 * k], line[2 * k + 1]
                if k >= len(many):
                    left.axis("off")
                    right.axis("off")
                    continue
                row = many[k]
                show_picture(left, p.picture(row))
                ground(right, *bounds)
                path(right, ahead, BASELINE[STRAIGHT], "--", 1.4, "straight")
                path(right, p.target[row], TARGET, "-", 5.0, "target")  # wide: seen under a right prediction
                path(right, p.predicted[row], POLICY, "-", 2.0, "predicted")
                error = f"ADE {ade[row]:.2f}" if np.isfinite(ade[row]) else "no target"
                left.set_title(_wrapped(p.instruction[row], 24), loc="left", fontsize=10)
                right.set_title(error, loc="right", fontsize=9, color="0.3")
            line[0].set_ylabel(name, fontsize=13, fontweight="bold", labelpad=8)
        _finish(figure, axes[0, 1], "From above, in units: forward is up, left is left")
        return png(figure)


def language_fan(predictions: Predictions, seed: int = 0) -> bytes | None:
    """PNG: pictures with the trajectories of their own instruction and of all atomic commands.

    None if the file has fewer than two commands. Pictures whose instruction names a thing come first.
    """
    p = predictions
    commands = [name for name in COMMANDS if name in p.variants]
    if len(commands) < 2:
        return None
    usable = np.all([np.isfinite(p.variants[name].predicted).all(axis=(1, 2)) for name in commands], axis=0)
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(usable)).tolist()
    drawn.sort(key=lambda row: kind(p.instruction[row]) != "landmark")  # what no command says already
    rows = _scattered(p, drawn)
    if not rows:
        return None
    bounds = limits([p.variants[name].predicted[row] for name in commands for row in rows] + list(p.predicted[rows]))
    columns = min(2, len(rows))
    with plt.rc_context(SIZES):
        figure, axes = _grid(-(-len(rows) // columns), columns, 3.2)
        panels = axes.reshape(-1, 2)
        for left, right in panels[len(rows) :]:
            left.axis("off")
            right.axis("off")
        for row, (left, right) in zip(rows, panels, strict=False):
            show_picture(left, p.picture(row))
            ground(right, *bounds)
            left.set_title(_wrapped(p.instruction[row], 40), loc="left", fontsize=10, color=OWN)
            path(right, p.predicted[row], OWN, "-", 5.0, "its own instruction (above the picture)")
            for name in commands:
                path(right, p.variants[name].predicted[row], COMMANDS[name], "-", 2.0, name)
        _finish(
            figure,
            panels[0, 1],
            "One picture, several instructions\n(from above, in units: forward is up, left is left)",
        )
        return png(figure)


def _various(predictions: Predictions, order: Sequence[int]) -> list[int]:
    """The first COLUMNS with an instruction of their own; filled up in order where there are too few."""
    seen: dict[str, int] = {}
    for row in order:
        seen.setdefault(predictions.instruction[row], row)
        if len(seen) == COLUMNS:
            break
    chosen = list(seen.values())
    return chosen + [row for row in order if row not in chosen][: COLUMNS - len(chosen)]


def _scattered(predictions: Predictions, order: Sequence[int]) -> list[int]:
    """The first FANS of different recordings."""
    groups = predictions.groups or predictions.sample_id
    seen: dict[str, int] = {}
    for row in order:
        seen.setdefault(groups[row], row)
    return list(seen.values())[:FANS]


def _grid(rows: int, columns: int, height: float = 2.55) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(
        rows, 2 * columns, figsize=(2 * height * columns, height * rows + 0.9), layout="constrained", squeeze=False
    )
    figure.set_layout_engine("constrained", h_pad=0.09)
    return figure, axes


def _finish(figure: Figure, panel: Axes, title: str) -> None:
    handles, labels = panel.get_legend_handles_labels()
    columns = min(len(labels), max(1, int(figure.get_figwidth() / 1.8)))
    figure.suptitle(title, fontsize=12)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=11)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=2, placeholder=" ...")) or "(no instruction)"
