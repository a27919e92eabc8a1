"""The one attention implementation that is registered with transformers, under the name `vla_ray`.

While nothing watches it is plain SDPA, so generation stays fast; an open Watcher is asked to attend instead. One is
open per process at a time: a replica runs one batch at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

IMPLEMENTATION = "vla_ray"

_open: Watcher | None = None


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one attention call is given.

    Attributes:
        query: [B, H, Q, D].
        key, value: [B, Hk, K, D], where Hk divides H.
        mask: boolean [B, 1, Q, K], True where a query may attend.
        causal: without a mask, whether a query may attend to no later key.
        scale: of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    def detached(self) -> AttentionCall:
        """The same numbers outside the graph."""
        return replace(self, query=self.query.detach(), key=self.key.detach(), value=self.value.detach())


class Watcher(AbstractContextManager["Watcher"]):
    """Sees every attention call of models with this implementation while it is open.

    It may be opened again for a later forward pass; what passes while it is closed is not seen.
    """

    def __enter__(self) -> Self:
        global _open
        if _open is not None:
            raise RuntimeError(f"another {type(_open).__name__} is open in this process")
        _open = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _open
        _open = None

    @abstractmethod
    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """The output [B, Q, H, D] of one call."""


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers' attention interface is called with, first layer first."""
    return [
        m
        for m in model.modules()
        if type(m).__name__.endswith("Attention") and hasattr(m, "q_proj") and hasattr(m, "is_causal")
    ]


def sdpa(module: nn.Module, call: AttentionCall) -> Tensor:
    """What transformers' own SDPA gives, [B, Q, H, D]."""
    return sdpa_attention_forward(
        module, call.query, call.key, call.value, call.mask, scaling=call.scale, is_causal=call.causal
    )[0]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by transformers' calling convention."""
    if _open is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(kwargs.get("is_causal", getattr(module, "is_causal", False)))
    causal = causal and attention_mask is None and query.shape[2] > 1
    return _open.attend(module, AttentionCall(query, key, value, attention_mask, causal, scale)), None


AttentionInterface.register(IMPLEMENTATION, attention)
# Without a mask function of the same name transformers passes no mask at all, and padding would be attended to.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
