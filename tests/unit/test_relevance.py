"""Relevance folded in backward equals the product of full matrices, for every kind, mask, and precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel, Qwen2Config, Qwen2Model

from vla_ray.attention import IMPLEMENTATION, AttentionRecorder
from vla_ray.attention.relevance import Chain, RelevanceTape, fold, sum_series
from vla_ray.attention.watch import AttentionCall

KINDS = ("positive", "negative", "signed", "absolute", "attention")
# What each kind is folded by: rollout for attention, relevancy for the others; and the rules without a product.
CHAINS = {
    **{kind: Chain(kind, "average" if kind == "attention" else "product") for kind in KINDS},  # type: ignore[arg-type]
    "attention_mean": Chain("attention", "mean"),
    "attention_last": Chain("attention", "last"),
    "positive_mean": Chain("positive", "mean"),
    "signed_series": Chain("signed", "series"),
}
SCALE = 0.37  # of a series


def reduce_heads(kind: str, p: Tensor, dp: Tensor) -> Tensor:
    weighted = {
        "positive": (p * dp).clamp_min(0),
        "negative": (-p * dp).clamp_min(0),
        "signed": p * dp,
        "absolute": (p * dp).abs(),
        "attention": p,
    }
    return weighted[kind].mean(1)


def product_row(chain: Chain, weights: Tensor, p: list[Tensor], dp: list[Tensor]) -> Tensor:
    """w^T R of full matrices [B,H,N,N], first layer first, R built up in forward order."""
    eye = torch.eye(p[0].shape[-1], dtype=p[0].dtype)
    total = eye.expand(p[0].shape[0], -1, -1)
    layers = [reduce_heads(chain.weight, one, gradient) for one, gradient in zip(p, dp, strict=True)]
    for a in layers:
        a = SCALE * a if chain.rule == "series" else a
        total = (0.5 * (eye + a) if chain.rule == "average" else eye + a) @ total
    if chain.rule == "mean":
        total = torch.stack(layers).mean(0)
    elif chain.rule == "last":
        total = layers[-1]
    return torch.einsum("bi,bij->bj", weights, total)


def language_model() -> Qwen2Model:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return Qwen2Model(config).eval().requires_grad_(False)


def vision_model() -> InternVLVisionModel:
    torch.manual_seed(1)
    config = InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=[42, 42],
        patch_size=[14, 14],
        initializer_range=0.2,
        layer_scale_init_value=1.0,
    )
    return InternVLVisionModel(config).eval().requires_grad_(False)


def hidden(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    if isinstance(model, InternVLVisionModel):
        return model.encoder(x).last_hidden_state
    assert mask is not None
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return model(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state


def both(model: nn.Module, x: Tensor, mask: Tensor | None, seed: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows of every kind, folded and from full matrices, for a scalar that differs between samples."""
    direction = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(3)).to(x.dtype)

    def scalar(h: Tensor) -> Tensor:
        return ((h @ direction) * seed.to(h.dtype)).square().sum()

    model.set_attn_implementation(IMPLEMENTATION)
    leaf = x.clone().requires_grad_()
    tape = RelevanceTape({"tower": model}, {"tower": CHAINS})
    with tape:
        y = scalar(hidden(model, leaf, mask))
    tape.start(tower=dict.fromkeys(CHAINS, seed))
    torch.autograd.grad(y, leaf)
    with AttentionRecorder({"tower": model}) as recorder:
        y = scalar(hidden(model, x.clone().requires_grad_(), mask))
    gradients, _ = recorder.gradients(y)
    p = [q.detach() for q in recorder.probabilities.values()]
    folded = tape.rows("tower")
    scales = torch.full((len(x),), SCALE, dtype=torch.float64)
    folded = {name: sum_series(row, scales) if CHAINS[name].rule == "series" else row for name, row in folded.items()}
    return folded, {
        name: product_row(chain, seed.to(p[0].dtype), p, list(gradients.values())) for name, chain in CHAINS.items()
    }


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("masking", ["none", "causal", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_fold_is_exact_in_float64(masking: str, kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    query, gradient = (torch.randn(2, 6, 150, 8, dtype=torch.float64, generator=g) for _ in range(2))
    key, value = (torch.randn(2, 2, 150, 8, dtype=torch.float64, generator=g) for _ in range(2))
    r = torch.rand(2, 150, dtype=torch.float64, generator=g)
    mask = torch.ones(2, 1, 150, 150, dtype=torch.bool)
    if masking != "none":
        mask = mask.tril()
    if masking == "padded":
        mask[1, :, :, :40] = False
        r[1, :40] = 0
    call = AttentionCall(query, key, value, mask if masking == "padded" else None, masking == "causal", 0.3)
    folded = fold(call, gradient, [(kind, r[None])])[0][0]
    k, v = (x.repeat_interleave(3, 1) for x in (key, value))
    scores = (query @ k.transpose(-1, -2) * 0.3).masked_fill(~mask, float("-inf"))
    p = scores.softmax(-1).nan_to_num(0.0)
    expected = torch.einsum("bi,bij->bj", r, reduce_heads(kind, p, gradient @ v.transpose(-1, -2)))
    assert error(folded, expected) < 1e-10


def test_vision_tower_in_float64() -> None:
    model = vision_model().double()
    seed = torch.rand(3, 10, dtype=torch.float64)
    folded, expected = both(model, torch.randn(3, 10, 32, dtype=torch.float64), None, seed)
    assert {name: error(folded[name], expected[name]) < 1e-10 for name in CHAINS} == dict.fromkeys(CHAINS, True)


@pytest.mark.parametrize("padding", [0, 4])
def test_grouped_causal_decoder(padding: int) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :padding] = 0
    seed = torch.zeros(2, 12)
    seed[:, -3:] = torch.rand(2, 3)
    folded, expected = both(language_model(), torch.randn(2, 12, 64), mask, seed)
    for kind in CHAINS:
        assert error(folded[kind], expected[kind]) < 1e-4, kind
    assert float(folded["positive"][1, :padding].abs().sum()) == 0, "padding gets no relevance"


def test_batched_equals_single() -> None:
    model, x = language_model(), torch.randn(2, 12, 64)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    seed = torch.zeros(2, 12)
    seed[:, -2:] = 0.5
    together, _ = both(model, x, mask, seed)
    alone, _ = both(model, x[1:, 5:], mask[1:, 5:], seed[1:, 5:])
    for kind in CHAINS:
        assert error(together[kind][1, 5:], alone[kind][0]) < 1e-4, kind


def test_bfloat16_ranks_like_float32() -> None:
    x, seed = torch.randn(1, 12, 64), torch.zeros(1, 12)
    seed[:, -3:] = 1 / 3
    mask = torch.ones(1, 12, dtype=torch.long)
    exact, _ = both(language_model(), x, mask, seed)
    rough, _ = both(language_model().bfloat16(), x.bfloat16(), mask, seed)
    ranks = [r["positive"][0].argsort().argsort().float() for r in (exact, rough)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.99


def test_towers_follow_each_other_and_targets_do_not_mix() -> None:
    """The vision tower is seeded by the finished rows of the language model; a second target starts afresh."""
    vision, language = vision_model(), language_model()
    join = torch.nn.Linear(32, 64)
    for model in (vision, language):
        model.set_attn_implementation(IMPLEMENTATION)
    leaf = torch.randn(1, 10, 32, requires_grad=True)
    tape = RelevanceTape(
        {"vision": vision, "language": language},
        {"vision": {"positive": Chain("positive")}, "language": {"positive": Chain("positive")}},
    )
    with tape:
        tokens = join(hidden(vision, leaf, None)[:, 1:])
        h = hidden(language, tokens, torch.ones(1, 9, dtype=torch.long))
    results = []
    for row in (8, 7, 8):
        seed = torch.zeros(1, 9)
        seed[:, row] = 1
        tape.start(
            language={"positive": seed},
            vision=lambda: {k: torch.nn.functional.pad(r, (1, 0)) for k, r in tape.rows("language").items()},
        )
        torch.autograd.grad(h[:, row].sum(), leaf, retain_graph=True)
        results.append({tower: tape.rows(tower)["positive"] for tower in ("language", "vision")})
    assert float(results[1]["language"][0, 8]) == 0, "causal: a later token is not looked at"
    assert torch.equal(results[0]["vision"], results[2]["vision"])
    assert not torch.allclose(results[0]["vision"], results[1]["vision"])
    assert float(results[0]["vision"].sum()) >= float(results[0]["language"].sum()) > 1


def test_without_a_tape_or_a_seed_nothing_is_folded() -> None:
    model = vision_model()
    model.set_attn_implementation(IMPLEMENTATION)
    x = torch.randn(1, 10, 32, requires_grad=True)
    tape = RelevanceTape({"tower": model}, {})
    hidden(model, x, None).sum().backward()
    with tape:
        y = hidden(model, x, None).sum()
        with pytest.raises(RuntimeError, match="another RelevanceTape"), RelevanceTape({}, {}):
            pass
    y.backward()
    with pytest.raises(KeyError):
        tape.rows("tower")
    with pytest.raises(ValueError, match="unknown relevance 'positiv'"):
        Chain("positiv")  # type: ignore[arg-type]
