"""A prepared dataset, or one table of samples, in words and as a contact sheet."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow.parquet as pq

from vla_ray.data.cast.archives import is_archive
from vla_ray.data.cast.rlds import FEATURES, is_tfrecord
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.tables import is_table
from vla_ray.data.prepared import PreparedDataset, has_failed, samples
from vla_ray.errors import ImageError, StorageError
from vla_ray.report.contact_sheet import COLUMNS, contact_sheet
from vla_ray.report.dataset_table import dataset_table
from vla_ray.storage.files import Location, read_json, write_atomic
from vla_ray.storage.location import storage_errors

SHEET = "contact_sheet.png"
SHOWN = 4 * COLUMNS

_DEPTH, _DIRECTORIES = 5, 50  # of a search for data


def describe_dataset(location: Location) -> Iterator[str]:
    """Lines about a prepared dataset; writes its contact sheet.

    Raises:
        DataError: it is not finished, or of another version.
    """
    dataset = PreparedDataset.open(location)
    counts = ", ".join(f"{dataset.rows(split):,} {split}" for split in dataset.splits)
    yield f"dataset {location.name}: {counts} samples of {dataset.document['source']}"
    yield f"  directory    {location}"
    run = read_json(location / "run.json")
    if run is not None:
        yield f"  command      {run['command']}"
    yield f"  fingerprint  {dataset.fingerprint}"
    yield ""
    yield from dataset_table(dataset.document)
    yield ""
    yield _written(location / SHEET, pick(dataset))


def describe_samples(location: Location) -> Iterator[str]:
    """Lines about a table of schema SAMPLES; writes a contact sheet beside it."""
    with storage_errors("read", location), location.open_input() as stream:
        file = pq.ParquetFile(stream)
        groups = [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]
        picked = [
            sample
            for group, rows in _spread(groups, SHOWN)
            for sample in samples(file.read_row_group(group).take(rows))
        ]
        yield f"{location}: {sum(groups):,} samples in {len(groups)} row groups"
    yield "  columns: " + ", ".join(f"{f.name} ({f.type})" for f in file.schema_arrow)
    if picked:
        name = location.name.removesuffix(".parquet")
        yield _written(location.parent / f"{name}.{SHEET}", picked)


def is_unprepared(location: Location) -> bool:
    """Whether this is a source of jobs/prepare_cast.py, or a dataset whose preparation failed.

    Published data lie two or three directories deep; beyond a few dozen directories nothing is looked for.
    """
    if has_failed(location):
        return True
    if (location.parent / "run.json").exists():  # tables of a run
        return False
    level, looked = [location], 0
    for _ in range(_DEPTH):
        below = []
        for directory in level[: _DIRECTORIES - looked]:
            looked += 1
            entries = directory.list()
            if any(_is_source(entry.name) for entry in entries if not entry.is_dir):
                return True
            below += [directory / entry.name for entry in entries if entry.is_dir and not entry.name.startswith(".")]
        level = below
    return False


def _is_source(name: str) -> bool:
    return name == FEATURES or is_tfrecord(name) or is_archive(name) or is_table(name)


def pick(dataset: PreparedDataset, count: int = SHOWN) -> list[Sample]:
    """About `count` samples, evenly from all sub-datasets and splits and evenly within each."""
    kinds = sorted({(file.dataset, file.split) for file in dataset.files})
    picked: list[Sample] = []
    for k, kind in enumerate(kinds):
        share = (k + 1) * count // len(kinds) - k * count // len(kinds)
        places = [(f, g) for f in dataset.files if (f.dataset, f.split) == kind for g in range(len(f.row_groups))]
        for place, rows in _spread([file.row_groups[group] for file, group in places], max(1, share)):
            picked += samples(dataset.read_group(*places[place]).take(rows))
    return picked


def _spread(groups: Sequence[int], count: int) -> Iterator[tuple[int, list[int]]]:
    """At most `count` rows, evenly over all: per group of so many rows, which ones."""
    ends = np.cumsum(groups)
    total = int(ends[-1]) if len(ends) else 0
    rows = np.unique(np.linspace(0, max(0, total - 1), min(count, total)).astype(int))
    owner = np.searchsorted(ends, rows, side="right")
    for group in np.unique(owner).tolist():
        yield group, (rows[owner == group] - (ends[group] - groups[group])).tolist()


def _written(location: Location, picked: Sequence[Sample]) -> str:
    """Looking at a dataset works where nothing can be written, too."""
    file = io.BytesIO()
    try:
        contact_sheet(picked).save(file, "PNG")
        write_atomic(location, file.getvalue())
    except (StorageError, ImageError) as error:
        return f"no contact sheet: {error}"
    return f"contact sheet of {len(picked)} samples: {location}"
