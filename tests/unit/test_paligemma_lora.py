"""Adapters: what they touch, and that every way of saving them gives the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PaliGemmaForConditionalGeneration

from vla_ray.errors import CheckpointError
from vla_ray.models.paligemma import lora
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.cost import lora_parameters
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.processing import Processor
from vla_ray.models.paligemma.tiny import build_tiny

TOKENIZER = ActionTokenizer()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def batch(directory: Path) -> dict[str, Tensor]:
    processor = Processor.from_directory(directory)
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8))
    prompts = [processor.prompt_ids(t) for t in ("stop", "turn left at the red door")]
    collated = processor.collate(images, prompts, rng.integers(0, 256, (2, 16)))
    return {name: torch.from_numpy(array) for name, array in collated.items()}


@pytest.fixture
def adapted(directory: Path, batch: dict[str, Tensor]) -> ActionPolicy:
    """A policy with adapters that have learnt something."""
    torch.manual_seed(0)
    policy = ActionPolicy.from_pretrained(directory, TOKENIZER)
    lora.add_adapters(policy.model, rank=4, alpha=8)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        policy(**batch).loss.backward()
        optimizer.step()
    return policy.eval()


@torch.no_grad()
def loss(policy: ActionPolicy, batch: dict[str, Tensor]) -> float:
    return float(policy(**batch).loss)


def as_policy(model: nn.Module, like: ActionPolicy) -> ActionPolicy:
    assert isinstance(model, PaliGemmaForConditionalGeneration)
    return ActionPolicy(model.eval(), like.first_action_id, like.num_bins, like.num_tokens)


def test_fresh_adapters_change_nothing_and_hit_the_language_model_alone(
    directory: Path, batch: dict[str, Tensor]
) -> None:
    policy = ActionPolicy.from_pretrained(directory, TOKENIZER)
    before = loss(policy, batch)
    lora.add_adapters(policy.model, rank=4, alpha=8)
    assert loss(policy, batch) == before
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert all("language_model" in n and "lora_" in n for n in trained)
    assert sum(p.numel() for p in trained.values()) == lora_parameters(policy.model.config, 4)
    policy(**batch).loss.backward()
    assert all(p.grad is not None for p in trained.values())


def test_saved_adapters_load_everywhere(adapted: ActionPolicy, batch: dict[str, Tensor], tmp_path: Path) -> None:
    expected = loss(adapted, batch)
    adapted.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Processor.from_directory(tmp_path).image_size == 56
    ours = ActionPolicy.from_pretrained(tmp_path, TOKENIZER)
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, local_files_only=True)
    base = PaliGemmaForConditionalGeneration.from_pretrained(adapted.directory)
    peft = PeftModel.from_pretrained(base, str(tmp_path)).base_model.model
    assert loss(ours, batch) == expected
    assert loss(as_policy(theirs, ours), batch) == pytest.approx(expected, abs=1e-6)
    assert loss(as_policy(peft, ours), batch) == pytest.approx(expected, abs=1e-6)
    assert loss(ActionPolicy.from_pretrained(adapted.directory or "", TOKENIZER), batch) != pytest.approx(expected)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in adapted.named_parameters() if p.requires_grad
    }


def test_merged(adapted: ActionPolicy, batch: dict[str, Tensor], tmp_path: Path) -> None:
    expected = loss(adapted, batch)
    adapted.save_merged(tmp_path)
    assert loss(adapted, batch) == expected  # still adapted, still trainable
    assert lora.has_adapters(adapted.model)
    found = ActionPolicy.from_pretrained(tmp_path, TOKENIZER)
    assert not lora.has_adapters(found.model)
    assert loss(found, batch) == pytest.approx(expected, abs=1e-5)
    names = {n for n, _ in ActionPolicy.from_pretrained(adapted.directory or "", TOKENIZER).named_parameters()}
    assert {n for n, _ in found.named_parameters()} == names
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")  # tied, so stored once


def test_full_save_from_gathered_weights(directory: Path, batch: dict[str, Tensor], tmp_path: Path) -> None:
    """As FSDP gathers them: by the policy's names, the tied head as a tensor of its own."""
    policy = ActionPolicy.from_pretrained(directory, TOKENIZER)
    weights = {name: tensor.clone() + 0.01 for name, tensor in policy.state_dict().items()}
    policy.save(tmp_path, weights)
    found = ActionPolicy.from_pretrained(tmp_path, TOKENIZER)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.state_dict().items())


def test_adapter_save_from_gathered_weights(adapted: ActionPolicy, batch: dict[str, Tensor], tmp_path: Path) -> None:
    weights = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    expected = loss(adapted, batch)
    for parameter in adapted.parameters():
        parameter.data.zero_()
    adapted.save(tmp_path, weights)
    assert loss(ActionPolicy.from_pretrained(tmp_path, TOKENIZER), batch) == expected


def test_adapters_stay_float32_beside_a_bfloat16_model(adapted: ActionPolicy, tmp_path: Path) -> None:
    adapted.save(tmp_path)
    found = ActionPolicy.from_pretrained(tmp_path, TOKENIZER, dtype=torch.bfloat16)
    kinds = {("lora_" in n, p.dtype) for n, p in found.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    exact = dict(adapted.named_parameters())
    assert all(torch.equal(p, exact[n]) for n, p in found.named_parameters() if "lora_" in n)


def test_a_frozen_bfloat16_base_trains(directory: Path, batch: dict[str, Tensor]) -> None:
    policy = ActionPolicy.from_pretrained(directory, TOKENIZER, dtype=torch.bfloat16)
    lora.add_adapters(policy.model, 4, 8, dropout=0.1)
    policy.checkpoint_activations()
    policy.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = policy(**batch)
    found.loss.backward()
    grads = [p.grad for p in policy.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)
    assert any(float(g.abs().max()) > 0 for g in grads if g is not None)


def _drop(directory: Path) -> None:
    weights = load_file(directory / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), directory / "adapter_model.safetensors")


def _cut(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _rename_base(directory: Path) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/nowhere/at/all"}))


def _remove(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, "incomplete: 1 missing"),
        (_cut, "cannot be loaded"),
        (_remove, "cannot be loaded"),
        (_rename_base, "belong to /nowhere/at/all: there is no model"),
    ],
)
def test_damaged_adapters(adapted: ActionPolicy, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    adapted.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as e:
        ActionPolicy.from_pretrained(tmp_path, TOKENIZER)
    assert "\n" not in str(e.value)


def test_base_may_have_moved(adapted: ActionPolicy, batch: dict[str, Tensor], tmp_path: Path) -> None:
    adapted.save(tmp_path)
    _rename_base(tmp_path)
    found = ActionPolicy.from_pretrained(tmp_path, TOKENIZER, base=str(adapted.directory))
    assert loss(found, batch) == loss(adapted, batch)


def test_adapters_of_another_size(adapted: ActionPolicy, tmp_path: Path) -> None:
    adapted.save(tmp_path)
    other = build_tiny(tmp_path / "other", dim=32)
    with pytest.raises(CheckpointError, match=r"another model or are incomplete: .* misshapen"):
        ActionPolicy.from_pretrained(tmp_path, TOKENIZER, base=str(other))
