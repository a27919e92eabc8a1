"""Gradient maps on functions whose attributions are known, and on the bundled driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vla_ray.errors import TargetError
from vla_ray.explain.gradients import gradient_x_input, input_gradient, integrated_gradients, patch_mean
from vla_ray.explain.question import Answer, Ask, Question
from vla_ray.models.simlingo import load_model, load_processor
from vla_ray.models.simlingo.config import read_config
from vla_ray.models.simlingo.processing import normalise
from vla_ray.targets import Spline, parse_targets

TILES, SIDE, GRID = 2, 6, 3
CELL = (SIDE // GRID) ** 2


def ask_of(function: Callable[[Tensor], Tensor]) -> Ask:
    """An Ask whose scalar is a function of [N, T, 3, S, S]; it has no trajectory."""
    return lambda pixels: Answer(
        pixels.new_zeros(len(pixels), 20, 2), pixels.new_zeros(len(pixels), 10, 2), function(pixels)
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def pixels() -> Tensor:
    return random(TILES, 3, SIDE, SIDE)


@pytest.fixture
def baseline() -> Tensor:
    return random(TILES, 3, SIDE, SIDE, seed=1)


@pytest.fixture
def weights() -> Tensor:
    return random(TILES, 3, SIDE, SIDE, seed=2)


def cell_sums(values_T3SS: Tensor) -> Tensor:
    parts = values_T3SS.sum(1).reshape(TILES, GRID, SIDE // GRID, GRID, SIDE // GRID)
    return parts.sum((2, 4))


def test_cells_are_squares_of_the_tile() -> None:
    tile = torch.zeros(1, SIDE, SIDE)
    tile[0, 2:4, 4:6] = 1
    mean = patch_mean(tile, GRID)
    assert mean[0, 1, 2] == 1
    assert mean.sum() == 1
    with pytest.raises(ValueError, match="6 pixels cannot be divided into 4 cells"):
        patch_mean(tile, 4)


def test_gradient_x_input_of_a_linear_function(pixels: Tensor, baseline: Tensor, weights: Tensor) -> None:
    ask = ask_of(lambda x: (x * weights).flatten(1).sum(1))
    signed = gradient_x_input(ask, pixels, GRID, sign="signed")
    torch.testing.assert_close(signed * CELL, cell_sums(pixels * weights))
    centred = gradient_x_input(ask, pixels, GRID, baseline, "signed")
    torch.testing.assert_close(centred * CELL, cell_sums((pixels - baseline) * weights))
    absolute = gradient_x_input(ask, pixels, GRID)
    torch.testing.assert_close(absolute * CELL, cell_sums((pixels * weights).sum(1, keepdim=True).abs()))
    assert bool((absolute > signed.abs()).any()), "pixels of a cell do not cancel"


@pytest.mark.parametrize("steps", [1, 5])
def test_integrated_gradients_are_exact_where_the_gradient_is_linear(
    steps: int, pixels: Tensor, baseline: Tensor, weights: Tensor
) -> None:
    linear = integrated_gradients(ask_of(lambda x: (x * weights).flatten(1).sum(1)), pixels, baseline, GRID, steps)
    torch.testing.assert_close(linear.values_TGG, cell_sums((pixels - baseline) * weights))
    quadratic = integrated_gradients(
        ask_of(lambda x: (x * x * weights).flatten(1).sum(1)), pixels, baseline, GRID, steps
    )
    torch.testing.assert_close(quadratic.values_TGG, cell_sums((pixels**2 - baseline**2) * weights))
    for result in (linear, quadratic):
        assert result.completeness_error < 1e-12
        assert result.steps == steps
        assert float(result.values_TGG.sum()) == pytest.approx(result.difference, rel=1e-12)


def test_steps_double_until_complete(pixels: Tensor, baseline: Tensor) -> None:
    ask = ask_of(lambda x: torch.tanh(x.flatten(1).sum(1)))
    rough = integrated_gradients(ask, pixels, baseline, GRID, steps=1, max_steps=1)
    fine = integrated_gradients(ask, pixels, baseline, GRID, steps=1, tolerance=1e-3, max_steps=4096)
    assert rough.steps == 1
    assert rough.completeness_error > 0.05
    assert fine.completeness_error < 1e-3
    assert fine.steps & (fine.steps - 1) == 0, "a power of two"
    half = integrated_gradients(ask, pixels, baseline, GRID, steps=fine.steps // 2, max_steps=fine.steps // 2)
    assert half.completeness_error >= 1e-3, "it stopped at the first that was good enough"


def test_an_incomplete_result_says_so(pixels: Tensor, baseline: Tensor) -> None:
    """A step has no gradient anywhere, so nothing of the difference is attributed."""
    height = float(pixels.sum() + baseline.sum()) / 2
    up = 1.0 if float(pixels.sum()) > height else -1.0
    ask = ask_of(lambda x: (x.flatten(1).sum(1) > height).to(x.dtype) + 0 * x.flatten(1).sum(1))
    result = integrated_gradients(ask, pixels, baseline, GRID, steps=2, max_steps=8)
    assert result.difference == up
    assert result.completeness_error == pytest.approx(1)
    assert result.steps == 8
    assert float(result.values_TGG.abs().sum()) == 0


def test_a_constant_is_complete_and_zero(pixels: Tensor, baseline: Tensor) -> None:
    result = integrated_gradients(ask_of(lambda x: 3 + 0 * x.flatten(1).sum(1)), pixels, baseline, GRID)
    assert (result.difference, result.completeness_error, result.steps) == (0, 0, 32)
    assert float(result.values_TGG.abs().sum()) == 0


def test_what_has_no_gradient_is_refused(pixels: Tensor, baseline: Tensor) -> None:
    with pytest.raises(TargetError, match="has no gradient"):
        gradient_x_input(ask_of(lambda x: x.detach().flatten(1).sum(1)), pixels, GRID)
    with pytest.raises(TargetError, match="not finite"):
        input_gradient(ask_of(lambda x: x.flatten(1).sum(1).abs().sqrt()), torch.zeros_like(pixels)[None])
    with pytest.raises(TargetError, match="nan at the picture"):
        integrated_gradients(ask_of(lambda x: x.flatten(1).sum(1).log()), -pixels.abs(), pixels.abs(), GRID)


@pytest.fixture(scope="module")
def driver(repo: Any) -> tuple[Question, Tensor, Tensor]:
    """How far a driver before a red light goes: the question, its picture, and that picture blurred."""
    root = repo / "checkpoints/simlingo-tiny"
    config = read_config(root / ".hydra/config.yaml")
    processor = load_processor(config)
    model = load_model(config, root / "checkpoints/epoch=013.ckpt/pytorch_model.pt", processor.placeholder_id)
    rgb = np.asarray(Image.open(repo / "datasets/demo_drive/red_light/images/frame_0003.png").convert("RGB"))
    tiles, _ = processor.tiler(rgb)
    pixels = normalise(tiles, model.device)
    prompt = processor.prompt(len(tiles), 5.0, None)
    batch = processor.batch([prompt], [len(tiles)])
    with torch.no_grad():
        embeds = model.embed_prompt(batch, model.encode_tiles(pixels), processor.image_token_id)
        text = model.generate(embeds, batch.mask_BP, processor.eos_id)[0]
    (target,) = parse_targets("action", ["longitudinal_progress"])
    blurred = torch.nn.functional.avg_pool2d(pixels, 41, stride=1, padding=20, count_include_pad=False)
    return Question(model, processor, prompt, text, target, Spline()), pixels, blurred


def test_on_the_driver_the_error_falls_with_steps(driver: tuple[Question, Tensor, Tensor]) -> None:
    question, pixels, blurred = driver
    grid = question.model.config.patch_grid
    errors = [
        integrated_gradients(question, pixels, blurred, grid, steps, max_steps=steps).completeness_error
        for steps in (1, 4, 32)
    ]
    assert errors[0] > errors[1] > errors[2], errors
    assert errors[2] < 0.05
    assert all(not p.requires_grad and p.grad is None for p in question.model.parameters())


def test_on_the_driver_batches_do_not_matter(driver: tuple[Question, Tensor, Tensor]) -> None:
    question, pixels, blurred = driver
    grid = question.model.config.patch_grid
    one, many = (
        integrated_gradients(question, pixels, blurred, grid, 6, max_steps=6, batch_size=size) for size in (1, 4)
    )
    assert one.values_TGG.shape == (len(pixels), grid, grid)
    assert float((one.values_TGG - many.values_TGG).abs().max() / one.values_TGG.abs().max()) < 1e-4
    assert one.completeness_error == pytest.approx(many.completeness_error, abs=1e-4)
