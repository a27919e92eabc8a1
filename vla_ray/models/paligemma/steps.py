"""Reading one action token after the other: with a cache that grows, or with one that keeps its shape.

A step of fixed shape can be compiled once and replayed as a CUDA graph, which takes away the time that launching some
hundred small kernels takes. That pays on GPUs; on a CPU it computes more than it has to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache
from transformers.cache_utils import StaticLayer


class GrowingSteps:
    """For prompts of any number and length."""

    def __init__(self, model: Any) -> None:
        """Args: model: the PaliGemmaModel inside a policy's `model`."""
        self._model = model
        self._cache: Any = None

    def begin(self, cache: Any, mask: Tensor, place: Tensor) -> None:
        """Go on from prompts that were read.

        Args:
            cache: their keys and values, of transformers; it is changed.
            mask: int64 [R, L], 0 on padding.
            place: int64 [R, 1], position of their last token.
        """
        self._cache, self._mask, self._place = cache, mask, place

    def __call__(self, tokens: Tensor) -> Tensor:
        """Hidden states [R, D] of one more token [R, 1] for each."""
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        self._place = self._place + 1
        return _step(self._model, self._cache, tokens, self._mask, self._place)


class FixedSteps:
    """For up to `rows` prompts (each draw counts as one) of up to `length` tokens, in one shape; used again and again.

    Same results, within rounding. One batch at a time: the cache is the object's own.
    """

    def __init__(self, model: Any, rows: int, length: int, num_tokens: int, compiled: bool = False) -> None:
        """Args:
        num_tokens: T, that follow a prompt.
        compiled: by torch.compile, once, when it is first used. For GPUs.
        """
        self._model, self.rows, self._length = model, rows, length
        self._size = length + num_tokens - 1
        # A layer that slides (PaliGemma 2) has a window longer than any prompt, so all may be plain ones.
        self._layers: list[Any] = [StaticLayer(self._size) for _ in range(model.config.text_config.num_hidden_layers)]
        self._cache = Cache(layers=self._layers)
        self._step = torch.compile(_step, mode="reduce-overhead", dynamic=False) if compiled else _step

    def begin(self, cache: Any, mask: Tensor, place: Tensor) -> None:
        """As GrowingSteps.begin. ValueError if the prompts are too many or too long."""
        count, length = mask.shape
        if count > self.rows or length > self._length:
            raise ValueError(f"{count} prompts of {length} tokens; made for {self.rows} of {self._length}")
        for own, read in zip(self._layers, cache.layers, strict=True):
            if not own.is_initialized:
                shape = (self.rows, *read.keys.shape[1:])
                own.lazy_initialization(read.keys[:1].expand(shape), read.values[:1].expand(shape))
            own.keys[:count, :, self._length - length : self._length] = read.keys
            own.values[:count, :, self._length - length : self._length] = read.values
            own.cumulative_length.fill_(self._length)
        rest, more = self.rows - count, self._size - self._length
        self._count = count
        # To the right all that will be written, which is not seen before: steps are causal. Below, rows of nothing.
        self._mask = functional.pad(functional.pad(mask, (self._length - length, 0, 0, rest)), (0, more), value=1)
        self._place = functional.pad(place, (0, 0, 0, rest))

    def __call__(self, tokens: Tensor) -> Tensor:
        """As GrowingSteps."""
        tokens = functional.pad(tokens, (0, 0, 0, self.rows - self._count))
        self._place = self._place + 1
        return self._step(self._model, self._cache, tokens, self._mask, self._place)[: self._count]


def _step(model: Any, cache: Any, tokens: Tensor, mask: Tensor, place: Tensor) -> Tensor:
    state = model(input_ids=tokens, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True)
    return state.last_hidden_state[:, -1]
