"""The recording attention equals transformers' own, padding included, and costs nothing while closed."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from vla_ray.attention import IMPLEMENTATION, AttentionRecorder, RelevanceTape
from vla_ray.attention.watch import attention


@pytest.fixture
def model() -> Qwen2Model:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Qwen2Model(config).eval().requires_grad_(False)


def run(model: Qwen2Model, x: torch.Tensor, mask: torch.Tensor, name: str) -> torch.Tensor:
    model.set_attn_implementation(name)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return model(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state


@pytest.mark.parametrize("padding", [0, 3])
def test_equals_eager_and_sdpa(model: Qwen2Model, padding: int) -> None:
    x = torch.randn(2, 7, 32)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :padding] = 0
    with AttentionRecorder({"language": model}) as recorder:
        ours = run(model, x, mask, IMPLEMENTATION)
    closed = run(model, x, mask, IMPLEMENTATION)
    for other in (run(model, x, mask, "eager"), run(model, x, mask, "sdpa"), closed):
        assert torch.allclose(ours[mask.bool()], other[mask.bool()], atol=1e-5)
    assert list(recorder.probabilities) == ["language_block_0", "language_block_1"]
    p = recorder.probabilities["language_block_0"]
    assert p.shape == (2, 4, 7, 7)
    assert torch.allclose(p[0].sum(-1), torch.ones(4, 7), atol=1e-6)
    assert float(p[0].triu(1).abs().max()) == 0, "causal"
    assert float(p[1, :, :, :padding].abs().sum()) == 0, "nobody looks at padding"
    assert float(p[1, :, :padding].abs().sum()) == 0, "padding looks at nobody"


def test_gradients_are_those_of_a_finite_difference(model: Qwen2Model) -> None:
    model = model.double()
    x = torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True)
    mask, weights = torch.ones(1, 5, dtype=torch.long), torch.randn(32, dtype=torch.float64)
    with AttentionRecorder({"language": model}) as recorder:
        y = (run(model, x, mask, IMPLEMENTATION)[0, -1] * weights).sum()
    gradients, (by_input,) = recorder.gradients(y, [x])
    step = 1e-2  # the model's norms round to float32
    delta = step * by_input / by_input.norm()
    with torch.no_grad():
        up, down = ((run(model, x + d, mask, "eager")[0, -1] * weights).sum() for d in (delta, -delta))
    assert float((up - down) / (2 * step)) == pytest.approx(float(by_input.norm()), rel=1e-3)
    assert float(gradients["language_block_1"][0, :, :-1].abs().max()) == 0, (
        "only the last row reaches y in the last block"
    )
    assert float(gradients["language_block_0"].abs().max()) > 0


def test_a_scalar_that_reads_no_block_has_zero_gradients(model: Qwen2Model) -> None:
    x = torch.randn(1, 4, 32, requires_grad=True)
    with AttentionRecorder({"language": model}) as recorder:
        run(model, x, torch.ones(1, 4, dtype=torch.long), IMPLEMENTATION)
    gradients, _ = recorder.gradients(x.sum())
    assert all(float(g.abs().max()) == 0 for g in gradients.values())


def test_misuse_is_refused(model: Qwen2Model) -> None:
    x, mask = torch.randn(1, 4, 32), torch.ones(1, 4, dtype=torch.long)
    with AttentionRecorder({"language": model}):
        run(model, x, mask, IMPLEMENTATION)
        with pytest.raises(RuntimeError, match="ran twice"):
            run(model, x, mask, IMPLEMENTATION)
        with pytest.raises(RuntimeError, match="another AttentionRecorder"), AttentionRecorder({"language": model}):
            pass
        with pytest.raises(RuntimeError, match="another AttentionRecorder"), RelevanceTape({"language": model}, {}):
            pass
    q = torch.randn(1, 2, 3, 4)
    plain = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch.equal(attention(model.layers[0].self_attn, q, q, q, None)[0], plain.transpose(1, 2)), "closed: SDPA"
