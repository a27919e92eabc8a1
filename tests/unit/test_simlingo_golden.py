"""Our SimLingo equals the original code: every array of golden/simlingo_a at its README's tolerances."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla_ray.attention import IMPLEMENTATION
from vla_ray.models.simlingo import load_model, load_processor
from vla_ray.models.simlingo.config import read_config
from vla_ray.models.simlingo.model import SimLingo
from vla_ray.models.simlingo.processing import Processor, Prompt, normalise
from vla_ray.stages.visit import Visit
from vla_ray.targets import Spline, Target, parse_targets

FRAMES = (0, 1, 2)  # two tiles; no target points; one tile
OUTPUT, GRADIENT = 1e-4, 1e-3  # of the reference's largest value


def assert_close(actual: Any, expected: np.ndarray, tolerance: float, what: str = "") -> None:
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:g}"


class Golden:
    """The golden checkpoint in our model, and the three frames ready for it."""

    def __init__(self, root: Path) -> None:
        checkpoint = root / "checkpoint_root"
        self.config = read_config(checkpoint / ".hydra/config.yaml", root / "pretrained/InternVL2-tiny-a")
        self.processor: Processor = load_processor(self.config)
        path = checkpoint / "checkpoints/epoch=013.ckpt/pytorch_model.pt"
        self.model: SimLingo = load_model(self.config, path, self.processor.placeholder_id)
        self.model.set_attention(IMPLEMENTATION)
        self.summary = json.loads((root / "expected/summary.json").read_text())["frames"]
        self.expected = [dict(np.load(root / f"expected/frame_{i:04d}.npz")) for i in FRAMES]
        self.tiles, self.prompts = [], []
        for line in (root / "scene/frames.jsonl").read_text().splitlines():
            frame = json.loads(line)
            rgb = np.asarray(Image.open(root / "scene" / frame["image"]).convert("RGB"))
            tiles, _ = self.processor.tiler(rgb)
            self.tiles.append(tiles)
            self.prompts.append(
                self.processor.prompt(len(tiles), frame["speed_mps"], frame["target_points"], frame["question"])
            )

    def visit(self, *frames: int) -> Visit:
        tiles, prompts = [self.tiles[i] for i in frames], [self.prompts[i] for i in frames]
        return Visit(self.model, self.processor, tiles, prompts)


@pytest.fixture(scope="module")
def g(golden: Path) -> Golden:
    return Golden(golden / "simlingo_a")


@pytest.mark.parametrize("i", FRAMES)
def test_pixels_and_prompt(g: Golden, i: int) -> None:
    assert_close(normalise(g.tiles[i]), g.expected[i]["pixel_values"], 1e-6, "pixel_values")
    assert list(g.prompts[i].ids) == g.expected[i]["input_ids"].tolist()
    assert g.prompts[i].text == g.summary[i]["prompt"]


@pytest.mark.parametrize("i", FRAMES)
@pytest.mark.parametrize("attention", [IMPLEMENTATION, "eager", "sdpa"])
def test_outputs(g: Golden, i: int, attention: str) -> None:
    e = g.expected[i]
    g.model.set_attention(attention)
    try:
        with torch.no_grad():
            embedded = g.model.vision.embeddings(normalise(g.tiles[i]))
            hidden = g.model.vision.encoder(embedded).last_hidden_state
            tokens = g.model.encode_tiles(normalise(g.tiles[i]))
            batch = g.processor.batch([g.prompts[i]], [len(g.tiles[i])])
            embeds = g.model.embed_prompt(batch, tokens, g.processor.image_token_id)
            text = g.model.generate(embeds, batch.mask_BP, g.processor.eos_id)
            d = g.model.decide(embeds, batch.mask_BP, text)
            logits = g.model.token_logits(d.hidden_BLH[0, d.text_rows(0)])
    finally:
        g.model.set_attention(IMPLEMENTATION)
    assert text[0] == e["generated_ids"].tolist()
    assert g.processor.decode(text[0]) == g.summary[i]["language"]
    assert g.processor.token_strings(text[0]) == g.summary[i]["token_strings"]
    for actual, name in (
        (hidden, "vit_last_hidden"),
        (tokens, "image_features"),
        (embeds[0], "prompt_inputs_embeds"),
        (d.hidden_BLH[0], "final_hidden"),
        (logits, "generation_logits"),
        (d.route_B202, "pred_route"),
        (d.speed_B102, "pred_speed_wps"),
    ):
        assert_close(actual, e[name], OUTPUT, name)


@pytest.mark.parametrize("i", FRAMES)
def test_final_inputs(g: Golden, i: int) -> None:
    """[prompt, text, EOS, queries] enter the language model in this order."""
    seen = []
    handle = g.model.language.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        g.visit(i)
    finally:
        handle.remove()
    assert_close(seen[-1][0], g.expected[i]["final_inputs_embeds"], OUTPUT)


@pytest.mark.parametrize("i", FRAMES)
def test_attention(g: Golden, i: int) -> None:
    visit = g.visit(i)
    names = [k for k in g.expected[i] if k.startswith("attn/")]
    assert len(names) == len(visit.probabilities) == 6
    for name in names:
        actual = visit.probabilities[name.removeprefix("attn/")]
        assert_close(actual[0] if "language" in name else actual, g.expected[i][name], OUTPUT, name)


def cases() -> Iterator[tuple[str, Target]]:
    for metric in ("curv_energy", "acc_energy", "longitudinal_progress"):
        yield metric, parse_targets("action", metric)[0]
    for strategy in ("max", "last"):
        yield f"text_{strategy}", parse_targets("text", text_token_strategy=strategy)[0]


@pytest.mark.parametrize("i", FRAMES)
@pytest.mark.parametrize(("name", "target"), list(cases()))
def test_head_mean_of_positive_attention_times_gradient(g: Golden, i: int, name: str, target: Target) -> None:
    visit = g.visit(i)
    explained = visit.explain(target, Spline(), keep_graph=False)
    arrays = [k for k in g.expected[i] if k.startswith(f"cam/{name}/")]
    assert arrays
    for key in arrays:
        block = key.rpartition("/")[2]
        cam = (visit.probabilities[block] * explained.gradients[block]).clamp_min(0).mean(1)
        tolerance = OUTPUT if name.startswith("text") else GRADIENT
        assert_close(cam[0] if block.startswith("language") else cam, g.expected[i][key], tolerance, key)


@pytest.mark.parametrize("i", FRAMES)
def test_text_gradients_per_head(g: Golden, i: int) -> None:
    """The one final pass has the gradients of the generation step that wrote the token; later rows have none."""
    index = g.summary[i]["text_index"]
    target = parse_targets("text", text_token_strategy="index", text_token_index=index)[0]
    explained = g.visit(i).explain(target, Spline(), keep_graph=False)
    for key in (k for k in g.expected[i] if k.startswith("grad/text_index/")):
        block, expected = key.rpartition("/")[2], g.expected[i][key]
        actual = explained.gradients[block]
        if block.startswith("language"):
            n = expected.shape[-1]
            assert float(actual[:, :, n:].abs().max()) == 0, "later rows cannot matter to an earlier token"
            actual = actual[0, :, :n, :n]
        assert_close(actual, expected, OUTPUT, key)


@pytest.mark.parametrize("i", FRAMES)
def test_route_gradients_per_head(g: Golden, i: int) -> None:
    visit = g.visit(i)
    route = visit.decision.route_B202
    energy = (route[:, 2:] - 2 * route[:, 1:-1] + route[:, :-2]).square().sum()
    gradients, (by_route,) = visit._recorder.gradients(energy, [route])
    assert_close(by_route[0], g.expected[i]["grad_out/route_second_diff_energy"], GRADIENT)
    for key in (k for k in g.expected[i] if k.startswith("grad/route_second_diff_energy/")):
        block = key.rpartition("/")[2]
        actual = gradients[block]
        assert_close(actual[0] if block.startswith("language") else actual, g.expected[i][key], GRADIENT, key)


@pytest.mark.parametrize("i", FRAMES)
def test_scalars(g: Golden, i: int) -> None:
    visit = g.visit(i)
    for name, value in g.summary[i]["scalars"].items():
        if name != "route_second_diff_energy":
            assert float(visit.kinematics(Spline())[name]) == pytest.approx(value, rel=1e-3)


def test_batched_equals_single(g: Golden) -> None:
    """Three frames of different tile counts, prompt and text lengths: outputs 1e-5, gradients 1e-4."""
    together = g.visit(*FRAMES)
    targets = [
        *parse_targets("action", ["curv_energy", "acc_energy", "longitudinal_progress"]),
        *parse_targets("text", text_token_strategy=["max", "last"]),
    ]
    batched = [together.explain(t, Spline(), keep_graph=True) for t in targets]
    for b in FRAMES:
        alone = g.visit(b)
        start = together.decision.starts[b]
        assert together.texts[b] == alone.texts[0]
        assert_close(together.decision.route_B202[b], alone.decision.route_B202[0].detach().numpy(), 1e-5)
        assert_close(together.decision.speed_B102[b], alone.decision.speed_B102[0].detach().numpy(), 1e-5)
        for target, many in zip(targets, batched, strict=True):
            one = alone.explain(target, Spline(), keep_graph=True)
            assert float(many.scalar_B[b]) == pytest.approx(float(one.scalar_B[0]), rel=1e-5)
            for block, expected in one.gradients.items():
                if block.startswith("vision"):
                    actual = many.gradients[block][together.tile_slices[b]]
                else:
                    actual = many.gradients[block][b : b + 1, :, start:, start:]
                assert_close(actual, expected.numpy(), 1e-4, f"{target.name} {block}")


def test_prompt_of_other_frames_does_not_leak(g: Golden) -> None:
    """Padding columns carry no attention and get none."""
    visit = g.visit(0, 2)
    start = visit.decision.starts[1]
    assert start > 0
    for name, p in visit.probabilities.items():
        if name.startswith("language"):
            assert float(p[1, :, :, :start].abs().max()) == 0
            assert float(p[1, :, :start].abs().max()) == 0
            assert torch.allclose(p[1, :, start:].sum(-1), torch.ones(()), atol=1e-5)


def test_placeholder_without_points_is_refused(g: Golden) -> None:
    with pytest.raises(Exception, match="target points"):
        g.processor.prompt(1, 1.0, None, "Go to <TARGET_POINT><TARGET_POINT>.")
    with pytest.raises(Exception, match="own token"):
        g.processor.prompt(1, 1.0, None, "What is <IMG_CONTEXT>?")
    prompt: Prompt = g.processor.prompt(1, 4.96, ((1.0, 2.0), (3.0, 4.0)))
    assert "Current speed: 5.0 m/s. Target waypoint: <TARGET_POINT><TARGET_POINT>." in prompt.text
