"""A policy's forward pass in pieces, so that a graph may begin at the pixels or after the patch embedding.

The same numbers as `ActionPolicy.hidden`, mask and positions included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vla_ray.models.paligemma.actions import PARALLEL
from vla_ray.models.paligemma.inputs import positions, with_placeholders
from vla_ray.models.paligemma.policy import ActionPolicy


def embed_patches(policy: ActionPolicy, pixels_B3SS: Tensor) -> Tensor:
    """Patch embeddings [B, N, C] of normalised pixels: below them there is no attention. SigLIP has no CLS token."""
    return policy.model.model.vision_tower.embeddings(pixels_B3SS)


def encode_patches(policy: ActionPolicy, patches_BNC: Tensor) -> Tensor:
    """Image tokens [B, N, D] of embedded patches, one for each."""
    inner = policy.model.model
    tower = inner.vision_tower
    encoded = tower.encoder(inputs_embeds=patches_BNC).last_hidden_state
    return inner.multi_modal_projector(tower.post_layernorm(encoded))


def hidden_states(policy: ActionPolicy, tokens_BND: Tensor, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
    """Last hidden states [B, L, D], normalised, as the head reads them; see ActionPolicy.forward."""
    return policy.model.model(
        input_ids=ids,
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=tokens_BND)},
        attention_mask=mask,
        position_ids=positions(mask),
        token_type_ids=types,
        use_cache=False,
    ).last_hidden_state


class Asked(NamedTuple):
    """Prompts with what follows them, int64 [B, L] each; position `first` gives the first action token, its right
    neighbours those after it."""

    ids: Tensor
    mask: Tensor
    types: Tensor
    first: int


def with_actions(policy: ActionPolicy, ids: Tensor, mask: Tensor, types: Tensor, bins: Tensor) -> Asked:
    """Prompts [B, P] followed by chosen actions [B, 2H], each predicted one position before it is read; or by
    placeholders, where the policy decodes in parallel and reads no action."""
    if policy.decoding == PARALLEL:
        return Asked(*with_placeholders(ids, mask, types, *policy.placeholders), ids.shape[1])
    ones, actions = torch.ones_like(bins), bins + policy.first_action_id
    ids, mask, types = (torch.cat(pair, dim=1) for pair in ((ids, actions), (mask, ones), (types, ones)))
    return Asked(ids, mask, types, ids.shape[1] - bins.shape[1] - 1)
