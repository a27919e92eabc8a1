"""How workers' results reach the driver through Ray Data: JSON in a column, expected errors among them.

Ray would wrap an error beyond recognition, log its stack, and start an actor that refuses again and again.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from ray.data import Dataset
from ray.exceptions import RayError, RayTaskError

from vla_ray import errors
from vla_ray.errors import ClusterError, VlaRayError
from vla_ray.storage.lease import Lease
from vla_ray.storage.location import Location


def as_row(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row with what `work` returns, or with the expected error that it raises."""
    try:
        result = work()
    except VlaRayError as e:
        result = {"error_type": type(e).__name__, "error": str(e)}
    return {"result": json.dumps(result)}


def read_results(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """What `as_row` was given, in the order of completion. Closing it frees the workers at once.

    Raises:
        VlaRayError: one that a worker raised; ClusterError when Ray itself gave up.
    """
    batches = iter(dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"))
    with closing(batches):  # type: ignore[type-var]  # a generator
        try:
            for batch in batches:
                for text in batch["result"]:
                    result = json.loads(text)
                    if "error" in result:
                        raise getattr(errors, result["error_type"])(result["error"])
                    yield result
        except RayTaskError:
            raise  # an exception in our own code: a bug, with its stack
        except RayError as e:
            reason = " ".join(str(e).split())[:300]
            raise ClusterError(f"Ray gave up ({type(e).__name__}: {reason}).") from e


def check_lease(directory: Location, token: str) -> None:
    """ClusterError if this worker does not see the lease that its driver holds: its storage is another one."""
    if not Lease.is_held_by(directory, token):
        raise ClusterError(
            f"a worker on {socket.gethostname()} does not see this run's lease in {directory}: output_dir must "
            "be on storage that every node shares. Give such an output_dir."
        )
