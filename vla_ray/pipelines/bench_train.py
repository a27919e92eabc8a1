"""bench=train: what Ray and the data cost beside a training step of the same model in a plain loop."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep

import psutil
import torch

from vla_ray.cluster import Cluster, connect
from vla_ray.config import BenchmarkConfig
from vla_ray.data.prepared import PreparedDataset
from vla_ray.evaluation.benchmarks.subjects import check_sizes
from vla_ray.evaluation.benchmarks.table import context
from vla_ray.evaluation.benchmarks.train import SIZES, Subject, make_dataset, make_spec, measure
from vla_ray.evaluation.benchmarks.train_cost import STREAMED, StartUp, TrainCost
from vla_ray.evaluation.benchmarks.training_memory import budgets
from vla_ray.training.batches import MicroBatch
from vla_ray.training.checkpoints import RunFiles
from vla_ray.training.trainer import CHUNK_SAMPLES, fit, ray_batches, share_out

_POLL_S = 0.02
_IDLE_S, _LONGEST_WAIT_S = 1.0, 60.0


def run(config: BenchmarkConfig) -> TrainCost:
    """Measure all sizes on the CPU, on a Ray of this process's own unless `cluster.address` names one."""
    sizes = check_sizes(config.size, SIZES)
    torch.set_num_threads(config.threads)
    began = perf_counter()
    with tempfile.TemporaryDirectory(prefix="vla_ray-benchmark-") as scratch, connect(config.cluster) as cluster:
        ray_s = perf_counter() - began
        dataset = make_dataset(Path(scratch) / "dataset")
        subjects = {name: Subject(SIZES[name], dataset, Path(scratch) / name, CHUNK_SAMPLES) for name in sizes}
        measured = [
            measure(subject, name, _Streamed(subject, cluster, config.data_workers), config.steps, config.rounds)
            for name, subject in subjects.items()
        ]
        first = {name: statistics.median(subject.first_batch_s[STREAMED]) for name, subject in subjects.items()}
        job_s = _seconds_to_first_step(dataset, cluster, Path(scratch) / "job")
    about = {**context(config.threads, config.rounds), "data workers": str(config.data_workers)}
    return TrainCost(about, measured, StartUp(ray_s, first, job_s), budgets())


class _Streamed:
    """The source that a training worker has: data actors that decode, augment and tokenise."""

    def __init__(self, subject: Subject, cluster: Cluster, data_workers: int) -> None:
        self.subject, self.data_workers = subject, data_workers
        self.cpus = share_out(cluster, 1, data_workers, "cpu").data_cpus

    def __call__(self, count: int) -> Iterator[MicroBatch]:
        maker, steps = self.subject.maker, self.subject.steps
        total = max(count, self.subject.size.stream)
        batches = ray_batches(maker, steps, 0, 0, total, self.data_workers, self.cpus)
        yield next(batches)
        _wait_until_idle()
        yield from batches


def _wait_until_idle() -> None:
    """Data workers first work ahead, which takes a moment of a run and would be much of a benchmark. From then on they
    make a batch when one is taken. Sees those of a Ray of this process's own; others are not waited for."""
    before, until = _data_worker_cpu_s(), perf_counter() + _LONGEST_WAIT_S
    while perf_counter() < until:
        sleep(_IDLE_S)
        now = _data_worker_cpu_s()
        if now - before < 0.1 * _IDLE_S:
            return
        before = now


def _data_worker_cpu_s() -> float:
    seconds = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"):
                seconds += sum(process.cpu_times()[:2])
    return seconds


def _seconds_to_first_step(dataset: PreparedDataset, cluster: Cluster, directory: Path) -> float:
    """Of a job with two workers, from handing it to Ray Train."""
    spec = make_spec(SIZES["tiny"], dataset, directory, workers=2, max_steps=2)
    shares = share_out(cluster, 2, 1, "cpu")
    log = RunFiles(Path(spec.directory)).log
    with ThreadPoolExecutor(1) as thread:  # in the main one Ray Train would take over the signals
        began = perf_counter()
        fitting = thread.submit(fit, spec, shares)
        while not (log.exists() or wait_for([fitting], _POLL_S).done):
            pass
        seconds = perf_counter() - began
        fitting.result()
    return seconds
