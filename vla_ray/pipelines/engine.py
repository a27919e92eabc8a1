"""The Ray Data graph that every batch workload runs on: items -> decode tasks -> replica actors -> summaries.

Only small things travel: an item's JSON, uint8 tiles, and counts on the way back. Results and rows are written by
the actors (stages/work.py). An actor that dies is restarted by Ray and its item given to it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy
from ray.util.metrics import Counter

from vla_ray.errors import VlaRayError
from vla_ray.pipelines.resources import DECODE_CPUS, Plan
from vla_ray.stages.decode import Decoder, pack, unpack
from vla_ray.stages.work import Replica, Summary, Worker, WorkItem
from vla_ray.storage.files import Location

MAX_BLOCKS = 4096  # blocks of one dataset: enough for any pool, few enough for the driver


def run_items(
    items: Sequence[WorkItem],
    decoder: Decoder,
    make_replica: Callable[[], Replica],
    run_dir: Location,
    token: str,
    plan: Plan,
    name: str,
) -> Iterator[Summary]:
    """Process items on a pool of replicas; summaries arrive in the order of completion.

    Args:
        make_replica: picklable; called once in each actor.
        name: what dashboards and logs call the actors.

    Raises:
        VlaRayError: one that a replica raised, without Ray's wrapping.
    """
    rows = [{"item": item.to_json()} for item in items]
    actor = type(name, (_ReplicaActor,), {})  # the class's name is what progress and dashboards show
    dataset = (
        ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
        .map(_Decode(decoder), num_cpus=DECODE_CPUS)
        .map(
            actor,
            fn_constructor_kwargs={"make_replica": make_replica, "run_dir": run_dir, "token": token},
            compute=ActorPoolStrategy(size=plan.replicas, max_tasks_in_flight_per_actor=2),
            num_cpus=plan.num_cpus,
            num_gpus=plan.num_gpus,
        )
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for text in batch["summary"]:
                yield Summary(**json.loads(text))
    except Exception as e:
        expected = _expected(e)
        if expected is not None:
            raise expected from None
        raise


class _Decode:
    """Item JSON -> item JSON, notes, tiles."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        notes, tiles = pack(self.decoder(WorkItem.from_json(row["item"])), self.decoder.tiler.image_size)
        return {"item": row["item"], "notes": notes, "tiles": tiles}


class _ReplicaActor:
    """One process with one model."""

    def __init__(self, make_replica: Callable[[], Replica], run_dir: Location, token: str) -> None:
        self.worker = Worker(make_replica(), run_dir, token)
        self.frames = Counter("vla_ray_rows_total", "rows committed, by status", tag_keys=("status",))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        item = WorkItem.from_json(row["item"])
        summary = self.worker(item, unpack(item, row["notes"], np.asarray(row["tiles"])))
        for status, count in summary.statuses.items():
            self.frames.inc(count, tags={"status": status})
        return {"summary": json.dumps(asdict(summary))}


def _expected(error: BaseException | None) -> VlaRayError | None:
    """The VlaRayError inside Ray's wrapping, if that is what ended the job."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, VlaRayError):
            # Ray raises a class derived from both; users get the plain one.
            base = next(c for c in type(error).__mro__ if c.__module__ == VlaRayError.__module__)
            return base(str(getattr(error, "cause", error)))
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
