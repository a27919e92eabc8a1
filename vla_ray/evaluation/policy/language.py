"""Does the policy follow language? The same pictures with other instructions, compared.

A policy that ignores words has language_use 0, no divergence, and scores at chance in every test: end points that are
equal, as bins make them, count as often as a coin would put them in the right order. Ideas: permuted
instructions as diff_l1 of catglossop/cast-vla, order and retrieval tests after the counterfactual pairs of CAST
(arXiv 2508.13446). Every rate has its chance level, or the same test with the instructions exchanged, beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations, permutations

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.cast.instructions import ATOMIC, kind, side
from vla_ray.data.cast.trajectory import ade, positions
from vla_ray.evaluation.bootstrap import Estimate
from vla_ray.evaluation.policy.intervals import Resampler, wilcoxon_p
from vla_ray.evaluation.policy.predictions import Predictions
from vla_ray.evaluation.policy.summary import Cell, PlainTable, show

Floats = NDArray[np.floating]
SHRINKS = 0.25  # a stop ends at less than this share of the way that going forward takes
INDEPENDENT = "which takes the samples of a recording as independent"  # what every p here has to say
APART = 0.25  # units of ADE: targets of a counterfactual pair that are closer cannot be told apart


@dataclass(frozen=True, slots=True)
class Language:
    """Attributes:
    estimates: language_use, ade_given, ade_permuted, order, stop_shrinks, opposite_side, opposite_order,
        opposite_shorter, divergence_end, divergence_path (units), retrieval, retrieval_permuted; those that the file
        has rows for.
    chance: the same without language: name -> value.
    p: of language_use, paired.
    """

    estimates: Mapping[str, Estimate]
    chance: Mapping[str, float]
    p: float | None
    tables: tuple[PlainTable, ...]


def follows_language(predictions: Predictions, resampler: Resampler) -> Language | None:
    """All tests that the variants of these predictions allow. None if there is nothing to test with."""
    p = predictions
    values: dict[str, Floats] = {}
    chance: dict[str, float] = {}
    estimates: dict[str, Estimate] = {}
    use_p = None
    if "permuted" in p.variants:
        estimates, use_p = _use(p, resampler)
    values |= _atomic(p, chance) | _opposite(p, chance)
    retrieved = retrieval(p, p.predicted)
    if np.isfinite(retrieved).any():
        values["retrieval"], chance["retrieval"] = retrieved, 0.5
        if "permuted" in p.variants:
            exchanged = retrieval(p, p.variants["permuted"].predicted)
            both = np.isfinite(retrieved) & np.isfinite(exchanged)
            if both.any():  # the two are only comparable on the same samples
                values["retrieval"] = np.where(both, retrieved, np.nan)
                values["retrieval_permuted"] = np.where(both, exchanged, np.nan)
    if values:
        found = resampler.estimates(np.stack(list(values.values()), axis=1))
        estimates |= dict(zip(values, found, strict=True))
    estimates = {name: e for name, e in estimates.items() if e.frames}
    if not estimates:
        return None
    tables = [_table(estimates, chance, use_p)]
    if any(name in p.variants for name in ATOMIC):
        tables.append(_atomic_table(p, resampler))
    return Language(estimates, chance, use_p, tuple(tables))


def retrieval(predictions: Predictions, predicted: Floats) -> Floats:
    """[N] share of a sample's counterfactual partners whose target is farther from its prediction than its own.

    Partners are samples with the same picture, in whatever sub-dataset, with another instruction and with a target at
    least APART away; NaN where there are none. What is equally far counts one half, which is also chance.
    """
    p = predictions
    found = np.full(len(p), np.nan)
    whole = np.asarray(p.valid.all(axis=1))
    seeing: defaultdict[str, list[int]] = defaultdict(list)
    for row, picture in enumerate(p.picture_hash):
        if picture and whole[row]:
            seeing[picture].append(row)
    for rows in seeing.values():
        for row in rows:
            others = [o for o in rows if p.instruction[o] != p.instruction[row]]
            others = [o for o in others if ade(p.target[o], p.target[row]) >= APART]
            if others and np.isfinite(predicted[row]).all():
                own = ade(predicted[row], p.target[row])
                found[row] = float(_greater(ade(predicted[row][None], p.target[others]), own).mean())
    return found


def _use(p: Predictions, resampler: Resampler) -> tuple[dict[str, Estimate], float]:
    """language_use = 1 - ADE given / ADE permuted, over samples that have both and another text."""
    other = p.variants["permuted"]
    differs = np.array([a is not None and a != b for a, b in zip(other.instructions, p.instruction, strict=True)])
    counted = differs & p.valid.all(axis=1)
    given = np.where(counted, ade(p.predicted, p.target), np.nan)
    misled = np.where(counted, ade(other.predicted, p.target), np.nan)
    both = np.isfinite(given) & np.isfinite(misled)
    given, misled = np.where(both, given, np.nan), np.where(both, misled, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):  # nothing moved at all: the ratio says nothing
        ratio = resampler.estimate(given / misled, np.where(both, misled, 0))
    if ratio.mean is not None:
        low = None if ratio.high is None else 1 - ratio.high
        high = None if ratio.low is None else 1 - ratio.low
        ratio = replace(ratio, mean=1 - ratio.mean, low=low, high=high)
    own, permuted = resampler.estimates(np.stack([given, misled], axis=1))
    return {"language_use": ratio, "ade_given": own, "ade_permuted": permuted}, wilcoxon_p(misled - given)


def _atomic(p: Predictions, chance: dict[str, float]) -> dict[str, Floats]:
    """Order, stop and divergence of the atomic commands that the file has."""
    paths = {name: positions(p.variants[name].predicted) for name in ATOMIC if name in p.variants}
    ends = {name: path[:, -1] for name, path in paths.items()}
    found: dict[str, Floats] = {}
    if {"turn left", "go forward", "turn right"} <= ends.keys():
        left, ahead, right = (ends[n][:, 1] for n in ("turn left", "go forward", "turn right"))
        ties = (left == ahead).astype(int) + (ahead == right)
        share = np.where((left >= ahead) & (ahead >= right), np.array([1, 1 / 2, 1 / 6])[ties], 0)
        found["order"], chance["order"] = np.where(np.isfinite(left + ahead + right), share, np.nan), 1 / 6
    if {"stop", "go forward"} <= ends.keys():
        found["stop_shrinks"] = _shrinks(ends["stop"], ends["go forward"])
        exchanged = np.stack([_shrinks(ends[a], ends[b]) for a, b in permutations(ends, 2)])
        if np.isfinite(exchanged).any():
            chance["stop_shrinks"] = float(np.nanmean(exchanged))
    pairs = list(combinations(paths, 2))
    if pairs:
        apart = np.stack([np.linalg.norm(paths[a] - paths[b], axis=-1) for a, b in pairs])  # [pairs, N, H]
        known = np.isfinite(apart).all(axis=(0, 2))
        found["divergence_end"] = np.where(known, apart[..., -1].mean(0), np.nan)
        found["divergence_path"] = np.where(known, apart.mean((0, 2)), np.nan)
    return found


def _greater(one: Floats, other: Floats) -> Floats:
    """1 where one is greater, one half where both are equal, else 0."""
    return (np.sign(one - other) + 1) / 2


def _shrinks(stop: Floats, ahead: Floats) -> Floats:
    """[N] whether end points [N, 2] of one are less than SHRINKS as far as those of the other."""
    near, far = np.linalg.norm(stop, axis=-1), np.linalg.norm(ahead, axis=-1)
    return np.where(np.isfinite(near + far), near < SHRINKS * far, np.nan)


def _opposite(p: Predictions, chance: dict[str, float]) -> dict[str, Floats]:
    """What the contrary instruction changes: the side, and how far the robot goes."""
    if "opposite" not in p.variants:
        return {}
    other = p.variants["opposite"]
    ends, contrary = positions(p.predicted)[:, -1], positions(other.predicted)[:, -1]
    known = np.isfinite(ends + contrary).all(axis=1)
    sides = np.array([side(text) for text in p.instruction])
    texts = [text or "" for text in other.instructions]
    turned = known & (sides != 0) & (np.array([side(text) for text in texts]) == -sides)
    apart = (ends[:, 1] - contrary[:, 1]) * sides
    stops = np.array([kind(text) == "stop" for text in p.instruction])
    started = np.array([kind(text) == "stop" for text in texts])
    one = known & (stops != started)
    own, others = np.linalg.norm(ends, axis=1), np.linalg.norm(contrary, axis=1)
    chance |= {"opposite_order": 0.5, "opposite_shorter": 0.5}
    return {
        "opposite_order": np.where(turned, _greater(apart, np.zeros_like(apart)), np.nan),
        "opposite_side": np.where(turned, np.sign(ends[:, 1]) * np.sign(contrary[:, 1]) < 0, np.nan),
        "opposite_shorter": np.where(one, np.where(stops, _greater(others, own), _greater(own, others)), np.nan),
    }


_TESTS = {
    "language_use": ("language use", "share of the error with a foreign instruction that the right one saves"),
    "order": ("turn left > go forward > turn right", "order of the end points, left to right"),
    "stop_shrinks": (f"|stop| < {SHRINKS:g} |go forward|", "distance of the end point from the start"),
    "opposite_order": ("left of its opposite", "left instruction ends left of the same with right"),
    "opposite_side": ("opposite changes the side", "end points lie on different sides of straight ahead"),
    "opposite_shorter": ("stopping is shorter", "of an instruction and its opposite, one of which says stop"),
    "divergence_end": ("divergence of end points, units", "mean distance between two atomic commands"),
    "divergence_path": ("divergence of trajectories, units", "the same, mean over steps"),
    "retrieval": ("retrieval on counterfactual pairs", "prediction nearer to its own target than to the other's"),
}


def _table(estimates: Mapping[str, Estimate], chance: Mapping[str, float], use_p: float | None) -> PlainTable:
    rows: list[tuple[Cell, ...]] = []
    for name, (label, says) in _TESTS.items():
        if name not in estimates:
            continue
        beside = f"{chance[name]:.2f}" if name in chance else "0"
        if name == "retrieval" and "retrieval_permuted" in estimates:
            beside = show(estimates["retrieval_permuted"])
        if name == "opposite_side":
            beside = "-"
        rows.append((label, says, estimates[name].frames, show(estimates[name]), beside))
    note = "Mean [95 % interval]. Without language: chance, or the same test with the instructions exchanged. "
    note += "Ties in order, side by side and retrieval count as chance."
    if use_p is not None and "ade_permuted" in estimates:
        given, permuted = estimates["ade_given"], estimates["ade_permuted"]
        note += f" ADE {show(given)} with its own instruction, {show(permuted)} with another sample's"
        note += f" (paired p {p_text(use_p)}: signed-rank test over samples, {INDEPENDENT})."
    return PlainTable(
        "Does it follow language?", note, ("test", "what", "n", "result", "without language"), tuple(rows)
    )


def p_text(p: float) -> str:
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def _atomic_table(p: Predictions, resampler: Resampler) -> PlainTable:
    rows: list[tuple[Cell, ...]] = []
    for name in (n for n in ATOMIC if n in p.variants):
        path = p.variants[name].predicted
        ends = positions(path)[:, -1]
        length = np.linalg.norm(path, axis=-1).sum(1)
        x, y, way = resampler.estimates(np.column_stack([ends, length]))
        rows.append((name, x.frames, show(x), show(y), show(way)))
    note = "End point and length of the predicted trajectory, units; x forward, y left."
    return PlainTable("Atomic commands", note, ("command", "n", "x", "y", "length"), tuple(rows))
