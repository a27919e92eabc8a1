"""Plain tables of samples: Parquet, JSONL, and datasets saved with `datasets.save_to_disk` (Arrow files).

| column | values |
|---|---|
| `image` or `image_path` | PNG or JPEG bytes, `{bytes, path}`, or a path relative to the table and below it |
| `instruction`, `language_instruction` or `text` | a text; or `instructions`, a list of texts that mean the same |
| `actions` or `action` | [H][2] or [2 H], x0 y0 x1 y1 ..., deltas in units of waypoint spacings, robot frame |
| `scale_m`, `dataset`, `split`, `recording`, `t`, `valid`, `sample_id` | optional; see sample.py |

Paths that leave the table's directory (absolute, `..`, URIs) are followed for local tables only: one that was
downloaded from the hub or lies in a store could otherwise copy any picture of this machine into the dataset.

With `targets=optional` actions may lack, as they do in logs of a robot: there is something to predict all the same.
Our own prepared files (schema SAMPLES) are such tables. A row without a recording is filed under its picture, so that
two instructions for one picture stay on one side of a split.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_ray.data.cast.episodes import distinct
from vla_ray.data.cast.listing import File, check_heads, in_threads
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.scales import group_of, scale_for
from vla_ray.data.cast.shards import OPTIONAL, REQUIRED, TABLE, ReadOptions, Shard, Tally
from vla_ray.data.cast.table_cells import (
    ACTIONS,
    IMAGE,
    TEXT,
    actions_of,
    has_actions,
    image_of,
    is_downloaded,
    name_of,
    scale_of,
    step_of,
    texts_of,
    valid_of,
)
from vla_ray.data.cast.windows import accept
from vla_ray.errors import DataError, StorageError
from vla_ray.storage.location import Location, storage_errors

ENDINGS = (".parquet", ".jsonl", ".arrow")
BATCH_ROWS = 64

_SPLIT = re.compile(r"(?:^|[/._-])(train|training|val|valid|validation|dev|test)(?=[/._-]|$)")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_HINT = "Add them, or take targets=optional: a policy can predict without them, but not learn"


def is_table(name: str) -> bool:
    """By its name; the caches that `datasets` leaves beside a saved dataset are none."""
    return name.endswith(ENDINGS) and not name.startswith("cache-")


def find_tables(files: Sequence[File], dataset: str, targets: str = REQUIRED) -> list[Shard]:
    """One shard per table; `dataset` is the sub-dataset of rows that name none.

    Raises:
        DataError: a table without pictures, texts or, if they are required, actions, or one that is damaged.
    """
    needed = [IMAGE, (*TEXT, "instructions"), *([ACTIONS] if targets == REQUIRED else [])]
    tables = [file for file in files if is_table(file.name)]
    check_heads(tables)
    for file, columns in zip(tables, in_threads(_columns, tables), strict=True):
        lacking = [names for names in needed if not set(names) & set(columns)]
        if columns and lacking:
            what = "; ".join(" or ".join(names) for names in lacking)
            hint = f". {_HINT}" if lacking == [ACTIONS] else ""
            raise DataError(f"{file.location} lacks the columns {what}; it has {', '.join(columns)}{hint}")
    return [_shard(file, dataset) for file in tables]


def read_table(shard: Shard, options: ReadOptions, tally: Tally) -> Iterator[Sample]:
    """The samples of one table. Lines and pictures that cannot be read are counted and named, and the others arrive.

    Raises:
        DataError: a value of a wrong type, actions that are no [H][2] or have fewer steps than the horizon, or the path
            of a picture that this table may not name.
    """
    location = Location.of(shard.path)
    bounded = not location.is_local or is_downloaded(location)
    for number, row in _rows(location, shard, tally):
        tally.episodes += 1
        where = f"{shard.path}: row {number}"
        if options.targets == OPTIONAL and not has_actions(row):
            actions, valid = np.zeros((0, 2), np.float32), np.zeros(0, bool)
        else:
            actions, valid = actions_of(row, options.horizon, where), valid_of(row, options.horizon, where)
        try:
            image, path = image_of(row, location.parent, bounded, where)
        except StorageError as error:
            tally.steps += 1
            tally.undecodable += 1
            tally.problem(f"{shard.name}: row {number}: {error}")
            continue
        instructions = distinct(texts_of(row, where))
        t, scale = step_of(row, where), scale_of(row, where)
        dataset = name_of(row, "dataset", where) or shard.dataset
        split = name_of(row, "split", where) or shard.split
        recording = name_of(row, "recording", where) or path or f"image-{blake2b(image, digest_size=8).hexdigest()}"
        sample = Sample(
            sample_id=name_of(row, "sample_id", where) or shard.sample_id(number, t),
            dataset=dataset,
            split=options.split_of(group_of(recording), split),
            recording=recording,
            t=t,
            image=image,
            instruction=next(iter(instructions), ""),
            instructions=instructions,
            actions=actions,
            valid=valid,
            scale_m=scale_for(dataset, options) if scale is None else scale,
        )
        if accept(sample, options, tally):
            yield sample


def _shard(file: File, dataset: str) -> Shard:
    """The split is a word of the path (`train/data-00000-of-00001.arrow`, `val.jsonl`), else train."""
    stem = file.path.rsplit(".", 1)[0]
    match = _SPLIT.search(stem)
    name = _UNSAFE.sub("_", stem.replace("/", "-")).lstrip(".-")
    return Shard(
        _UNSAFE.sub("_", dataset), match[1] if match else "train", name, TABLE, str(file.location), file.identity
    )


# Rows ----------------------------------------------------------------------------------------------------------


def _columns(file: File) -> list[str]:
    """The names of a table's columns; none for an empty JSONL file."""
    try:
        with storage_errors("read", file.location), file.location.open_input() as stream:
            if file.name.endswith(".parquet"):
                return list(_checked(file.location, pq.read_schema, stream).names)
            if file.name.endswith(".arrow"):
                return list(_checked(file.location, _open_arrow, stream).schema.names)
            for line in io.BufferedReader(stream):
                if line.strip():
                    return list(dict(json.loads(line.decode("utf-8-sig"))))
    except (_DamagedError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file.location} is damaged or truncated ({reason}); fetch it or write it again") from error
    return []


def _rows(location: Location, shard: Shard, tally: Tally) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with their numbers from 0, at most BATCH_ROWS in memory. What cannot be read is told to the tally."""
    number = 0
    with storage_errors("read", location), location.open_input() as stream:
        if location.name.endswith(".jsonl"):
            yield from _lines(stream, shard, tally)
            return
        try:
            for batch in _batches(location, stream):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
        except _DamagedError as error:
            tally.lost(f"{shard.name}: the rows from {number} on cannot be read: {error}")


def _batches(location: Location, stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    if location.name.endswith(".parquet"):
        batches = _checked(location, pq.ParquetFile, stream).iter_batches(BATCH_ROWS)
    else:
        arrow = _checked(location, _open_arrow, stream)
        stored = getattr(arrow, "num_record_batches", None)
        batches = iter(arrow) if stored is None else (arrow.get_batch(i) for i in range(stored))
    while (batch := _checked(location, next, batches, None)) is not None:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _open_arrow(stream: pa.NativeFile) -> Any:
    """Both forms of Arrow files: `datasets` writes the one for streams."""
    magic = stream.read(6)
    stream.seek(0)
    return pa.ipc.open_file(stream) if magic == b"ARROW1" else pa.ipc.open_stream(stream)


class _DamagedError(Exception):
    """What a table's file has instead of rows."""


def _checked(location: Location, function: Callable[..., Any], *arguments: Any) -> Any:
    """Tell damage, which is the file's, from a read that a disk or a store refused."""
    try:
        return function(*arguments)
    except pa.ArrowException as error:
        raise _DamagedError(" ".join(str(error).split())) from error
    except OSError as error:
        if not location.is_local or error.errno is not None:
            raise
        raise _DamagedError(" ".join(str(error).split())) from error  # a page that does not unpack


def _lines(stream: pa.NativeFile, shard: Shard, tally: Tally) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(io.BufferedReader(stream)):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
            if b"\\ud" in line.lower():  # half of a pair is JSON, but no text that can be written anywhere
                json.dumps(row, ensure_ascii=False).encode()
        except ValueError as error:
            tally.lost(f"{shard.name}: row {number} is not valid JSON ({error})")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            tally.lost(f"{shard.name}: row {number} is no JSON object")
