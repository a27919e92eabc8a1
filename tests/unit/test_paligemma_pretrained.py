"""Models that cannot be used are one clear line; the tiny one is the same each time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file

from vla_ray.errors import CheckpointError
from vla_ray.models.paligemma import pretrained
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.pretrained import RELEASED, find_model, load_model
from vla_ray.models.paligemma.processing import Processor
from vla_ray.models.paligemma.tiny import build_tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(name: str | Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as e:
        ActionPolicy.from_pretrained(name, ActionTokenizer())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["paligema", "./nothing", "/nothing/here", "a/b/c"])
def test_unknown_names(name: str) -> None:
    refused(name, f"there is no model '{name}'. Give a directory that exists, a name on the hub such as {RELEASED}")


def test_near_misses() -> None:
    refused("tinny", "Did you mean 'tiny'")


def answer(kind: type[Exception]) -> Exception:
    if issubclass(kind, HfHubHTTPError):
        return kind("403", response=httpx.Response(403, request=httpx.Request("GET", "http://test")))
    return kind("no")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "is gated: accept its licence .* HF_TOKEN"),
        (RepositoryNotFoundError, "there is no owner/name on the hub, or it is private"),
        (LocalEntryNotFoundError, "hub cannot be reached .*`hf download owner/name"),
        (OfflineModeIsEnabled, "hub cannot be reached"),
        (HfHubHTTPError, "cannot be downloaded: HfHubHTTPError"),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise answer(kind)

    monkeypatch.setattr(pretrained, "snapshot_download", fails)
    refused("owner/name", message)


def test_downloaded_models_keep_their_name(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """An adapter saved later must name the model, not a cache on this machine."""
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: str(directory))
    model, found = load_model("owner/name")
    assert (found, model.name_or_path) == (directory, "owner/name")


def test_offline_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=f"{RELEASED} is not in the hub cache"):
        find_model(RELEASED, cache_dir=tmp_path)


def test_another_model(copy: Path) -> None:
    edit(copy / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    refused(copy, r"is a model of type 'qwen2' \(Qwen2ForCausalLM\), not a PaliGemma")
    (copy / "config.json").unlink()
    refused(copy, "there is no config.json")


def test_missing_and_misshapen_weights(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.0.mlp.up_proj.weight"))
    up = weights.pop(name)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    refused(copy, r"do not fit its config.json: 1 missing \(.*layers\.0\.mlp\.up_proj\.weight\)")
    save_file({**weights, name: up[:5].contiguous()}, copy / "model.safetensors", {"format": "pt"})
    refused(copy, r"up_proj|cannot be loaded")
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    refused(copy, "cannot be loaded")
    (copy / "model.safetensors").unlink()
    refused(copy, "cannot be loaded")


def test_processor_of_another_model(copy: Path) -> None:
    settings = json.loads((copy / "processor_config.json").read_text())
    settings["image_processor"] |= {"size": {"height": 112, "width": 112}, "image_seq_length": 64}
    (copy / "processor_config.json").write_text(json.dumps(settings))
    refused(copy, "pictures of 112 pixels and 64 tokens, its model takes 56 pixels and 16 tokens")


def test_vocabulary_of_another_model(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    edit(copy / "config.json", image_token_index=config["image_token_index"] + 1)
    refused(copy, "the tokenizer in .* does not fit the model: <image> is")


def test_dtype_and_mode(directory: Path) -> None:
    model, _ = load_model(str(directory), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_tiny_is_a_function_of_its_arguments(directory: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    again = build_tiny(tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json", "config.json", "processor_config.json"):
        assert (again / name).read_bytes() == (directory / name).read_bytes(), name
    other = build_tiny(tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (directory / "model.safetensors").read_bytes()
    before = torch.rand(1)
    torch.manual_seed(99)
    assert torch.equal(before, torch.rand(1))  # the caller's generator is left alone


def test_tiny_sizes_and_words(tmp_path: Path) -> None:
    words = ["zigzag zigzag"] * 9
    build_tiny(tmp_path, image_size=64, patch_size=8, dim=32, layers=1, vision_layers=3, heads=2, corpus=words)
    processor = Processor.from_directory(tmp_path)
    assert (processor.image_size, processor.image_tokens) == (64, 64)
    assert len(processor.prompt_ids("zigzag zigzag")) == 64 + 1 + 2 + 1
    config = load_model(str(tmp_path))[0].config
    assert (config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers) == (1, 3)
