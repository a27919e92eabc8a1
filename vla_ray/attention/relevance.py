"""Relevance folded in while backward runs: no attention matrix is kept.

Attention relevancy (Chefer et al. 2021, rule 6) of a scalar y is R = (I + A_L) ... (I + A_1) with
A_l = mean over heads of relu(P * dy/dP), [N, N]. Only one row of it, w^T R, is ever shown, and that row obeys

    r <- w;   for l = L ... 1:   r <- r + A_l^T r,

the order in which backward reaches the layers. So every attention call hooks the gradient dO of its output, recomputes
P and dP = dO V^T for a block of rows at a time, and folds them into r. Rows of different samples never mix: a batch
gives each of them its own r. Memory is that of plain SDPA plus one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vla_ray.attention.watch import AttentionCall, Watcher, attention_modules, sdpa

BLOCK_ROWS = 128

# positive, negative: what raises, what lowers the scalar; signed: both, cancelling; attention: rollout, no gradient.
Kind = Literal["positive", "negative", "signed", "attention"]
KINDS: tuple[Kind, ...] = ("positive", "negative", "signed", "attention")
Seed = Tensor | Callable[[], Mapping[str, Tensor]]


class RelevanceTape(Watcher):
    """Folds relevance for the attention modules of the given towers.

    Open it around the forward pass; then, for every target, `start` it and run backward from the towers' output.

    Args:
        towers: name -> model.
        kinds: what to fold, each in its own chain.
    """

    def __init__(self, towers: Mapping[str, nn.Module], kinds: Sequence[Kind] = ("positive",)) -> None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ValueError(f"unknown relevance kind {unknown}; known: {', '.join(KINDS)}")
        self.kinds = tuple(kinds)
        self._places = {
            id(module): (tower, layer)
            for tower, model in towers.items()
            for layer, module in enumerate(attention_modules(model))
        }
        self._seeds: dict[str, Seed] = {}
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._last: dict[str, int] = {}

    def start(self, **seeds: Seed) -> None:
        """Begin the relevance of one target.

        Args:
            seeds: tower -> weights [B, N] of its rows; or a function that gives them for each kind when the tower is
                reached, so that the finished rows of one tower can seed the next. A tower without a seed is not folded.
        """
        self._seeds, self._rows, self._last = dict(seeds), {}, {}

    def rows(self, tower: str) -> dict[str, Tensor]:
        """kind -> w^T R, [B, N] float32 (float64 for a float64 model): the relevance of each token of the tower."""
        return self._rows[tower]

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """SDPA, whose output is hooked: the call is folded when the gradient of its output is known.

        The hook keeps alive only what SDPA's own backward keeps anyway.
        """
        output_BHND = sdpa(module, call).transpose(1, 2)
        place = self._places.get(id(module))
        if place is not None and output_BHND.requires_grad:
            inputs = call.detached()
            output_BHND.register_hook(lambda gradient: self._fold(*place, inputs, gradient))
        return output_BHND.transpose(1, 2)

    def _fold(self, tower: str, layer: int, call: AttentionCall, gradient_BHND: Tensor) -> None:
        if tower not in self._seeds:
            return
        if tower not in self._rows:
            seed = self._seeds[tower]
            weights = seed() if callable(seed) else dict.fromkeys(self.kinds, seed)
            dtype = torch.promote_types(weights[self.kinds[0]].dtype, torch.float32)
            self._rows[tower] = {kind: weights[kind].detach().to(dtype) for kind in self.kinds}
        elif layer != self._last[tower] - 1:
            raise RuntimeError(f"layer {layer} of {tower} was folded after layer {self._last[tower]}")
        self._last[tower] = layer
        rows = self._rows[tower]
        added = fold(call, gradient_BHND, rows)
        for kind, old in rows.items():
            # Rows of P sum to one, so rollout averages with the identity and keeps its mass.
            rows[kind] = 0.5 * (old + added[kind]) if kind == "attention" else old + added[kind]


@torch.no_grad()
def fold(call: AttentionCall, gradient_BHND: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kind -> A^T r for one attention call, in blocks of rows.

    Args:
        gradient_BHND: d scalar / d output of the call, before heads are joined.
        rows: kind -> r [B, N].
    """
    query, (batch, heads, length, _) = call.query, call.query.shape
    groups = heads // call.key.shape[1]
    added = {kind: torch.zeros_like(r) for kind, r in rows.items()}
    for b in range(batch):
        live = torch.stack([r[b] != 0 for r in rows.values()]).any(0)
        key, value = (x[b].repeat_interleave(groups, 0) if groups > 1 else x[b] for x in (call.key, call.value))
        for start in range(0, length, BLOCK_ROWS):
            block = slice(start, min(start + BLOCK_ROWS, length))
            if not bool(live[block].any()):  # rows without relevance pass none on
                continue
            p = _probabilities(query[b, :, block], key, call, b, block)
            gradient = (gradient_BHND[b, :, block] @ value.transpose(-1, -2)).to(p.dtype)
            for kind, r in rows.items():
                added[kind][b] += r[b, block] @ _weights(kind, p, gradient).mean(0).to(r.dtype)
    return added


def _probabilities(query_HND: Tensor, key_HND: Tensor, call: AttentionCall, b: int, block: slice) -> Tensor:
    scores = (query_HND @ key_HND.transpose(-1, -2)).to(
        torch.promote_types(query_HND.dtype, torch.float32)
    ) * call.scale
    allowed = None if call.mask is None else call.mask[b, :, block]
    if allowed is None and call.causal:
        columns = torch.arange(scores.shape[-1], device=scores.device)
        allowed = columns <= torch.arange(block.start, block.stop, device=scores.device)[:, None]
    if allowed is None:
        return scores.softmax(-1)
    # A row that may attend nowhere (left padding) gets zeros, as SDPA gives it.
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1) * allowed


def _weights(kind: str, p: Tensor, gradient: Tensor) -> Tensor:
    match kind:
        case "positive":
            return p * gradient.clamp_min(0)
        case "negative":
            return p * (-gradient).clamp_min(0)
        case "signed":
            return p * gradient
        case _:
            return p
