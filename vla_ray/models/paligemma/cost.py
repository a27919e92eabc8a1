"""What a PaliGemma costs: parameters, memory of a training process, floating-point operations of a step.

Memory in bytes: 16 per trained parameter (float32 weight, its gradient, two moments of AdamW) and 2 for the copy that
bfloat16 autocast keeps through forward and backward; frozen ones their weight alone. Activations come on top.

Operations, per sample, a multiply-add counted as two: forward 2 N per token of a part with N weights, and 4 n^2 d per
layer of attention over n tokens of width d. Backward the same once for the gradients of inputs, where something below
is trained, and once for those of trained weights, which attention has not. So all trained is 6 N per token. The head
is counted on the suffix alone, where it is computed; activations computed again are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

BYTES_TRAINED, BYTES_AUTOCAST = 16, 2

# Dense bfloat16, from the makers' data sheets.
_PEAKS = (
    (r"H100.*(PCIe)", 756e12),
    (r"H100.*(NVL)", 835e12),
    (r"H[12]00", 989e12),
    (r"A100", 312e12),
    (r"\bL4\b", 121e12),
    (r"RTX 4090$", 165e12),
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts by part; the head is tied to the embeddings and counted once."""

    vision: int
    projector: int
    embeddings: int
    language: int

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.embeddings + self.language

    def of(self, parts: Collection[str]) -> int:
        return sum(getattr(self, part) for part in parts)


def released_config() -> PaliGemmaConfig:
    """The architecture of google/paligemma-3b-*-224."""
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        vision_use_head=False,
    )
    text = GemmaConfig(
        vocab_size=257216,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    )
    return PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=257152,
        projection_dim=2048,
        hidden_size=2048,
        vocab_size=257216,
    )


def count_parameters(config: PaliGemmaConfig) -> Parameters:
    """Exact, from a model on the meta device: no memory is taken."""
    with torch.device("meta"):
        inner: Any = PaliGemmaForConditionalGeneration(config).model
    vision, projector, embeddings, both = (
        sum(p.numel() for p in module.parameters())
        for module in (
            inner.vision_tower,
            inner.multi_modal_projector,
            inner.language_model.embed_tokens,
            inner.language_model,
        )
    )
    return Parameters(vision, projector, embeddings, both - embeddings)


def lora_parameters(config: PaliGemmaConfig, rank: int) -> int:
    """rank * (inputs + outputs) of each adapted linear layer."""
    t: Any = config.text_config
    wide, narrow = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    attention = 2 * (t.hidden_size + wide) + 2 * (t.hidden_size + narrow)
    return rank * t.num_hidden_layers * (attention + 3 * (t.hidden_size + t.intermediate_size))


def training_bytes(
    config: PaliGemmaConfig, frozen: Collection[str] = (), lora_rank: int = 0, frozen_bytes: int = 4
) -> int:
    """Weights, gradients and optimiser of one process that holds all of them (DDP); FSDP divides by its workers.

    Args:
        frozen: parts that do not learn; all of them with lora_rank > 0.
        frozen_bytes: of a frozen weight: 4, or 2 where the model is loaded in bfloat16.
    """
    counts = count_parameters(config)
    if lora_rank:
        trained, still = lora_parameters(config, lora_rank), counts.total
    else:
        still = counts.of(frozen)
        trained = counts.total - still
    return trained * (BYTES_TRAINED + BYTES_AUTOCAST) + still * frozen_bytes


def sharded_bytes(config: PaliGemmaConfig, workers: int, frozen: Collection[str] = (), lora_rank: int = 0) -> int:
    """As training_bytes, of one of so many workers under FSDP: all is float32 (a unit has one type) and shared out;
    embeddings and projector, which belong to no layer, stay gathered in bfloat16."""
    counts = count_parameters(config)
    trained = lora_parameters(config, lora_rank) if lora_rank else counts.total - counts.of(frozen)
    still = counts.total if lora_rank else counts.of(frozen)
    return (BYTES_TRAINED * trained + 4 * still) // workers + BYTES_AUTOCAST * (counts.embeddings + counts.projector)


def inference_bytes(config: PaliGemmaConfig, tokens: int, itemsize: int) -> float:
    """Working memory of one sample that is decoded, `tokens` long with its picture: keys and values, and activations
    of one layer at a time."""
    text: Any = config.text_config
    vision: Any = config.vision_config
    heads = text.num_key_value_heads * text.head_dim
    kept = 2 * tokens * text.num_hidden_layers * heads
    layer = tokens * (3 * text.intermediate_size + 6 * text.hidden_size)
    patches = (vision.image_size // vision.patch_size) ** 2
    tower = patches * (2 * vision.intermediate_size + 6 * vision.hidden_size)
    return float(itemsize * (kept + max(layer, tower)))


def flops_per_sample(
    config: PaliGemmaConfig, tokens: int, suffix: int = 17, frozen: Collection[str] = (), lora_rank: int = 0
) -> float:
    """Of forward and backward.

    Args:
        tokens: L, image tokens and suffix included.
        suffix: positions whose logits are computed.
    """
    counts = count_parameters(config)
    v: Any = config.vision_config
    t: Any = config.text_config
    patches = (v.image_size // v.patch_size) ** 2
    trained = {part for part in ("vision", "projector", "embeddings", "language") if part not in frozen}
    adapters = 0
    if lora_rank:
        trained, adapters = {"language"}, lora_parameters(config, lora_rank)
    width = t.num_attention_heads * t.head_dim
    # (part, weights, forward of the linear layers, forward of attention), from the pixels up
    stages = (
        (
            "vision",
            2.0 * (counts.vision - patches * v.hidden_size) * patches,
            4.0 * v.num_hidden_layers * patches**2 * v.hidden_size,
        ),
        ("projector", 2.0 * counts.projector * patches, 0.0),
        ("language", 2.0 * counts.language * tokens, 4.0 * t.num_hidden_layers * tokens**2 * width),
        ("embeddings", 2.0 * counts.embeddings * suffix, 0.0),  # as the head
    )
    # The embeddings' gradients flow through the language model too: they are its input.
    below = False
    total = 6.0 * adapters * tokens
    for part, linear, attention in stages:
        below = below or part in trained or (part == "language" and "embeddings" in trained)
        weights = part in trained and not (lora_rank and part == "language")
        total += linear * (1 + below + weights) + attention * (3 if below else 1)
    return total


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations per second of a GPU by its CUDA name; None if unknown."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, device_name)), None)
