"""How figures of trajectories look: one palette that the colour-blind can tell apart, few lines, PNG out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vla_ray.data.cast.trajectory import positions
from vla_ray.evaluation.bootstrap import Estimate
from vla_ray.evaluation.policy.metrics import STILL, STRAIGHT

Floats = NDArray[np.floating]

DPI = 120
# Okabe and Ito 2008. The policy is blue, baselines are warm and grey, in every figure; the truth is a wide grey band.
POLICY, TARGET = "#0072B2", "0.72"
BASELINE = {STRAIGHT: "#E69F00", STILL: "0.55"}
BASELINE_LINE = {STRAIGHT: "--", STILL: ":"}
OTHERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")
# Left is blue and right is red, more of it for a turn than for an adjustment.
COMMANDS = {
    "turn left": "#0072B2",
    "adjust left": "#56B4E9",
    "go forward": "black",
    "stop": "#CC79A7",
    "adjust right": "#E69F00",
    "turn right": "#D55E00",
}
SIZES: dict[Any, Any] = {
    "text.parse_math": False,  # instructions and names of runs are shown as they are, dollars included
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    plt.close(figure)
    return buffer.getvalue()


def ends_of(estimates: Sequence[Estimate]) -> tuple[Floats, Floats, Floats]:
    """Means, and the ends of the intervals; NaN where there is no mean, the mean itself where there is no interval."""
    mean = np.array([np.nan if e.mean is None else e.mean for e in estimates])
    low = np.array([m if e.low is None else e.low for e, m in zip(estimates, mean, strict=True)])
    high = np.array([m if e.high is None else e.high for e, m in zip(estimates, mean, strict=True)])
    return mean, low, high


def path(
    axes: Axes, deltas: Floats, colour: str, line: str = "-", width: float = 2.0, label: str | None = None
) -> None:
    """A trajectory [H, 2] from above: forward is up, left is left. Nothing if it is not finite."""
    if not np.isfinite(deltas).all():
        return
    points = np.vstack([[0.0, 0.0], positions(deltas)])
    axes.plot(-points[:, 1], points[:, 0], line, color=colour, lw=width, label=label, solid_capstyle="round")
    axes.plot(-points[-1, 1], points[-1, 0], "o", color=colour, ms=3 + 1.4 * width)


def limits(many: Sequence[Floats]) -> tuple[float, float, float]:
    """[least x, greatest x, greatest |y|] of the positions of trajectories, with some room; the same for all panels."""
    whole = [positions(deltas) for deltas in many if np.isfinite(deltas).all()]
    points = np.vstack([np.zeros((1, 2)), *whole])
    low, high, aside = points[:, 0].min(), points[:, 0].max(), np.abs(points[:, 1]).max()
    room = 0.08 * max(high - low, 2 * aside, 1.0)
    return float(low - room), float(high + room), float(aside + room)


def ground(axes: Axes, low: float, high: float, aside: float) -> None:
    """Axes of a view from above, in units, all directions to the same scale."""
    aside = max(aside, (high - low) / 2)
    axes.set_aspect("equal")
    axes.set_xlim(-aside, aside)
    axes.set_ylim(low, high)
    axes.plot(0, 0, marker="^", color="0.6", ms=9, zorder=1.5)
    axes.grid(color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    span = max(high - low, 2 * aside)
    power = 10.0 ** max(0, np.floor(np.log10(span / 6)))
    step = next(s for s in (power, 2 * power, 5 * power, 10 * power) if span / s <= 6)
    axes.set_yticks(np.arange(np.ceil(low / step) * step, high, step))
    ticks = np.arange(np.ceil(-aside / step) * step, aside, step)
    axes.set_xticks(ticks, [f"{abs(t):g}" for t in ticks])  # to either side: the axis says which is which
    axes.tick_params(labelsize=8, length=2)


def show_picture(axes: Axes, picture: NDArray[np.uint8] | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    if picture is None:
        axes.set_facecolor("0.95")
        axes.set_aspect("equal")
        axes.text(0.5, 0.5, "no picture", ha="center", va="center", color="0.4", transform=axes.transAxes)
    else:
        axes.imshow(picture, interpolation="bilinear")
