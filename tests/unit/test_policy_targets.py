"""Scalars of an action policy: their values, what their gradients touch, and how they are named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vla_ray.errors import TargetError
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.targets import acting_direction, policy_scalar, policy_targets
from vla_ray.targets.policy import tokens_read

H, K, B = 3, 8, 2
TOKENIZER = ActionTokenizer(num_bins=K, num_steps=H)
CENTERS = torch.from_numpy(TOKENIZER.centers())


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(B, 2 * H, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def value(name: str, logits: Tensor) -> Tensor:
    (target,) = policy_targets(name, H)
    read = tokens_read(target, H)
    return policy_scalar(target, logits[:, read], logits.argmax(-1)[:, read], CENTERS)


def test_the_end_point_is_what_the_tokenizer_makes_of_the_expected_bins(logits: Tensor) -> None:
    expected = TOKENIZER.decode((logits.softmax(-1) @ torch.arange(K, dtype=torch.float64)).numpy()).sum(1)
    assert value("forward_progress", logits).tolist() == pytest.approx(expected[:, 0].tolist(), abs=1e-6)
    assert value("lateral_offset", logits).tolist() == pytest.approx(expected[:, 1].tolist(), abs=1e-6)
    for axis, whole in (("x", "forward_progress"), ("y", "lateral_offset")):
        steps = sum(value(f"{axis}_{k}", logits) for k in range(H))
        assert torch.allclose(torch.as_tensor(steps), value(whole, logits)), "the end point is the sum of its steps"


def test_a_certain_policy_expects_what_it_does(logits: Tensor) -> None:
    certain = torch.nn.functional.one_hot(logits.argmax(-1), K).double() * 1e3
    end = TOKENIZER.decode(logits.argmax(-1).numpy()).sum(1)
    assert value("lateral_offset", certain).tolist() == pytest.approx(end[:, 1].tolist(), abs=1e-6)
    assert value("token_4", certain).tolist() == pytest.approx([0.0, 0.0])


def test_token_and_side(logits: Tensor) -> None:
    log_p = logits.log_softmax(-1)
    assert torch.allclose(value("token_2", logits), log_p[:, 2].amax(-1))
    p_left = logits[:, 1].softmax(-1)[:, CENTERS[1] > 0].sum(-1)
    assert torch.allclose(value("side", logits), (p_left / (1 - p_left)).log())
    mirrored = logits.clone()
    mirrored[:, 1] = logits[:, 1].flip(-1)
    assert torch.allclose(value("side", mirrored), -value("side", logits))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("lateral_offset", (1, 3, 5)),
        ("forward_progress", (0, 2, 4)),
        ("side", (1,)),
        ("y_2", (5,)),
        ("x_1", (2,)),
        ("token_3", (3,)),
    ],
)
def test_gradients_touch_the_tokens_that_are_read_and_are_right(
    name: str, read: tuple[int, ...], logits: Tensor
) -> None:
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(value(name, logits).sum(), logits)
    assert tuple(gradient.abs().sum((0, 2)).nonzero().flatten().tolist()) == read
    assert torch.allclose(gradient.sum(-1), torch.zeros(B, 2 * H, dtype=torch.float64)), "logits have no zero point"
    step = 1e-6 * torch.randn_like(logits)
    change = value(name, (logits + step).detach()) - value(name, logits.detach())
    assert torch.allclose(change, (gradient * step).sum((1, 2)), rtol=1e-3, atol=1e-12)


def test_names_are_parsed_in_order_and_once() -> None:
    found = policy_targets("side, token_5,lateral_offset,side", H)
    assert [t.name for t in found] == ["side", "token_5", "lateral_offset"]
    assert {t.mode for t in found} == {"action"}
    assert [t.index for t in found] == [1, 5, None]


@pytest.mark.parametrize("name", ["token_6", "y_3", "z_0", "token_", "token_-1", "latral_offset", "curv_energy"])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        TargetError, match=r"unknown target.*3 steps; known: lateral_offset.*y_2, token_0 \.\.\. token_5"
    ):
        policy_targets([name], H)


def test_a_typo_gets_a_proposal_and_nothing_an_answer() -> None:
    with pytest.raises(TargetError, match="Did you mean 'lateral_offset'"):
        policy_targets("latral_offset", H)
    with pytest.raises(TargetError, match="no target is named"):
        policy_targets(" , ", H)


def test_what_acts() -> None:
    for name in ("lateral_offset", "side", "y_3"):
        assert acting_direction(name, 0.4) == "positive"
        assert acting_direction(name, -0.4) == "negative", "what pushes it to the side where it goes"
    for name in ("forward_progress", "x_0"):
        assert acting_direction(name, 3.0) == "negative", "what holds it back, as for a driver's progress"
    assert acting_direction("token_3", -5.0) == "positive"
