"""LRP rules: outputs untouched, relevance conserved wherever the rules say so, the model left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vla_ray.attention import IMPLEMENTATION
from vla_ray.attention.watch import AttentionCall
from vla_ray.errors import ConfigError
from vla_ray.explain import lrp as lrp_module
from vla_ray.explain.gradients import gradient_x_input
from vla_ray.explain.lrp import Scores, lrp, lrp_rules
from vla_ray.explain.question import Answer, Question
from vla_ray.models.simlingo import SimLingo, load_model, load_processor
from vla_ray.models.simlingo.config import read_config
from vla_ray.models.simlingo.processing import normalise
from vla_ray.targets import Spline, parse_targets

# Constants of the forward pass: inputs beside the pixels, which take their part of relevance.
INPUTS = ("bias", "cls_token", "position_embeddings", "embed_tokens.weight", "route_queries", "speed_queries")


def question(model: SimLingo, processor: Any, metric: str, tiles: int) -> Question:
    """With a made-up text, so that nothing has to be generated."""
    prompt = processor.prompt(tiles, 5.0, None)
    (target,) = parse_targets("action", [metric])
    return Question(model, processor, prompt, [5, 6, processor.eos_id], target, Spline())


@pytest.fixture(scope="module")
def loaded(repo: Any) -> tuple[SimLingo, Any, Tensor]:
    root = repo / "checkpoints/simlingo-tiny"
    config = read_config(root / ".hydra/config.yaml")
    processor = load_processor(config)
    model = load_model(config, root / "checkpoints/epoch=013.ckpt/pytorch_model.pt", processor.placeholder_id)
    model.set_attention(IMPLEMENTATION)
    rgb = np.asarray(Image.open(repo / "datasets/demo_drive/lead_car/images/frame_0003.png").convert("RGB"))
    tiles, _ = processor.tiler(rgb)
    return model, processor, normalise(tiles, model.device)


@pytest.fixture(scope="module")
def driver(loaded: tuple[SimLingo, Any, Tensor]) -> tuple[SimLingo, Any, Tensor]:
    """The bundled driver in float64, its constants differentiable."""
    model, processor, pixels = loaded
    double = SimLingo(model.config, model.placeholder_id).double()
    double.load_state_dict(model.state_dict())
    double.set_attention(IMPLEMENTATION)
    return double.eval().requires_grad_(True), processor, pixels.double()


@pytest.fixture(scope="module")
def bias_free(loaded: tuple[SimLingo, Any, Tensor]) -> tuple[SimLingo, Any, Tensor]:
    """Random weights, every constant zero: all that reaches the trajectory comes from the pixels."""
    model, processor, pixels = loaded
    torch.manual_seed(0)
    free = SimLingo(model.config, model.placeholder_id).double()
    free.set_attention(IMPLEMENTATION)
    with torch.no_grad():
        for name, parameter in free.named_parameters():
            if name.endswith(INPUTS):
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(1, 0.3)
    return free.eval().requires_grad_(False), processor, pixels.double()


@contextmanager
def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[AttentionCall, Tensor]]]:
    """Every attention call under the rules, its inputs and its output keeping their gradients."""
    calls: list[tuple[AttentionCall, Tensor]] = []
    plain = lrp_module.sdpa

    def sdpa(module: nn.Module, call: AttentionCall) -> Tensor:
        output = plain(module, call)
        output.retain_grad()
        calls.append((call, output))
        return output

    with monkeypatch.context() as patch:
        patch.setattr(lrp_module, "sdpa", sdpa)
        yield calls


def contributions(ask: Question, pixels: Tensor, scores: Scores) -> tuple[float, list[Tensor]]:
    """y, and input x propagated gradient of the pixels and of every constant of the model."""
    inputs = {name: p for name, p in ask.model.named_parameters() if name.endswith(INPUTS) and p.requires_grad}
    leaf = pixels.clone().requires_grad_()
    with lrp_rules(ask.model, scores):
        y = ask(leaf[None]).scalar[0]
    gradients = torch.autograd.grad(y, [leaf, *inputs.values()], allow_unused=True)
    pairs = zip([leaf, *inputs.values()], gradients, strict=True)
    return y.item(), [(x * g).detach() for x, g in pairs if g is not None]


@pytest.mark.parametrize("metric", ["lateral_offset", "longitudinal_progress"])
def test_without_constants_the_pixels_are_the_whole_of_y(bias_free: Any, metric: str) -> None:
    model, processor, pixels = bias_free
    ask = question(model, processor, metric, len(pixels))
    relevance = lrp(ask, pixels, "constant")
    y = float(ask(pixels[None]).scalar)
    assert relevance.shape == (len(pixels), model.config.patch_grid, model.config.patch_grid)
    assert abs(y) > 0.01
    # The RMSNorm of transformers computes in float32 whatever the model is, hence 1e-6 and not 1e-12.
    assert abs(float(relevance.sum()) - y) < 1e-6 * float(relevance.abs().sum())
    plain = gradient_x_input(ask, pixels, model.config.patch_grid, sign="signed") * model.config.patch_size**2
    assert abs(float(plain.sum()) - y) > 0.01 * float(plain.abs().sum()), "the plain gradient conserves too"


@pytest.mark.parametrize(
    ("metric", "degree"), [("lateral_offset", 1), ("forward_speed", 1), ("acc_energy", 2), ("curv_energy", -2)]
)
def test_with_all_constants_counted_relevance_is_degree_times_y(driver: Any, metric: str, degree: int) -> None:
    """Euler: <trajectory, dy/dtrajectory> = n y for a scalar of degree n; all of it reaches the inputs."""
    model, processor, pixels = driver
    y, parts = contributions(question(model, processor, metric, len(pixels)), pixels, "constant")
    total, mass = sum(float(p.sum()) for p in parts), sum(float(p.abs().sum()) for p in parts)
    assert y != 0
    assert abs(total - degree * y) < 1e-6 * mass


def test_what_is_missing_with_shared_scores_is_lost_in_softmax(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attention call takes sum(O dO), gives half to v and a quarter of sum(S dS) each to q and k."""
    model, processor, pixels = driver
    with recorded_calls(monkeypatch) as calls:
        ask = question(model, processor, "lateral_offset", len(pixels))
        inputs = [(n, p) for n, p in model.named_parameters() if n.endswith(INPUTS)]
        leaf = pixels.clone().requires_grad_()
        with lrp_rules(model):
            y = ask(leaf[None]).scalar[0]
        y.backward()
    parts = [(x * x.grad).detach() for x in (leaf, *(p for _, p in inputs)) if x.grad is not None]
    model.zero_grad(set_to_none=True)
    assert len(calls) == 6
    lost = 0.0
    for call, output in calls:
        received = float((output * output.grad).detach().sum())
        weights, d_scores, scores = attention_in_the_open(call, output.grad)
        assert float((weights @ repeated(call.value, weights) - output.detach().transpose(1, 2)).abs().max()) < 1e-9
        lost += 0.5 * (received - float((scores * d_scores).sum()))
    total, mass = sum(float(p.sum()) for p in parts), sum(float(p.abs().sum()) for p in parts)
    assert abs(total + lost - y.item()) < 1e-6 * mass
    assert abs(lost) > 1e-4 * mass, "nothing was lost, so nothing was tested"


def repeated(x: Tensor, like: Tensor) -> Tensor:
    return x.detach().repeat_interleave(like.shape[1] // x.shape[1], 1)


def attention_in_the_open(call: AttentionCall, d_output_BQHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P, dS and S of a call, from first principles."""
    query = call.query.detach()
    scores = query @ repeated(call.key, query).transpose(-1, -2) * call.scale
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if call.causal else torch.tensor(True)
    allowed = allowed if call.mask is None else call.mask
    p = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    d_p = d_output_BQHD.transpose(1, 2) @ repeated(call.value, query).transpose(-1, -2)
    return p, p * (d_p - (p * d_p).sum(-1, keepdim=True)), scores


def test_shares_of_query_key_and_value() -> None:
    """One call: v gets half of its plain gradient, q and k a quarter of theirs; with constant scores v gets all."""
    torch.manual_seed(0)
    plain = [torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    call = AttentionCall(*plain, mask=None, causal=True, scale=0.5)
    module = nn.Module()
    outer = torch.randn(1, 5, 2, 4, dtype=torch.float64)
    expected = torch.autograd.grad(lrp_module.sdpa(module, call), plain, outer)
    shared = torch.autograd.grad(lrp_module._AttentionRule("shared").attend(module, call), plain, outer)
    for ours, full, share in zip(shared, expected, (0.25, 0.25, 0.5), strict=True):
        torch.testing.assert_close(ours, share * full)
    constant = torch.autograd.grad(
        lrp_module._AttentionRule("constant").attend(module, call), plain, outer, allow_unused=True
    )
    assert constant[:2] == (None, None)
    torch.testing.assert_close(constant[2], expected[2])


@pytest.mark.parametrize("scores", ["shared", "constant"])
def test_outputs_do_not_change(loaded: Any, scores: Scores) -> None:
    model, processor, pixels = loaded
    ask = question(model, processor, "curv_energy", len(pixels))
    outside: Answer = ask(pixels[None])
    with lrp_rules(model, scores):
        inside = ask(pixels[None].clone().requires_grad_())
        text = model.generate(*embedded(ask, pixels), processor.eos_id, 4)
    assert torch.equal(inside.route, outside.route)
    assert torch.equal(inside.speed, outside.speed)
    assert torch.equal(inside.scalar, outside.scalar)
    assert text == model.generate(*embedded(ask, pixels), processor.eos_id, 4)


def embedded(ask: Question, pixels: Tensor) -> tuple[Tensor, Tensor]:
    batch = ask.processor.batch([ask.prompt], [len(pixels)])
    with torch.no_grad():
        tokens = ask.model.encode_tiles(pixels)
        return ask.model.embed_prompt(batch, tokens, ask.processor.image_token_id), batch.mask_BP


def test_the_model_is_left_as_it_was(loaded: Any) -> None:
    model, processor, pixels = loaded
    ask = question(model, processor, "longitudinal_progress", len(pixels))
    grid = model.config.patch_grid
    before = gradient_x_input(ask, pixels, grid, sign="signed")
    changed = lrp(ask, pixels)
    assert float((changed / model.config.patch_size**2 - before).abs().max()) > 0.1 * float(before.abs().max())
    own = model.projector.norm.__dict__["forward"] = model.projector.norm.forward
    with pytest.raises(AttributeError), lrp_rules(model):
        model.encode_tiles(None)  # type: ignore[arg-type]
    assert model.projector.norm.__dict__.pop("forward") is own
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]
    assert torch.equal(gradient_x_input(ask, pixels, grid, sign="signed"), before)
    assert all(p.grad is None for p in model.parameters())


def test_one_at_a_time(loaded: Any) -> None:
    model, _, _ = loaded
    with lrp_rules(model), pytest.raises(RuntimeError, match="open in this process"):
        lrp_rules(model).__enter__()
    with lrp_rules(model):
        pass
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_other_attention_is_refused(loaded: Any) -> None:
    model, _, _ = loaded
    model.set_attention("sdpa")
    try:
        with pytest.raises(
            ConfigError, match=r"vision tower's attention 'sdpa'; call model.set_attention\('vla_ray'\)"
        ):
            lrp_rules(model).__enter__()
    finally:
        model.set_attention(IMPLEMENTATION)
