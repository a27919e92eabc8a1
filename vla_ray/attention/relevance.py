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

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vla_ray.attention.watch import AttentionCall, Watcher, attention_modules, sdpa

BLOCK_ROWS = 128  # at most: causal blocks of fewer rows leave more keys out
BLOCK_ELEMENTS = 1 << 20  # of a matrix of all heads: a processor's cache
GPU_BLOCK_ELEMENTS = 1 << 26  # a GPU wants few large kernels; 256 MB for each of two matrices in float32

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

    Attributes:
        bottoms: tower -> output of its first layer's attention. Once its gradient is known all is folded, so backward
            may end there. To be taken out by whoever runs backward: a tape that keeps it keeps the graph, in a cycle.
    """

    def __init__(self, towers: Mapping[str, nn.Module], chains: Mapping[str, Mapping[str, Chain]]) -> None:
        self._chains = chains
        self._places = {
            id(module): (tower, layer)
            for tower, model in towers.items()
            for layer, module in enumerate(attention_modules(model))
        }
        self.bottoms: dict[str, Tensor] = {}
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
            inputs, (tower, layer) = call.detached(), place
            output_BHND.register_hook(lambda gradient: self._fold(tower, layer, inputs, gradient))
            if layer == 0:
                self.bottoms[tower] = output_BHND
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
        if not moving:
            return
        products = fold(call, gradient_BHND, [(row.chain.weight, drive) for row, drive in moving])
        for (row, _), product in zip(moving, products, strict=True):
            row.add(product)


@torch.no_grad()
def fold(call: AttentionCall, gradient_BHND: Tensor, drives: Sequence[tuple[Weight, Tensor]]) -> list[Tensor]:
    """A^T r for one attention call and each (kind of matrix, rows r [K, B, N]), block by block; the same shapes.

    Args:
        gradient_BHND: d scalar / d output of the call, before heads are joined.
    """
    if not drives:
        return []
    groups = {weight: [i for i, (other, _) in enumerate(drives) if other == weight] for weight, _ in drives}
    order = [i for mine in groups.values() for i in mine]
    stacked_MBN = torch.cat([drives[i][1] for i in order])
    # Rows are brought to a size of one, so that no order overflows the precision of the matrices.
    sizes = stacked_MBN.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(stacked_MBN.dtype).tiny)
    precision = torch.promote_types(call.query.dtype, torch.float32)
    rows_BMN = (stacked_MBN / sizes).to(precision).transpose(0, 1)
    found_BMN = torch.zeros_like(rows_BMN)
    live_BN = rows_BMN.ne(0).any(1).cpu()
    counts = [sum(len(drives[i][1]) for i in mine) for mine in groups.values()]
    rows, found = (dict(zip(groups, x.split(counts, 1), strict=True)) for x in (rows_BMN, found_BMN))
    blocks = _Blocks(call, gradient_BHND, precision)
    for samples, block in blocks:
        if not live_BN[samples, block].any():  # rows without relevance pass none on
            continue
        for weight, matrix_BQK in blocks.matrices(samples, block, groups).items():
            product = rows[weight][samples, :, block] @ matrix_BQK
            found[weight][samples, :, : product.shape[-1]] += product
    products = (found_BMN.transpose(0, 1) * sizes).split([len(drives[i][1]) for i in order])
    return [product for _, product in sorted(zip(order, products, strict=True), key=lambda pair: pair[0])]


class _Blocks:
    """An attention call, recomputed a block of rows at a time.

    Blocks are small enough for a processor's cache, and for peak memory not to notice. All of them use the same room:
    fresh memory costs as much as what is done in it.
    """

    def __init__(self, call: AttentionCall, gradient_BHND: Tensor, precision: torch.dtype) -> None:
        self._call, self._gradient = call, gradient_BHND
        # Read once per block, so in the order in which they are read.
        self._key, self._value = call.key.contiguous(), call.value.contiguous()
        self._batch, heads, self._length, _ = call.query.shape
        elements = BLOCK_ELEMENTS if call.query.device.type == "cpu" else GPU_BLOCK_ELEMENTS
        self._rows = min(self._length, BLOCK_ROWS, max(1, elements // (heads * self._length)))
        row_of_blocks = heads * self._rows * self._length
        self._samples = min(self._batch, max(1, elements // row_of_blocks))
        self._room = torch.empty(2, self._samples * row_of_blocks, dtype=precision, device=call.query.device)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Samples and rows of each block."""
        for b in range(0, self._batch, self._samples):
            for start in range(0, self._length, self._rows):
                yield slice(b, min(b + self._samples, self._batch)), slice(start, min(start + self._rows, self._length))

    def matrices(self, samples: slice, block: slice, weights: Collection[Weight]) -> dict[Weight, Tensor]:
        """Weight -> its matrix [B, Q, K], the mean over heads; K ends with the last key that may be attended to."""
        p = self._probabilities(samples, block)
        found: dict[Weight, Tensor] = {}
        if "attention" in weights:
            found["attention"] = p.mean(1)
        others = [weight for weight in weights if weight != "attention"]
        if not others:
            return found
        dp = self._by_heads(self._gradient[samples, :, block], self._value[samples, :, : p.shape[-1]], 1.0, 0)
        weighted = dp.mul_(p)
        # Every pass over the matrix of all heads counts. Two means give all four: w = w+ - w-, |w| = w+ + w-.
        signed = weighted.mean(1) if others != ["positive"] else None
        positive = weighted.clamp_min_(0).mean(1) if others != ["signed"] else None
        for weight in others:
            found[weight] = _combined(weight, signed, positive)
        return found

    def _probabilities(self, samples: slice, block: slice) -> Tensor:
        call = self._call
        keys = slice(0, block.stop if call.causal else None)
        scores = self._by_heads(call.query[samples, :, block], self._key[samples, :, keys], call.scale, 0)
        allowed = None
        if call.causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu_(block.start + 1)
            scores.masked_fill_(later, -torch.inf)
        elif call.mask is not None:
            allowed = call.mask[samples, :, block]
            scores.masked_fill_(~allowed, torch.finfo(scores.dtype).min)
        p = torch.softmax(scores, -1, out=self._view(1, scores.shape))
        # A row that may attend nowhere (left padding) gets zeros, as SDPA gives it.
        return p if allowed is None else p.mul_(allowed)

    def _by_heads(self, x_BHQD: Tensor, y_BHKD: Tensor, scale: float, room: int) -> Tensor:
        """scale * x y^T; y may have fewer heads, each of them shared by neighbours of x."""
        batch, shared, keys, _ = y_BHKD.shape
        x, y = x_BHQD.reshape(batch * shared, -1, x_BHQD.shape[-1]), y_BHKD.flatten(0, 1).transpose(1, 2)
        out = self._view(room, (*x_BHQD.shape[:3], keys))
        flat, nothing = out.view(len(x), -1, keys), x.new_empty(())
        # The factor rides along with the product: no pass over the matrix.
        if x.dtype == out.dtype:
            torch.baddbmm(nothing, x, y, beta=0, alpha=scale, out=flat)
        else:
            flat.copy_(torch.baddbmm(nothing, x, y, beta=0, alpha=scale))
        return out

    def _view(self, room: int, shape: Sequence[int]) -> Tensor:
        return self._room[room, : math.prod(shape)].view(shape)


def _combined(weight: Weight, signed: Tensor | None, positive: Tensor | None) -> Tensor:
    """A matrix from w = mean of P * dP and w+ = mean of P * relu(dP), of which it asks for no more than it needs."""
    if weight == "signed":
        assert signed is not None
        return signed
    assert positive is not None
    if weight == "positive":
        return positive
    assert signed is not None
    negative = (positive - signed).clamp_min_(0)  # rounding may leave less than nothing
    return negative if weight == "negative" else positive + negative
