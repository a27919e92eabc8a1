"""PaliGemma as an action policy: a picture and an instruction in, the loss of the right action tokens out.

The prompt (picture, instruction) sees itself in both directions, action tokens see only what came before: transformers
builds that mask from `token_type_ids`, and without them silently lets actions see their own future. So every call has
them. Positions come from the mask, so that padding never changes a result. Loss and logits exist on the suffix
alone: over a vocabulary of 257,216 anything else is gigabytes.

Decoding in parallel (OpenVLA-OFT, arXiv 2502.19645), T placeholders follow the prompt and belong to it: all see each
other, and the i-th gives the i-th action token. Batches are the same; the actions that they end in are then never read.

Shapes: B samples, L tokens, T = 2H action tokens, S pixels a side, D width, K bins, V vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PaliGemmaForConditionalGeneration

from vla_ray.errors import CheckpointError, ConfigError, nearest
from vla_ray.models.paligemma import lora
from vla_ray.models.paligemma.actions import AUTOREGRESSIVE, DECODINGS, PARALLEL, ActionTokenizer
from vla_ray.models.paligemma.decode import Decoded, Steps, decode
from vla_ray.models.paligemma.inputs import normalise, positions, with_placeholders
from vla_ray.models.paligemma.pretrained import load_model, quiet
from vla_ray.models.paligemma.processing import PLACEHOLDERS, PROCESSOR_FILES, Processor
from vla_ray.models.paligemma.tokenizer_file import NAME, load_decoding
from vla_ray.storage.files import Location

PARTS = ("vision", "projector", "embeddings", "language")
LOSSES = ("vocabulary", "actions")


class PolicyOutput(NamedTuple):
    """Of one batch.

    Attributes:
        loss: mean cross entropy in nats: over T actions and EOS; for loss_over=actions, and where actions are decoded
            in parallel, over the T actions.
        correct: how many action tokens are the likeliest of their K, given the right ones before them.
        tokens: how many action tokens there are, B * T.
    """

    loss: Tensor
    correct: Tensor
    tokens: int


class ActionPolicy(nn.Module):
    """Wraps the model without changing it; `model` stays what transformers saves and loads."""

    def __init__(
        self,
        model: PaliGemmaForConditionalGeneration,
        first_action_id: int,
        num_bins: int,
        num_tokens: int,
        loss_over: str = "vocabulary",
        placeholder_id: int | None = None,
    ) -> None:
        """Args:
        first_action_id: token of bin 0.
        num_bins: K.
        num_tokens: T.
        loss_over: vocabulary | actions; the latter spends no probability on tokens that are never decoded.
        placeholder_id: token of the first placeholder, for a policy that decodes in parallel.
        """
        super().__init__()
        if loss_over not in LOSSES:
            raise ConfigError(f"training.loss_over={loss_over!r} is unknown; known: {', '.join(LOSSES)}.")
        if placeholder_id is not None and num_tokens > PLACEHOLDERS:
            raise ConfigError(
                f"training.decoding=parallel has placeholders for {PLACEHOLDERS // 2} steps; action.num_steps is "
                f"{num_tokens // 2}. Use training.decoding=autoregressive."
            )
        self.model = model
        self.first_action_id, self.num_bins, self.num_tokens = first_action_id, num_bins, num_tokens
        self.loss_over, self.placeholder_id = loss_over, placeholder_id
        self.directory: Path | None = None  # where the processor's files are

    @staticmethod
    def from_pretrained(
        name: str | Path,
        tokenizer: ActionTokenizer,
        *,
        dtype: torch.dtype = torch.float32,
        loss_over: str = "vocabulary",
        attention: str = "sdpa",
        base: str | None = None,
        cache_dir: str | Path | None = None,
        decoding: str | None = None,
    ) -> ActionPolicy:
        """A policy of a directory (full, merged or adapters) or of a name on the hub; see `load_model`.

        Args:
            decoding: autoregressive | parallel; None: what its tokenizers.pt says that it was trained for, or
                autoregressive where there is none.

        Raises:
            CheckpointError: not found, gated, offline, not a PaliGemma, incomplete, or with another image size.
            ConfigError: attention, loss_over or decoding unknown, or more tokens than there are placeholders.
        """
        model, directory = load_model(str(name), dtype=dtype, attention=attention, base=base, cache_dir=cache_dir)
        processor = Processor.from_directory(directory)
        vision, text = _configs(model)
        if processor.image_size != vision.image_size:
            raise CheckpointError(
                f"{directory} makes pictures of {processor.image_size} pixels, its model takes {vision.image_size}. "
                "Use the processor that belongs to the model."
            )
        rows, ids = text.vocab_size, processor.ids
        if (
            max(ids.eos, ids.first_action + tokenizer.num_bins, ids.placeholder + PLACEHOLDERS) > rows
            or ids.image != model.config.image_token_id
        ):
            raise CheckpointError(
                f"the tokenizer in {directory} does not fit the model: <image> is {ids.image} there and "
                f"{model.config.image_token_id} in config.json, <loc0000> is {ids.first_action} of {rows} rows."
            )
        file = Location.of(directory) / NAME
        if decoding is None:
            decoding = load_decoding(file) if file.exists() else AUTOREGRESSIVE
        if decoding not in DECODINGS:
            raise ConfigError(f"training.decoding={decoding!r} is unknown; known: {', '.join(DECODINGS)}.")
        placeholder = ids.placeholder if decoding == PARALLEL else None
        policy = ActionPolicy(model, ids.first_action, tokenizer.num_bins, tokenizer.num_tokens, loss_over, placeholder)
        policy.directory = directory
        return policy

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor, types: Tensor) -> PolicyOutput:
        """Loss of a batch that ends in T action tokens and EOS: teacher-forced, or of what placeholders give.

        Args:
            pixels: uint8 [B, S, S, 3].
            ids, mask, types: int64 [B, L], see Processor.collate.
        """
        count, width = len(ids), self.num_tokens
        labels = ids[:, -width - 1 :]
        if self.decoding == PARALLEL:
            cut = slice(None, -width - 1)
            asked = with_placeholders(ids[:, cut], mask[:, cut], types[:, cut], *self.placeholders)
            suffix_BTD = self.hidden(pixels, *asked)[:, -width:]
            labels = labels[:, :-1]
        else:
            # Each predicts the token after it: T actions, then EOS.
            suffix_BTD = self.hidden(pixels, ids, mask, types)[:, -width - 2 : -1]
        bins = labels[:, :width] - self.first_action_id
        if self.loss_over == "actions":
            actions_BTK = self.action_logits(suffix_BTD[:, :width])
            loss = functional.cross_entropy(actions_BTK.flatten(0, 1), bins.flatten())
        else:
            logits_BTV = self._softcap(self.model.lm_head(suffix_BTD).float())
            loss = functional.cross_entropy(logits_BTV.flatten(0, 1), labels.flatten())
            actions_BTK = logits_BTV[:, :width, self.first_action_id : self.first_action_id + self.num_bins]
        correct = (actions_BTK.detach().argmax(-1) == bins).sum()
        return PolicyOutput(loss, correct, count * width)

    @property
    def decoding(self) -> str:
        """How actions are given: autoregressive | parallel."""
        return AUTOREGRESSIVE if self.placeholder_id is None else PARALLEL

    @property
    def placeholders(self) -> tuple[int, int]:
        """The first one's token, and how many follow a prompt: T. Of a policy that decodes in parallel."""
        assert self.placeholder_id is not None
        return self.placeholder_id, self.num_tokens

    def hidden(self, pixels: Tensor, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """Last hidden states [B, L, D]."""
        return self.model.model(
            input_ids=ids,
            pixel_values=normalise(pixels),
            attention_mask=mask,
            position_ids=positions(mask),
            token_type_ids=types,
            use_cache=False,
        ).last_hidden_state

    def action_logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., K] of hidden states [..., D], from the K rows of the head that are actions."""
        rows = self.model.lm_head.weight[self.first_action_id : self.first_action_id + self.num_bins]
        return self._softcap(functional.linear(hidden, rows).float())

    def decode(
        self,
        pixels: Tensor,
        ids: Tensor,
        mask: Tensor,
        types: Tensor,
        noise: Tensor | None = None,
        temperature: float = 1.0,
        steps: Steps | None = None,
    ) -> Decoded:
        """Likeliest actions of prompts, and drawn ones; see `decode`. A method, so that FSDP can gather weights."""
        return decode(self, pixels, ids, mask, types, noise, temperature, steps)

    def freeze(self, parts: Sequence[str]) -> None:
        """These parts learn nothing, of vision, projector, embeddings (with the head that is tied to them), language.

        Raises:
            ConfigError: an unknown part, or all of them.
        """
        for part in parts:
            if part not in PARTS:
                raise ConfigError(
                    f"training.freeze: {part!r} is unknown; known: {', '.join(PARTS)}.{nearest(part, PARTS)}"
                )
            for module in self.parts()[part]:
                module.requires_grad_(False)
        if not any(p.requires_grad for p in self.parameters()):
            raise ConfigError(f"training.freeze=[{','.join(parts)}] leaves nothing to train. Leave a part out.")

    def parts(self) -> dict[str, tuple[nn.Module, ...]]:
        """Modules by part; together, all parameters."""
        inner = self.model.model
        text = inner.language_model
        return {
            "vision": (inner.vision_tower,),
            "projector": (inner.multi_modal_projector,),
            "embeddings": (text.embed_tokens, self.model.lm_head),
            "language": (text.layers, text.norm),
        }

    def layers(self) -> list[nn.Module]:
        """The transformer layers of both towers: the units in which FSDP gathers weights."""
        inner = self.model.model
        return [*inner.vision_tower.encoder.layers, *inner.language_model.layers]

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them: a third more work, less memory."""
        self.model.activation_checkpointing_enable()

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write what `from_pretrained` of transformers and of this class read: adapters, if there are any, else all.

        Args:
            directory: exists; not atomic.
            weights: by this module's parameter names, as a full state dict of FSDP gives them; None: its own.
        """
        state = None
        if weights is not None:
            state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
            if self.model.config.tie_word_embeddings:
                state.pop("lm_head.weight", None)
        with quiet():
            self.model.save_pretrained(directory, state_dict=state)
        self.save_processor(directory)

    def save_processor(self, directory: Path) -> None:
        """Copy the processor's files from where the policy was loaded."""
        if self.directory is None:
            raise ValueError("only a policy made by from_pretrained knows its processor")
        for name in PROCESSOR_FILES:
            if (source := self.directory / name).is_file() and self.directory != directory:
                shutil.copyfile(source, directory / name)

    def save_merged(self, directory: Path) -> None:
        """As `save`, with adapters folded into the weights. Takes memory for a second model."""
        with quiet():
            lora.merged(self.model).save_pretrained(directory)
        self.save_processor(directory)

    def _softcap(self, logits: Tensor) -> Tensor:
        """Gemma 2 bounds its logits (PaliGemma 2); Gemma does not."""
        cap = getattr(_configs(self.model)[1], "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _configs(model: PaliGemmaForConditionalGeneration) -> tuple[Any, Any]:
    """Of the vision tower and of the language model."""
    return model.config.vision_config, model.config.text_config
