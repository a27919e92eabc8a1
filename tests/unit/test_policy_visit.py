"""Relevance of an action policy: folded online it equals explicit matrices of every layer, alone and in company."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vla_ray.attention import IMPLEMENTATION
from vla_ray.attention.watch import AttentionCall, Watcher, attention_modules, sdpa
from vla_ray.data.sample_refs import SampleRef
from vla_ray.data.tiles import Tiler
from vla_ray.errors import TargetError
from vla_ray.explain.chain import STRENGTH
from vla_ray.explain.folds import FOLDS
from vla_ray.explain.gradients import gradient_x_input
from vla_ray.explain.methods import parse_methods
from vla_ray.explain.question import Answer
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.forced import embed_patches, encode_patches, hidden_states, with_actions
from vla_ray.models.paligemma.inputs import normalise
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.processing import Processor
from vla_ray.models.paligemma.tiny import build_tiny
from vla_ray.models.paligemma.tokenizer_file import NAME, save_tokenizer
from vla_ray.schema import DEGENERATE, MAPS, OK
from vla_ray.stages.explain_policy import PolicyExplainer, PolicyExplainSpec, policy_methods
from vla_ray.stages.maps import read_map
from vla_ray.stages.policy import PolicySpec
from vla_ray.stages.policy_visit import PolicyVisit
from vla_ray.stages.work import Loaded, WorkFrame
from vla_ray.storage.files import Location
from vla_ray.storage.fragments import read_rows
from vla_ray.targets import policy_scalar, policy_targets
from vla_ray.targets.policy import tokens_read

TOKENIZER = ActionTokenizer(num_bins=32, num_steps=3)
TEXTS = ("stop", "go through the green door, then wait here", "turn left")
PICTURES = list(np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8))
TARGETS = policy_targets("lateral_offset,forward_progress,side,token_3", 3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights larger than at the start of training, so that attention is no mean over everything."""
    path = build_tiny(tmp_path_factory.mktemp("tiny"))
    policy = ActionPolicy.from_pretrained(path, TOKENIZER)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "proj" in name and weight.dim() == 2:
                weight.mul_(4)
    policy.model.save_pretrained(path)
    save_tokenizer(Location.of(path) / NAME, TOKENIZER, Processor.from_directory(path).ids.first_action)
    return path


@pytest.fixture(scope="module")
def processor(directory: Path) -> Processor:
    return Processor.from_directory(directory)


@pytest.fixture(scope="module", params=["autoregressive", "parallel"])
def policy(directory: Path, request: pytest.FixtureRequest) -> ActionPolicy:
    found = ActionPolicy.from_pretrained(directory, TOKENIZER, decoding=request.param).requires_grad_(False)
    found.model.set_attn_implementation(IMPLEMENTATION)
    return found


def visit(
    policy: ActionPolicy, processor: Processor, *which: int, folds: Any = tuple(FOLDS), **more: Any
) -> PolicyVisit:
    pictures, texts = [PICTURES[i] for i in which], [TEXTS[i] for i in which]
    return PolicyVisit(policy, processor, TOKENIZER, pictures, texts, folds, **more)


def batch(processor: Processor, *which: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = processor.collate([PICTURES[i] for i in which], [processor.prompt_ids(TEXTS[i]) for i in which])
    pixels, ids, mask, types = (torch.from_numpy(found[name]) for name in ("pixels", "ids", "mask", "types"))
    return pixels, ids, mask, types


def prefix_mask(mask_BL: Tensor, types_BL: Tensor) -> Tensor:
    """[B, L, L] by the definition: prompts see each other, actions what came before, nobody sees padding."""
    count, length = mask_BL.shape
    allowed = torch.zeros(count, length, length, dtype=torch.bool)
    for b in range(count):
        for q in range(length):
            for k in range(length):
                both_prompt = types_BL[b, q] == 0 and types_BL[b, k] == 0
                allowed[b, q, k] = bool(mask_BL[b, k]) and (bool(both_prompt) or k <= q)
    return allowed


class Calls(Watcher):
    """Keeps what every attention call was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[nn.Module, AttentionCall]] = []

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        self.seen.append((module, call))
        return sdpa(module, call)


@pytest.mark.parametrize("which", [(0,), (0, 1, 2)], ids=["alone", "padded"])
@torch.no_grad()
def test_it_attends_as_sdpa_does_with_the_masks_of_a_prefix_lm(
    policy: ActionPolicy, processor: Processor, which: tuple[int, ...]
) -> None:
    pixels, ids, mask, types = batch(processor, *which)
    bins = torch.randint(0, 32, (len(which), 6), generator=torch.Generator().manual_seed(1))
    asked = with_actions(policy, ids, mask, types, bins)
    with Calls() as calls:
        ours = policy.hidden(pixels, asked.ids, asked.mask, asked.types)
    policy.model.set_attn_implementation("sdpa")
    theirs = policy.hidden(pixels, asked.ids, asked.mask, asked.types)
    policy.model.set_attn_implementation(IMPLEMENTATION)
    real = asked.mask.bool()
    assert torch.allclose(ours[real], theirs[real], atol=1e-5)
    inner = policy.model.model
    towers = [attention_modules(inner.vision_tower), attention_modules(inner.language_model)]
    assert [len(t) for t in towers] == [2, 2]
    assert [m for m, _ in calls.seen] == [*towers[0], *towers[1]], "each once, first layer first"
    expected = prefix_mask(asked.mask, asked.types)
    for module, call in calls.seen:
        assert not call.causal
        if module in towers[0]:
            assert call.mask is None
        else:
            assert call.mask is not None, "without a mask it would be causal, or fully bidirectional"
            assert call.mask.dtype == torch.bool
            assert torch.equal(call.mask[:, 0][real], expected[real])


@torch.no_grad()
def test_prompts_see_each_other_and_actions_only_what_came_before(directory: Path, processor: Processor) -> None:
    policy = ActionPolicy.from_pretrained(directory, TOKENIZER, decoding="autoregressive")
    policy.model.set_attn_implementation(IMPLEMENTATION)
    pixels, ids, mask, types = batch(processor, 1)
    asked = with_actions(policy, ids, mask, types, torch.zeros(1, 6, dtype=torch.int64))
    before = policy.hidden(pixels, asked.ids, asked.mask, asked.types)
    late, early = asked.ids.clone(), asked.ids.clone()
    late[0, -2] += 5  # an action
    early[0, -8] += 5  # a word
    after = policy.hidden(pixels, late, asked.mask, asked.types)
    assert torch.equal(after[:, :-2], before[:, :-2])
    assert not torch.allclose(after[:, -1], before[:, -1])
    assert not torch.allclose(policy.hidden(pixels, early, asked.mask, asked.types)[:, :16], before[:, :16])


def test_the_forward_pass_in_pieces_is_the_policy_s_own(policy: ActionPolicy, processor: Processor) -> None:
    v = visit(policy, processor, 0, 1, 2)
    pixels, ids, mask, types = batch(processor, 0, 1, 2)
    asked = with_actions(policy, ids, mask, types, v.bins)
    whole = policy.hidden(pixels, asked.ids, asked.mask, asked.types)
    real = asked.mask.bool()
    assert torch.allclose(v.hidden[real], whole[real], atol=1e-5)
    assert torch.equal(v.logits.argmax(-1), v.bins), "the chosen bins are the likeliest where the scalars read them"


_kept: dict[int, Tensor] = {}


def _explicit(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention by its definition, its matrices kept for their gradients."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * scaling
    p = (scores if mask is None else scores.masked_fill(~mask, -1e30)).softmax(-1)
    _kept[id(module)] = p
    if p.requires_grad:
        p.retain_grad()
    return (p @ v).transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module")
def explicit() -> Iterator[str]:
    AttentionInterface.register("explicit", _explicit)
    AttentionMaskInterface.register("explicit", sdpa_mask)
    yield "explicit"
    _kept.clear()


def by_matrices(
    policy: ActionPolicy, v: PolicyVisit, processor: Processor, target: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Kind -> language row [L] and patches [N] of sample 0 alone, by full products of all matrices."""
    pixels, ids, mask, types = batch(processor, 0)
    asked = with_actions(policy, ids, mask, types, v.bins[:1])
    inner = policy.model.model
    policy.model.set_attn_implementation("explicit")
    normalised = normalise(pixels).requires_grad_()
    tokens = encode_patches(policy, embed_patches(policy, normalised))
    hidden = hidden_states(policy, tokens, asked.ids, asked.mask, asked.types)
    hidden.retain_grad()
    logits = policy.action_logits(hidden[:, asked.first : asked.first + 6])
    read = tokens_read(target, 3)
    policy_scalar(target, logits[:, read], v.bins[:1, read], torch.from_numpy(TOKENIZER.centers())).sum().backward()
    policy.model.set_attn_implementation(IMPLEMENTATION)

    def matrices(tower: nn.Module) -> list[Tensor]:
        kept = [_kept[id(m)] for m in attention_modules(tower)]
        assert all(p.grad is not None for p in kept)
        return [(p.detach() * p.grad)[0].double() for p in kept if p.grad is not None]

    language, vision = matrices(inner.language_model), matrices(inner.vision_tower)
    assert hidden.grad is not None
    rows = (hidden.detach() * hidden.grad)[0].sum(-1).abs().double()
    seed = rows / rows.sum()
    assert set(seed.nonzero().flatten().tolist()) <= {asked.first + i for i in range(6)}
    scale = STRENGTH / sum(float((seed @ a.abs().mean(0)).sum()) for a in language)

    def chain(layers: Sequence[Tensor], row: Tensor, kind: str) -> Tensor:
        total = torch.eye(len(row), dtype=torch.float64)
        for a in layers:
            a = {"positive": a.clamp_min(0), "negative": (-a).clamp_min(0), "signed": a}[kind].mean(0)
            total = total + scale * a @ total
        return row @ total

    found = {}
    for kind in ("positive", "negative", "signed"):
        row = chain(language, seed, kind)
        found[kind] = row, chain(vision, row[:16], kind)
    return found


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_folded_equals_full_products_of_explicit_matrices(
    policy: ActionPolicy, processor: Processor, explicit: str, target: Any
) -> None:
    v = visit(policy, processor, 0)
    explained = v.explain(target, keep_graph=False)
    found = v.relevance(explained, 0)
    for kind, (language, patches) in by_matrices(policy, v, processor, target).items():
        fold = f"relevancy_{kind}"
        assert found.patches[fold].shape == (1, 16)
        for ours, expected in ((found.language[fold], language), (found.patches[fold][0], patches)):
            assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-5, kind


def test_batched_equals_single_whatever_the_padding(policy: ActionPolicy, processor: Processor) -> None:
    together = visit(policy, processor, 0, 1, 2, pixels=True)
    for b in range(3):
        alone = visit(policy, processor, b, pixels=True)
        assert torch.equal(together.bins[b], alone.bins[0])
        for target in TARGETS:
            many, one = together.explain(target, keep_graph=True), alone.explain(target, keep_graph=True)
            assert float(many.scalar_B[b]) == pytest.approx(float(one.scalar_B[0]), abs=1e-5)
            ours, theirs = together.relevance(many, b), alone.relevance(one, 0)
            for fold in FOLDS:
                for part in ("language", "patches"):
                    x, y = getattr(ours, part).get(fold), getattr(theirs, part).get(fold)
                    assert x is None or float((x - y).abs().max() / y.abs().max()) < 1e-4, (b, target.name, fold, part)
            x, y = together.gradient_x_input(many, b), alone.gradient_x_input(one, 0)
            assert float((x - y).abs().max() / y.abs().max()) < 1e-4


def test_shares_say_where_the_relevance_lies(policy: ActionPolicy, processor: Processor) -> None:
    v = visit(policy, processor, 0, 1)
    explained = v.explain(TARGETS[0], keep_graph=False)
    for b in (0, 1):
        spans, length = v.spans(b), len(v.prompts[b])
        assert spans == {"image": [0, 16], "prompt": [0, 17], "text": [17, length], "queries": [length, length + 6]}
        shares = v.relevance(explained, b).shares("relevancy_positive", spans, v.seed_row(explained, b))
        assert set(shares) == {"image", "text", "prompt", "queries"}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert min(shares.values()) > 0
        assert float(v.seed_row(explained, b).sum()) == pytest.approx(1)


def test_gradient_x_input_is_that_of_the_whole_function(policy: ActionPolicy, processor: Processor) -> None:
    v = visit(policy, processor, 0, 1, folds=("raw_attention",), pixels=True)
    _, ids, mask, types = batch(processor, 1)
    for target in TARGETS:
        read = tokens_read(target, 3)

        def ask(pixels_NT3SS: Tensor, read: slice = read, target: Any = target) -> Answer:
            asked = with_actions(policy, ids, mask, types, v.bins[1:])
            tokens = encode_patches(policy, embed_patches(policy, pixels_NT3SS[:, 0]))
            hidden = hidden_states(policy, tokens, asked.ids, asked.mask, asked.types)
            logits = policy.action_logits(hidden[:, asked.first : asked.first + 6])[:, read]
            value = policy_scalar(target, logits, v.bins[1:, read], torch.from_numpy(TOKENIZER.centers()))
            return Answer(value, value, value)

        expected = gradient_x_input(ask, normalise(torch.from_numpy(PICTURES[1])[None]), 4)
        ours = v.gradient_x_input(v.explain(target, keep_graph=True), 1)
        assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-4, target.name


def test_given_actions_are_explained_in_place_of_decoded_ones(policy: ActionPolicy, processor: Processor) -> None:
    bins = torch.full((1, 6), 7)
    v = visit(policy, processor, 0, bins=bins)
    assert torch.equal(v.bins, bins)
    (target,) = policy_targets("token_2", 3)
    expected = v.logits[0, 2].detach().log_softmax(-1)[7]
    assert float(v.explain(target, keep_graph=False).scalar_B[0]) == pytest.approx(float(expected))


def test_a_certain_policy_has_nothing_to_explain(directory: Path, processor: Processor) -> None:
    policy = ActionPolicy.from_pretrained(directory, TOKENIZER).requires_grad_(False)
    policy.model.set_attn_implementation(IMPLEMENTATION)
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.add_(1).mul_(1e4).sub_(1)
    explained = visit(policy, processor, 0).explain(TARGETS[0], keep_graph=False)
    assert explained.is_degenerate(0)


def test_a_visit_is_freed_at_once(policy: ActionPolicy, processor: Processor) -> None:
    gc.disable()
    try:
        v = visit(policy, processor, 0, pixels=True)
        for target in TARGETS:
            v.explain(target, keep_graph=True)
        alive = weakref.ref(v)
        del v
        assert alive() is None
    finally:
        gc.enable()


def loaded(which: int, side: int = 56) -> Loaded:
    tiler = Tiler(side, max_tiles=1, cut_bottom=False, use_thumbnail=False)
    tiles, geometry = tiler(np.random.default_rng(which).integers(0, 256, (90, 160, 3), dtype=np.uint8))
    ref = SampleRef(f"set/val/a:{which}/0", which, "set", "/nowhere.parquet", 0, which)
    columns = {"instruction": TEXTS[which], "image_path": f"images/{ref.image_filename}"}
    return Loaded(WorkFrame(ref, "set"), tiles, geometry, columns=columns)


def test_a_replica_writes_rows_and_maps(directory: Path, tmp_path: Path) -> None:
    run = Location.of(tmp_path)
    methods = policy_methods("relevancy,relevancy_signed,rollout_lm,gradient_x_input")
    replica = PolicyExplainer(PolicyExplainSpec(run, TARGETS, methods), PolicySpec(str(directory)))
    rows = replica.process([loaded(0), loaded(1)], ["side", "lateral_offset"])
    assert {(r["frame_id"], r["target"]) for r in rows} == {
        (f"set/val/a:{i}/0", t) for i in (0, 1) for t in ("side", "lateral_offset")
    }
    assert {r["status"] for r in rows} == {OK}
    row = rows[0]
    assert (row["scene"], row["text"], row["mode"], row["tag"][:13]) == ("set", "stop", "action", "sample_000000")
    assert len(row["text_ids"]) == row["num_generated_tokens"] == 6
    ((_, table),) = read_rows(run, [row["payload_path"]], MAPS)
    maps = table.to_pylist()
    mine = [m for m in maps if (m["frame_id"], m["target"]) == (row["frame_id"], row["target"])]
    assert [m["method"] for m in mine] == ["relevancy", "relevancy_signed", "rollout_lm", "gradient_x_input"]
    for m in mine:
        heat = read_map(m)
        assert heat.values.shape == (4, 4)
        assert heat.on_picture().shape == (90, 160), "squeezed pictures are stretched back, nothing is cut off"
        assert np.isfinite(heat.on_picture()).all()
        assert m["share_cls"] is None, "SigLIP has no CLS token"
    assert mine[0]["direction"] == ("positive" if row["target_scalar"] >= 0 else "negative")
    failed = replica.failed(loaded(2), "side", "ImageError", "cannot be read")
    assert (failed["status"], failed["text"], failed["target"]) == ("failed", "turn left", "side")


def test_a_degenerate_target_is_a_row_without_a_map(directory: Path, tmp_path: Path) -> None:
    replica = PolicyExplainer(
        PolicyExplainSpec(Location.of(tmp_path), TARGETS, policy_methods("relevancy")), PolicySpec(str(directory))
    )
    with torch.no_grad():
        replica.policy.model.model.language_model.norm.weight.add_(1).mul_(1e4).sub_(1)
    (row,) = replica.process([loaded(0)], ["lateral_offset"])
    assert row["status"] == DEGENERATE
    assert "payload_path" not in row


def test_methods_that_need_a_driver_are_refused() -> None:
    with pytest.raises(TargetError, match=r"'occlusion' does not explain a policy; these do: relevancy,"):
        policy_methods("relevancy,occlusion")
    assert policy_methods("rollout") == parse_methods("rollout")
