"""A prepared dataset on disk: `dataset.json` says what it holds, `samples/<split>/<shard>.parquet` hold the samples.

pipelines/prepare_cast.py writes `dataset.json` last: where it is, every file it names is whole. Reading is by row
group, so that training can draw groups in an order of its own and keep few of them in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.shards import REQUIRED
from vla_ray.data.cast.statistics import ActionStatistics
from vla_ray.errors import DataError
from vla_ray.schema import SAMPLES
from vla_ray.storage.files import Location, read_json
from vla_ray.storage.location import storage_errors

DOCUMENT = "dataset.json"
FORMAT, VERSION = "vla_ray.cast", 1


@dataclass(frozen=True, slots=True)
class PreparedFile:
    """One Parquet file.

    Attributes:
        path: relative to the dataset.
        dataset: the sub-dataset, the same for all rows.
        row_groups: rows of each.
    """

    path: str
    dataset: str
    split: str
    row_groups: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True, slots=True)
class PreparedDataset:
    """What `dataset.json` says.

    Attributes:
        location: the directory.
        horizon: steps of each sample's actions.
        fingerprint: of all samples and how they were made; not of where they lie.
        statistics: of the actions, by split; steps after an episode's end are not counted.
        document: the whole of dataset.json.
    """

    location: Location
    horizon: int
    fingerprint: str
    files: tuple[PreparedFile, ...]
    statistics: Mapping[str, ActionStatistics]
    document: Mapping[str, Any] = field(repr=False, compare=False)

    @staticmethod
    def open(path: str | Location) -> PreparedDataset:
        """Read what the dataset in this directory holds; no samples yet.

        Raises:
            DataError: it is no prepared dataset, an unfinished one, or one of another version.
        """
        location = path if isinstance(path, Location) else Location.of(path)
        document = read_json(location / DOCUMENT)
        if document is None:
            raise DataError(_missing(location))
        try:
            if (document["format"], document["version"]) != (FORMAT, VERSION):
                raise ValueError(f"its format is {document['format']} {document['version']}, not {FORMAT} {VERSION}")
            return PreparedDataset(
                location,
                int(document["horizon"]),
                str(document["fingerprint"]),
                tuple(
                    PreparedFile(f["path"], f["dataset"], f["split"], tuple(f["row_groups"])) for f in document["files"]
                ),
                {split: ActionStatistics.from_dict(v["exact"]) for split, v in document["statistics"].items()},
                document,
            )
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(
                f"{location / DOCUMENT} was not written by this version of vla_ray ({type(e).__name__}: {e}). "
                "Prepare the dataset again under another name: python jobs/prepare_cast.py source=... name=..."
            ) from e

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted({file.split for file in self.files}))

    def rows(self, split: str) -> int:
        """Number of samples of a split; 0 for one that does not exist."""
        return sum(file.rows for file in self.files if file.split == split)

    def without_actions(self, split: str) -> int:
        """Number of samples of a split that have none (logs of a robot), in a dataset without padded ones."""
        if self.document["options"].get("targets", REQUIRED) == REQUIRED:
            return 0
        return self.rows(split) - self.statistics[split].count // self.horizon

    def read_group(self, file: PreparedFile, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group, of schema SAMPLES or of some of its columns. StorageError if the file cannot be read."""
        return read_group(self.location / file.path, group, columns)


def read_group(location: Location, group: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One row group of a prepared file. StorageError if it cannot be read."""
    with storage_errors("read", location), location.open_input() as stream:
        return pq.ParquetFile(stream).read_row_group(group, None if columns is None else list(columns))


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """Samples as rows of schema SAMPLES."""
    rows = [
        {
            "sample_id": s.sample_id,
            "dataset": s.dataset,
            "split": s.split,
            "recording": s.recording,
            "t": s.t,
            "instruction": s.instruction,
            "instructions": list(s.instructions),
            "actions": s.actions.ravel(),
            "valid": s.valid,
            "scale_m": s.scale_m,
            "image": s.image,
        }
        for s in samples
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def samples(table: pa.Table) -> Iterator[Sample]:
    """Rows of schema SAMPLES as samples."""
    for row in table.to_pylist():
        row["instructions"] = tuple(row["instructions"])
        row["actions"] = np.array(row["actions"], np.float32).reshape(-1, 2)
        row["valid"] = np.array(row["valid"], np.bool_)
        yield Sample(**row)


def has_failed(location: Location) -> bool:
    """Whether a preparation was refused here after some shards were done: it takes run.json away and keeps these."""
    return (location / "shards").is_dir() and (location / "config.yaml").exists()


def _missing(location: Location) -> str:
    run = read_json(location / "run.json")
    if run is not None and run.get("settings", {}).get("job") == "prepare_cast":
        return f"the dataset {location} is not finished ({run['status']}). Run this again: {run['command']}"
    if has_failed(location):
        return (
            f"the dataset {location} is not finished: its preparation failed. "
            f"Run it again, with settings that work: python jobs/prepare_cast.py source=... name={location.name}"
        )
    if not location.exists():
        return f"there is no dataset at {location}. Make one: python jobs/prepare_cast.py (--help lists what of)"
    return (
        f"{location} is no prepared dataset: it has no {DOCUMENT}. "
        f"Make one of it: python jobs/prepare_cast.py source={location} name=NAME"
    )
