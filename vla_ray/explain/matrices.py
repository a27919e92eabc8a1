"""The same folds from a stored `full` or `reduced` payload: rows through its matrices, last layer first.

Only vectors are multiplied, and matrices are read as they are needed: a payload of gigabytes costs one pass over it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vla_ray.attention.relevance import Chain, Row, Start, Weight, sum_series
from vla_ray.errors import TargetError
from vla_ray.explain.chain import STRENGTH, cross_projector, hop_scale, patch_groups, uniform_seed
from vla_ray.explain.folds import FIRST_HOP, Relevance, chains

Blocks = list[Mapping[str, Any]]  # a tower's entries, first layer first


@torch.no_grad()
def relevance_of(payload: Mapping[str, Any], folds: Sequence[str], strength: float = STRENGTH) -> Relevance:
    """Relevance of a payload of any level.

    Raises:
        TargetError: a relevance payload does not hold one of the folds, or attention lacks its gradients.
    """
    meta = payload["meta"]
    if "relevance" in payload:
        return _stored(payload["relevance"], folds, meta["frame_id"])
    spans, seed = meta["spans"], meta["seed"]
    grad_rms = float(seed["grad_rms"])
    chosen = chains(folds)
    weights = seed_row(meta)[None]
    unit = 1.0 / grad_rms if grad_rms > 0 else 0.0
    blocks = tower_blocks(payload, "language")
    scale = torch.zeros(1)
    if FIRST_HOP in chosen["language"]:
        first = _rows(blocks, {FIRST_HOP: chosen["language"].pop(FIRST_HOP)}, {FIRST_HOP: weights}, unit)
        scale = hop_scale(first[FIRST_HOP].sum(-1), len(blocks), strength)
    # The scale is known before the product here: no series is needed.
    closed = {n: Chain(c.weight, "product") if c.rule == "series" else c for n, c in chosen["language"].items()}

    def start(name: str, seed: Tensor, rule: str) -> Start:
        return Start(seed, scale if rule == "product" else 1.0)

    language = _rows(blocks, closed, {n: start(n, weights, c.rule) for n, c in closed.items()}, unit)
    first_image, last_image = spans["image"]
    grid, token_grid = meta["tiles"]["patch_grid"], meta["tiles"]["token_grid"]
    groups = patch_groups(grid, grid // token_grid)
    tiles = meta["num_patch_views"]
    uniform = uniform_seed(tiles, grid * grid)
    starts: dict[str, Start | Tensor] = {FIRST_HOP: uniform}
    for name, chain in chosen["vision"].items():
        if name in language:
            seed = cross_projector(language[name][0, first_image:last_image].view(tiles, -1), groups)
            starts[name] = start(name, seed, chain.rule)
        else:
            starts[name] = uniform
    blocks = tower_blocks(payload, "vision")
    vision = _rows(blocks, chosen["vision"], starts, unit)
    if FIRST_HOP in vision:
        scale = hop_scale(vision.pop(FIRST_HOP).sum()[None], len(blocks), strength)
        vision = {name: sum_series(row, scale, skip=1) if row.dim() == 3 else row for name, row in vision.items()}
    return Relevance(
        {name: row[0].float() for name, row in language.items()},
        {name: row[:, 1:].float() for name, row in vision.items()},
        {name: row[:, 0].float() for name, row in vision.items()},
    )


def seed_row(meta: Mapping[str, Any]) -> Tensor:
    """Where a payload's relevance starts, [L]."""
    row = torch.zeros(meta["spans"]["speed_queries"][1])
    row[meta["seed"]["rows"]] = meta["seed"]["weights"].float()
    return row


def _stored(relevance: Mapping[str, Any], folds: Sequence[str], frame_id: str) -> Relevance:
    missing = [name for name in folds if name not in relevance["patches"]]
    if missing:
        raise TargetError(
            f"the relevance payload of {frame_id} holds {', '.join(relevance['patches'])}, not {', '.join(missing)}: "
            "capture with these methods, or with payload=reduced or full."
        )

    def kept(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[name] for name in folds if name in values}

    return Relevance(kept(relevance["language"]), kept(relevance["patches"]), kept(relevance["cls"]))


def tower_blocks(payload: Mapping[str, Any], tower: str) -> Blocks:
    """The entries of a tower's blocks, first layer first."""
    attention = payload["attention"]
    names = [name for name in attention if name.startswith(f"{tower}_block_")]
    return [attention[f"{tower}_block_{i}"][0] for i in range(len(names))]


def _rows(
    blocks: Blocks, chosen: Mapping[str, Chain], starts: Mapping[str, Start | Tensor], unit: float
) -> dict[str, Tensor]:
    """name -> [B, N]. `unit` is what raw gradients are multiplied with."""
    rows = {name: Row.start(chain, starts[name]) for name, chain in chosen.items()}
    for entry in reversed(blocks):
        matrices: dict[Weight, Tensor] = {}
        for row in rows.values():
            drive, weight = row.drive, row.chain.weight
            if drive is None:
                continue
            if weight not in matrices:
                matrices[weight] = _matrix(entry, weight, unit).double()
            row.add(torch.einsum("kbi,bij->kbj", drive, matrices[weight]))
    return {name: row.result for name, row in rows.items()}


def _matrix(entry: Mapping[str, Any], weight: Weight, unit: float) -> Tensor:
    """[B, N, N], the mean over heads."""
    if "attn_mean" in entry:
        return _of_reduced(entry, weight)
    attn = entry["attn"].float()
    if weight == "attention":
        return attn.mean(1)
    weighted = attn * (gradient_of(entry).float() * unit)
    if weight == "signed":
        return weighted.mean(1)
    if weight == "absolute":
        return weighted.abs().mean(1)
    return (weighted if weight == "positive" else -weighted).clamp_min(0).mean(1)


def gradient_of(entry: Mapping[str, Any]) -> Tensor:
    """The gradient of a `full` payload's entry. TargetError if it has none."""
    gradient: Tensor | None = entry.get("grad")
    if gradient is None:
        raise TargetError("the payload holds attention without its gradients: capture it again with payload=full.")
    return gradient


def _of_reduced(entry: Mapping[str, Any], weight: Weight) -> Tensor:
    """As above; these matrices are in units of the gradient's RMS already."""
    if weight == "attention":
        return entry["attn_mean"].float()
    if weight in ("signed", "absolute"):
        sign = -1 if weight == "signed" else 1
        return _of_reduced(entry, "positive") + sign * _of_reduced(entry, "negative")
    cam, scale = ("cam", "cam_scale") if weight == "positive" else ("cam_negative", "cam_negative_scale")
    return entry[cam].float() * entry[scale]
