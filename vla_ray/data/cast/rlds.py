"""The published layout, directories as TFDS writes them: features.json, <name>-<split>.tfrecord-00000-of-000NN.

Sub-datasets and splits are found by their files, never by a list of names.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b

import pyarrow as pa

from vla_ray.data.cast.episodes import KEYS, read_episode, text_of
from vla_ray.data.cast.example import parse_example
from vla_ray.data.cast.features import FACTORS, FILE_PATH, parse_features
from vla_ray.data.cast.listing import File, check_heads, in_threads
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.scales import missing_scale, scale_for, source_of
from vla_ray.data.cast.shards import RLDS, ReadOptions, Shard, Tally
from vla_ray.data.cast.tfrecord import Record, read_records
from vla_ray.data.cast.windows import samples_of
from vla_ray.errors import DataError
from vla_ray.storage.location import Location, storage_errors

logger = logging.getLogger(__name__)

FEATURES = "features.json"
BUFFER_BYTES = 1 << 20  # of an object store's requests

_SHARD = re.compile(r"(?P<dataset>.+)-(?P<split>[^-]+)\.tfrecord(?:-(?P<index>\d+)-of-(?P<count>\d+))?")


def is_tfrecord(name: str) -> bool:
    return ".tfrecord" in name


def find_rlds(files: Sequence[File]) -> list[Shard]:
    """The shards among these files; none if no directory holds both a features.json and TFRecords.

    Raises:
        DataError: a features.json without pictures, states or language; a shard that is something else (git-LFS ...).
    """
    records: dict[str, list[File]] = defaultdict(list)
    described: dict[str, File] = {}
    for file in files:
        directory = file.path[: -len(file.name)]
        if file.name == FEATURES:
            described[directory] = file
        elif is_tfrecord(file.name):
            records[directory].append(file)
    directories = sorted(records.keys() & described.keys())
    check_heads([file for directory in directories for file in (described[directory], *records[directory])])
    texts = in_threads(lambda directory: described[directory].location.read_bytes(), directories)
    shards = []
    for directory, text in zip(directories, texts, strict=True):
        parse_features(text, str(described[directory].location))
        digest = blake2b(text, digest_size=4).hexdigest()
        shards += [_shard(file, digest) for file in records[directory]]
        _warn_of_gaps(directory, records[directory])
    return shards


def read_rlds(shard: Shard, options: ReadOptions, tally: Tally) -> Iterator[Sample]:
    """The samples of one shard, record by record. Damaged records are counted and named, and the others arrive.

    Raises:
        DataError: an episode without a scale, before any sample of it.
    """
    location = Location.of(shard.path)
    described = location.parent / FEATURES
    features = parse_features(described.read_bytes(), str(described))
    for record in _records(location, options, tally, shard.name):
        where = f"{shard.name}: record {record.number}"
        try:
            episode = read_episode(parse_example(record.data or b"", KEYS), features)
        except DataError as error:
            tally.lost(f"{where} {error}")
            continue
        scale = episode.scale_m or scale_for(episode.source, options)
        if scale is None:
            raise missing_scale(shard.name, _sources_without_scale(location, options))
        tally.episodes += 1
        yield from samples_of(episode, scale, record.number, shard, options, tally)


def _records(location: Location, options: ReadOptions, tally: Tally, name: str) -> Iterator[Record]:
    """The sound records; the others are told to the tally."""
    with storage_errors("read", location), location.open_input() as file:
        for record in read_records(pa.BufferedInputStream(file, BUFFER_BYTES), file.size(), options.crc):
            if record.data is None:
                tally.lost(f"{name}: {record.problem}")
            else:
                yield record


def _sources_without_scale(location: Location, options: ReadOptions) -> set[str]:
    """All of them in this shard, so that the user need not find them one by one."""
    sources = set()
    for record in _records(location, options, Tally(), ""):
        with suppress(DataError):  # a record that is no Example: said where it is read
            values = parse_example(record.data or b"", (FILE_PATH, *FACTORS))
            source = source_of(text_of(values.get(FILE_PATH)))
            if scale_for(source, options) is None and not any(key in values for key in FACTORS):
                sources.add(source)
    return sources


def _shard(file: File, features: str) -> Shard:
    match = _SHARD.fullmatch(file.name)
    if match is None:
        raise DataError(
            f"{file.location} is not named as TFDS names a shard, <name>-<split>.tfrecord[-00000-of-000NN]; rename it"
        )
    index = f"-{match['index']}-of-{match['count']}" if match["index"] else ""
    name = f"{match['dataset']}-{match['split']}{index}"
    identity = f"{file.identity}-{features}"
    return Shard(match["dataset"], match["split"], name, RLDS, str(file.location), identity)


def _warn_of_gaps(directory: str, files: Sequence[File]) -> None:
    """A download that is not complete looks like a smaller dataset; it may be meant."""
    seen: dict[tuple[str, str, int], int] = defaultdict(int)
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match and match["count"]:
            seen[match["dataset"], match["split"], int(match["count"])] += 1
    for (dataset, split, count), number in seen.items():
        if number < count:
            logger.warning("%s, split %s: %d of %d shards are in %s", dataset, split, number, count, directory or ".")
