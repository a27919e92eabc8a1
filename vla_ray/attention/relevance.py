"""Relevance folded in while backward runs: no attention matrix is kept.

Attention relevancy (Chefer et al. 2021, rule 6) of a scalar y is R = (I + A_L) ... (I + A_1) with
A_l = mean over heads of relu(P * dy/dP), [N, N]. Only one row of it, w^T R, is ever shown, and that row obeys

    r <- w;   for l = L ... 1:   r <- r + A_l^T r,

the order in which backward reaches the layers. So every attention call hooks the gradient dO of its output, recomputes
P and dP = dO V^T for a block of rows at a time, and folds them into r. Rollout, raw attention and attention x gradient
are rows of the same kind, by other rules, and are folded beside it. Rows of different samples never mix: a batch gives
each of them its own r. Memory is that of plain SDPA plus one block.

With s A_l in place of A_l, R mixes orders of s, so the map depends on the scale of y. A series keeps the orders apart,
r(s) = sum_k s^k r_k, where r_k has taken k hops: r_k <- r_k + A_l^T r_{k-1}. It costs a few more rows in the same
product, and s can be chosen when all layers are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vla_ray.attention.watch import AttentionCall, Watcher, attention_modules, sdpa

BLOCK_ROWS = 128

# A layer's matrix, as the mean over heads of P * relu(dP), P * relu(-dP), P * dP, P * |dP|, or P: what raises the
# scalar, what lowers it, both (cancelling or not), or what is looked at, whatever the scalar.
Weight = Literal["positive", "negative", "signed", "absolute", "attention"]
# How layers make a row. product: (I + A_L) ... (I + A_1); series: its orders; average: the same with (I + A) / 2
# (rollout, whose rows keep their mass, as those of P sum to one); mean: of w^T A_l over layers; last: w^T A_L.
Rule = Literal["product", "series", "average", "mean", "last"]


@dataclass(frozen=True, slots=True)
class Chain:
    """One row to fold: which matrix of every layer, and how layers combine."""

    weight: Weight
    rule: Rule = "product"

    def __post_init__(self) -> None:
        for value, known in ((self.weight, get_args(Weight)), (self.rule, get_args(Rule))):
            if value not in known:
                raise ValueError(f"unknown relevance {value!r}; known: {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Start:
    """Where a row starts: weights [B, N], and what every layer's matrix is multiplied with, [B] or 1."""

    seed: Tensor
    scale: Tensor | float = 1.0


@dataclass(slots=True)
class Row:
    """A chain on its way down the layers of one tower.

    Attributes:
        seed: [B, N], where it started, float64: the orders of a series differ by many powers of ten.
        value: [K, B, N], what it is now; K is 1, or one more than the layers of a series.
        scale: [B, 1] of each layer's matrix.
    """

    chain: Chain
    seed: Tensor
    value: Tensor
    scale: Tensor
    layers: int = 0

    @classmethod
    def start(cls, chain: Chain, start: Start | Tensor) -> Row:
        start = start if isinstance(start, Start) else Start(start)
        seed = start.seed.detach().double()
        scale = torch.as_tensor(start.scale, dtype=seed.dtype, device=seed.device).reshape(-1, 1)
        first = seed if chain.rule in ("product", "series", "average") else torch.zeros_like(seed)
        return cls(chain, seed, first[None], scale)

    @property
    def drive(self) -> Tensor | None:
        """What the next layer's matrix is multiplied with, [K, B, N]; None if nothing more is to come."""
        if self.chain.rule in ("product", "series", "average"):
            return self.value
        return self.seed[None] if self.chain.rule == "mean" or self.layers == 0 else None

    def add(self, product: Tensor) -> None:
        """Take in A^T drive of one more layer."""
        self.layers += 1
        product = product * self.scale
        match self.chain.rule:
            case "product":
                self.value = self.value + product
            case "series":
                nothing = torch.zeros_like(self.value[:1])
                self.value = torch.cat([self.value, nothing]) + torch.cat([nothing, product])
            case "average":
                self.value = 0.5 * (self.value + product)
            case "mean":
                self.value = self.value + (product - self.value) / self.layers
            case "last":
                self.value = product

    @property
    def result(self) -> Tensor:
        """[B, N], of a series [K, B, N]."""
        return self.value if self.chain.rule == "series" else self.value[0]


def sum_series(orders_KBN: Tensor, scale_B: Tensor, skip: int = 0) -> Tensor:
    """r(s) = sum over k of s^k r_k, [B, N]: the product with every matrix multiplied by s; without the first `skip`."""
    powers = torch.arange(len(orders_KBN), device=orders_KBN.device, dtype=orders_KBN.dtype)
    return (orders_KBN * scale_B.to(orders_KBN).reshape(1, -1, 1) ** powers[:, None, None])[skip:].sum(0)


# name of a chain -> where its row starts, or a function giving them when the tower is reached.
Seeds = Mapping[str, Tensor | Start] | Callable[[], Mapping[str, Tensor | Start]]


class RelevanceTape(Watcher):
    """Folds relevance for the attention modules of the given towers.

    Open it around the forward pass; then, for every target, `start` it and run backward from the towers' output.

    Args:
        towers: name -> model.
        chains: tower -> name -> what to fold there.
    """

    def __init__(self, towers: Mapping[str, nn.Module], chains: Mapping[str, Mapping[str, Chain]]) -> None:
        self._chains = chains
        self._places = {
            id(module): (tower, layer)
            for tower, model in towers.items()
            for layer, module in enumerate(attention_modules(model))
        }
        self._seeds: dict[str, Seeds] = {}
        self._rows: dict[str, dict[str, Row]] = {}
        self._last: dict[str, int] = {}

    def start(self, **seeds: Seeds) -> None:
        """Begin the relevance of one target.

        Args:
            seeds: tower -> the seed of each of its chains; or a function that gives them when the tower is reached, so
                that the finished rows of one tower can seed the next. A tower without seeds is not folded.
        """
        self._seeds, self._rows, self._last = dict(seeds), {}, {}

    def rows(self, tower: str) -> dict[str, Tensor]:
        """Chain -> w^T R, [B, N] float64: the relevance of each token of the tower; a series' orders are [K, B, N]."""
        return {name: row.result for name, row in self._rows[tower].items()}

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
            seeds = self._seeds[tower]
            found = seeds() if callable(seeds) else seeds
            self._rows[tower] = {name: Row.start(chain, found[name]) for name, chain in self._chains[tower].items()}
        elif layer != self._last[tower] - 1:
            raise RuntimeError(f"layer {layer} of {tower} was folded after layer {self._last[tower]}")
        self._last[tower] = layer
        driven = [(row, row.drive) for row in self._rows[tower].values()]
        moving = [(row, drive) for row, drive in driven if drive is not None]
        products = fold(call, gradient_BHND, [(row.chain.weight, drive) for row, drive in moving])
        for (row, _), product in zip(moving, products, strict=True):
            row.add(product)


@torch.no_grad()
def fold(call: AttentionCall, gradient_BHND: Tensor, drives: list[tuple[Weight, Tensor]]) -> list[Tensor]:
    """A^T r for one attention call and each (kind of matrix, rows r [K, B, N]), in blocks of rows; the same shapes.

    Args:
        gradient_BHND: d scalar / d output of the call, before heads are joined.
    """
    query, (batch, heads, length, _) = call.query, call.query.shape
    groups = heads // call.key.shape[1]
    products = [torch.zeros_like(r) for _, r in drives]
    for b in range(batch if drives else 0):
        # Rows are brought to a size of one, so that no order overflows the precision of the matrices.
        sizes = [r[:, b].abs().amax(-1, keepdim=True) for _, r in drives]
        rows = [r[:, b] / size.clamp_min(torch.finfo(r.dtype).tiny) for (_, r), size in zip(drives, sizes, strict=True)]
        live = torch.cat(rows).ne(0).any(0)
        key, value = (x[b].repeat_interleave(groups, 0) if groups > 1 else x[b] for x in (call.key, call.value))
        for start in range(0, length, BLOCK_ROWS):
            block = slice(start, min(start + BLOCK_ROWS, length))
            if not bool(live[block].any()):  # rows without relevance pass none on
                continue
            p = _probabilities(query[b, :, block], key, call, b, block)
            weighted = None
            if any(weight != "attention" for weight, _ in drives):
                weighted = p * (gradient_BHND[b, :, block] @ value.transpose(-1, -2)).to(p.dtype)
            for weight in dict.fromkeys(weight for weight, _ in drives):
                matrix = _matrix(weight, p, weighted).flatten(0, 1)
                mine = [i for i, (other, _) in enumerate(drives) if other == weight]
                # The mean over heads and the product with every row that wants it, in one pass over the matrix.
                wanted = torch.cat([rows[i][:, block] for i in mine]).to(p.dtype)
                parts = ((wanted / heads).repeat(1, heads) @ matrix).split([len(rows[i]) for i in mine])
                for i, part in zip(mine, parts, strict=True):
                    products[i][:, b] += part * sizes[i]
    return products


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


def _matrix(weight: Weight, p: Tensor, weighted: Tensor | None) -> Tensor:
    if weight == "attention":
        return p
    assert weighted is not None
    if weight == "signed":
        return weighted
    if weight == "absolute":
        return weighted.abs()
    return weighted.clamp_min(0) if weight == "positive" else (-weighted).clamp_min(0)
