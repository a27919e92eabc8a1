"""A PaliGemma small enough for a laptop's CPU, made offline: random weights, the same classes, the same files.

Its vocabulary is learnt from a few navigation instructions (byte fallback takes the rest), so that everything that
reads the released model's directory reads this one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    GemmaTokenizer,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vla_ray.models.paligemma.pretrained import quiet

CORPUS = (
    "go forward",
    "stop",
    "wait here",
    "turn left",
    "turn right",
    "adjust left",
    "adjust right",
    "keep moving straight ahead",
    "follow the corridor to the end wall",
    "move along the wall on the left",
    "move to the red door on the right",
    "go through the green door",
    "turn right at the blue door",
    "turn left into the side corridor",
    "pass the person on the right, then go on",
    "move past the yellow chair",
    "navigate to the next door",
)
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # ids 0 .. 4, as Gemma's
_LETTERS = "\u2581\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'-"


def build_tiny(
    directory: str | Path,
    *,
    image_size: int = 56,
    patch_size: int = 14,
    vision_dim: int = 64,
    vision_layers: int = 2,
    dim: int = 64,
    layers: int = 2,
    heads: int = 4,
    corpus: Iterable[str] = CORPUS,
    vocab_size: int = 512,
    seed: int = 0,
) -> Path:
    """Write model and processor with `save_pretrained`; the same arguments give the same files.

    Args:
        image_size: pixels, a multiple of `patch_size`; (image_size / patch_size)^2 image tokens.
        vision_dim, vision_layers: of SigLIP.
        dim, layers, heads: of Gemma; heads divide both widths. One key-value head, as in the released model.
        corpus: instructions that the vocabulary is learnt from.
        vocab_size: of text; <image>, <loc> and <seg> come on top.
    """
    directory = Path(directory)
    processor = PaliGemmaProcessor(
        SiglipImageProcessorPil(
            size={"height": image_size, "width": image_size}, image_seq_length=(image_size // patch_size) ** 2
        ),
        _tokenizer(corpus, vocab_size),
    )
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    vision = SiglipVisionConfig(
        hidden_size=vision_dim,
        intermediate_size=2 * vision_dim,
        num_hidden_layers=vision_layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )
    text = GemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=dim // heads,
        max_position_embeddings=1024,
        **special,
    )
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        projection_dim=dim,
        hidden_size=dim,
        vocab_size=len(tokenizer),
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PaliGemmaForConditionalGeneration(config)
    with quiet():
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
    return directory


def _tokenizer(corpus: Iterable[str], vocab_size: int) -> GemmaTokenizer:
    """A Gemma tokenizer with byte-pair merges learnt from `corpus`."""
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    # Words are learnt apart, or a small corpus would make whole instructions tokens.
    learner.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")
    learner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=list(_LETTERS),
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    return GemmaTokenizer(vocab=learnt["vocab"], merges=merges)
