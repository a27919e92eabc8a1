"""Constrained decoding: always exactly 2H action tokens, never anything else.

The prompt is read once; then each step takes the likeliest of the action bins and reads it back with the keys and
values of what came before. A policy that was trained for it gives all tokens in that first pass, at placeholders. Only
the rows of the head that are actions are computed, so there is no text to parse and nothing that can fail. Rows of a
batch do not influence each other.

Shapes: B prompts, L tokens, T = 2H action tokens, K bins, N draws, S pixels a side, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vla_ray.models.paligemma.actions import PARALLEL
from vla_ray.models.paligemma.inputs import normalise, positions, with_placeholders
from vla_ray.models.paligemma.steps import GrowingSteps

if TYPE_CHECKING:
    from vla_ray.models.paligemma.policy import ActionPolicy


class Steps(Protocol):
    """How tokens after the prompt are read; see steps.py."""

    def begin(self, cache: Any, mask: Tensor, place: Tensor) -> None: ...
    def __call__(self, tokens: Tensor) -> Tensor: ...


class Decoded(NamedTuple):
    """Of B prompts, T = 2H tokens each, all [B, T] but `samples`.

    Attributes:
        bins: int64, the likeliest, each given those before it, or in parallel each by itself.
        probability: of that bin among all bins, float32.
        entropy: of the distribution over bins, in nats, float32; at most log(num_bins).
        expected: mean bin under that distribution, float32; ActionTokenizer.decode takes it as it takes bins.
        samples: int64 [B, N, T], bins that were drawn; None if none were asked for.
    """

    bins: Tensor
    probability: Tensor
    entropy: Tensor
    expected: Tensor
    samples: Tensor | None = None


@torch.no_grad()
def decode(
    policy: ActionPolicy,
    pixels: Tensor,
    ids: Tensor,
    mask: Tensor,
    types: Tensor,
    noise: Tensor | None = None,
    temperature: float = 1.0,
    steps: Steps | None = None,
) -> Decoded:
    """Greedy actions of a batch of prompts, without suffix; and N drawn ones, where there is noise.

    Args:
        pixels: uint8 [B, S, S, 3].
        ids, mask, types: int64 [B, L], see Processor.collate; types all 0.
        noise: float32 [B, N, T, K], see `gumbel_noise`. The largest of logit / temperature + noise is a draw from the
            softmax (the Gumbel-max trick), so that noise alone decides, whatever else is in the batch.
        temperature: positive; of draws, not of what else is returned.
        steps: None: GrowingSteps. Without use for a policy that decodes in parallel.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature:g} must be positive; without noise actions are the likeliest")
    if policy.decoding == PARALLEL:
        ids, mask, types = with_placeholders(ids, mask, types, *policy.placeholders)
        logits_BTK = policy.action_logits(policy.hidden(pixels, ids, mask, types)[:, -policy.num_tokens :])
        samples = None if noise is None else (logits_BTK[:, None] / temperature + noise).argmax(-1)
        return _decoded(logits_BTK, samples)
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
    hidden_D, place, cache = state.last_hidden_state[:, -1], place[:, -1:], state.past_key_values
    count = len(ids)
    if noise is not None:  # beside each greedy row its draws, which all go on from the one prompt that was read
        rows = 1 + noise.shape[1]
        cache.batch_repeat_interleave(rows)
        hidden_D, mask, place = (x.repeat_interleave(rows, dim=0) for x in (hidden_D, mask, place))
    if steps is None:
        steps = GrowingSteps(model)
    steps.begin(cache, mask, place)
    greedy: list[Tensor] = []
    drawn: list[Tensor] = []
    while True:
        logits_BRK = policy.action_logits(hidden_D).unflatten(0, (count, -1))
        greedy.append(logits_BRK[:, 0])
        bins_BR = logits_BRK[:, :1].argmax(-1)
        if noise is not None:
            drawn.append((logits_BRK[:, 1:] / temperature + noise[:, :, len(drawn)]).argmax(-1))
            bins_BR = torch.cat([bins_BR, drawn[-1]], dim=1)
        if len(greedy) == policy.num_tokens:
            return _decoded(torch.stack(greedy, dim=1), torch.stack(drawn, dim=-1) if drawn else None)
        hidden_D = steps(bins_BR.flatten()[:, None] + policy.first_action_id)


def _decoded(logits_BTK: Tensor, samples: Tensor | None) -> Decoded:
    log_p = logits_BTK.log_softmax(-1)
    p, bins = log_p.exp(), logits_BTK.argmax(-1)  # as read back: rounding may make ties in log_p
    numbers = torch.arange(p.shape[-1], device=p.device, dtype=torch.float32)
    probability = p.gather(-1, bins[..., None])[..., 0]
    return Decoded(bins, probability, -(p * log_p).sum(-1), p @ numbers, samples)
