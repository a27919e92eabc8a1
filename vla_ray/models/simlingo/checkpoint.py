"""Loading and writing `pytorch_model.pt` in the released layout.

Loading is strict: names and shapes are compared before any weight is touched, and one error lists everything that
does not fit. It takes little more memory than the model itself: parameters are made on the meta device and filled
one by one from a memory-mapped file. Nothing is unpickled but tensors (`weights_only`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from vla_ray.errors import CheckpointError
from vla_ray.models.simlingo.config import SimLingoConfig
from vla_ray.models.simlingo.layout import find, optional_names, released_shapes, sources
from vla_ray.models.simlingo.model import SimLingo

logger = logging.getLogger(__name__)

PREFIXES = ("module.", "_forward_module.")  # left by DistributedDataParallel and by Lightning's strategies
FLOAT32_PARTS = ("route_head.", "speed_head.", "waypoint_encoder.")  # trajectories are metres: no bf16 here
REMAP_BYTES = 128 << 20  # the file is mapped anew after this much, so that pages already copied are given back
MERGE_ELEMENTS = 1 << 18  # merged at a time: 1 MB of float32


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Released name -> memory-mapped tensor, with wrapper and prefixes removed.

    Raises:
        CheckpointError: not there, not a torch file, or not a mapping of names to tensors.
    """
    path = Path(path)
    if not path.is_file():
        hint = (
            " It is a directory: give the pytorch_model.pt inside it." if path.is_dir() else " Check model.checkpoint."
        )
        raise CheckpointError(f"there is no checkpoint {path}.{hint}")
    try:
        state: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for the same thing: a bad file
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise CheckpointError(
            f"{path} cannot be read as a torch checkpoint ({reason}). It may be a partial download or a "
            f"git-lfs pointer: {path.stat().st_size:,} bytes; the released file has 2,569,679,322."
        ) from e
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path} does not map names to tensors. Make it with zero_to_fp32.py from the training run."
        )
    return {_strip(k): v for k, v in state.items()}


def _strip(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.removeprefix(next(p for p in PREFIXES if name.startswith(p)))
    return name


def check_layout(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], lora_rank: int, where: object) -> None:
    """Compare a file's names and shapes with what `model` needs.

    Raises:
        CheckpointError: one error that lists missing, unexpected and misshapen tensors.
    """
    expected = released_shapes(model, lora_rank)
    groups = optional_names(model, lora=lora_rank > 0)
    missing = [k for k in expected if k not in shapes and not any(n in shapes for n in groups.get(k, ()))]
    unexpected = [k for k in shapes if k not in expected]
    misshapen = [
        f"{k} is {tuple(shapes[k])}, expected {tuple(v)}"
        for k, v in expected.items()
        if k in shapes and tuple(shapes[k]) != v
    ]
    if missing or unexpected or misshapen:
        parts = [
            f"{len(names)} {what} ({_some(names)})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
            if names
        ]
        raise CheckpointError(
            f"{where} does not fit this model: {'; '.join(parts)}. "
            "Check that model.config and model.variant_dir belong to this checkpoint."
        )


def _some(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


def verify(config: SimLingoConfig, shapes: Mapping[str, tuple[int, ...]], where: object) -> int:
    """Check a file's names and shapes against a configuration without loading weights; returns the parameter count.

    Raises:
        CheckpointError: see `check_layout`.
    """
    with torch.device("meta"):
        model = SimLingo(config, placeholder_id=-1)
    check_layout(model, shapes, config.lora_rank, where)
    return sum(p.numel() for p in model.parameters())


def load_model(
    config: SimLingoConfig,
    path: str | Path,
    placeholder_id: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SimLingo:
    """The model with the file's weights, LoRA merged, frozen, in eval mode.

    Args:
        dtype: of the towers; heads and the target-point encoder stay float32.

    Raises:
        CheckpointError: the file does not fit (see `check_layout`).
    """
    start = time.perf_counter()
    with torch.device("meta"):
        model = SimLingo(config, placeholder_id)
    state = read_state(path)
    check_layout(model, {k: tuple(v.shape) for k, v in state.items()}, config.lora_rank, path)
    mapped, total = 0, 0
    for source in sources(model, lora=config.lora_rank > 0):
        tensor = state[find(state, source)]
        if mapped + tensor.nbytes > REMAP_BYTES:
            del tensor, state
            state, mapped = read_state(path), 0
            tensor = state[find(state, source)]
        mapped += tensor.nbytes
        target = torch.float32 if source.parameter.startswith(FLOAT32_PARTS) else dtype
        if source.third is not None:
            tensor = tensor.chunk(3)[source.third]
        if source.lora:
            a, b = (state[n] for n in source.lora_names())
            own = merge_lora(tensor, a, b, config.lora_scale, target).to(device)
        else:
            own = tensor.to(device=device, dtype=target, copy=True).contiguous()
        _assign(model, source.parameter, own)
        total += own.nbytes
    # The rotary frequencies are no parameters: no file holds them, and the meta device lost them.
    model.language.model.rotary_emb = Qwen2RotaryEmbedding(model.language.config).to(device)
    model.eval().requires_grad_(False)
    logger.info("loaded %s: %.1f MB in %s on %s, %.1f s", path, total / 1e6, dtype, device, time.perf_counter() - start)
    return model


def merge_lora(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W + scale * B A in float32, rounded once to `dtype` (Hu et al. 2021).

    Works through blocks of rows: a float32 copy of every matrix would leave holes in the heap of half the model's size.
    """
    merged = torch.empty(weight.shape, dtype=dtype)
    rows = max(1, MERGE_ELEMENTS // weight.shape[1])
    a = lora_a.float()
    for i in range(0, len(weight), rows):
        block = slice(i, i + rows)
        merged[block] = torch.addmm(weight[block].float(), lora_b[block].float(), a, alpha=scale)
    return merged


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))


def to_released(model: SimLingo, lora_rank: int, frozen_dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The inverse: a state dict in the released layout, aliases sharing storage, LoRA pairs that add nothing.

    Args:
        lora_rank: rank of the pairs to write (A small and random from a fixed seed, B zero).
        frozen_dtype: of the language model, which the released training froze; the rest is float32.
    """
    own = {k: p.detach() for k, p in model.named_parameters(remove_duplicate=False)}
    out: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    fused: dict[str, list[Tensor]] = {}
    for s in sources(model, lora=lora_rank > 0):
        frozen = s.parameter.startswith("language.")
        tensor = own[s.parameter].cpu().to(frozen_dtype if frozen else torch.float32).contiguous()
        if s.third is not None:
            fused.setdefault(s.name, []).append(tensor)
            if len(fused[s.name]) == 3:
                out[s.name] = torch.cat(fused.pop(s.name))
            continue
        out.update(dict.fromkeys((s.name, *s.aliases), tensor))
        if s.lora:
            a, b = s.lora_names()
            out[a] = 0.02 * torch.randn(lora_rank, s.shape[1], generator=generator)
            out[b] = torch.zeros(s.shape[0], lora_rank)
    return out
