"""Shards in, records out: one Ray task per shard, each a plain ShardPreparer; only records travel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import ray
from ray.data import Dataset, TaskPoolStrategy

from vla_ray.data.cast.shards import Shard
from vla_ray.errors import ClusterError
from vla_ray.logs import setup_logging
from vla_ray.pipelines.results import as_row, check_lease, read_results
from vla_ray.stages.prepare import ShardPreparer, ShardRecord
from vla_ray.storage.attempts import Attempts

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
    with closing(read_results(dataset)) as results:  # type: ignore[type-var]  # a generator
        for result in results:
            yield ShardRecord.from_dict(result)


class _Prepare:
    """Shard JSON -> record JSON."""

    def __init__(self, preparer: ShardPreparer, token: str) -> None:
        self.preparer, self.token = preparer, token

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        setup_logging()
        return as_row(lambda: self._prepare(Shard.from_dict(json.loads(row["shard"]))).to_dict())

    def _prepare(self, shard: Shard) -> ShardRecord:
        check_lease(self.preparer.directory, self.token)
        attempts, name = Attempts(self.preparer.directory, self.token), hashlib.sha256(shard.name.encode()).hexdigest()
        if attempts.begin(name, [shard.name], solo=True, prior=0) > MAX_STARTS:
            raise ClusterError(
                f"the process that reads shard {shard.name} ({shard.path}) was killed {MAX_STARTS} times, most likely "
                "for want of memory. Run fewer at once (cluster.num_cpus) or give another source."
            )
        record = self.preparer(shard)
        attempts.finish(name)
        return record
