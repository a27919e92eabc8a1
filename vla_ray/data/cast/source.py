"""What a user calls a source -> its shards -> samples. The one door to every layout.

Detection in this order: `synthetic`, RLDS directories, archives of these, tables. Anything else is one error that lists
what was seen and what each adapter lacked; there is no silent fallback, and nothing from a file is unpickled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from vla_ray.data.cast import archives, rlds, tables
from vla_ray.data.cast.listing import File, check_heads, files_below, shown
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.shards import REQUIRED, RLDS, SYNTHETIC, ReadOptions, Shard, Tally
from vla_ray.errors import DataError
from vla_ray.storage.location import Location

logger = logging.getLogger(__name__)

PICKLED = (".pkl", ".pickle", ".npz", ".npy", ".pt")


def find_shards(source: str | Location, cache: Path | None = None, targets: str = REQUIRED) -> list[Shard]:
    """The shards of `synthetic`, a directory or file, local or s3://, by name.

    Args:
        cache: where archives are unpacked; None: beside them.
        targets: whether tables must have actions, see ReadOptions.

    Raises:
        DataError: nothing there, an unknown layout, pickles, git-LFS pointers, or damaged files.
    """
    if source == SYNTHETIC:
        from vla_ray.data import corridors

        return corridors.shards()
    root = Location.of(source) if isinstance(source, str) else source
    if not root.exists():
        raise DataError(f"source={root} does not exist; give a directory, a file, owner/name on the hub, or synthetic")
    # What archives were unpacked to is found through them, so that one that was added or changed is not overlooked.
    files = [file for file in files_below(root) if f"{archives.EXTRACTED}/" not in file.path]
    shards = _published(files, cache) or tables.find_tables(files, root.name, targets)
    if not shards:
        raise _unknown(root, files)
    shards.sort(key=lambda shard: shard.name)
    for one, other in pairwise(shards):
        if one.name == other.name:
            raise DataError(
                f"two shards are named {one.name}: {one.path} and {other.path}; sample ids would be ambiguous: "
                "give the directory of one of them as source"
            )
    return shards


def read_shard(shard: Shard, options: ReadOptions, tally: Tally) -> Iterator[Sample]:
    """The samples of one shard in a fixed order. The tally is complete when the iterator is exhausted.

    Raises:
        DataError: no scale for an episode, or actions that do not fit the horizon. Damaged records do not raise.
    """
    if shard.layout == SYNTHETIC:
        from vla_ray.data import corridors

        return corridors.read(shard, options, tally)
    return rlds.read_rlds(shard, options, tally) if shard.layout == RLDS else tables.read_table(shard, options, tally)


def _published(files: Sequence[File], cache: Path | None) -> list[Shard]:
    """RLDS shards as they lie there, and those in archives whose content does not lie there already."""
    shards = rlds.find_rlds(files)
    unpacked = {part for file in files if rlds.is_tfrecord(file.name) for part in file.path.split("/")[:-1]}
    packed = [file for file in files if archives.is_archive(file.name)]
    check_heads(packed, may_be_compressed=True)
    held: dict[str, list[str]] = {}  # archives without shards
    for archive in packed:
        if archives.stem(archive.name) in unpacked:
            logger.info("%s is left alone: its content lies unpacked in the source", archive.location)
            continue
        members, held[archive.path] = archives.unpacked(archive, cache)
        inside = rlds.find_rlds(members)
        shards += inside
        if inside:
            del held[archive.path]
    if held and not shards:
        raise _unknown_archives(held)
    if held:
        logger.warning("no TFRecords with a features.json are in %s: left out", ", ".join(held))
    return shards


def _unknown_archives(held: dict[str, list[str]]) -> DataError:
    name, members = next(iter(held.items()))
    if archives.looks_like_webdataset(members):
        return DataError(
            f"{name} holds pictures and texts in pairs (WebDataset), which is not supported; write a JSONL or Parquet "
            f"table with the columns image_path, instruction, actions. It holds {', '.join(members)}"
        )
    return DataError(
        f"no archive holds TFRecords with a features.json beside them: {', '.join(held)}; "
        f"{name} holds {', '.join(members) or 'no other files'}"
    )


def _unknown(root: Location, files: Sequence[File]) -> DataError:
    if not files:
        return DataError(f"source={root} holds no files; give a directory with data")
    pickled = [file for file in files if file.name.endswith(PICKLED)]
    if pickled:
        return DataError(
            f"source={root} holds {shown(pickled)}: nothing is unpickled, because that can run any code that a file "
            "brings along. Give the published TFRecords, or write a JSONL or Parquet table with the columns "
            "image_path, instruction, actions"
        )
    check_heads(files)
    records = [file for file in files if rlds.is_tfrecord(file.name)]
    described = [file for file in files if file.name == rlds.FEATURES]
    if records:
        lacked = f"{rlds.FEATURES} beside {records[0].path}"
    else:
        lacked = (
            f"*.tfrecord* files beside {described[0].path if described else f'a {rlds.FEATURES} (neither is there)'}"
        )
    return DataError(
        f"source={root} has an unknown layout: it holds {shown(files)}. "
        f"RLDS lacks {lacked}; archives: no {', '.join('*' + ending for ending in archives.ENDINGS)}; "
        f"tables: no {', '.join('*' + ending for ending in tables.ENDINGS)} (a `datasets` dataset needs save_to_disk)"
    )
