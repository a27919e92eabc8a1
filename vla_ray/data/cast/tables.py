"""Plain tables of samples: Parquet, JSONL, and datasets saved with `datasets.save_to_disk` (Arrow files).

| column | values |
|---|---|
| `image` or `image_path` | PNG or JPEG bytes, `{bytes, path}`, or a path: relative to the table, absolute, or a URI |
| `instruction`, `language_instruction` or `text` | a text; or `instructions`, a list of texts that mean the same |
| `actions` or `action` | [H][2] or [2 H], x0 y0 x1 y1 ..., deltas in units of waypoint spacings, robot frame |
| `scale_m`, `dataset`, `split`, `recording`, `t`, `valid`, `sample_id` | optional; see sample.py |

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
from numpy.typing import NDArray

from vla_ray.data.cast.episodes import distinct
from vla_ray.data.cast.listing import File, check_heads, in_threads
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.scales import scale_for
from vla_ray.data.cast.shards import TABLE, ReadOptions, Shard, Tally
from vla_ray.data.cast.windows import accept
from vla_ray.errors import DataError, StorageError
from vla_ray.storage.location import Location, storage_errors

ENDINGS = (".parquet", ".jsonl", ".arrow")
IMAGE = ("image", "image_path")
TEXT = ("instruction", "language_instruction", "text")
ACTIONS = ("actions", "action")
BATCH_ROWS = 64

_SPLIT = re.compile(r"(?:^|[/._-])(train|training|val|valid|validation|dev|test)(?=[/._-]|$)")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def is_table(name: str) -> bool:
    """By its name; the caches that `datasets` leaves beside a saved dataset are none."""
    return name.endswith(ENDINGS) and not name.startswith("cache-")


def find_tables(files: Sequence[File], dataset: str) -> list[Shard]:
    """One shard per table; `dataset` is the sub-dataset of rows that name none.

    Raises:
        DataError: a table without pictures, texts or actions, or one that is damaged.
    """
    tables = [file for file in files if is_table(file.name)]
    check_heads(tables)
    for file, columns in zip(tables, in_threads(_columns, tables), strict=True):
        lacking = [
            " or ".join(names) for names in (IMAGE, (*TEXT, "instructions"), ACTIONS) if not set(names) & set(columns)
        ]
        if columns and lacking:
            raise DataError(f"{file.location} lacks the columns {'; '.join(lacking)}; it has {', '.join(columns)}")
    return [_shard(file, dataset) for file in tables]


def read_table(shard: Shard, options: ReadOptions, tally: Tally) -> Iterator[Sample]:
    """The samples of one table. Lines and pictures that cannot be read are counted and named, and the others arrive.

    Raises:
        DataError: actions that are no [H][2] or have fewer steps than the horizon.
    """
    location = Location.of(shard.path)
    for number, row in _rows(location, shard, tally):
        tally.episodes += 1
        where = f"{shard.name}: row {number}"
        actions = _actions(row, options.horizon, where)
        try:
            image, path = _image(row, location.parent)
        except StorageError as error:
            tally.steps += 1
            tally.undecodable += 1
            tally.problem(f"{where}: {error}")
            continue
        given = row.get("instructions") or ()
        texts = [*(row.get(name) for name in TEXT), *((given,) if isinstance(given, str) else given)]
        instructions = distinct(text for text in texts if isinstance(text, str))
        dataset, split = str(row.get("dataset") or shard.dataset), str(row.get("split") or shard.split)
        recording = str(row.get("recording") or path or f"image-{blake2b(image, digest_size=8).hexdigest()}")
        scale = row.get("scale_m")
        sample = Sample(
            sample_id=str(row.get("sample_id") or shard.sample_id(number, int(row.get("t") or 0))),
            dataset=dataset,
            split=options.split_of(recording, split),
            recording=recording,
            t=int(row.get("t") or 0),
            image=image,
            instruction=next(iter(instructions), ""),
            instructions=instructions,
            actions=actions,
            valid=_valid(row, options.horizon, where),
            scale_m=scale_for(dataset, options) if scale is None else float(scale),
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
        except ValueError as error:
            tally.lost(f"{shard.name}: row {number} is not valid JSON ({error})")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            tally.lost(f"{shard.name}: row {number} is no JSON object")


def _actions(row: Mapping[str, Any], horizon: int, where: str) -> NDArray[np.float32]:
    given = next((row[name] for name in ACTIONS if row.get(name) is not None), None)
    try:
        actions = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError):
        actions = np.zeros((), np.float32)  # of no use either
    if actions.ndim == 1 and actions.size % 2 == 0:
        actions = actions.reshape(-1, 2)
    if actions.ndim != 2 or actions.shape[1] != 2:
        raise DataError(f"{where}: actions are {str(given)[:60]}; expected [[x, y], ...] or [x0, y0, x1, y1, ...]")
    if len(actions) < horizon:
        raise DataError(
            f"{where} has actions of {len(actions)} steps and action.num_steps={horizon} are asked for; "
            f"set action.num_steps={len(actions)} or less"
        )
    return actions[:horizon]


def _valid(row: Mapping[str, Any], horizon: int, where: str) -> NDArray[np.bool_]:
    given = row.get("valid")
    if given is None:
        return np.ones(horizon, bool)
    if len(given) < horizon:
        raise DataError(
            f"{where}: `valid` has {len(given)} values for {horizon} steps of actions; give one for each step"
        )
    return np.array(given[:horizon], dtype=bool)


def _image(row: Mapping[str, Any], directory: Location) -> tuple[bytes, str | None]:
    """The encoded picture, and its path if it was read from a file of its own. Empty bytes: the row has none."""
    for name in IMAGE:
        value = row.get(name)
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
        if isinstance(data, bytes):
            return data, None
        if isinstance(path, str) and path:
            absolute = path.startswith("/") or "://" in path
            location = Location.of(path) if absolute else directory / path.removeprefix("./")
            return location.read_bytes(), path
    return b"", None
