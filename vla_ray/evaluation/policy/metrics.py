"""How far predicted trajectories are from the right ones: per sample, in units and where the scale is known in metres.

Two spaces, never mixed: `mse`, `mae`, `rmse`, `success_rate_*` compare the deltas of single steps (units, the original
project's metrics); `ade`, `fde` and the rest compare positions, the cumulative sums. Steps after the end of an
episode are left out of the former; the latter are taken of samples whose steps are all valid, and only of those, as
a shorter trajectory would count as an easier one. A column is NaN where it does not apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.cast.trajectory import displacement, positions, still, straight
from vla_ray.evaluation.policy.predictions import Predictions

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

STEP_TAUS = (0.05, 0.1, 0.2, 0.5)  # units: of a single delta
FDE_TAUS = (0.5, 1.0, 2.0)  # units: of the end point
FDE_TAUS_M = (0.25, 0.5, 1.0)  # metres
MISS = 2.0  # units
RELIABLE = 1.0  # units: what is closer to the start has no side and no heading
DEFINED = 0.1  # units: no cosine with a shorter vector

STILL, STRAIGHT = "stand still", "straight"
BASELINES = (STILL, STRAIGHT)


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one set of trajectories against the targets.

    Attributes:
        columns: name -> [N].
        errors: [N, H, 2] predicted - target deltas; NaN at steps that do not count.
        displacement: [N, H] between positions; NaN in samples that are not whole.
    """

    columns: Mapping[str, Floats]
    errors: Floats
    displacement: Floats

    @property
    def weights(self) -> Floats:
        """[N] valid steps: how much a sample counts in a mean over (sample, step)."""
        return np.isfinite(self.errors[..., 0]).sum(1).astype(float)


def score(
    predicted: Floats,
    target: Floats,
    valid: Bools,
    scale_m: Floats,
    samples: Floats | None = None,
) -> Scores:
    """Every metric of every sample.

    Args:
        predicted, target: [N, H, 2] deltas; NaN in rows that have none.
        valid: [N, H].
        scale_m: [N], NaN if unknown.
        samples: [N, K, H, 2] further predictions of the same, for `min_ade`.

    Returns:
        Columns mse, mae, rmse (units of deltas), success_rate_<tau> (share of steps), ade, fde, ade_m, fde_m, min_ade
        (the best of K), miss and success_fde_<tau>[_m] (0 or 1), heading_error (degrees, at the end point; standing
        still counts as 90), turn_side (1 if the end point is on the right side; of targets at least RELIABLE to a
        side), cosine (mean over steps, of the angle between positions).
    """
    errors = np.where(valid[..., None], predicted - target, np.nan)
    counts = np.isfinite(errors[..., 0]).sum(1)
    some = counts > 0
    whole = some & valid.all(axis=1)

    def over_steps(values: Floats) -> Floats:
        """[N] means of [N, H] over valid steps."""
        return _where(some, np.nansum(values, axis=1) / np.maximum(counts, 1))

    mse = over_steps((errors**2).mean(-1))
    columns = {"mse": mse, "mae": over_steps(np.abs(errors).mean(-1)), "rmse": np.sqrt(mse)}
    lengths = np.linalg.norm(errors, axis=-1)
    for tau in STEP_TAUS:
        columns[f"success_rate_{tau:g}"] = over_steps(np.where(np.isnan(lengths), np.nan, lengths < tau))

    moved = np.where(whole[:, None], displacement(predicted, target), np.nan)
    ade, fde = moved.mean(1), moved[:, -1]
    columns |= {"ade": ade, "fde": fde, "ade_m": ade * scale_m, "fde_m": fde * scale_m}
    if samples is not None:
        columns["min_ade"] = _where(whole, displacement(samples, target[:, None]).mean(-1).min(1))
    columns["miss"] = _where(whole, fde > MISS)
    for tau in FDE_TAUS:
        columns[f"success_fde_{tau:g}"] = _where(whole, fde < tau)
    for tau in FDE_TAUS_M:
        columns[f"success_fde_{tau:g}_m"] = _where(whole & np.isfinite(scale_m), fde * scale_m < tau)
    columns |= _directions(positions(predicted), positions(target), whole)
    return Scores(columns, errors, moved)


def score_all(predictions: Predictions) -> dict[str, Scores]:
    """Scores of the predictions, and of the baselines on the same samples: name -> scores, the predictions' name ""."""
    p = predictions
    target = np.where(p.predicted_ok[:, None, None], p.target, np.nan)  # what failed is scored for no one
    rest = (target, p.valid & p.predicted_ok[:, None], p.scale_m)
    found = {"": score(p.predicted, *rest, p.samples)}
    found[STILL] = score(still(p.target), *rest)
    found[STRAIGHT] = score(straight(p.target, p.median_step), *rest)
    for name in BASELINES:  # they end on neither side, which is no wrong answer
        found[name] = replace(found[name], columns={**found[name].columns, "turn_side": np.full(len(p), np.nan)})
    return found


def _directions(predicted: Floats, target: Floats, whole: Bools) -> dict[str, Floats]:
    """Cosine, heading and side of positions [N, H, 2]."""
    lengths = np.linalg.norm(target, axis=-1)
    own = np.linalg.norm(predicted, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (predicted * target).sum(-1) / (own * lengths)
    cosines = np.where(own > 0, np.clip(cosines, -1, 1), 0.0)  # who stands still goes neither along nor against
    counted = (lengths >= DEFINED) & whole[:, None]
    number = counted.sum(1)
    end, sideways = target[:, -1], np.abs(target[:, -1, 1]) >= RELIABLE
    return {
        "heading_error": _where(whole & (lengths[:, -1] >= RELIABLE), np.degrees(np.arccos(cosines[:, -1]))),
        "turn_side": _where(whole & sideways, np.sign(predicted[:, -1, 1]) == np.sign(end[:, 1])),
        "cosine": _where(number > 0, np.where(counted, cosines, 0).sum(1) / np.maximum(number, 1)),
    }


def _where(mask: Bools, values: NDArray) -> Floats:
    return np.where(mask, values, np.nan).astype(float)
