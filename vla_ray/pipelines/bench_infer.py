"""bench=infer: decoding beside transformers' `generate`, then the pipeline beside a bare loop of its replica."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from vla_ray.cluster import Cluster, connect
from vla_ray.config import BenchmarkConfig
from vla_ray.evaluation.benchmarks import infer
from vla_ray.evaluation.benchmarks.infer import SIZES, InferCost
from vla_ray.evaluation.benchmarks.pipeline_cost import PipelineCost, Stretch, measure_pipeline
from vla_ray.evaluation.benchmarks.subjects import check_sizes
from vla_ray.evaluation.benchmarks.train import make_dataset
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.processing import Processor
from vla_ray.models.paligemma.tiny import build_tiny
from vla_ray.models.paligemma.tokenizer_file import NAME, save_tokenizer
from vla_ray.pipelines.engine import run_items
from vla_ray.pipelines.resources import make_plan
from vla_ray.schema import PREDICTIONS
from vla_ray.stages.decode_samples import SampleDecoder
from vla_ray.stages.infer import PredictReplica
from vla_ray.stages.policy import PolicySpec
from vla_ray.stages.work import Summary, WorkItem
from vla_ray.storage.files import Location
from vla_ray.storage.lease import Lease

ITEMS = {"tiny": 40, "mid": 8}  # batches of a stretch: some seconds. The full size is measured without the pipeline
_SAMPLES_OF_A_PICTURE = 8  # and more: each corridor has many instructions


def run(config: BenchmarkConfig) -> InferCost:
    """Measure all sizes, decoding first, in this process and on a Ray of its own unless `cluster.address` names one."""
    sizes = check_sizes(config.size, SIZES)
    cost = infer.run(config)
    rows: list[PipelineCost] = []
    with tempfile.TemporaryDirectory(prefix="vla_ray-benchmark-") as scratch, connect(config.cluster) as cluster:
        for size in sizes:
            if size in ITEMS:
                rows.append(_measure(config, size, cluster, Path(scratch) / size))
    return replace(cost, pipelines=rows)


def _measure(config: BenchmarkConfig, size: str, cluster: Cluster, scratch: Path) -> PipelineCost:
    batch, items = max(config.batches), ITEMS[size]
    directory = build_tiny(scratch / "policy", **SIZES[size])  # type: ignore[arg-type]  # numbers alone
    save_tokenizer(
        Location.of(directory / NAME), ActionTokenizer(), Processor.from_directory(directory).ids.first_action
    )
    device = config.model.device
    if device == "auto":
        device = "cuda" if cluster.num_gpus >= 1 else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    policy = PolicySpec(str(directory), device, dtype, threads=config.threads)
    dataset = make_dataset(scratch / "dataset", math.ceil(batch * items / _SAMPLES_OF_A_PICTURE))
    engine = RayEngine(cluster, device, batch)
    return measure_pipeline(size, Stretch(policy, dataset, scratch, batch, items), engine, config.rounds)


class RayEngine:
    """jobs/infer.py without its driver: one replica, and the tasks that read for it."""

    def __init__(self, cluster: Cluster, device: str, batch: int) -> None:
        # Memory is no matter: models of this size fit wherever the benchmark itself does.
        self.plan = make_plan(cluster, device, 1, batch, model_bytes=0.0, frame_bytes=0.0)

    def __call__(
        self,
        items: Sequence[WorkItem],
        decoder: SampleDecoder,
        make_replica: Callable[[], PredictReplica],
        run_dir: Location,
    ) -> Iterator[Summary]:
        with Lease.acquire(run_dir, command="jobs/benchmark.py") as lease:
            summaries = run_items(
                items, decoder, make_replica, run_dir, lease.token, self.plan, "PaliGemmaInfer", PREDICTIONS
            )
            with closing(summaries):  # type: ignore[type-var]  # a generator
                yield from summaries
