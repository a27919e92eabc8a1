"""Recording every attention block's probabilities, so that their gradients can be asked for.

Gradients are those of the post-softmax probabilities, dP = dO V^T (Chefer et al. 2021), taken with
`torch.autograd.grad`, never accumulated. Memory grows with heads x length^2 of every block: this is the exact,
expensive level of capture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vla_ray.attention.watch import AttentionCall, Watcher, attention_modules


class AttentionRecorder(Watcher):
    """While open, keeps the probabilities of the given towers' attention under `<tower>_block_<i>`.

    Args:
        towers: name -> model; blocks are numbered by their order among the tower's modules, not by call order.
    """

    def __init__(self, towers: Mapping[str, nn.Module]) -> None:
        self.probabilities: dict[str, Tensor] = {}
        self._names = {
            id(module): f"{tower}_block_{i}"
            for tower, model in towers.items()
            for i, module in enumerate(attention_modules(model))
        }

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """Attention in the open: softmax(q k^T) as a tensor of the graph.

        Rows that may attend nowhere (left padding) get zero probabilities, as SDPA gives them.
        """
        groups = call.query.shape[1] // call.key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (call.key, call.value))
        scores, mask = (call.query @ key.transpose(-1, -2)) * call.scale, call.mask
        if call.causal:
            queries, keys = scores.shape[-2:]
            mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        if mask is not None:
            p = p * mask
        self._record(module, p)
        return (p @ value).transpose(1, 2).contiguous()

    def _record(self, module: nn.Module, probabilities_BHQK: Tensor) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        if name in self.probabilities:
            raise RuntimeError(f"{name} ran twice while recording; use one recorder per forward pass")
        self.probabilities[name] = probabilities_BHQK

    def gradients(
        self, scalar: Tensor, extra: Sequence[Tensor] = (), keep_graph: bool = False
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """d scalar / d probabilities of every recorded block, and / d each of `extra`.

        Args:
            scalar: 0-dim; the sum over a batch's frames gives every frame its own gradient, as rows never mix.
            keep_graph: True while more scalars of the same forward follow.

        Returns:
            name -> [B,H,Q,K], zero where the scalar does not depend on a block, and the gradients of `extra`.
        """
        inputs = [*self.probabilities.values(), *extra]
        grads = torch.autograd.grad(scalar, inputs, retain_graph=keep_graph, allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
        return dict(zip(self.probabilities, filled, strict=False)), filled[len(self.probabilities) :]
