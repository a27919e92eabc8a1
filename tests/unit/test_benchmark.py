"""The benchmark: ratios that survive a busy machine, sides that do what their names say, goals said plainly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_ray.config import BenchmarkConfig, ModelConfig
from vla_ray.errors import ConfigError
from vla_ray.evaluation.benchmarks import find_bench, interleaved, relevance
from vla_ray.evaluation.benchmarks.interleaved import Side, Timing, interleave
from vla_ray.evaluation.benchmarks.memory import peak_bytes
from vla_ray.evaluation.benchmarks.subjects import Subject, check_sizes, make_subject, mid_config
from vla_ray.evaluation.benchmarks.table import Goal, aligned, goal_lines
from vla_ray.stages.payloads import estimate_bytes

MB = 2**20


@pytest.fixture(scope="module")
def checkpoint(repo: Path) -> ModelConfig:
    return ModelConfig(checkpoint=str(repo / "checkpoints/simlingo-tiny/checkpoints/epoch=013.ckpt/pytorch_model.pt"))


@pytest.fixture(scope="module")
def tiny(checkpoint: ModelConfig) -> Subject:
    return make_subject("tiny", checkpoint)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time that passes only when a side says so; the CPU works half of it."""
    now = [0.0]
    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(interleaved.time, "process_time", lambda: now[0] / 2)

    def spend(seconds: float) -> None:
        now[0] += seconds

    return spend


def test_a_machine_that_becomes_slower_does_not_change_ratios(clock: Callable[[float], None]) -> None:
    slowness = iter(range(10, 100))  # every run takes longer than the one before, whatever it is
    order: list[str] = []

    def side(name: str, work: float) -> Side:
        def run() -> None:
            order.append(name)
            clock(work * next(slowness))

        return Side(name, run)

    timings = interleave(side("plain", 1.0), [side("twice", 2.0), side("thrice", 3.0)], rounds=3)
    assert order == ["plain", *["twice", "plain", "thrice", "plain"] * 3]
    assert timings["plain"].wall == timings["plain"].cpu == 1
    for name, ratio in (("twice", 2), ("thrice", 3)):
        assert timings[name].wall == pytest.approx(ratio)
        assert timings[name].cpu_range == pytest.approx((ratio, ratio))
        assert timings[name].cpu_s == pytest.approx(timings[name].wall_s / 2)


def test_one_disturbed_round_is_outvoted(clock: Callable[[float], None]) -> None:
    taken: Iterator[float] = iter([2.0, 50.0, 2.0])
    timings = interleave(Side("plain", lambda: clock(1)), [Side("side", lambda: clock(next(taken)))], rounds=3)
    assert timings["side"].wall == pytest.approx(2)
    assert timings["side"].wall_range == pytest.approx((2, 50))


def test_preparation_is_not_timed(clock: Callable[[float], None]) -> None:
    timings = interleave(Side("plain", lambda: clock(1), lambda: clock(100)), [], rounds=1)
    assert timings["plain"].wall_s == 1


def _allocates(megabytes: int) -> Callable[[], object]:
    held = torch.zeros(64 * MB // 4)  # what is loaded before does not count
    return lambda: [len(held), torch.ones(megabytes * MB // 4).sum()]


def test_peak_memory_is_what_the_work_adds_and_gives_back() -> None:
    """In a process of its own, whatever this one holds."""
    here = torch.ones(300 * MB // 4)
    peak = peak_bytes(_allocates, 100)
    assert peak is not None
    assert 95 * MB < peak < 140 * MB
    assert len(here)


def test_every_side_gives_what_it_is_named_after(tiny: Subject, tmp_path: Path) -> None:
    sides = relevance.make_sides(tiny, str(tmp_path))
    assert next(iter(sides)) == relevance.PLAIN
    results = {}
    for name, side in sides.items():
        side.prepare()
        results[name] = side.run()
    assert results[relevance.PLAIN] is None
    levels = {relevance.RELEVANCE: "relevance", relevance.REDUCED: "reduced", relevance.FULL: "full"}
    for name, level in levels.items():
        content: Any = results[name]
        assert content["meta"]["payload"] == level
        assert content["text_outputs"]["token_ids"] == list(tiny.text)
        assert content["meta"]["seed"]["grad_rms"] > 0, "without a gradient nothing would be folded"
    assert set(results[relevance.RELEVANCE]["relevance"]["patches"]) == {  # type: ignore[index]
        f"relevancy_{direction}" for direction in ("positive", "negative", "signed")
    }
    several: Any = results[relevance.SEVERAL]
    assert [payload["meta"]["target"] for payload in several] == [t.name for t in relevance.TARGETS]
    assert not any(p.requires_grad for p in tiny.model.parameters()), "the original way must leave no trace"


def test_all_sides_explain_the_same_scalar(tiny: Subject, tmp_path: Path) -> None:
    sides = relevance.make_sides(tiny, str(tmp_path))
    patches = tiny.model.embed_patches(relevance.normalise(tiny.tiles))
    with torch.no_grad():
        plain = float(relevance._scalar(tiny, patches))
    for name in (relevance.RELEVANCE, relevance.REDUCED, relevance.FULL):
        sides[name].prepare()
        content: Any = sides[name].run()
        assert content["target_scalar"] == pytest.approx(plain, rel=1e-4)


def test_the_mid_size_is_what_the_table_says(tiny: Subject) -> None:
    config = mid_config(tiny.model.config)
    assert config.patch_grid**2 + 1 == 1025
    assert config.vision["num_hidden_layers"] == config.language["num_hidden_layers"] == 12
    assert config.language["num_key_value_heads"] < config.language["num_attention_heads"]


def test_the_bench_on_the_tiny_driver(checkpoint: ModelConfig, tmp_path: Path) -> None:
    config = BenchmarkConfig(output_dir=str(tmp_path), rounds=1, memory=False, model=checkpoint)
    threads = torch.get_num_threads()
    try:
        result = find_bench("relevance")(config)
    finally:
        torch.set_num_threads(threads)
    content: Any = json.loads(json.dumps(result.content))
    sides = content["sizes"]["tiny"]["sides"]
    assert sides[relevance.PLAIN]["timing"]["wall"] == 1
    assert (
        sides[relevance.RELEVANCE]["payload"] < sides[relevance.REDUCED]["payload"] < sides[relevance.FULL]["payload"]
    )
    for name in sides:
        assert name in result.text
    assert "tiny: 1.2 M parameters" in result.text
    assert "threads 1" in result.text


def test_a_relevance_payload_of_the_released_model_is_small() -> None:
    sizes = {level: estimate_bytes(level, relevance.RELEASED, torch.bfloat16) for level in relevance.LEVELS}
    assert sizes["relevance"] <= 100_000
    assert sizes["full"] == pytest.approx(3.8e9, rel=0.05)


def _of_size(fused: float, peak: int | None = 104) -> relevance.OfSize:
    def measured(ratio: float, of_peak: int | None) -> relevance.Measured:
        return relevance.Measured(Timing(ratio, ratio, ratio, ratio, (ratio, ratio), (ratio, ratio)), of_peak, None)

    ratios = {
        relevance.PLAIN: 1.0,
        relevance.RELEVANCE: fused,
        relevance.RELEVANCE_FILE: 1.2,
        relevance.SEVERAL: 4 * fused,
        relevance.WRITTEN: 2.0,
        relevance.SEVERAL_WRITTEN: 5.0,
        relevance.ORIGINAL: 6.0,
    }
    peaks = {relevance.PLAIN: None if peak is None else 100}
    return relevance.OfSize("s", "d", {name: measured(r, peaks.get(name, peak)) for name, r in ratios.items()})


def test_goals_are_judged_by_ratios() -> None:
    met = {goal.name: goal.met for goal in _of_size(1.2).goals}
    missed = {goal.name: goal.met for goal in _of_size(1.3, peak=110).goals}
    assert met.pop("4 targets / one, text fixed") is False, "four times the time of one"
    assert all(met.values())
    assert [name for name, ok in missed.items() if not ok] == [
        "relevance / plain, clock",
        "relevance / plain, CPU seconds",
        "relevance / plain, peak memory",
        "4 targets / one, text fixed",
    ]


def test_without_memory_there_is_no_memory_goal() -> None:
    size = _of_size(1.2, peak=None)
    assert not [goal for goal in size.goals if "memory" in goal.name]
    assert size.lines


def test_a_goal_says_plainly_whether_it_was_met() -> None:
    lines = goal_lines([Goal("fast", 1.2, 1.25), Goal("slow", 1.3, 1.25), Goal("much", 3.5, 3.0, at_least=True)])
    assert [line.split()[-1] for line in lines[1:]] == ["met", "MET", "met"]
    assert "NOT MET" in lines[2]
    assert ">= 3.00" in lines[3]


def test_columns_line_up() -> None:
    assert aligned([("name", "x"), ("a", "12.0"), ("longer", "")]) == ["name       x", "a       12.0", "longer"]


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: find_bench("relevence"), "Did you mean 'relevance'?"),
        (lambda: check_sizes(["tiny", "midd"]), "Did you mean 'mid'?"),
        (lambda: BenchmarkConfig(rounds=0), "at least 1"),
    ],
)
def test_what_is_unknown_is_refused(call: Callable[[], object], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint.replace("?", r"\?")):
        call()
