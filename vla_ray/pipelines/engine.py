"""The Ray Data graph that every batch workload runs on: items -> decode tasks -> replica actors -> summaries.

Only small things travel: an item's JSON, uint8 tiles, and counts on the way back. Results and rows are written by
the actors (stages/work.py). An actor that dies is restarted by Ray and its item given to it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.util.metrics import Counter

from vla_ray.errors import VlaRayError
from vla_ray.logs import setup_logging
from vla_ray.pipelines.resources import DECODE_CPUS, Plan
from vla_ray.pipelines.results import as_row, check_lease, read_results
from vla_ray.schema import METRICS
from vla_ray.stages.decode import Decoder, DecodeWorker, pack, unpack
from vla_ray.stages.work import Loaded, Replica, Summary, Worker, WorkItem
from vla_ray.storage.files import Location

MAX_BLOCKS = 4096  # blocks of one dataset: enough for any pool, few enough for the driver


def run_items(
    items: Sequence[WorkItem],
    decoder: Decoder | None,
    make_replica: Callable[[], Replica],
    run_dir: Location,
    token: str,
    plan: Plan,
    name: str,
    schema: pa.Schema = METRICS,
) -> Iterator[Summary]:
    """Process items on a pool of replicas; summaries arrive in the order of completion.

    Args:
        decoder: None if the replicas need no pictures.
        make_replica: picklable; called once in each actor.
        name: what dashboards and logs call the actors.
        schema: of the rows that replicas make.

    Raises:
        VlaRayError: one that a replica raised; ClusterError when Ray itself gave up.
    """
    rows = [{"item": item.to_json()} for item in items]
    actor = type(name, (_ReplicaActor,), {})  # the class's name is what progress and dashboards show
    dataset: Dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
    if decoder is not None:
        dataset = dataset.map(
            _Decode(DecodeWorker(decoder, run_dir, token)),
            compute=TaskPoolStrategy(size=min(plan.decoders, len(rows))),
            num_cpus=DECODE_CPUS,
        )
    dataset = dataset.map(
        actor,
        fn_constructor_kwargs={"make_replica": make_replica, "run_dir": run_dir, "token": token, "schema": schema},
        compute=ActorPoolStrategy(size=min(plan.replicas, len(rows)), max_tasks_in_flight_per_actor=2),
        num_cpus=plan.num_cpus,
        num_gpus=plan.num_gpus,
    )
    with closing(read_results(dataset)) as results:  # type: ignore[type-var]  # a generator
        for result in results:
            yield Summary(**result)


class _Decode:
    """Item JSON -> item JSON, notes, tiles."""

    def __init__(self, worker: DecodeWorker) -> None:
        self.worker = worker

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        notes, tiles = pack(self.worker(WorkItem.from_json(row["item"])), self.worker.decoder.tiler.image_size)
        return {"item": row["item"], "notes": notes, "tiles": tiles}


class _ReplicaActor:
    """One process with one model."""

    def __init__(self, make_replica: Callable[[], Replica], run_dir: Location, token: str, schema: pa.Schema) -> None:
        setup_logging()
        self.refusal: VlaRayError | None = None
        try:
            check_lease(run_dir, token)
            self.worker = Worker(make_replica(), run_dir, token, schema)
        except VlaRayError as e:
            self.refusal = e
        self.frames = Counter("vla_ray_rows_total", "rows committed, by status", tag_keys=("status",))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return as_row(lambda: asdict(self._process(row)))

    def _process(self, row: dict[str, Any]) -> Summary:
        if self.refusal is not None:
            raise self.refusal
        item = WorkItem.from_json(row["item"])
        if "tiles" in row:
            loaded = unpack(item, row["notes"], np.asarray(row["tiles"]))
        else:
            loaded = [Loaded(frame) for frame in item.frames]
        summary = self.worker(item, loaded)
        for status, count in summary.statuses.items():
            self.frames.inc(count, tags={"status": status})
        return summary
