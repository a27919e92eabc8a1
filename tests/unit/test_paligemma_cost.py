"""Costs: exact counts, and formulas against what torch itself counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vla_ray.models.paligemma import lora
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.cost import (
    count_parameters,
    flops_per_sample,
    lora_parameters,
    peak_flops,
    released_config,
    training_bytes,
)
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.tiny import build_tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


def test_released_model() -> None:
    counts = count_parameters(released_config())
    assert (counts.vision, counts.projector, counts.embeddings) == (412_442_352, 2_361_344, 526_778_368)
    assert counts.total == 2_923_466_480
    assert lora_parameters(released_config(), 16) == 19_611_648


def test_memory_of_the_released_model() -> None:
    config = released_config()
    assert training_bytes(config) == 18 * 2_923_466_480
    assert training_bytes(config, ("vision",)) == 18 * (2_923_466_480 - 412_442_352) + 4 * 412_442_352
    adapters = training_bytes(config, lora_rank=16, frozen_bytes=2)
    assert adapters == 18 * 19_611_648 + 2 * 2_923_466_480
    assert adapters < 7e9


def test_counts_of_a_loaded_model(directory: Path) -> None:
    policy = ActionPolicy.from_pretrained(directory, ActionTokenizer())
    assert count_parameters(policy.model.config).total == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize(
    ("frozen", "rank"), [((), 0), (("vision",), 0), (("vision", "projector", "embeddings"), 0), ((), 4)]
)
def test_flops_equal_those_torch_counts(directory: Path, frozen: tuple[str, ...], rank: int) -> None:
    """Up to what the formula leaves out: input gradients of the lowest trained layer."""
    policy = ActionPolicy.from_pretrained(directory, ActionTokenizer())
    policy.model.set_attn_implementation("eager")  # matrix products that the counter sees on a CPU
    if rank:
        lora.add_adapters(policy.model, rank, 2 * rank)
    else:
        policy.freeze(frozen)
    tokens, image = 64, policy.model.config.image_token_id
    ids = torch.tensor([[image] * 16 + [2] + [300] * (tokens - 34) + [policy.first_action_id] * 16 + [1]])
    types = torch.zeros_like(ids)
    types[:, -17:] = 1
    pixels = torch.zeros(1, 56, 56, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        policy(pixels, ids, torch.ones_like(ids), types).loss.backward()
    expected = flops_per_sample(policy.model.config, tokens, frozen=frozen, lora_rank=rank)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.04)


def test_flops_of_the_released_model() -> None:
    config = released_config()
    whole, still, adapters = (
        flops_per_sample(config, 290, **options)  # type: ignore[arg-type]
        for options in ({}, {"frozen": ("vision",)}, {"lora_rank": 16})
    )
    assert adapters < still < whole
    six_n = 6 * (412e6 * 256 + 1.982e9 * 290)
    assert six_n < whole < 1.1 * six_n


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("cpu", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
