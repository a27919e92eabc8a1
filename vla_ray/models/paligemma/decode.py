"""Constrained decoding: always exactly 2H action tokens, never anything else.

The prompt is read once; then each step takes the likeliest of the action bins and reads it back with the keys and
values of what came before. Only the rows of the head that are actions are computed, so there is no text to parse and
nothing that can fail. Rows of a batch do not influence each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vla_ray.models.paligemma.inputs import normalise, positions

if TYPE_CHECKING:
    from vla_ray.models.paligemma.policy import ActionPolicy


class Decoded(NamedTuple):
    """Of B prompts, T = 2H tokens each, all [B, T].

    Attributes:
        bins: int64, the likeliest, each given those before it.
        probability: of that bin among all bins, float32.
        entropy: of the distribution over bins, in nats, float32; at most log(num_bins).
        expected: mean bin under that distribution, float32; ActionTokenizer.decode takes it as it takes bins.
    """

    bins: Tensor
    probability: Tensor
    entropy: Tensor
    expected: Tensor


@torch.no_grad()
def decode(policy: ActionPolicy, pixels: Tensor, ids: Tensor, mask: Tensor, types: Tensor) -> Decoded:
    """Greedy actions of a batch of prompts, without suffix.

    Args:
        pixels: uint8 [B, S, S, 3].
        ids, mask, types: int64 [B, L], see Processor.collate; types all 0.
    """
    model: Any = policy.model.model
    place = positions(mask)
    state = model(
        input_ids=ids,
        pixel_values=normalise(pixels),
        attention_mask=mask,
        position_ids=place,
        token_type_ids=types,
        use_cache=True,
    )
    place = place[:, -1:]
    numbers = torch.arange(policy.num_bins, device=ids.device, dtype=torch.float32)
    steps: list[Decoded] = []
    while True:
        log_p = policy.action_logits(state.last_hidden_state[:, -1]).log_softmax(-1)
        p, bins = log_p.exp(), log_p.argmax(-1)
        probability = p.gather(-1, bins[:, None])[:, 0]
        steps.append(Decoded(bins, probability, -(p * log_p).sum(-1), p @ numbers))
        if len(steps) == policy.num_tokens:
            return Decoded(*(torch.stack(column, dim=1) for column in zip(*steps, strict=True)))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        place = place + 1
        state = model(
            input_ids=bins[:, None] + policy.first_action_id,
            attention_mask=mask,
            position_ids=place,
            past_key_values=state.past_key_values,
            use_cache=True,
        )
