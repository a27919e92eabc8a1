"""bench=infer: sides that answer the same prompts, rates and goals said plainly, the full size only where it fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_ray.config import BenchmarkConfig, ModelConfig
from vla_ray.errors import ConfigError
from vla_ray.evaluation.benchmarks import find_bench, infer
from vla_ray.evaluation.benchmarks.infer import (
    FULL,
    ONE_BY_ONE,
    OURS,
    PARALLEL,
    SIZES,
    TOGETHER,
    InferCost,
    OfBatch,
    OfSize,
    make_sides,
    make_subject,
    measure,
)
from vla_ray.evaluation.benchmarks.interleaved import Timing
from vla_ray.models.paligemma.cost import released_config


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> infer.Subject:
    return make_subject("tiny", "cpu", tmp_path_factory.mktemp("bench"))


def test_sides_answer_the_same_prompts(tiny: infer.Subject) -> None:
    found = {name: run() for name, run in make_sides(tiny, 3).items()}
    assert list(found) == [OURS, PARALLEL, TOGETHER, ONE_BY_ONE], "compiled steps are for GPUs"
    assert {tuple(tokens.shape) for tokens in found.values()} == {(3, 16)}
    assert torch.equal(found[TOGETHER], found[ONE_BY_ONE]), "padding changes nothing"
    assert not (found[ONE_BY_ONE] == tiny.processor.ids.eos).any(), "as many tokens as ours, none of them the end"
    batch = tiny.batch(0, 3)
    assert set(batch["mask"].sum(1).tolist()) != {batch["mask"].shape[1]}, "prompts of different lengths"
    assert torch.equal(tiny.batch(2, 1)["pixels"][0], batch["pixels"][2])
    assert tiny.policy.model is tiny.parallel.model


def test_measure(tiny: infer.Subject) -> None:
    found = measure(tiny, "tiny", (1, 2), rounds=1)
    assert [b.count for b in found.batches] == [1, 2]
    for b in found.batches:
        assert b.timings[OURS].wall == 1
        assert all(b.rate(side) > 0 for side in b.timings)
    pair = found.batches[1].timings
    assert pair[ONE_BY_ONE].cpu > pair[TOGETHER].cpu > pair[PARALLEL].cpu
    assert found.goals == (), "the goal is of batches of 32"


def of_size(name: str, ratio: float, count: int = 32) -> OfSize:
    def timing(wall: float) -> Timing:
        return Timing(wall, wall, wall, wall, (wall, wall), (wall, wall))

    return OfSize(name, "some model", [OfBatch(count, {OURS: timing(1.0), ONE_BY_ONE: timing(ratio)})])


@pytest.mark.parametrize(("ratio", "met"), [(10.1, True), (9.9, False)])
def test_the_goal_is_ten_times_as_many(ratio: float, met: bool) -> None:
    for name in ("tiny", FULL):
        assert [goal.met for goal in of_size(name, ratio).goals] == [met]
    assert ("NOT MET" in "\n".join(of_size("tiny", ratio).lines)) is not met
    assert of_size("mid", ratio).goals == ()
    assert of_size("tiny", ratio, count=8).goals == ()


def test_the_result_says_all_of_it() -> None:
    cost = InferCost({"CPU": "some"}, [of_size("tiny", 16.0)])
    for part in (
        "CPU some",
        "some model",
        "no side reads or collates",
        ONE_BY_ONE,
        "32.0",
        "2.0",
        "16.00x",
        ">= 10.00",
    ):
        assert part in cost.text
    assert max(map(len, cost.text.splitlines())) <= 160
    content: Any = json.loads(json.dumps(cost.content))
    assert content["sizes"]["tiny"]["batches"]["32"][ONE_BY_ONE]["samples_per_s"] == 2
    assert content["sizes"]["tiny"]["goals"][0]["met"]


def test_the_full_size_is_the_released_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its vocabulary and ids, and fewer and narrower layers."""
    config: Any = released_config()
    for part, heads in ((config.vision_config, 2), (config.text_config, 1)):
        part.num_hidden_layers, part.hidden_size, part.intermediate_size = 1, 8, 8
        part.num_attention_heads = heads
    config.text_config.head_dim, config.vision_config.projection_dim, config.projection_dim = 8, 8, 8
    monkeypatch.setattr(infer, "released_config", lambda: config)
    subject = make_subject(FULL, "cpu", tmp_path)
    assert "256 image tokens, bfloat16 on CPU" in subject.description
    found = {name: run() for name, run in make_sides(subject, 2).items()}
    assert {tuple(tokens.shape) for tokens in found.values()} == {(2, 16)}


def test_what_cannot_be_measured_is_refused() -> None:
    assert set(SIZES) == {"tiny", "mid", FULL}
    bench = find_bench("infer")
    with pytest.raises(ConfigError, match=r"size=full is the released 3B model: .*model\.device=cuda") as e:
        bench(BenchmarkConfig(bench="infer", size=["tiny", "full"], model=ModelConfig(device="cpu")))
    assert "\n" not in str(e.value)
    for batches, message in (([], "is empty"), (["two"], "no whole numbers"), ([8, 0], "too small"), (2.5, "no whole")):
        with pytest.raises(ConfigError, match=message):
            BenchmarkConfig(batches=batches)
    assert BenchmarkConfig(batches=4).batches == (4,)
