"""The released layout: the full size matches key by key; wrong files are refused with one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vla_ray.errors import CheckpointError
from vla_ray.models.simlingo.checkpoint import check_layout, load_model, read_state, to_released
from vla_ray.models.simlingo.config import SimLingoConfig, infer_architecture, read_config
from vla_ray.models.simlingo.layout import released_shapes
from vla_ray.models.simlingo.model import SimLingo, pixel_shuffle

PLACEHOLDER = 47


@pytest.fixture(scope="module")
def tiny() -> SimLingoConfig:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
    }
    language = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
    }
    return SimLingoConfig("tiny", "nowhere", vision, language, image_size=56, lora_rank=2, lora_alpha=4)


@pytest.fixture(scope="module")
def model(tiny: SimLingoConfig) -> SimLingo:
    torch.manual_seed(0)
    model = SimLingo(tiny, PLACEHOLDER).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def save(state: dict[str, Tensor] | object, tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "pytorch_model.pt")
    return tmp_path / "pytorch_model.pt"


def full_size(golden: Path) -> tuple[SimLingoConfig, dict[str, tuple[int, ...]]]:
    arch = json.loads((golden / "internvl2_1b_config.json").read_text())
    keys = json.loads((golden / "simlingo_real_keys.json").read_text())
    config = SimLingoConfig("OpenGVLab/InternVL2-1B", "nowhere", arch["vision_config"], arch["llm_config"])
    return config, {name: tuple(shape) for name, (shape, _) in keys.items()}


def test_full_size_layout(golden: Path) -> None:
    """992 names and shapes, as the original classes make them."""
    config, expected = full_size(golden)
    with torch.device("meta"):
        model = SimLingo(config, 151662)
    assert len(expected) == 992
    assert released_shapes(model, config.lora_rank) == expected
    check_layout(model, expected, config.lora_rank, "golden")


def test_sizes_can_be_inferred_from_the_shapes(golden: Path) -> None:
    config, shapes = full_size(golden)
    inferred = infer_architecture(shapes)
    for part, known in (("vision_config", config.vision), ("llm_config", config.language)):
        assert {k: v for k, v in inferred[part].items() if known[k] != v} == {}
    assert (inferred["force_image_size"], inferred["downsample_ratio"]) == (448, 0.5)


def test_released_hydra_config(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((golden / "internvl2_1b_config.json").read_text())
    config = read_config(golden / "simlingo_released_hydra.yaml", tmp_path)
    assert (config.lora_rank, config.lora_scale, config.speed_dim) == (32, 2.0, 2)
    assert (config.cut_bottom, config.use_thumbnail, config.tokens_per_tile) == (True, False, 256)


def test_round_trip(model: SimLingo, tiny: SimLingoConfig, tmp_path: Path) -> None:
    path = save(to_released(model, tiny.lora_rank, torch.float32), tmp_path)
    loaded = load_model(tiny, path, PLACEHOLDER)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    x = torch.randn(2, 3, 56, 56)
    assert torch.equal(model.encode_tiles(x), loaded.encode_tiles(x))
    embeds, mask = torch.randn(1, 5, 16), torch.ones(1, 5, dtype=torch.long)
    assert torch.allclose(
        model.decide(embeds, mask, [[1, 2]]).route_B202, loaded.decide(embeds, mask, [[1, 2]]).route_B202
    )


def test_lora_is_merged_with_its_scale(model: SimLingo, tiny: SimLingoConfig, tmp_path: Path) -> None:
    state = to_released(model, tiny.lora_rank, torch.float32)
    stem = "language_model.model.base_model.model.model.layers.1.self_attn.k_proj"
    b = torch.randn(8, 2)
    state[f"{stem}.lora_B.default.weight"] = b
    loaded = load_model(tiny, save(state, tmp_path), PLACEHOLDER)
    expected = state[f"{stem}.base_layer.weight"] + 2.0 * b @ state[f"{stem}.lora_A.default.weight"]
    assert torch.allclose(loaded.language.model.layers[1].self_attn.k_proj.weight, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"state_dict": s, "epoch": 13},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_forward_module.module.{k}": v for k, v in s.items()},
        lambda s: {k: v for k, v in s.items() if not k.startswith("adaptors.language.")},
        lambda s: {k: v for k, v in s.items() if k != "language_model.model.base_model.model.lm_head.weight"},
        lambda s: {k: v.half() if k.startswith("language") else v for k, v in s.items()},
    ],
    ids=["wrapper", "ddp prefix", "two prefixes", "no aliases", "only an alias", "mixed dtypes"],
)
def test_variants_of_the_released_file(
    model: SimLingo, tiny: SimLingoConfig, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, object]]
) -> None:
    loaded = load_model(tiny, save(change(to_released(model, tiny.lora_rank, torch.float32)), tmp_path), PLACEHOLDER)
    head = loaded.language.lm_head.weight
    assert torch.allclose(head, model.language.lm_head.weight, atol=1e-3)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_dtype_of_towers_and_heads(model: SimLingo, tiny: SimLingoConfig, tmp_path: Path) -> None:
    path = save(to_released(model, tiny.lora_rank), tmp_path)
    loaded = load_model(tiny, path, PLACEHOLDER, dtype=torch.bfloat16)
    assert loaded.compute_dtype == loaded.route_queries.dtype == torch.bfloat16
    assert loaded.route_head[0].weight.dtype == loaded.waypoint_encoder[0].weight.dtype == torch.float32
    d = loaded.decide(torch.randn(1, 4, 16, dtype=torch.bfloat16), torch.ones(1, 4, dtype=torch.long), [[3]])
    assert d.route_B202.dtype == torch.float32


def test_one_error_lists_all_that_does_not_fit(model: SimLingo, tiny: SimLingoConfig, tmp_path: Path) -> None:
    state = to_released(model, tiny.lora_rank)
    del state["wp_encoder.mlp.0.bias"], state["adaptors.driving.query_embeds_wps"]
    state["something.new"] = torch.zeros(1)
    state["adaptors.driving.route_head.4.weight"] = torch.zeros(3, 256)
    with pytest.raises(CheckpointError) as e:
        load_model(tiny, save(state, tmp_path), PLACEHOLDER)
    message = str(e.value)
    assert "2 missing (adaptors.driving.query_embeds_wps, wp_encoder.mlp.0.bias)" in message
    assert "1 unexpected (something.new)" in message
    assert "route_head.4.weight is (3, 256), expected (2, 256)" in message
    assert "\n" not in message


def test_a_checkpoint_of_another_size_is_one_short_line(model: SimLingo, tiny: SimLingoConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    other = replace(tiny, language={**tiny.language, "hidden_size": 32})
    with pytest.raises(CheckpointError, match=r"misshapen .* and \d+ more"):
        load_model(other, save(to_released(model, tiny.lora_rank), tmp_path), PLACEHOLDER)


def test_unreadable_files(tmp_path: Path) -> None:
    lfs = tmp_path / "pytorch_model.pt"
    lfs.write_text("version https://git-lfs.github.com/spec/v1\nsize 2569679322\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer: 59 bytes"):
        read_state(lfs)
    with pytest.raises(CheckpointError, match=r"give the pytorch_model\.pt inside it"):
        read_state(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_state(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="does not map names to tensors"):
        read_state(save([1, 2], tmp_path))


def test_nothing_is_unpickled_from_a_checkpoint(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("executed",)

    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(save({"x": Evil()}, tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {}", "not a SimLingo training configuration"),
        ("[1, 2]", "expected a mapping, found list"),
        ("a: [", "not a readable training configuration"),
    ],
)
def test_wrong_configs(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(path, tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_config(tmp_path / "none.yaml", tmp_path)


def test_pixel_shuffle_keeps_neighbours_together() -> None:
    """Token (r, c) holds patches (2r..2r+1, 2c..2c+1)."""
    patches = torch.arange(16.0).view(1, 4, 4, 1)
    assert pixel_shuffle(patches)[0, 1, 0].tolist() == [8, 9, 12, 13]
    assert pixel_shuffle(patches)[0, 0, 1].tolist() == [2, 3, 6, 7]


@pytest.mark.slow
def test_full_size_file_loads_within_memory(golden: Path, tmp_path: Path) -> None:
    """A random file in the full released layout and dtypes: bf16 model, about 1.3x its own memory at most."""
    config, shapes = full_size(golden)
    state, made = {}, {}
    for name, shape in shapes.items():
        frozen = name.startswith(("language_model", "adaptors.language")) and "lora" not in name
        same = next((s for s in ("embed_tokens.weight", "lm_head.weight") if name.endswith(s)), name)
        if same not in made:
            made[same] = torch.full(shape, 0.01, dtype=torch.float16 if frozen else torch.float32)
        state[name] = made[same]
    path = save(state, tmp_path)
    assert path.stat().st_size == pytest.approx(2_569_679_322, rel=0.001)  # the released file's size
    code = (
        "import json, re, sys, time, torch\n"
        "from pathlib import Path\n"
        "from vla_ray.models.simlingo.checkpoint import load_model\n"
        "from vla_ray.models.simlingo.config import SimLingoConfig\n"
        "config = SimLingoConfig(**json.loads(sys.argv[1]))\n"
        "peak_kb = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak_kb()\n"
        "start = time.perf_counter()\n"
        "model = load_model(config, sys.argv[2], 151662, dtype=torch.bfloat16)\n"
        "seconds = time.perf_counter() - start\n"
        "size = sum(p.numel() * p.element_size() for p in model.parameters())\n"
        "peak = (peak_kb() - before) * 1024\n"
        "print(json.dumps([size, peak / size, seconds]))\n"
    )
    from dataclasses import asdict

    del state, made
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asdict(config)), str(path)], capture_output=True, text=True, check=True
    )
    size, ratio, seconds = json.loads(done.stdout.splitlines()[-1])
    print(f"full size: {size / 1e9:.2f} GB, peak {ratio:.2f} of that, {seconds:.1f} s")  # noqa: T201
    assert size == pytest.approx(1.88e9, rel=0.01)
    assert ratio < 1.35
