"""Whether a policy knows when it is wrong: its confidence against its error.

Confidence is what decoding leaves behind: the mean log probability of the chosen bins, and the mean entropy of the
distributions they were chosen from. Without probabilities there is nothing to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_ray.errors import CheckpointError
from vla_ray.evaluation.policy.intervals import Resampler, rank_correlation
from vla_ray.evaluation.policy.metrics import Scores
from vla_ray.evaluation.policy.predictions import Predictions
from vla_ray.evaluation.policy.summary import Cell, PlainTable, show
from vla_ray.models.paligemma.actions import ActionTokenizer

Floats = NDArray[np.floating]
BINS = 5
_LEAST = 1e-12  # a probability of 0 in float32 is not minus infinity of confidence


@dataclass(frozen=True, slots=True)
class Calibration:
    """Attributes:
    numbers: rank_correlation (of confidence and ADE; -1 is ideal, 0 knows nothing), rank_correlation_entropy,
        risk_coverage_auc with _random and _oracle beside it, expected_calibration_error (of single tokens).
    confidence: [N] mean log probability.
    """

    numbers: Mapping[str, float | None]
    tables: tuple[PlainTable, ...]
    confidence: Floats


def calibrate(predictions: Predictions, scores: Scores, resampler: Resampler) -> Calibration | None:
    """Confidence against ADE, and token probability against hits. None without probabilities or without targets."""
    p = predictions
    if p.probability is None:
        return None
    error = scores.columns["ade"]
    confidence = np.log(np.maximum(p.probability, _LEAST)).mean(axis=1)
    known = np.isfinite(error) & np.isfinite(confidence)
    if not known.any():
        return None
    numbers: dict[str, float | None] = {"rank_correlation": rank_correlation(confidence, error)}
    if p.entropy is not None:
        numbers["rank_correlation_entropy"] = rank_correlation(-p.entropy.mean(axis=1), error)
    own = risk_coverage_auc(confidence[known], error[known])
    random, oracle = float(error[known].mean()), risk_coverage_auc(-error[known], error[known])
    numbers |= {
        "risk_coverage_auc": own,
        "risk_coverage_auc_random": random,
        "risk_coverage_auc_oracle": oracle,
    }
    tables = [_by_confidence(confidence, scores, resampler)]
    hits = token_hits(p)
    if hits is not None:
        table, numbers["expected_calibration_error"] = _by_token(p.probability, hits, scores)
        tables.append(table)
    return Calibration(numbers, tuple(tables), confidence)


def risk_coverage_auc(confidence: Floats, error: Floats) -> float:
    """Mean, over coverages 1/n ... 1, of the mean error of the most confident; units of the error, lower is better."""
    order = np.argsort(-confidence, kind="stable")
    return float((np.cumsum(error[order]) / np.arange(1, len(order) + 1)).mean())


def token_hits(predictions: Predictions) -> Floats | None:
    """[N, 2H] 1 where the target lies in the chosen bin, NaN where it does not count; None if the bins are unknown.

    They are known from the file's metadata, `action_tokenizer`, and chosen where decoding was greedy: averages of bins
    (decode=expected) lie in bins that nobody chose.
    """
    p = predictions
    if "action_tokenizer" not in p.metadata or p.metadata.get("decode") == "expected":
        return None
    try:
        tokenizer = ActionTokenizer.from_dict(json.loads(p.metadata["action_tokenizer"]))
    except (ValueError, CheckpointError):
        return None
    known = np.isfinite(p.predicted).all(-1) & np.isfinite(p.target).all(-1) & p.valid
    both = np.where(known[..., None], np.stack([p.predicted, p.target]), 0.0)
    chosen, right = (tokenizer.encode(values).reshape(p.predicted.shape) for values in both)
    return np.where(known[..., None], chosen == right, np.nan).reshape(len(p), -1)


def _by_confidence(confidence: Floats, scores: Scores, resampler: Resampler) -> PlainTable:
    known = np.isfinite(confidence) & np.isfinite(scores.columns["ade"])
    order = np.flatnonzero(known)[np.argsort(confidence[known], kind="stable")]
    rows: list[tuple[Cell, ...]] = []
    for part in np.array_split(order, min(BINS, len(order))):
        mine = np.isin(np.arange(len(confidence)), part)
        ade, fde = (resampler.estimate(np.where(mine, scores.columns[c], np.nan)) for c in ("ade", "fde"))
        low, high = np.exp(confidence[part].min()), np.exp(confidence[part].max())
        rows.append((f"{low:.3f} to {high:.3f}", len(part), show(ade), show(fde)))
    note = "Fifths of the samples, least confident first. Confidence: geometric mean of the chosen bins' probability."
    return PlainTable("Error by confidence", note, ("confidence", "n", "ADE, units", "FDE, units"), tuple(rows))


def _by_token(probability: Floats, hits: Floats, scores: Scores) -> tuple[PlainTable, float]:
    """Fifths of all tokens by probability, and the mean gap between probability and hits."""
    flat = np.abs(scores.errors).reshape(hits.shape)
    known = np.isfinite(hits) & np.isfinite(flat) & np.isfinite(probability)
    p, hit, error = probability[known], hits[known], flat[known]
    order = np.argsort(p, kind="stable")
    rows: list[tuple[Cell, ...]] = []
    gap = 0.0
    for part in np.array_split(order, min(BINS, len(order))):
        mean, share = float(p[part].mean()), float(hit[part].mean())
        gap += abs(mean - share) * len(part) / len(order)
        rows.append((round(mean, 3), round(share, 3), len(part), round(float(error[part].mean()), 3)))
    note = (
        f"Fifths of all tokens by probability. Right: the target lies in the chosen bin. A probability "
        f"is conditional on the tokens before, right or wrong. Expected calibration error "
        f"{gap:.3f}. Tokens of one sample depend on each other: no interval is given."
    )
    columns = ("mean probability", "share right", "tokens", "mean |error|, units")
    return PlainTable("Reliability of tokens", note, columns, tuple(rows)), gap
