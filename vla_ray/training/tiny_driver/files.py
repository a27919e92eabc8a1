"""The files around the tiny driver's weights, laid out as in the released checkpoint.

    .hydra/config.yaml
    checkpoints/epoch=013.ckpt/pytorch_model.pt
    pretrained/<variant>/{config.json, tokenizer.json, ...}
The embedding table ends before the eight SimLingo tokens, which the processor adds at run time, as in the real model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VARIANT = "InternVL2-tiny-driver"
CONFIG_PATH = Path(".hydra/config.yaml")
CHECKPOINT_PATH = Path("checkpoints/epoch=013.ckpt/pytorch_model.pt")
LORA_RANK, LORA_ALPHA = 2, 4
SPECIAL_TOKENS = (  # InternVL2's, in its order, behind the merges
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HYDRA = """\
model:
  vision_model:
    variant: pretrained/{variant}
    embed_dim: 512
    freeze: false
    _target_: simlingo_training.models.encoder.vlm.VLMEncoderModel
  language_model:
    variant: pretrained/{variant}
    lora: true
    lora_alpha: {alpha}
    lora_r: {rank}
    lora_dropout: 0.1
    _target_: simlingo_training.models.language_model.llm.LLM
  speed_wps_mode: 2d
  predict_route_as_wps: true
  _target_: simlingo_training.models.driving.DrivingModel
data_module:
  base_dataset:
    cut_bottom_quarter: true
    num_route_points: 20
    pred_len: 11
    route_as: target_point_command
  use_global_img: false
  _target_: simlingo_training.dataloader.datamodule.DataModule
"""


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE like Qwen2's, trained on these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def write_variant(root: Path, texts: Iterable[str], dim: int, vit_layers: int, lm_layers: int) -> None:
    """Training configuration, tokenizer and `config.json` under `root`: all that the ordinary loaders read.

    Args:
        texts: what the vocabulary is trained on.
        dim: hidden size of both towers (4 heads each, 2 key-value heads in the language model).
    """
    directory = root / "pretrained" / VARIANT
    directory.mkdir(parents=True, exist_ok=True)
    (root / CONFIG_PATH).parent.mkdir(parents=True, exist_ok=True)
    (root / CONFIG_PATH).write_text(_HYDRA.format(variant=VARIANT, rank=LORA_RANK, alpha=LORA_ALPHA))
    tokenizer = build_tokenizer(texts)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))  # vocab.json, merges.txt
    vocabulary = tokenizer.get_vocab()
    ids = {t: vocabulary[t] for t in SPECIAL_TOKENS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _dump(directory / "added_tokens.json", ids)
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    additional = {"additional_special_tokens": list(SPECIAL_TOKENS[1:])}
    _dump(
        directory / "special_tokens_map.json",
        additional | {key: {"content": token, **flags} for key, token in named.items()},
    )
    _dump(
        directory / "tokenizer_config.json",
        {
            "added_tokens_decoder": {str(i): {"content": t, **flags, "special": True} for t, i in ids.items()},
            **additional,
            **named,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    _dump(directory / "config.json", _architecture(dim, vit_layers, lm_layers, len(vocabulary), ids))


def _architecture(dim: int, vit_layers: int, lm_layers: int, vocab: int, ids: dict[str, int]) -> dict[str, object]:
    """An InternVLChatConfig: two 168 px tiles of 12x12 patches, 36 image tokens a tile."""
    return {
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "force_image_size": 168,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "Hermes-2",
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": dim,
            "intermediate_size": dim * 8 // 3,
            "num_hidden_layers": lm_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocab,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "max_position_embeddings": 2048,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": dim,
            "intermediate_size": 4 * dim,
            "num_hidden_layers": vit_layers,
            "num_attention_heads": 4,
            "image_size": 168,
            "patch_size": 14,
            "num_channels": 3,
            "qkv_bias": True,
            "qk_normalization": False,
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
            "initializer_factor": 1.0,
        },
    }


def _dump(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
