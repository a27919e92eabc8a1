"""Recording every attention block's probabilities, so that their gradients can be asked for.

An attention implementation named `vla_ray_record` is registered with transformers. While an `AttentionRecorder` is
open it computes softmax(q k^T) explicitly and keeps the result in the autograd graph; otherwise it is plain SDPA, so
generation stays fast. Gradients are those of the post-softmax probabilities, dP = dO V^T (Chefer et al. 2021), taken
with `torch.autograd.grad`, never accumulated.

Memory grows with heads x length^2 of every block; this is the exact, expensive level of capture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

IMPLEMENTATION = "vla_ray_record"

_open: AttentionRecorder | None = None  # one per process: a replica runs one batch at a time


class AttentionRecorder(AbstractContextManager["AttentionRecorder"]):
    """While open, keeps the probabilities of the given attention modules under `<tower>_block_<i>`.

    Args:
        towers: name -> model; blocks are numbered by their order among the tower's modules, not by call order.

    The towers must run with `set_attn_implementation(IMPLEMENTATION)`. It may be opened again to add blocks that have
    not run yet; what passes while it is closed is not recorded.
    """

    def __init__(self, towers: Mapping[str, nn.Module]) -> None:
        self.probabilities: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        for tower, model in towers.items():
            self._names.update({id(m): f"{tower}_block_{i}" for i, m in enumerate(attention_modules(model))})

    def __enter__(self) -> AttentionRecorder:
        global _open
        if _open is not None:
            raise RuntimeError("another AttentionRecorder is open in this process")
        _open = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _open
        _open = None

    def record(self, module: nn.Module, probabilities_BHQK: Tensor) -> None:
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


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers' attention interface is called with, first layer first."""
    return [
        m
        for m in model.modules()
        if type(m).__name__.endswith("Attention") and hasattr(m, "q_proj") and hasattr(m, "is_causal")
    ]


def record_attention(
    module: nn.Module,
    query_BHQD: Tensor,
    key_BHKD: Tensor,
    value_BHKD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention by transformers' calling convention; keys and values may have fewer heads than queries.

    The mask is boolean, True where a query may attend; None means full or, for a causal module, causal attention.
    Rows that may attend nowhere (left padding) get zero probabilities, as SDPA gives them.
    """
    if _open is None:
        return sdpa_attention_forward(
            module, query_BHQD, key_BHKD, value_BHKD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query_BHQD.shape[1] // key_BHKD.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key_BHKD, value_BHKD))
    scale = query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query_BHQD @ key.transpose(-1, -2)) * scale
    queries, keys = scores.shape[-2:]
    if attention_mask is None and kwargs.get("is_causal", getattr(module, "is_causal", False)) and queries > 1:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    if attention_mask is not None:
        probabilities = probabilities * attention_mask
    _open.record(module, probabilities)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register(IMPLEMENTATION, record_attention)
# Without a mask function of the same name transformers passes no mask at all, and padding would be attended to.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
