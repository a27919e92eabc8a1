"""Constrained decoding: exactly the greedy path, the same alone and in company."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.decode import decode
from vla_ray.models.paligemma.inputs import normalise, positions
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.processing import Processor
from vla_ray.models.paligemma.tiny import build_tiny

TOKENIZER = ActionTokenizer()
TEXTS = ("stop", "turn left into the side corridor", "go through the green door, then wait here", "turn right")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(directory: Path) -> Processor:
    return Processor.from_directory(directory)


@pytest.fixture(scope="module")
def policy(directory: Path, processor: Processor) -> ActionPolicy:
    """Sharpened a little by training, so that no two bins tie."""
    policy = ActionPolicy.from_pretrained(directory, TOKENIZER)
    bins = np.random.default_rng(1).integers(0, 256, (len(TEXTS), 16))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        policy(**batch(processor, bins=bins)).loss.backward()
        optimizer.step()
    return policy.eval()


def pictures(side: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (len(TEXTS), side, side, 3), dtype=np.uint8))


def batch(
    processor: Processor, rows: slice = slice(None), bins: np.ndarray | None = None, multiple: int = 1
) -> dict[str, Tensor]:
    prompts = [processor.prompt_ids(t) for t in TEXTS[rows]]
    collated = processor.collate(pictures(processor.image_size)[rows], prompts, bins, multiple)
    return {name: torch.from_numpy(array) for name, array in collated.items()}


def test_batched_equals_single(policy: ActionPolicy, processor: Processor) -> None:
    together = policy.decode(**batch(processor))
    for row in range(len(TEXTS)):
        alone = decode(policy, **batch(processor, slice(row, row + 1)))
        padded = decode(policy, **batch(processor, slice(row, row + 1), multiple=64))
        assert torch.equal(alone.bins[0], together.bins[row])
        assert torch.equal(alone.bins, padded.bins)
        for one, many in ((alone, together.expected[row]), (padded, together.expected[row])):
            assert torch.allclose(one.expected[0], many, atol=1e-3)
        assert torch.allclose(alone.probability[0], together.probability[row], atol=1e-5)
        assert torch.allclose(alone.entropy[0], together.entropy[row], atol=1e-5)


@torch.no_grad()
def test_it_is_what_teacher_forcing_says(policy: ActionPolicy, processor: Processor) -> None:
    """Fed with its own actions, without a cache, the model finds each of them likeliest."""
    found = policy.decode(**batch(processor))
    forced = policy(**batch(processor, bins=found.bins.numpy()))
    assert int(forced.correct) == forced.tokens == found.bins.numel()
    hidden = policy.hidden(**batch(processor, bins=found.bins.numpy()))
    p = policy.action_logits(hidden[:, -18:-2]).softmax(-1)
    assert torch.allclose(p.amax(-1), found.probability, atol=1e-5)
    assert torch.allclose((p * torch.arange(256.0)).sum(-1), found.expected, atol=1e-2)
    assert torch.allclose(torch.special.entr(p).sum(-1), found.entropy, atol=1e-4)


@torch.no_grad()
def test_it_equals_generate_of_transformers(policy: ActionPolicy, processor: Processor) -> None:
    b = batch(processor)
    first = policy.first_action_id
    generated = policy.model.generate(
        input_ids=b["ids"],
        pixel_values=normalise(b["pixels"]),
        attention_mask=b["mask"],
        token_type_ids=b["types"],
        max_new_tokens=16,
        min_new_tokens=16,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda _, __: list(range(first, first + 256)),
    )
    assert torch.equal(generated[:, b["ids"].shape[1] :] - first, policy.decode(**b).bins)


def test_shapes_and_ranges(policy: ActionPolicy, processor: Processor) -> None:
    found = policy.decode(**batch(processor))
    assert [x.shape for x in found] == [(len(TEXTS), 16)] * 4
    assert found.bins.dtype == torch.int64
    assert ((found.bins >= 0) & (found.bins < 256)).all()
    assert ((found.probability > 1 / 256) & (found.probability <= 1)).all()
    assert ((found.entropy >= 0) & (found.entropy <= math.log(256))).all()
    assert TOKENIZER.decode(found.expected.numpy()).shape == (len(TEXTS), 8, 2)


def test_bfloat16(policy: ActionPolicy, processor: Processor) -> None:
    exact = policy.decode(**batch(processor))
    with torch.autocast("cpu", torch.bfloat16):
        found = policy.decode(**batch(processor))
    assert found.probability.dtype == torch.float32
    assert float((found.bins == exact.bins).float().mean()) > 0.9


def test_positions_start_at_the_first_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions(mask).tolist() == [[1, 1, 1, 2, 3], [1, 2, 3, 4, 5]]
