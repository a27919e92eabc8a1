"""The rows of a run, each exactly once, whatever is killed and when.

Workers commit a batch's rows as one small fragment, `ledger/<hash of its keys>.parquet`; only the driver folds
fragments into `metrics/part-<number>.parquet` and then deletes them. A part is written before its fragments go, and a
row whose key is known is dropped, so a crash between any two steps changes nothing: the next fold finishes the work.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vla_ray.errors import StorageError, nearest
from vla_ray.schema import DEGENERATE, FAILED, METRICS, OK
from vla_ray.storage.files import Location, clean_temp, write_atomic

Key: TypeAlias = tuple[Any, ...]  # strings and integers, in the order of the key columns

FRAME_AND_TARGET = ("frame_id", "target")
_PART = re.compile(r"part-(\d{6,})\.parquet")
_FRAGMENT = re.compile(r"([0-9a-f]{32})\.parquet")


def fragment_name(keys: Iterable[Sequence[str | int]]) -> str:
    """32 hex digits that depend on the set of keys only, not on their order."""
    text = json.dumps(sorted(list(key) for key in keys))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def commit(
    run_dir: Location,
    rows: Sequence[Mapping[str, Any]],
    schema: pa.Schema = METRICS,
    key: tuple[str, ...] = FRAME_AND_TARGET,
) -> str:
    """Make a batch's rows durable and return their fragment's name. What they point at must be durable already.

    Committing the same keys again replaces the fragment. A missing column is null. ValueError: an unknown column, a
    value that its column cannot hold, a null where none is allowed, no rows.
    """
    table = _table(rows, schema)
    name = fragment_name(_keys(table, key))
    _write(run_dir / "ledger" / f"{name}.parquet", table)
    return name


def read_fragment(run_dir: Location, name: str, schema: pa.Schema = METRICS) -> list[dict[str, Any]] | None:
    """The rows of a fragment that is still in the ledger; None if it was never committed or is folded already."""
    table = _read(run_dir / "ledger" / f"{name}.parquet", schema)
    return None if table is None else table.to_pylist()


def read_metrics(
    run_dir: Location,
    columns: Sequence[str] | None = None,
    schema: pa.Schema = METRICS,
    key: tuple[str, ...] = FRAME_AND_TARGET,
) -> pa.Table:
    """All rows of a run, sorted by key, each key once, also while a driver is folding."""
    wanted = list(schema.names if columns is None else columns)
    for name in wanted:
        if name not in schema.names:
            raise ValueError(f"No column {name!r}.{nearest(name, schema.names)} Columns: {', '.join(schema.names)}.")
    needed = [name for name in schema.names if name in {*wanted, *key}]
    part_schema = pa.schema([schema.field(name) for name in needed])
    # Fragments first: one that vanishes now is in a part already, which the later listing then shows.
    fragments = [_read(loc, part_schema) for _, loc in _files(run_dir / "ledger", _FRAGMENT)]
    parts = [_read(loc, part_schema) for _, loc in _files(run_dir / "metrics", _PART)]
    tables = [table for table in parts + fragments if table is not None]
    table = pa.concat_tables(tables) if tables else part_schema.empty_table()
    numbered = table.select(list(key)).append_column("row", pa.arange(0, table.num_rows))
    first = numbered.group_by(list(key), use_threads=False).aggregate([("row", "min")])["row_min"]
    return table.take(first).sort_by([(name, "ascending") for name in key]).select(wanted)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one row failed."""

    key: Key
    error_type: str | None
    error: str | None

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.key))}: {self.error_type}: {self.error}"


class Ledger:
    """The driver's view of a run's rows: which keys are done, how they ended, never the rows themselves.

    `schema` needs the key columns and `status`; `error_type` and `error` are used where it has them.
    Call `load()` once before anything else. One driver at a time: hold the lease.
    """

    def __init__(self, run_dir: Location, schema: pa.Schema = METRICS, key: tuple[str, ...] = FRAME_AND_TARGET) -> None:
        self._ledger = run_dir / "ledger"
        self._metrics = run_dir / "metrics"
        self._schema = schema
        self._key = key
        self._next_part: int | None = None
        self.done: set[Key] = set()
        self.counts: Counter[str] = Counter()
        self.first_failure: Failure | None = None

    def load(self) -> Ledger:
        """Read what earlier drivers left, fold their fragments, remove the temporary files of dead writers."""
        clean_temp(self._ledger)
        clean_temp(self._metrics)
        self._count_parts()
        self.fold(None)
        return self

    def fold(self, names: Iterable[str] | None) -> int:
        """Move the named fragments' rows (None: all there are) into one new part; returns how many rows were new.

        A fragment that is gone was folded before. A damaged one is a StorageError, and nothing is folded.
        """
        if self._next_part is None:
            raise RuntimeError("Ledger.load() comes before fold()")
        if names is None:
            fragments = [loc for _, loc in _files(self._ledger, _FRAGMENT)]
        else:
            fragments = [self._ledger / f"{name}.parquet" for name in dict.fromkeys(names)]
        tables: list[pa.Table] = []
        found: list[Location] = []
        seen: set[Key] = set()
        for loc in fragments:
            table = _read(loc, self._schema)
            if table is None:
                continue
            found.append(loc)
            new = []
            for key in _keys(table, self._key):
                new.append(key not in self.done and key not in seen)
                seen.add(key)
            tables.append(table.filter(pa.array(new, pa.bool_())))
        rows = pa.concat_tables(tables) if tables else self._schema.empty_table()
        if rows.num_rows:
            # overwrite=False: a second driver that slipped past the lease must not lose us a part.
            _write(self._metrics / f"part-{self._next_part:06d}.parquet", rows, overwrite=False)
            self._next_part += 1
            self._count(rows)
        for loc in found:
            loc.delete()
        return rows.num_rows

    def drop_failed(self) -> int:
        """Forget the failed rows, so that their keys are to be done again; returns how many there were."""
        dropped = 0
        for _, loc in _files(self._metrics, _PART):
            table = _read(loc, self._schema)
            if table is None:
                continue
            kept = table.filter(pc.not_equal(table["status"], FAILED))
            if kept.num_rows == table.num_rows:
                continue
            dropped += table.num_rows - kept.num_rows
            if kept.num_rows:
                _write(loc, kept)
            else:
                loc.delete()
        self._count_parts()
        return dropped

    def _count_parts(self) -> None:
        names = [*self._key, "status", *(n for n in ("error_type", "error") if n in self._schema.names)]
        few = pa.schema([self._schema.field(name) for name in names])
        self.done.clear()
        self.counts = Counter({OK: 0, FAILED: 0, DEGENERATE: 0})
        self.first_failure = None
        last = -1
        for number, loc in _files(self._metrics, _PART):
            last = max(last, int(number))
            table = _read(loc, few)
            if table is not None:
                self._count(table)
        # Never a number again that was used: a reader may still have that part of an earlier listing in mind.
        self._next_part = max(last + 1, self._next_part or 0)

    def _count(self, table: pa.Table) -> None:
        keys = list(_keys(table, self._key))
        status = table["status"].to_pylist()
        for row, (key, state) in enumerate(zip(keys, status, strict=True)):
            if key in self.done:
                continue
            self.done.add(key)
            self.counts[state] += 1
            # The smallest key, not the first seen: what is reported should not depend on who was faster.
            if state == FAILED and (self.first_failure is None or key < self.first_failure.key):
                reason = [table[n][row].as_py() if n in table.column_names else None for n in ("error_type", "error")]
                self.first_failure = Failure(key, *reason)


def _table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    if not rows:
        raise ValueError("No rows to commit.")
    for name in {name: None for row in rows for name in row}:
        if name not in schema.names:
            raise ValueError(f"No column {name!r}.{nearest(name, schema.names)} Columns: {', '.join(schema.names)}.")
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        try:
            if pa.types.is_integer(field.type):  # pyarrow would cut off fractions in silence
                values = [None if value is None else operator.index(value) for value in values]
            column = pa.array(values, field.type)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"Column {field.name!r} ({field.type}): {error}") from error
        if column.null_count and not field.nullable:
            raise ValueError(f"Column {field.name!r} must not be null.")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def _keys(table: pa.Table, key: tuple[str, ...]) -> Iterator[Key]:
    return zip(*(table[name].to_pylist() for name in key), strict=True)


def _files(directory: Location, pattern: re.Pattern[str]) -> list[tuple[str, Location]]:
    """(group 1, file) of every file of that name, in the order of names."""
    matches = [(pattern.fullmatch(entry.name), entry.name) for entry in directory.list()]
    return [(match[1], directory / name) for match, name in matches if match]


def _write(loc: Location, table: pa.Table, *, overwrite: bool = True) -> None:
    write_atomic(loc, lambda file: pq.write_table(table, file, compression="zstd"), overwrite=overwrite)


def _read(loc: Location, schema: pa.Schema) -> pa.Table | None:
    """The file's rows in this schema, columns that it lacks as nulls (older version); None if there is no such file."""
    data = loc.try_read_bytes()
    if data is None:
        return None
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        present = set(file.schema_arrow.names)
        table = file.read(columns=[name for name in schema.names if name in present])
        if not table.schema.equals(schema):
            columns = [table[f.name] if f.name in present else pa.nulls(table.num_rows, f.type) for f in schema]
            table = pa.Table.from_arrays(columns, names=schema.names).cast(schema)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StorageError(
            f"{loc} is damaged ({reason}). Delete it and run the same command again: its frames are computed anew."
        ) from error
    return table
