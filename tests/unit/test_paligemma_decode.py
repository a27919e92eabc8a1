"""Constrained decoding: exactly the greedy path, the same alone and in company; drawn paths; all in one pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from vla_ray.errors import CheckpointError, ConfigError
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.decode import decode
from vla_ray.models.paligemma.inputs import normalise, positions, with_placeholders
from vla_ray.models.paligemma.noise import gumbel_noise
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.processing import Processor
from vla_ray.models.paligemma.steps import FixedSteps
from vla_ray.models.paligemma.tiny import build_tiny
from vla_ray.models.paligemma.tokenizer_file import load_decoding, load_tokenizer, save_tokenizer
from vla_ray.storage.files import Location

TOKENIZER = ActionTokenizer()
NAMES = ("a/0", "a/1", "b/0", "b/1")
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
    return taught(ActionPolicy.from_pretrained(directory, TOKENIZER), processor, steps=30)


@pytest.fixture(scope="module")
def parallel(directory: Path, processor: Processor) -> ActionPolicy:
    """Knows all actions of the batch by heart."""
    return taught(ActionPolicy.from_pretrained(directory, TOKENIZER, decoding="parallel"), processor, steps=60)


def right_bins() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (len(TEXTS), 16))


def taught(policy: ActionPolicy, processor: Processor, steps: int) -> ActionPolicy:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        policy(**batch(processor, bins=right_bins())).loss.backward()
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
    assert_same_alone(policy, processor)


def assert_same_alone(policy: ActionPolicy, processor: Processor) -> None:
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
    *described, samples = found
    assert samples is None
    assert [x.shape for x in described] == [(len(TEXTS), 16)] * 4
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


# Drawn --------------------------------------------------------------------------------------------------------------


def noise(names: tuple[str, ...] = NAMES, draws: int = 3, seed: int = 0) -> Tensor:
    return torch.from_numpy(gumbel_noise(names, seed, draws, 16, 256))


def test_noise_belongs_to_the_sample() -> None:
    found = noise()
    assert found.shape == (4, 3, 16, 256)
    assert found.dtype == torch.float32
    assert torch.equal(found[2:3], noise(NAMES[2:3])), "whoever else is there"
    assert torch.equal(found[:, :2], noise(draws=2)), "however many draws"
    assert not torch.equal(found, noise(seed=1))
    assert len({float(x) for x in found.flatten()[::97]}) > 100
    assert float(found.mean()) == pytest.approx(0.5772, abs=0.02), "Euler's constant"


@pytest.mark.parametrize("which", ["policy", "parallel"])
def test_draws_do_not_depend_on_the_batch(which: str, processor: Processor, request: pytest.FixtureRequest) -> None:
    policy: ActionPolicy = request.getfixturevalue(which)
    plain = policy.decode(**batch(processor))
    found = policy.decode(**batch(processor), noise=noise(), temperature=2.0)
    assert found.samples is not None
    assert found.samples.shape == (4, 3, 16)
    assert ((found.samples >= 0) & (found.samples < 256)).all()
    assert torch.equal(found.bins, plain.bins), "what is likeliest stays so"
    assert torch.allclose(found.probability, plain.probability, atol=1e-5)
    for row, name in enumerate(NAMES):
        one = batch(processor, slice(row, row + 1), multiple=16)
        alone = policy.decode(**one, noise=noise((name,), draws=2), temperature=2.0)
        assert alone.samples is not None
        assert torch.equal(alone.samples[0], found.samples[row, :2])


@torch.no_grad()
def test_draws_go_on_from_themselves(policy: ActionPolicy, processor: Processor) -> None:
    """Each token of a draw is the largest of logit / temperature + noise, given the draw's own tokens before it."""
    drawn = policy.decode(**batch(processor), noise=noise(), temperature=1.5).samples
    assert drawn is not None
    for k in range(3):
        forced = policy.hidden(**batch(processor, bins=drawn[:, k].numpy()))
        scores = policy.action_logits(forced[:, -18:-2]) / 1.5 + noise()[:, k]
        assert torch.equal(scores.argmax(-1), drawn[:, k])


def test_draws_follow_the_distribution(policy: ActionPolicy, processor: Processor) -> None:
    """Of the first token, which nothing was drawn before: its shares are its probabilities."""
    many = noise(NAMES[:1], draws=2000)
    found = policy.decode(**batch(processor, slice(0, 1)), noise=many)
    assert found.samples is not None
    share = float((found.samples[0, :, 0] == found.bins[0, 0]).float().mean())
    p = float(found.probability[0, 0])
    assert 0.02 < p < 0.98
    assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 2000))


def test_a_cold_draw_is_the_likeliest(policy: ActionPolicy, processor: Processor) -> None:
    found = policy.decode(**batch(processor), noise=noise(), temperature=1e-4)
    assert found.samples is not None
    assert torch.equal(found.samples, found.bins[:, None].expand(-1, 3, -1))
    with pytest.raises(ValueError, match="must be positive"):
        policy.decode(**batch(processor), noise=noise(), temperature=0.0)


# In steps of one shape ----------------------------------------------------------------------------------------------


def fixed(policy: ActionPolicy, rows: int, length: int, compiled: bool = False) -> FixedSteps:
    return FixedSteps(policy.model.model, rows, length, policy.num_tokens, compiled)


def test_steps_of_one_shape_give_the_same(policy: ActionPolicy, processor: Processor) -> None:
    steps = fixed(policy, rows=20, length=64)
    for rows, draws in ((slice(None), 3), (slice(1, 2), 3), (slice(None), 0), (slice(2, 4), 1)):  # used again
        given = noise(NAMES[rows], draws) if draws else None
        b = batch(processor, rows)
        expected, found = (policy.decode(**b, noise=given, steps=s) for s in (None, steps))
        assert torch.equal(found.bins, expected.bins)
        assert torch.allclose(found.probability, expected.probability, atol=1e-5)
        assert torch.allclose(found.entropy, expected.entropy, atol=1e-4)
        if draws:
            assert torch.equal(found.samples, expected.samples)
    for small in (fixed(policy, rows=3, length=64), fixed(policy, rows=4, length=20)):
        with pytest.raises(ValueError, match="4 prompts of"):
            policy.decode(**batch(processor), steps=small)


def test_a_step_of_one_shape_is_one_graph(
    policy: ActionPolicy, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch.compile needs to pay: no break, and never compiled again. Without a compiler, which takes minutes."""
    compile_, asked = torch.compile, []

    def traced(function: Any, **options: Any) -> Any:
        asked.append(options)
        return compile_(function, backend="eager", dynamic=options["dynamic"])

    monkeypatch.setattr(torch, "compile", traced)
    counters.clear()
    steps = fixed(policy, rows=4, length=64, compiled=True)
    for rows in (slice(None), slice(0, 2), slice(None)):
        b = batch(processor, rows)
        assert torch.equal(policy.decode(**b, steps=steps).bins, policy.decode(**b).bins)
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# All in one pass ----------------------------------------------------------------------------------------------------


def test_parallel_is_learnt_by_heart(parallel: ActionPolicy, processor: Processor) -> None:
    found = parallel.decode(**batch(processor))
    assert float((found.bins == torch.from_numpy(right_bins())).float().mean()) > 0.95
    with torch.no_grad():
        forced = parallel(**batch(processor, bins=right_bins()))
    assert int(forced.correct) == int((found.bins == torch.from_numpy(right_bins())).sum()), "as token accuracy says"
    assert forced.tokens == found.bins.numel()
    assert float(forced.loss) < 1


def test_parallel_batched_equals_single(parallel: ActionPolicy, processor: Processor) -> None:
    assert_same_alone(parallel, processor)


@torch.no_grad()
def test_parallel_never_reads_the_actions(parallel: ActionPolicy, processor: Processor) -> None:
    """The same pass, whatever the batch ends in: else the loss would be of what the model was told."""
    seen: list[Tensor] = []
    hook = parallel.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    for bins in (right_bins(), right_bins()[::-1].copy()):
        parallel(**batch(processor, bins=bins))
    parallel.decode(**batch(processor))
    hook.remove()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2]), "and it is the one that decodes"
    assert parallel.placeholders == (processor.ids.placeholder, 16)


@torch.no_grad()
def test_placeholders_and_prompt_see_each_other(parallel: ActionPolicy, processor: Processor) -> None:
    b = batch(processor, slice(0, 1))
    ids, mask, types = with_placeholders(b["ids"], b["mask"], b["types"], *parallel.placeholders)
    changed = ids.clone()
    changed[:, -1] = parallel.first_action_id
    moved = (parallel.hidden(b["pixels"], ids, mask, types) - parallel.hidden(b["pixels"], changed, mask, types)).abs()
    assert float(moved.amax(-1).min()) > 0, "the last placeholder is seen by all, pictures included"


@torch.no_grad()
@pytest.mark.parametrize("loss_over", ["vocabulary", "actions"])
def test_parallel_loss(directory: Path, processor: Processor, loss_over: str) -> None:
    policy = ActionPolicy.from_pretrained(directory, TOKENIZER, decoding="parallel", loss_over=loss_over).eval()
    b = batch(processor)
    ids = torch.cat(
        [b["ids"], torch.arange(processor.ids.placeholder, processor.ids.placeholder + 16).expand(4, 16)], 1
    )
    mask = torch.cat([b["mask"], torch.ones(4, 16, dtype=torch.int64)], 1)
    logits = policy.model(
        input_ids=ids,
        pixel_values=normalise(b["pixels"]),
        attention_mask=mask,
        position_ids=positions(mask),
        token_type_ids=torch.zeros_like(ids),
    ).logits[:, -16:]
    labels = torch.from_numpy(right_bins()) + policy.first_action_id
    if loss_over == "actions":
        logits = logits[..., policy.first_action_id : policy.first_action_id + 256]
        labels = labels - policy.first_action_id
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(policy(**batch(processor, bins=right_bins())).loss) == pytest.approx(float(expected), abs=1e-5)


def test_a_checkpoint_says_how_it_decodes(directory: Path, parallel: ActionPolicy, tmp_path: Path) -> None:
    assert ActionPolicy.from_pretrained(directory, TOKENIZER).decoding == "autoregressive", "there is no tokenizers.pt"
    parallel.save(tmp_path)
    file = Location.of(tmp_path) / "tokenizers.pt"
    save_tokenizer(file, TOKENIZER, parallel.first_action_id, parallel.decoding)
    assert load_decoding(file) == "parallel"
    assert load_tokenizer(file, decoding="parallel") == TOKENIZER
    assert ActionPolicy.from_pretrained(tmp_path, TOKENIZER).decoding == "parallel"
    with pytest.raises(CheckpointError, match=r"does not fit: the decoding is parallel there, autoregressive here\."):
        load_tokenizer(file, decoding="autoregressive")
    with pytest.raises(ConfigError, match="'both' is unknown; known: autoregressive, parallel"):
        ActionPolicy.from_pretrained(tmp_path, TOKENIZER, decoding="both")
    with pytest.raises(ConfigError, match=r"placeholders for 64 steps; action\.num_steps is 65"):
        ActionPolicy.from_pretrained(tmp_path, ActionTokenizer(num_steps=65))
