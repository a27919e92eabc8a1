"""bench=infer: sides that answer the same prompts, rates and goals said plainly, the full size only where it fits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_ray.config import BenchmarkConfig, ModelConfig
from vla_ray.data.prepared import PreparedDataset
from vla_ray.errors import ConfigError
from vla_ray.evaluation.benchmarks import find_bench, infer, pipeline_cost
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
from vla_ray.evaluation.benchmarks.pipeline_cost import PipelineCost, Stretch, measure_pipeline
from vla_ray.models.paligemma.cost import released_config
from vla_ray.schema import PREDICTIONS
from vla_ray.stages.decode import DecodeWorker
from vla_ray.stages.decode_samples import SampleDecoder
from vla_ray.stages.infer import PredictReplica
from vla_ray.stages.policy import PolicySpec
from vla_ray.stages.work import Summary, Worker, WorkItem
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import read_metrics


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


def here(
    items: Sequence[WorkItem], decoder: SampleDecoder, make_replica: Callable[[], PredictReplica], run: Location
) -> Iterator[Summary]:
    """An engine without Ray."""
    worker, decode = Worker(make_replica(), run, "token", PREDICTIONS), DecodeWorker(decoder, run, "token")
    for item in items:
        yield worker(item, decode(item))


def test_both_sides_of_the_pipeline_do_all_of_the_work(
    tmp_path: Path, policy_dir: Path, corridors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = PolicySpec(str(policy_dir), threads=1)
    stretch = Stretch(policy, PreparedDataset.open(str(corridors)), tmp_path, batch=4, items=4)
    cost = measure_pipeline("tiny", stretch, here, rounds=1)
    assert (len(cost.loop), len(cost.engine), len(cost.ratios)) == (2, 1, 1)
    assert min(*cost.loop, *cost.engine) > 0
    assert cost.ratio == pytest.approx(cost.engine[0] / (sum(cost.loop) / 2))
    tables = [read_metrics(Location.of(tmp_path / name), schema=PREDICTIONS) for name in ("loop-0", "engine-1")]
    for name, table in zip(("loop-0", "engine-1"), tables, strict=True):
        assert len(list((tmp_path / name / "images").iterdir())) == table.num_rows == 16
    assert tables[0]["predicted"].equals(tables[1]["predicted"])
    clock = iter([10.0, 12.0])  # of two batches of four after two that do not count
    monkeypatch.setattr(pipeline_cost, "perf_counter", lambda: next(clock))
    assert pipeline_cost._rate(iter([4, 4, 4, 4])) == 4.0


@pytest.mark.parametrize(("ratio", "met"), [(0.96, True), (0.94, False)])
def test_the_pipeline_is_judged_at_mid_size(ratio: float, met: bool) -> None:
    cost = PipelineCost("mid", "some model", 32, [100.0, 102.0, 104.0], [90.0, 99.0], [ratio - 0.1, ratio + 0.1])
    assert [goal.met for goal in cost.goals] == [met]
    text = InferCost({}, [], [cost]).text
    for part in ("some model", "102.0", "94.5", f"{ratio:.2f}x", "start-up is in neither", "met" if met else "NOT MET"):
        assert part in text
    content: Any = json.loads(json.dumps(InferCost({}, [], [cost]).content))
    assert content["pipelines"]["mid"]["ratio"] == pytest.approx(ratio)
    assert replace(cost, name="tiny").goals == ()


@pytest.mark.slow
def test_the_engine_of_the_bench_is_rays(tmp_path: Path, policy_dir: Path, corridors: Path) -> None:
    """Alone on a Ray of its own."""
    code = (
        "import sys; from pathlib import Path; from vla_ray.pipelines.bench_infer import RayEngine;"
        "from vla_ray.cluster import connect; from vla_ray.config import ClusterConfig;"
        "from vla_ray.data.prepared import PreparedDataset; from vla_ray.stages.policy import PolicySpec;"
        "from vla_ray.evaluation.benchmarks.pipeline_cost import Stretch, measure_pipeline\n"
        "with connect(ClusterConfig(num_cpus=2)) as cluster:\n"
        "    data = PreparedDataset.open(sys.argv[2])\n"
        "    stretch = Stretch(PolicySpec(sys.argv[1], threads=1), data, Path(sys.argv[3]), 4, 4)\n"
        "    print(measure_pipeline('tiny', stretch, RayEngine(cluster, 'cpu', 4), 1).engine)"
    )
    arguments = [sys.executable, "-c", code, str(policy_dir), str(corridors), str(tmp_path)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": f"/tmp/vb{os.getpid()}"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert read_metrics(Location.of(tmp_path / "engine-1"), schema=PREDICTIONS).num_rows == 16
    shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


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
