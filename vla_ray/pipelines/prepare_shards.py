"""Shards in, records out: one Ray task per shard, each a plain ShardPreparer; only records travel."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import ray
from ray.data import Dataset, TaskPoolStrategy
from ray.exceptions import RayError, RayTaskError

from vla_ray import errors
from vla_ray.data.cast.shards import Shard
from vla_ray.errors import ClusterError, VlaRayError
from vla_ray.logs import setup_logging
from vla_ray.stages.prepare import ShardPreparer, ShardRecord
from vla_ray.storage.attempts import Attempts
from vla_ray.storage.lease import Lease

MAX_BLOCKS = 4096  # a task each: enough for any cluster, few enough for the driver
MAX_STARTS = 3  # of a shard whose process died; Ray would start it again for ever


def prepare_shards(shards: Sequence[Shard], preparer: ShardPreparer, token: str) -> Generator[ShardRecord, None, None]:
    """Prepare shards on the connected cluster; records arrive as they are done. Closing it stops the work.

    Args:
        token: of the lease that the driver holds on the dataset's directory.

    Raises:
        VlaRayError: one that a shard raised; ClusterError when Ray itself gave up.
    """
    rows = [{"shard": json.dumps(shard.to_dict())} for shard in shards]
    dataset: Dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
        _Prepare(preparer, token), compute=TaskPoolStrategy(), num_cpus=1
    )
    batches = iter(dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"))
    with closing(batches):  # type: ignore[type-var]  # a generator; closing it ends the tasks
        try:
            for batch in batches:
                for text in batch["result"]:
                    result = json.loads(text)
                    if "error" in result:
                        raise getattr(errors, result["error_type"])(result["error"])
                    yield ShardRecord.from_dict(result)
        except RayTaskError:
            raise  # an exception in our own code: a bug, with its stack
        except RayError as e:
            reason = " ".join(str(e).split())[:300]
            raise ClusterError(f"Ray gave up ({type(e).__name__}: {reason}).") from e


class _Prepare:
    """Shard JSON -> record JSON. An expected error travels as a result: Ray would wrap it beyond recognition."""

    def __init__(self, preparer: ShardPreparer, token: str) -> None:
        self.preparer, self.token = preparer, token

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        setup_logging()
        try:
            directory = self.preparer.directory
            if not Lease.is_held_by(directory, self.token):
                raise ClusterError(
                    f"a worker on {socket.gethostname()} does not see this run's lease in {directory}: output_dir "
                    "must be on storage that every node shares. Give such an output_dir."
                )
            result = self._prepare(Shard.from_dict(json.loads(row["shard"]))).to_dict()
        except VlaRayError as e:
            result = {"error_type": type(e).__name__, "error": str(e)}
        return {"result": json.dumps(result)}

    def _prepare(self, shard: Shard) -> ShardRecord:
        attempts, name = Attempts(self.preparer.directory, self.token), hashlib.sha256(shard.name.encode()).hexdigest()
        if attempts.begin(name, [shard.name], solo=True, prior=0) > MAX_STARTS:
            raise ClusterError(
                f"the process that reads shard {shard.name} ({shard.path}) was killed {MAX_STARTS} times, most likely "
                "for want of memory. Run fewer at once (cluster.num_cpus) or give another source."
            )
        record = self.preparer(shard)
        attempts.finish(name)
        return record
