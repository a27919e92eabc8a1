"""Low-rank adapters (Hu et al. 2021) of the language model's linear layers, by peft.

Nothing else learns: SigLIP has layers of the same names, which must not be hit. Adapters are saved with the name of the
model they belong to, or folded into its weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PaliGemmaForConditionalGeneration

from vla_ray.errors import CheckpointError, ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = rf".*language_model.*\.({'|'.join(LINEARS)})"


def add_adapters(
    model: PaliGemmaForConditionalGeneration, rank: int = 16, alpha: int = 32, dropout: float = 0.0
) -> None:
    """Add float32 adapters in place, scaled by alpha / rank; all other weights are frozen.

    They start as no change at all. Their random half comes from torch's global generator: seed it first.
    """
    _attach(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS))


def load_adapters(model: PaliGemmaForConditionalGeneration, directory: Path) -> None:
    """Add saved adapters in place, to be used or trained on, bit for bit as they were saved.

    (transformers' own `load_adapter` rounds them to the model's type, so a resumed run would not be the same.)

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    try:
        config = PeftConfig.from_pretrained(str(directory))
        saved = load_file(directory / WEIGHTS)
        _attach(model, config)
    except Exception as e:  # peft and safetensors raise a dozen kinds for damaged files and other architectures
        reason = " ".join(str(e).split())[:200]
        raise CheckpointError(f"the adapters in {directory} cannot be loaded ({type(e).__name__}: {reason}).") from e
    own = {_saved_name(name): parameter for name, parameter in model.named_parameters() if "lora_" in name}
    wrong = sorted(own.keys() ^ saved.keys()) or [n for n, p in own.items() if p.shape != saved[n].shape]
    if wrong:
        raise CheckpointError(
            f"the adapters in {directory} belong to another model or are incomplete: {len(wrong)} missing, unexpected "
            f"or misshapen tensors, such as {wrong[0]}. Give their own base, or restore the files."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def has_adapters(model: PaliGemmaForConditionalGeneration) -> bool:
    return any(isinstance(module, LoraLayer) for module in model.modules())


def check_rank(model: PaliGemmaForConditionalGeneration, rank: int) -> None:
    """ConfigError if the model's adapters have another rank."""
    configs: dict[str, Any] = model.peft_config
    found = {config.r for config in configs.values()}
    if found != {rank}:
        raise ConfigError(
            f"lora.rank={rank}, but the adapters to start from have rank {min(found)}. Set lora.rank={min(found)}."
        )


def merged(model: PaliGemmaForConditionalGeneration) -> PaliGemmaForConditionalGeneration:
    """A copy without adapters, their product added to the weights they adapt. `model` stays as it is."""
    if not has_adapters(model):
        return model
    with torch.no_grad():
        plain = copy.deepcopy(model)
        for name, module in [*plain.named_modules()]:
            if isinstance(module, LoraLayer):
                module.merge()
                parent, _, child = name.rpartition(".")
                setattr(plain.get_submodule(parent), child, module.get_base_layer())
    plain._hf_peft_config_loaded = False  # transformers' own mark: it would save adapters
    del plain.peft_config
    return plain


def _attach(model: PaliGemmaForConditionalGeneration, config: PeftConfig) -> None:
    model.requires_grad_(False)
    model.add_adapter(config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # small updates vanish in bfloat16
            parameter.requires_grad_(True)


def _saved_name(name: str) -> str:
    """As peft writes it: model.x.lora_A.default.weight -> base_model.model.model.x.lora_A.weight."""
    return f"base_model.model.{name.replace('.default.', '.')}"
