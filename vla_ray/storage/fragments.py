"""Tables that replicas write beside their rows: one Parquet file per batch, named by what it holds.

A file is whole or absent, and it counts only for the metrics rows that name it as `payload_path`: what a batch wrote
before its process died, and was then done again in other company, is ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vla_ray.errors import StorageError
from vla_ray.storage.files import Location, write_atomic

SUFFIX = ".parquet"


def fragment_path(keys: Iterable[Sequence[str]]) -> str:
    """Where a batch of these keys keeps its table, relative to the run."""
    digest = hashlib.sha256(json.dumps(sorted(map(list, keys))).encode()).hexdigest()[:24]
    return f"{digest}{SUFFIX}"


def write_rows(location: Location, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> int:
    """Write a batch's table and return its size. A missing column is null; an unknown one is a ValueError."""
    unknown = {name for row in rows for name in row} - set(schema.names)
    if unknown:
        raise ValueError(f"no columns {sorted(unknown)} in this table: {', '.join(schema.names)}")
    table = pa.Table.from_pylist(list(rows), schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return write_atomic(location, sink.getvalue().to_pybytes())


def read_rows(run_dir: Location, paths: Iterable[str], schema: pa.Schema) -> Iterator[tuple[str, pa.Table]]:
    """(path, table) of every file, in the order given, one in memory at a time.

    Raises:
        StorageError: a file is missing, damaged, or of another version.
    """
    for path in dict.fromkeys(paths):
        location = run_dir / path
        try:
            table = pq.read_table(pa.BufferReader(location.read_bytes()))
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise StorageError(
                f"{location} is damaged ({reason}). Delete the run's directory and run again."
            ) from error
        if not set(schema.names) <= set(table.schema.names):
            lacks = ", ".join(sorted(set(schema.names) - set(table.schema.names)))
            raise StorageError(f"{location} lacks {lacks}: it was written by another version. Compute it again.")
        yield path, table.select(schema.names)
