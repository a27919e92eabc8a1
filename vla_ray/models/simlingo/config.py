"""What a SimLingo checkpoint is made of, read from the two files that describe it.

`.hydra/config.yaml` (released beside the weights) says how the model was trained: LoRA, crop, thumbnail, heads.
The sizes are not in it: they come from `config.json` of the InternVL2 variant it names, or, where that file is
missing, from the tensor shapes plus constants of InternVL2-1B that no shape reveals.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import InternVLVisionConfig, Qwen2Config

from vla_ray.errors import CheckpointError

logger = logging.getLogger(__name__)

NUM_ROUTE_QUERIES = 20  # route points, about 1 m apart
NUM_SPEED_QUERIES = 10  # ego positions at 0.25 s, 0.50 s ... 2.50 s
HEAD_DIM = 64  # InternViT-300M and Qwen2-0.5B alike; only used when config.json is missing
VARIANT_FILES = (
    "config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True, slots=True)
class SimLingoConfig:
    """Sizes and conventions of one checkpoint. Plain values, so it travels to workers."""

    variant: str  # name in the training config, e.g. OpenGVLab/InternVL2-1B
    variant_dir: str  # local directory with tokenizer and, usually, config.json
    vision: Mapping[str, Any]  # config.json's vision_config
    language: Mapping[str, Any]  # config.json's llm_config
    image_size: int = 448
    downsample_ratio: float = 0.5
    lora_rank: int = 32  # 0: the checkpoint has no LoRA
    lora_alpha: float = 64.0
    speed_dim: int = 2  # 2: positions; 1: distance along the path
    cut_bottom: bool = True  # drop the bottom 4.8/16 of the picture (the bonnet), as in training
    use_thumbnail: bool = False  # append the whole picture as one more tile when there are two
    max_tiles: int = 2

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0

    @property
    def patch_size(self) -> int:
        return int(self.vision["patch_size"])

    @property
    def patch_grid(self) -> int:
        """Patches per side of a tile (32 in the released model)."""
        return self.image_size // self.patch_size

    @property
    def token_grid(self) -> int:
        """Image tokens per side of a tile after the pixel shuffle (16 in the released model)."""
        return int(self.patch_grid * self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return self.token_grid**2

    @property
    def hidden_size(self) -> int:
        return int(self.language["hidden_size"])

    def vision_config(self) -> InternVLVisionConfig:
        """The native configuration. `use_mean_pooling` leaves out the final LayerNorm that InternViT does not have."""
        v = self.vision
        return InternVLVisionConfig(
            hidden_size=v["hidden_size"],
            num_hidden_layers=v["num_hidden_layers"],
            num_attention_heads=v["num_attention_heads"],
            intermediate_size=v["intermediate_size"],
            image_size=[self.image_size] * 2,
            patch_size=[self.patch_size] * 2,
            attention_bias=v.get("qkv_bias", True),
            use_qk_norm=v.get("qk_normalization", False),
            use_mean_pooling=True,
            norm_type=v.get("norm_type", "layer_norm"),
            layer_norm_eps=v.get("layer_norm_eps", 1e-6),
            hidden_act=v.get("hidden_act", "gelu"),
            # InternViT multiplies the branch outputs by these; 1 leaves a model trained from scratch free to learn.
            layer_scale_init_value=v.get("initializer_factor", 1.0),
        )

    def language_config(self) -> Qwen2Config:
        m = self.language
        return Qwen2Config(
            vocab_size=m["vocab_size"],
            hidden_size=m["hidden_size"],
            intermediate_size=m["intermediate_size"],
            num_hidden_layers=m["num_hidden_layers"],
            num_attention_heads=m["num_attention_heads"],
            num_key_value_heads=m["num_key_value_heads"],
            hidden_act=m.get("hidden_act", "silu"),
            rms_norm_eps=m.get("rms_norm_eps", 1e-6),
            max_position_embeddings=m.get("max_position_embeddings", 32768),
            rope_parameters={"rope_type": "default", "rope_theta": float(m.get("rope_theta", 1e6))},
            tie_word_embeddings=bool(m.get("tie_word_embeddings", False)),
        )


def read_config(
    config_path: str | Path,
    variant_dir: str | Path | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> SimLingoConfig:
    """Read `.hydra/config.yaml` and the variant's `config.json`.

    Args:
        config_path: the training configuration released beside the weights.
        variant_dir: directory of the InternVL2 variant (tokenizer and config.json); found or downloaded when None.
        shapes: released tensor name -> shape, used for the sizes when the variant has no config.json.

    Raises:
        CheckpointError: a file is missing, unreadable, or lacks a key.
    """
    path = Path(config_path)
    hydra = _read(path, yaml.safe_load, "training configuration (model.config)")
    try:
        model, data = hydra["model"], hydra.get("data_module") or {}
        variant, lora = str(model["vision_model"]["variant"]), model["language_model"]
        use_lora = bool(lora.get("lora", True))
        rank = int(lora["lora_r"]) if use_lora else 0
        alpha = float(lora["lora_alpha"]) if use_lora else 0.0
        speed_dim = {"2d": 2, "1d": 1}[model.get("speed_wps_mode", "2d")]
        predicts_route = bool(model.get("predict_route_as_wps", True))
        cut_bottom = bool((data.get("base_dataset") or {}).get("cut_bottom_quarter", True))
        use_thumbnail = bool(data.get("use_global_img", False))
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise CheckpointError(
            f"{path} is not a SimLingo training configuration: {type(e).__name__} at {e}. Expected model.vision_model."
            "variant, model.language_model.{lora, lora_r, lora_alpha}; give the .hydra/config.yaml of the checkpoint."
        ) from e
    if not predicts_route:
        raise CheckpointError(
            f"{path}: model.predict_route_as_wps is false, but the model has no other route head. "
            "Give the configuration that was released with the weights."
        )
    directory = find_variant(variant, path, variant_dir)
    config_json = directory / "config.json"
    if config_json.is_file():
        arch = _read(config_json, json.loads, "architecture (config.json of the variant)")
    elif shapes is not None:
        logger.info("%s has no config.json: sizes are taken from the tensor shapes", directory)
        arch = infer_architecture(shapes)
    else:
        raise CheckpointError(
            f"{directory} has no config.json. Give the InternVL2 variant's directory: model.variant_dir=DIR"
        )
    if arch.get("ps_version", "v2") != "v2":
        raise CheckpointError(
            f"{config_json}: ps_version is {arch['ps_version']!r}; only the pixel shuffle v2 is known."
        )
    try:
        return SimLingoConfig(
            variant=variant,
            variant_dir=str(directory),
            vision=dict(arch["vision_config"]),
            language=dict(arch["llm_config"]),
            image_size=int(arch.get("force_image_size") or arch["vision_config"]["image_size"]),
            downsample_ratio=float(arch.get("downsample_ratio", 0.5)),
            lora_rank=rank,
            lora_alpha=alpha,
            speed_dim=speed_dim,
            cut_bottom=cut_bottom,
            use_thumbnail=use_thumbnail,
        )
    except KeyError as e:
        raise CheckpointError(
            f"{config_json} lacks {e}; expected an InternVLChatConfig with vision_config and llm_config."
        ) from e


def find_variant(variant: str, config_path: Path, variant_dir: str | Path | None) -> Path:
    """Where the variant's tokenizer and config are: as given, beside the checkpoint, in the hub cache, or fetched."""
    if variant_dir is not None:
        directory = Path(variant_dir)
        if not directory.is_dir():
            raise CheckpointError(
                f"model.variant_dir={directory} is not a directory. Give the one that holds tokenizer.json."
            )
        return directory
    root = config_path.resolve().parent.parent
    for base in (root / "pretrained", root.parent / "pretrained"):
        directory = base / Path(variant).name
        if directory.is_dir():
            return directory
    from huggingface_hub import snapshot_download  # slow to import, and only needed without a local variant

    try:
        return Path(snapshot_download(variant, allow_patterns=list(VARIANT_FILES)))
    except Exception as e:  # the hub client raises a dozen unrelated classes; all mean "not to be had"
        raise CheckpointError(
            f"tokenizer and config.json of {variant!r} are not beside {config_path}, not in the Hugging Face cache, "
            f"and could not be downloaded ({type(e).__name__}). Fetch that repository and give model.variant_dir=DIR"
        ) from e


def infer_architecture(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """InternVLChatConfig as far as the released tensor shapes tell, with InternVL2-1B's constants for the rest.

    Args:
        shapes: released tensor name -> shape.
    """

    def shape(suffix: str) -> tuple[int, ...]:
        found = [tuple(s) for k, s in shapes.items() if k.endswith(suffix)]
        if not found:
            raise CheckpointError(
                f"cannot infer the architecture: no tensor named *{suffix}. Give model.variant_dir=DIR"
            )
        return found[0]

    def layers(part: str) -> int:
        return 1 + max((int(k.split(part)[1].split(".")[0]) for k in shapes if part in k), default=-1)

    vit, patch = shape("embeddings.patch_embedding.weight")[0], shape("embeddings.patch_embedding.weight")[-1]
    patches = shape("embeddings.position_embedding")[1] - 1
    vocab, hidden = shape("embed_tokens.weight")
    suffix = "base_layer.weight" if any(".lora_A." in k for k in shapes) else "weight"
    size = round(patches**0.5) * patch
    return {
        "force_image_size": size,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "vision_config": {
            "hidden_size": vit,
            "num_hidden_layers": layers("vision_model.encoder.layers."),
            "num_attention_heads": vit // HEAD_DIM,
            "intermediate_size": shape("encoder.layers.0.mlp.fc1.weight")[0],
            "image_size": size,
            "patch_size": patch,
            "qkv_bias": any(k.endswith("attn.qkv.bias") for k in shapes),
        },
        "llm_config": {
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": shape(f"layers.0.mlp.gate_proj.{suffix}")[0],
            "num_hidden_layers": layers("model.layers."),
            "num_attention_heads": hidden // HEAD_DIM,
            "num_key_value_heads": shape(f"layers.0.self_attn.k_proj.{suffix}")[0] // HEAD_DIM,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
        },
    }


def _read(path: Path, parse: Any, what: str) -> dict[str, Any]:
    try:
        content = parse(path.read_text())
    except OSError as e:
        raise CheckpointError(f"cannot read the {what} {path}: {e.strerror or e}. Check the path.") from e
    except (ValueError, yaml.YAMLError) as e:
        raise CheckpointError(f"{path} is not a readable {what}: {str(e).splitlines()[0]}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a {what}: expected a mapping, found {type(content).__name__}.")
    return content
