"""The policy's loss: what it may see, that it equals transformers' own, and what learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_ray.errors import ConfigError
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.inputs import normalise, positions
from vla_ray.models.paligemma.policy import PARTS, ActionPolicy
from vla_ray.models.paligemma.processing import Processor
from vla_ray.models.paligemma.tiny import build_tiny

TOKENIZER = ActionTokenizer()
SAME_LENGTH = ("turn left", "turn right")
MIXED = ("stop", "go through the green door, then pass the person on the right")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def policy(directory: Path) -> ActionPolicy:
    return ActionPolicy.from_pretrained(directory, TOKENIZER)


@pytest.fixture(scope="module")
def processor(directory: Path) -> Processor:
    return Processor.from_directory(directory)


def batch(processor: Processor, texts: tuple[str, ...] = MIXED, multiple: int = 1, seed: int = 0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    side = processor.image_size
    images = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in texts]
    bins = rng.integers(0, 256, (len(texts), 16))
    collated = processor.collate(images, [processor.prompt_ids(t) for t in texts], bins, multiple)
    return {name: torch.from_numpy(array) for name, array in collated.items()}


def hf_inputs(b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": b["ids"],
        "pixel_values": normalise(b["pixels"]),
        "attention_mask": b["mask"],
        "token_type_ids": b["types"],
        "position_ids": positions(b["mask"]),
    }


@torch.no_grad()
@pytest.mark.parametrize("texts", [SAME_LENGTH, MIXED], ids=["no padding", "padding"])
def test_no_later_action_is_seen(policy: ActionPolicy, processor: Processor, texts: tuple[str, ...]) -> None:
    b = batch(processor, texts)
    assert bool(b["mask"].all()) == (texts is SAME_LENGTH)
    for place in range(1, 17):  # change each action token in turn, and EOS
        changed = {**b, "ids": b["ids"].clone()}
        changed["ids"][:, -place] = policy.first_action_id + 300
        moved = (policy.hidden(**b) - policy.hidden(**changed)).abs().amax(dim=(0, 2))
        assert float(moved[:-place].max()) == 0
        assert float(moved[-place]) > 1e-3


@torch.no_grad()
def test_without_token_types_the_future_leaks(policy: ActionPolicy, processor: Processor) -> None:
    """What the test above is for: transformers then lets all see all, and does not say so."""
    b = batch(processor, SAME_LENGTH)
    changed = {**b, "ids": b["ids"].clone()}
    changed["ids"][:, -2] = policy.first_action_id + 300
    one, two = (hf_inputs(x) for x in (b, changed))
    del one["token_type_ids"], two["token_type_ids"]
    moved = (policy.model(**one).logits - policy.model(**two).logits).abs().amax(dim=(0, 2))
    assert float(moved[:-2].max()) > 1e-4


@torch.no_grad()
def test_the_prompt_sees_itself_both_ways(policy: ActionPolicy, processor: Processor) -> None:
    b = batch(processor, SAME_LENGTH)
    changed = {**b, "ids": b["ids"].clone()}
    changed["ids"][:, -19] = processor.prompt_ids("stop")[-2]  # the prompt's last word
    assert float((policy.hidden(**b) - policy.hidden(**changed))[:, 0].abs().max()) > 1e-6


@pytest.mark.parametrize("texts", [SAME_LENGTH, MIXED], ids=["no padding", "padding"])
def test_loss_equals_transformers(policy: ActionPolicy, processor: Processor, texts: tuple[str, ...]) -> None:
    b = batch(processor, texts)
    labels = b["ids"].masked_fill(b["types"] == 0, -100)
    theirs = policy.model(**hf_inputs(b), labels=labels).loss
    theirs.backward()
    expected = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    ours = policy(**b)
    ours.loss.backward()
    assert float(ours.loss.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    assert ours.tokens == 2 * 16
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name  # else DDP waits for it
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


@torch.no_grad()
def test_loss_over_actions(directory: Path, policy: ActionPolicy, processor: Processor) -> None:
    b = batch(processor)
    sliced = ActionPolicy.from_pretrained(directory, TOKENIZER, loss_over="actions")
    logits = policy.model(**hf_inputs(b)).logits[:, -18:-2]
    actions = logits[..., policy.first_action_id : policy.first_action_id + 256].log_softmax(-1)
    bins = b["ids"][:, -17:-1] - policy.first_action_id
    expected = -actions.gather(-1, bins[..., None]).mean()
    found = sliced(**b)
    assert float(found.loss) == pytest.approx(float(expected), abs=1e-6)
    assert int(found.correct) == int((actions.argmax(-1) == bins).sum()) == int(policy(**b).correct)


@torch.no_grad()
def test_padding_changes_nothing(policy: ActionPolicy, processor: Processor) -> None:
    prompts = [batch(processor, (text,), seed=i) for i, text in enumerate(MIXED)]
    for b in prompts:
        wider = torch.nn.functional.pad
        padded = {**b, **{n: wider(b[n], (11, 0)) for n in ("ids", "mask", "types")}}
        assert torch.allclose(policy.hidden(**padded)[:, 11:], policy.hidden(**b), atol=1e-5)
    together = {
        n: torch.cat(
            [torch.nn.functional.pad(b[n], (64 - b[n].shape[1], 0)) if n != "pixels" else b[n] for b in prompts]
        )
        for n in prompts[0]
    }
    mean = (policy(**prompts[0]).loss + policy(**prompts[1]).loss) / 2
    assert float(policy(**together).loss) == pytest.approx(float(mean), abs=1e-5)


@pytest.mark.parametrize("loss_over", ["vocabulary", "actions"])
def test_bfloat16_autocast(directory: Path, processor: Processor, loss_over: str) -> None:
    policy = ActionPolicy.from_pretrained(directory, TOKENIZER, loss_over=loss_over)
    b = batch(processor)
    exact = float(policy(**b).loss.detach())
    with torch.autocast("cpu", torch.bfloat16):
        found = policy(**b)
    found.loss.backward()
    assert found.loss.dtype == torch.float32
    assert float(found.loss.detach()) == pytest.approx(exact, rel=0.01)
    assert {p.grad.dtype for p in policy.parameters() if p.grad is not None} == {torch.float32}


def test_it_learns(policy: ActionPolicy, processor: Processor) -> None:
    b = batch(processor)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = policy(**b).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_parts_are_all_there_is(policy: ActionPolicy) -> None:
    of_parts = [p for modules in policy.parts().values() for m in modules for p in m.parameters()]
    assert {id(p) for p in of_parts} == {id(p) for p in policy.parameters()}
    assert tuple(policy.parts()) == PARTS


@pytest.mark.parametrize("frozen", [("vision",), ("vision", "projector", "embeddings"), ("language",)])
def test_freeze(policy: ActionPolicy, processor: Processor, frozen: tuple[str, ...]) -> None:
    policy.freeze(frozen)
    policy(**batch(processor)).loss.backward()
    for part, modules in policy.parts().items():
        for parameter in (p for m in modules for p in m.parameters()):
            assert (parameter.grad is None) == (part in frozen)


def test_freeze_refusals(policy: ActionPolicy) -> None:
    with pytest.raises(ConfigError, match=r"'visoin' is unknown; known: vision, projector, .*Did you mean 'vision'"):
        policy.freeze(["visoin"])
    with pytest.raises(ConfigError, match="nothing to train"):
        policy.freeze(PARTS)


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "projector", "embeddings")])
def test_activation_checkpointing_changes_nothing(directory: Path, processor: Processor, frozen: Any) -> None:
    b = batch(processor)
    found = []
    for checkpointed in (False, True):
        policy = ActionPolicy.from_pretrained(directory, TOKENIZER)
        policy.freeze(frozen)
        if checkpointed:
            policy.checkpoint_activations()
        policy.train()
        loss = policy(**b).loss
        loss.backward()
        found.append((float(loss.detach()), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}))
    (one, plain), (two, saved) = found
    assert one == two
    assert plain.keys() == saved.keys()
    assert all(torch.allclose(plain[n], saved[n], atol=1e-7) for n in plain)


def test_layers(policy: ActionPolicy) -> None:
    assert [type(m).__name__ for m in policy.layers()] == ["SiglipEncoderLayer"] * 2 + ["GemmaDecoderLayer"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash_attention_2"}, "would see their own future"),
        ({"attention": "spda"}, "known: sdpa, eager. Did you mean 'sdpa'"),
        ({"loss_over": "words"}, "known: vocabulary, actions"),
    ],
)
def test_refused_options(directory: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActionPolicy.from_pretrained(directory, TOKENIZER, **options)  # type: ignore[arg-type]
