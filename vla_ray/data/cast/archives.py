"""RLDS directories inside `*.tar.gz` and `*.tar`: unpacked once into a cache, then read like any other shard.

An archive cannot be read by several workers at once, hence the unpacking. What is visible under the cache's name is
complete: members go to a temporary directory that is renamed at the end, with a `.complete` file that tells which
archive they came from. Only features.json, dataset_info.json and TFRecords are taken.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, cast

from vla_ray.data.cast.listing import COMPLETE, SHOWN, File, files_below
from vla_ray.data.cast.rlds import FEATURES, is_tfrecord
from vla_ray.data.cast.tfrecord import GZIP
from vla_ray.errors import DataError
from vla_ray.storage.location import Location, make_directory, storage_errors, sync_directory

logger = logging.getLogger(__name__)

ENDINGS = (".tar.gz", ".tgz", ".tar")
EXTRACTED = ".extracted"

_WANTED = (FEATURES, "dataset_info.json")
_DRAIN_BYTES = 1 << 20
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def is_archive(name: str) -> bool:
    return name.endswith(ENDINGS)


def stem(name: str) -> str:
    """`cast_filtered_dataset.tar.gz` -> `cast_filtered_dataset`."""
    return name[: -len(next(ending for ending in ENDINGS if name.endswith(ending)))]


def unpacked(archive: File, cache: Path | None) -> tuple[list[File], list[str]]:
    """The archive's RLDS files, unpacked if they are not yet, and the first names of what else it holds.

    Args:
        cache: the directory of `<archive>-<hash of its path>.extracted/`; None: `<archive>.extracted/` beside it.

    Raises:
        DataError: truncated, damaged or unsafe, or not on a local disk.
    """
    if not archive.location.is_local:
        raise DataError(
            f"{archive.location}: an archive must be on a local disk to be unpacked. Download it and give its local "
            "path, or unpack it into the store"
        )
    source = archive.location.local_path
    # In a cache, archives of several sources may have one name.
    where = f"-{blake2b(str(source).encode(), digest_size=4).hexdigest()}" if cache else ""
    target = (cache or source.parent) / f"{source.name}{where}{EXTRACTED}"
    identity = archive.identity
    document = _complete(target)
    if document is None or document["archive"] != identity:
        logger.info("unpacking %s into %s", source, target)
        with storage_errors("unpack into", Location.of(target)):
            _unpack(source, target, identity)
        document = _complete(target)
        assert document is not None
    return files_below(Location.of(target)), document["others"]


def looks_like_webdataset(names: Sequence[str]) -> bool:
    """Pictures and texts in pairs, `<key>.jpg` and `<key>.json`."""
    endings = {Path(name).suffix.lower() for name in names}
    return bool(endings & set(_PICTURES)) and bool(endings & {".json", ".txt", ".cls"})


def _complete(target: Path) -> dict[str, Any] | None:
    try:
        return json.loads((target / COMPLETE).read_bytes())
    except FileNotFoundError:
        return None


def _unpack(source: Path, target: Path, identity: str) -> None:
    make_directory(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        others = _extract(source, temporary)
        (temporary / COMPLETE).write_text(json.dumps({"archive": identity, "others": others}))
        temporary.chmod(0o755)  # mkdtemp makes it private; other users' workers read it
        for directory, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(directory) / name)
            sync_directory(Path(directory))
        _publish(temporary, target, identity)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, target: Path, identity: str) -> None:
    """Rename, unless another process just did."""
    if target.exists():
        document = _complete(target)
        if document is None:
            raise DataError(f"{target} was not unpacked by this program and stands in its place: move it away")
        if document["archive"] == identity:
            return
        shutil.rmtree(target)  # of an archive that was here before
    try:
        temporary.rename(target)
    except OSError:
        if _complete(target) is None:
            raise
    sync_directory(target.parent)


def _extract(source: Path, into: Path) -> list[str]:
    """Take the wanted members, and return the first names of the others."""
    others: list[str] = []
    try:
        with _open(source) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if member.isreg() and not name.startswith(".") and (name in _WANTED or is_tfrecord(name)):
                    archive.extract(member, into, filter="data")
                elif member.isreg() and len(others) < SHOWN:
                    others.append(member.name)
            _check_end(stream, archive.offset)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{source} is truncated, damaged or unsafe ({reason}); nothing of it was kept: fetch it again"
        ) from error
    return others


def _open(source: Path) -> IO[bytes]:
    """By content: downloads get unpacked, or not, whatever their name says."""
    with source.open("rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
    return cast(IO[bytes], gzip.open(source)) if compressed else source.open("rb")


def _check_end(stream: IO[bytes], offset: int) -> None:
    """A cut between two members looks like an end to tarfile; a whole archive ends in blocks of zeros.

    gzip has a length and a checksum at its own end, which are compared when that is read.
    """
    if isinstance(stream, gzip.GzipFile):
        while stream.read(_DRAIN_BYTES):
            pass
        return
    stream.seek(offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end of archive at byte {offset}")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
