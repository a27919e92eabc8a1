"""The original definitions, by explicit products of whole matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vla_ray.explain.original import original_flow, original_generic, original_raw, original_rollout

TILES, HEADS, GRID, BLOCKS = 3, 2, 3, 4
TOKENS = 1 + GRID * GRID
EYE = torch.eye(TOKENS)


@pytest.fixture
def blocks() -> tuple[list[Tensor], list[Tensor]]:
    """Attention and gradients of a few blocks, as `full` payloads store them: bfloat16 rows do not quite sum to 1."""
    generator = torch.Generator().manual_seed(0)
    shape = (TILES, HEADS, TOKENS, TOKENS)
    attention = [torch.randn(shape, generator=generator).mul(2).softmax(-1).bfloat16() for _ in range(BLOCKS)]
    return attention, [torch.randn(shape, generator=generator) for _ in range(BLOCKS)]


def rollout_matrix(a: Tensor, _: Tensor) -> Tensor:
    mixed = a.mean(0) + EYE
    return mixed / mixed.sum(-1, keepdim=True)


MATRICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rollout": rollout_matrix,
    "flow": lambda a, _: a.mean(0),
    "generic": lambda a, g: EYE + (a * g).clamp_min(0).mean(0),
}


def ours(name: str, attention: list[Tensor], gradients: list[Tensor]) -> Tensor:
    if name == "generic":
        return original_generic(attention, gradients)
    return {"raw": original_raw, "rollout": original_rollout, "flow": original_flow}[name](attention)


@pytest.mark.parametrize("name", MATRICES)
def test_equals_the_product_of_matrices_for_every_tile(name: str, blocks: tuple[list[Tensor], list[Tensor]]) -> None:
    attention, gradients = blocks
    maps = ours(name, attention, gradients)
    assert maps.shape == (TILES, GRID, GRID)
    assert maps.dtype == torch.float32
    for tile in range(TILES):
        product = EYE
        for a, g in zip(attention, gradients, strict=True):
            product = MATRICES[name](a[tile].float(), g[tile]) @ product
        torch.testing.assert_close(maps[tile].flatten(), product[1:, 1:].sum(0))


def test_raw_is_the_last_block_alone(blocks: tuple[list[Tensor], list[Tensor]]) -> None:
    attention, _ = blocks
    expected = attention[-1].float().mean(1)[:, 1:, 1:].sum(1).view(TILES, GRID, GRID)
    torch.testing.assert_close(original_raw(attention), expected)
    assert torch.equal(original_raw([torch.zeros_like(attention[0]), attention[-1]]), original_raw(attention))


@pytest.mark.parametrize("name", ["raw", *MATRICES])
def test_each_tile_is_its_own(name: str, blocks: tuple[list[Tensor], list[Tensor]]) -> None:
    attention, gradients = blocks
    before = ours(name, attention, gradients)
    changed = [a.clone() for a in attention]
    for a in changed:
        a[1] = a[1].flip(-1)
    after = ours(name, changed, gradients)
    assert not torch.allclose(before[1], after[1])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])


def test_rollout_keeps_its_mass_and_generic_starts_from_uniform(blocks: tuple[list[Tensor], list[Tensor]]) -> None:
    attention, gradients = blocks
    # Rows that nobody looks at keep their identity: CLS, blanked as a key, takes nothing from the patches.
    blind = [a.float() for a in attention]
    for a in blind:
        a[..., 0] = 0
    assert original_rollout(blind).sum((1, 2)).tolist() == pytest.approx([GRID * GRID] * TILES, rel=1e-5)
    nothing = original_generic(attention, [torch.zeros_like(g) for g in gradients])
    assert torch.equal(nothing, torch.ones_like(nothing))


def test_generic_needs_a_gradient_for_every_block(blocks: tuple[list[Tensor], list[Tensor]]) -> None:
    attention, gradients = blocks
    with pytest.raises(ValueError, match="4 blocks of attention, 3 of gradients"):
        original_generic(attention, gradients[1:])
