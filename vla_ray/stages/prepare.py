"""One shard of a source -> Parquet files of its samples, and a record of what became of it.

Samples stream through: as many as a row group are held, however large the shard. The record is written last, so that
where one is, its files are whole; a shard without one, or with one of another content or other options, is done again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.shards import ReadOptions, Shard, Tally
from vla_ray.data.cast.statistics import ActionStatistics
from vla_ray.data.prepared import to_table
from vla_ray.errors import DataError
from vla_ray.schema import SAMPLES
from vla_ray.storage.files import Location, read_json, write_atomic, write_json

Read = Callable[[Shard, ReadOptions, Tally], Iterator[Sample]]

# Pictures are compressed already, and zstd costs next to nothing on them. But the samples of one picture, each with an
# instruction of its own, lie side by side, and then it makes files five times smaller.
_COMPRESSION = "zstd"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_REPEATING = ["dataset", "split", "recording", "instruction", "instructions.list.element"]


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """One Parquet file of a shard.

    Attributes:
        path: relative to the dataset.
        row_groups: rows of each.
        bytes: its size.
        digest: of the samples in it, however they are encoded.
        recordings: all that its samples come from.
        statistics: ActionStatistics.to_dict() of its actions: as an object it is 200 kB, and the driver keeps all.
    """

    path: str
    dataset: str
    split: str
    row_groups: tuple[int, ...]
    bytes: int
    digest: str
    recordings: tuple[str, ...]
    statistics: Mapping[str, Any]

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What `shards/<shard>.json` holds. `options` is a fingerprint of all that changes a shard's samples."""

    shard: Shard
    options: str
    tally: Tally
    files: tuple[WrittenFile, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "shard": self.shard.to_dict(),
            "options": self.options,
            "tally": self.tally.to_dict(),
            "files": [_shallow(file) for file in self.files],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ShardRecord:
        files = (
            WrittenFile(
                **{
                    **file,
                    "row_groups": tuple(file["row_groups"]),
                    "recordings": tuple(file["recordings"]),
                }
            )
            for file in values["files"]
        )
        return ShardRecord(
            Shard.from_dict(values["shard"]), values["options"], Tally.from_dict(values["tally"]), tuple(files)
        )

    @staticmethod
    def read(directory: Location, shard: Shard, options: str) -> ShardRecord | None:
        """The record of this very content under these options; None if there is none."""
        values = read_json(record_location(directory, shard))
        try:
            record = None if values is None else ShardRecord.from_dict(values)
            for file in record.files if record else ():
                ActionStatistics.from_dict(file.statistics)
        except (KeyError, TypeError, ValueError):  # of another version: the shard is done again
            return None
        if record is None or record.options != options or record.shard.identity != shard.identity:
            return None
        return record


def record_location(directory: Location, shard: Shard) -> Location:
    return directory / "shards" / f"{shard.name}.json"


def options_fingerprint(options: ReadOptions, row_group: int) -> str:
    text = json.dumps({**options.to_dict(), "row_group": row_group}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ShardPreparer:
    """Writes shards of one dataset; picklable.

    Args:
        directory: of the dataset.
        row_group: samples of a row group.
        read: how a shard is read.
    """

    def __init__(self, directory: Location, options: ReadOptions, row_group: int, read: Read) -> None:
        self.directory, self.options, self.row_group, self.read = directory, options, row_group, read
        self.fingerprint = options_fingerprint(options, row_group)

    def __call__(self, shard: Shard) -> ShardRecord:
        """Read and write all of a shard.

        Raises:
            DataError: it cannot be read at all.
            StorageError: its samples cannot be written.
        """
        tally = Tally()
        files: dict[tuple[str, str], _File] = {}
        self._write(self.read(shard, self.options, tally), shard, files)
        written = tuple(files[key].written for key in sorted(files))
        record = ShardRecord(shard, self.fingerprint, tally, written)
        write_json(record_location(self.directory, shard), record.to_dict())
        return record

    def _write(self, samples: Iterator[Sample], shard: Shard, files: dict[tuple[str, str], _File]) -> None:
        """Sort the samples into files. The first sample of a sub-dataset and split opens their file and hands it the
        rest, so that every file is open in write_atomic until the last sample has come, and none is seen before."""
        for sample in samples:
            key = sample.dataset, sample.split
            if key in files:
                files[key].add(sample)
                continue
            file = files[key] = _File(_path(sample, shard), sample, self.row_group)

            def fill(stream: BinaryIO, file: _File = file) -> None:
                with pq.ParquetWriter(
                    pa.PythonFile(stream, "w"), SAMPLES, compression=_COMPRESSION, use_dictionary=_REPEATING
                ) as writer:
                    file.open(writer)
                    self._write(samples, shard, files)
                    file.flush()

            file.bytes = write_atomic(self.directory / file.path, fill)
            return


class _File:
    """A Parquet file while it is written."""

    def __init__(self, path: str, first: Sample, row_group: int) -> None:
        self.path, self.dataset, self.split = path, first.dataset, first.split
        self.bytes = 0
        self._row_group, self._rows, self._groups = row_group, [first], list[int]()
        self._digest, self._recordings, self._statistics = (
            hashlib.blake2b(digest_size=16),
            set[str](),
            ActionStatistics(),
        )

    def open(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer

    def add(self, sample: Sample) -> None:
        if len(self._rows) == self._row_group:
            self.flush()
        self._rows.append(sample)

    def flush(self) -> None:
        self._writer.write_table(to_table(self._rows), row_group_size=self._row_group)
        self._groups.append(len(self._rows))
        for sample in self._rows:
            self._digest.update(_content(sample))
            self._recordings.add(sample.recording)
            self._statistics.add(sample.actions[sample.valid])
        self._rows = []

    @property
    def written(self) -> WrittenFile:
        return WrittenFile(
            self.path,
            self.dataset,
            self.split,
            tuple(self._groups),
            self.bytes,
            self._digest.hexdigest(),
            tuple(sorted(self._recordings)),
            self._statistics.to_dict(),
        )


def _path(sample: Sample, shard: Shard) -> str:
    """Of the file that the sample belongs to, relative to the dataset."""
    for what, name in (("split", sample.split), ("dataset", sample.dataset)):
        if not _NAME.fullmatch(name):
            raise DataError(
                f"{shard.path}: {what}={name!r} of {sample.sample_id} cannot name a file. "
                "Use letters, digits, '.', '_' and '-', not starting with '.'."
            )
    # A table may hold several sub-datasets. No shard's name holds an @, so no other shard has this path.
    other = "" if sample.dataset == shard.dataset else f"@{sample.dataset}"
    return f"samples/{sample.split}/{shard.name}{other}.parquet"


def _content(sample: Sample) -> bytes:
    """What the sample is, unambiguously."""
    facts = [sample.sample_id, sample.recording, sample.instructions, sample.scale_m, len(sample.image)]
    return json.dumps(facts).encode() + sample.actions.tobytes() + sample.valid.tobytes() + sample.image


def _shallow(file: WrittenFile) -> dict[str, Any]:
    return {name: getattr(file, name) for name in file.__slots__}
