"""Training on Ray: Ray Train runs the plain loop on every worker, Ray Data prepares its batches elsewhere.

State lives in the run directory, not in Ray: a worker group that is started again after a death, and a driver that is
started again after its own, read `last/` and go on from there. Ray's own checkpoints are safe only once its controller
has polled for them; these are safe when they are written.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vla_ray.before_ray  # noqa: F401  # isort: skip  # it must come before ray
import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from vla_ray import errors
from vla_ray.cluster import Cluster
from vla_ray.errors import ClusterError, ConfigError, TrainingError, VlaRayError
from vla_ray.logs import setup_logging
from vla_ray.storage.files import Location, read_json, write_json
from vla_ray.training.batches import BatchMaker, MicroBatch, pack, pack_error, unpack
from vla_ray.training.order import Steps
from vla_ray.training.parallel import Workers
from vla_ray.training.session import TrainSpec, run_worker

logger = logging.getLogger(__name__)

CHUNK_SAMPLES = 256  # of one data task: long enough that a row group's rows are used together
REST_S = 0.1  # a chunk takes longer, and the next one is under way
SEGMENT_CHUNKS = 512  # of one Ray dataset: what the driver of a stream holds at a time


@dataclass(frozen=True, slots=True)
class Shares:
    """What of the cluster each process asks for."""

    worker_cpus: float
    data_cpus: float
    gpu: bool


def share_out(cluster: Cluster, workers: int, data_workers: int, device: str) -> Shares:
    """A CPU for every process where there are enough; else the same part of one each.

    Raises:
        ConfigError: fewer GPUs than workers.
    """
    gpu = device == "cuda" or (device == "auto" and cluster.num_gpus >= workers)
    if gpu and cluster.num_gpus < workers:
        raise ConfigError(
            f"workers={workers} need a GPU each, and the cluster has {cluster.num_gpus:g}. Set "
            f"workers={max(1, int(cluster.num_gpus))}, or model.device=cpu."
        )
    each = min(1.0, int(100 * cluster.num_cpus / (workers * (1 + data_workers))) / 100)
    if each <= 0:
        raise ConfigError(f"workers={workers} do not fit on {cluster.num_cpus:g} CPUs; lower it or data.num_workers.")
    return Shares(each, each, gpu)


def fit(spec: TrainSpec, shares: Shares) -> None:
    """Train on the connected cluster until the run is complete.

    Raises:
        VlaRayError: what a worker refused (out of memory, a damaged checkpoint ...).
        ClusterError: workers died more often than `max_failures`, or Ray gave up.
    """
    config = spec.config
    _refusal(spec).delete()
    scratch = Path(spec.directory) / "logs" / "ray"
    trainer = _QuietTrainer(
        _work,
        train_loop_config={"spec": spec, "data_cpus": shares.data_cpus},
        torch_config=TorchConfig(backend="nccl" if shares.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=shares.gpu,
            resources_per_worker={"CPU": shares.worker_cpus, **({"GPU": 1} if shares.gpu else {})},
        ),
        run_config=RunConfig(
            # Another name at each start: Ray would take up what it believes the state of an old one to be.
            name=f"{time.time_ns():x}",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=config.max_failures + 1),  # the last only ends it, see _Deaths
            callbacks=[_Deaths(spec)],  # type: ignore[list-item]  # as above
            logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]  # mypy reads Train v1
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as e:
        raise _reason([e], config.max_failures) from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if (refusal := read_json(_refusal(spec))) is not None:
        raise getattr(errors, refusal["error_type"])(refusal["error"])


class _QuietTrainer(TorchTrainer):
    """Without the actor that frees the workers' resources should the controller vanish: it asks the dashboard's State
    API every second, says so when there is none, and a job's resources are freed when its driver ends."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # as above
        return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]


class _Deaths(ray.train.UserCallback):
    """Counts them where Ray Train decides on another start, and refuses one too many: workers then return at once."""

    def __init__(self, spec: TrainSpec) -> None:
        self.spec, self.left = spec, spec.config.max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if not self.left:
            _refuse(self.spec, _reason([*worker_exceptions.values()], self.spec.config.max_failures))
        self.left -= 1


def _work(given: dict[str, Any]) -> None:
    """The life of one training process."""
    setup_logging()
    spec: TrainSpec = given["spec"]
    if _refusal(spec).exists():
        return  # it would only be refused again; the driver reads why
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    rank, size = context.get_world_rank(), context.get_world_size()
    kind = spec.config.parallel if size > 1 or spec.config.parallel == "fsdp" else "single"
    workers = Workers(kind, rank, size, device, spec.computes_in_bfloat16(device))

    def stream(maker: BatchMaker, steps: Steps, start: int, total: int) -> Iterator[MicroBatch]:
        data_workers = spec.config.data.num_workers
        for batch in ray_batches(maker, steps, rank, start, total, data_workers, given["data_cpus"]):
            if _refusal(spec).exists():
                raise TrainingError("stopped, or refused by another worker.")
            yield batch

    try:
        run_worker(spec, workers, stream)
    except Exception as e:
        if (refused := _expected(e, spec)) is not None:
            _refuse(spec, refused)
        if _refusal(spec).exists():  # also another worker's, whose end broke a connection of ours
            logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # no stack: the driver says it in a line
        raise


def _expected(error: Exception, spec: TrainSpec) -> VlaRayError | None:
    """What of an error is for the user to put right."""
    if isinstance(error, torch.OutOfMemoryError):  # not in a step, see loop.py: while loading, validating or saving
        return TrainingError(
            f"out of memory beside the training steps, for the model or a validation "
            f"({' '.join(str(error).split())[:120]}). Lower training.batch_size ({spec.config.training.batch_size}), "
            "set lora.enabled=true, or parallel=fsdp with more workers."
        )
    return error if isinstance(error, VlaRayError) else None


def stop(spec: TrainSpec) -> None:
    """End a `fit` that runs in another thread: its workers stop at their next batch, and are not started again."""
    _refuse(spec, TrainingError("stopped."))


def _refuse(spec: TrainSpec, error: VlaRayError) -> None:
    """For the driver, once: Ray Train would try again and again, and wrap the error beyond recognition."""
    if not _refusal(spec).exists():
        with suppress(VlaRayError):  # the disk may be what is refused
            write_json(_refusal(spec), {"error_type": type(error).__name__, "error": str(error)})


def _refusal(spec: TrainSpec) -> Location:
    return Location.of(spec.directory) / "logs" / "refusal.json"


def ray_batches(
    maker: BatchMaker, steps: Steps, rank: int, start: int, total: int, data_workers: int, data_cpus: float
) -> Iterator[MicroBatch]:
    """One worker's batches of steps `start` .. `total`, made by a pool of data actors, in order.

    Each worker streams its own samples: nothing is split, so nothing depends on who was faster, and what was consumed
    before a resume is never read.
    """
    per_chunk = max(1, CHUNK_SAMPLES // (steps.batch_size * steps.accumulation))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = -1
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, _Rest])
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    segment = per_chunk * SEGMENT_CHUNKS
    for first in range(start, total, segment):
        last = min(first + segment, total)
        rows = [_chunk(steps, rank, at, min(at + per_chunk, last)) for at in range(first, last, per_chunk)]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _MakeBatches,
            fn_constructor_kwargs={"maker": maker},
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(data_workers, len(rows))),
            num_cpus=data_cpus,
        )
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            yield from unpack(table)


class _Rest(BackpressurePolicy):
    """Lets Ray Data's scheduling loop rest between its rounds. While batches are ready that nobody takes yet, it would
    go round and round, in a thread of this very process: measured, a training step then takes twice as long."""

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        if not op.input_dependencies:  # once per round
            time.sleep(REST_S)
        return None


def _chunk(steps: Steps, rank: int, first: int, stop: int) -> dict[str, Any]:
    addresses = np.stack([steps.addresses(step, rank) for step in range(first, stop)])
    return {"first": first, "shape": list(addresses.shape), "addresses": addresses.tobytes()}


class _MakeBatches:
    """A data worker: a chunk's addresses in, its micro-batches out, one at a time."""

    def __init__(self, maker: BatchMaker) -> None:
        setup_logging()
        self.maker = maker

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        (row,) = table.to_pylist()
        addresses = np.frombuffer(row["addresses"], np.int64).reshape(row["shape"])
        try:
            for batch in self.maker(row["first"], addresses):
                yield pack(batch)
        except VlaRayError as e:
            yield pack_error(e)


def _reason(causes: Sequence[Exception], max_failures: int) -> VlaRayError:
    """The first worker's reason in a line, or Ray's own."""
    cause = causes[0]
    # An error of ours says more than the broken connections of the others.
    for candidate in (getattr(c, "_base_exc", c) for c in causes):
        if isinstance(candidate, VlaRayError):
            return candidate
        if isinstance(candidate, ray.exceptions.OutOfMemoryError):
            return TrainingError(
                "the node ran out of memory and Ray ended a worker. Lower training.batch_size, data.num_workers or "
                "data.window, or use fewer workers per node."
            )
    text = str(cause).strip().splitlines()
    reason = text[-1] if text else ""
    return ClusterError(
        f"training stopped after {max_failures} restarts ({type(cause).__name__}: {reason[:200]}). The stack is "
        "in the log above."
    )
