"""What lies below a source, before anyone opens it: all files with size and time, on a disk or in an object store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow.fs as pafs

from vla_ray.data.cast.tfrecord import GZIP, foreign
from vla_ray.errors import DataError
from vla_ray.storage.location import Location, storage_errors

HEAD_BYTES = 64
SHOWN = 20
THREADS = 16
COMPLETE = ".complete"  # in a directory that was downloaded or unpacked, written last

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class File:
    """One file below a source. `path` is relative to it."""

    path: str
    location: Location
    size: int  # bytes
    mtime_ns: int

    @property
    def name(self) -> str:
        return self.location.name

    @property
    def identity(self) -> str:
        """Differs when the content may: size and modification time."""
        return f"{self.size:x}-{self.mtime_ns:x}"


def files_below(source: Location) -> list[File]:
    """All files by path, or the source itself if it is one. Hidden ones are left out (.cache, .git)."""
    if not source.is_dir():
        entry = source.info()
        return [File(source.name, source, entry.size, entry.mtime_ns)]
    with storage_errors("list", source):
        found = source.filesystem.get_file_info(pafs.FileSelector(source.path, recursive=True))
    files = []
    for stat in found:
        path = stat.path[len(source.path) :].lstrip("/")
        if stat.type == pafs.FileType.File and not any(part.startswith(".") for part in path.split("/")):
            files.append(File(path, source / path, stat.size, stat.mtime_ns or 0))
    return sorted(files, key=lambda file: file.path)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`function` of each item, in order: an object store answers each small read in tens of milliseconds."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def check_heads(files: Sequence[File], *, may_be_compressed: bool = False) -> None:
    """DataError if any of these files is something else: a git-LFS pointer, a web page, compressed."""

    def problem(file: File) -> str | None:
        with storage_errors("read", file.location), file.location.open_input() as stream:
            head = stream.read(HEAD_BYTES)
        return None if may_be_compressed and head.startswith(GZIP) else foreign(head)

    found = [(file, what) for file, what in zip(files, in_threads(problem, files), strict=True) if what]
    if found:
        file, what = found[0]
        others = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
        raise DataError(f"{file.location}{others} is {what}")


def shown(files: Sequence[File]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return ", ".join(file.path for file in files[:SHOWN]) + more
