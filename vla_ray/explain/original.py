"""The original scripts' vision maps under their own names, `original_*`, so that older pictures can be compared.

Definitions are those of the TML_UDD scripts, vision tower only, with two repairs without which there is nothing to
compare: every tile gets its own map (they show only the last picture of the batch, which is the thumbnail if there is
one and otherwise the right half of the road, stretched over the whole frame), and no map is stretched to 0..1.

What makes them poor defaults, and why ours differ:
* All output patches count alike (the sum over the rows of R), so what the language model chose to look at is lost;
  ours starts from the queries the scalar reads and crosses the projector.
* Their language map reads the row of the last token. It is a speed query, on which, by the causal mask, no route
  scalar depends: its gradient and so its map are exactly zero. It is not offered here.
* An older two-stage version averages all tiles' attention into one matrix, multiplies on the wrong side, and turns the
  language model's choice into one number. Not offered either: it is not one definition but several.
* Their scalars take heading differences without wrapping them to (-pi, pi], so a U-turn explodes; ours wrap.
* "flow" is no maximum flow (Abnar & Zuidema 2020) but a product of attentions without the residual stream.

Each takes the blocks of a `full` payload, first layer first: probabilities [T, heads, N, N], where N = 1 + G * G and
token 0 is CLS, and gives [T, G, G] float32: w^T R for w = 1 on every patch and 0 on CLS. Only that row is carried
through the blocks, last layer first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def original_raw(attention: Sequence[Tensor]) -> Tensor:
    """R = mean over heads of the last block's attention."""
    return _map(attention[-1:], lambda row, i: _through(row, attention[-1].float().mean(1)))


def original_rollout(attention: Sequence[Tensor]) -> Tensor:
    """R = product of (mean over heads of A + I), each with its rows divided by their sums."""

    def step(row: Tensor, i: int) -> Tensor:
        mean_TNN = attention[i].float().mean(1)
        share = row / (mean_TNN.sum(-1) + 1)
        return _through(share, mean_TNN) + share

    return _map(attention, step)


def original_flow(attention: Sequence[Tensor]) -> Tensor:
    """R = product of the means over heads of A, without residual."""
    return _map(attention, lambda row, i: _through(row, attention[i].float().mean(1)))


def original_generic(attention: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """R = product of (I + mean over heads of relu(A * dA)), raw gradients (Chefer et al. 2021, rule 6).

    Gradients are not freed from the unit of the scalar, so the map depends on it; that, too, is the original.

    Args:
        gradients: d scalar / d probabilities, shaped as they are.
    """
    if len(attention) != len(gradients):
        raise ValueError(f"{len(attention)} blocks of attention, {len(gradients)} of gradients")

    def step(row: Tensor, i: int) -> Tensor:
        return row + _through(row, (attention[i].float() * gradients[i].float()).clamp_min(0).mean(1))

    return _map(attention, step)


@torch.no_grad()
def _map(attention: Sequence[Tensor], step: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Carry the row through the blocks, last first, and drop CLS."""
    tiles, _, tokens, _ = attention[0].shape
    row = torch.ones(tiles, tokens, device=attention[0].device)
    row[:, 0] = 0
    for i in reversed(range(len(attention))):
        row = step(row, i)
    side = math.isqrt(tokens - 1)
    return row[:, 1:].unflatten(1, (side, side))


def _through(row_TN: Tensor, matrix_TNN: Tensor) -> Tensor:
    return torch.einsum("ti,tij->tj", row_TN, matrix_TNN)
