"""Writes that are whole or absent, on a local disk or an object store.

Promises: nothing half-written is ever visible under its final name, a local write is durable when it returns (file
and directory are fsynced), and everything that can be refused is a `StorageError` (see location.py).
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import pyarrow as pa

from vla_ray.errors import StorageError
from vla_ray.storage.location import Entry, Location, make_directory, storage_errors, sync_directory

__all__ = [
    "Content",
    "Entry",
    "Location",
    "clean_temp",
    "create_exclusive",
    "free_bytes",
    "read_json",
    "write_atomic",
    "write_json",
]

Content: TypeAlias = bytes | Callable[[BinaryIO], None]

_TEMP = re.compile(r"\..+\.(\d+)-([0-9a-f]{8})[0-9a-f]{8}\.tmp")
# Tells this process's own temporary files from those of a dead one that had the same pid (usual in containers).
_PROCESS = secrets.token_hex(4)
_UPLOAD_BYTES = 64 * 1024 * 1024
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_atomic(loc: Location, data: Content, *, overwrite: bool = True) -> int:
    """Write a file so that readers see the old content or all of the new, and return its size in bytes.

    A callable writes to an open binary file: next to the target on a local disk, to a spool file for an object
    store (a store publishes whatever a stream got when it is closed, even by an exception, so it must only ever be
    handed finished bytes). `overwrite=False` refuses an existing file.
    """
    if not overwrite:
        size, created = _write_new(loc, data)
        if not created:
            raise StorageError(f"Cannot write {loc}: it exists already. Delete it or give another name.")
        return size
    with storage_errors("write", loc):
        if not loc.is_local:
            return _upload(loc, data)
        with _temporary(loc.local_path, data) as (temporary, size):
            temporary.replace(loc.path)
            sync_directory(temporary.parent)
        return size


def create_exclusive(loc: Location, data: Content) -> bool:
    """Write a file only if there is none, and say whether it was us who wrote it.

    Local: atomic, the file appears whole, exactly one of several callers wins. Object store: check, write, read
    back, which leaves a moment in which two callers may both believe they won: no lock should rest on it there.
    """
    return _write_new(loc, data)[1]


def write_json(loc: Location, value: Any) -> int:
    """Atomic write of a small JSON document, indented for people."""
    return write_atomic(loc, json.dumps(value, indent=1).encode() + b"\n")


def read_json(loc: Location) -> Any | None:
    """The document, or None if there is no such file. A damaged one is a StorageError."""
    data = loc.try_read_bytes()
    if data is None:
        return None
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{loc} is not valid JSON ({error}). Restore it or delete it.") from error


def free_bytes(loc: Location) -> int | None:
    """Free space in bytes on the disk that would hold `loc`; None for an object store."""
    if not loc.is_local:
        return None
    path = Path(loc.path)
    with storage_errors("measure the free space of", loc):
        existing = next(p for p in (path, *path.parents) if p.exists())
        return shutil.disk_usage(existing).free


def clean_temp(directory: Location) -> int:
    """Remove temporary files that dead writers left in `directory` (not below it) and return how many.

    For the driver that holds the run: files of the calling process are in use and stay.
    """
    removed = 0
    for entry in directory.list():
        match = _TEMP.fullmatch(entry.name)
        if match and (int(match[1]), match[2]) != (os.getpid(), _PROCESS):
            (directory / entry.name).delete()
            removed += 1
    return removed


# Local disks ---------------------------------------------------------------------------------------------------


@contextmanager
def _temporary(final: Path, data: Content) -> Iterator[tuple[Path, int]]:
    """A finished, fsynced file beside `final`, and its size. Whatever happens, it is gone afterwards."""
    path = final.with_name(f".{final.name}.{os.getpid()}-{_PROCESS}{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        try:
            descriptor = os.open(path, flags, 0o666)  # not mkstemp: its mode 0600 would hide results from colleagues
        except FileNotFoundError:
            make_directory(path.parent)
            descriptor = os.open(path, flags, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            _fill(file, data)
            file.flush()
            os.fsync(descriptor)
            size = os.fstat(descriptor).st_size
        yield path, size
    finally:
        with suppress(OSError):  # missing is the usual case: it was renamed
            path.unlink()


def _fill(file: BinaryIO, data: Content) -> None:
    if isinstance(data, bytes):
        file.write(data)
    else:
        data(file)


def _write_new(loc: Location, data: Content) -> tuple[int, bool]:
    with storage_errors("write", loc):
        if not loc.is_local:
            if loc.exists():
                return 0, False
            content = data if isinstance(data, bytes) else None
            size = _upload(loc, data)
            return size, content is None or loc.try_read_bytes() == content
        final = loc.local_path
        with _temporary(final, data) as (temporary, size):
            try:
                final.hardlink_to(temporary)
            except FileExistsError:
                return 0, False
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                # FAT, some network and FUSE mounts: an empty file decides who wins, then its content arrives whole.
                try:
                    final.touch(exist_ok=False)
                except FileExistsError:
                    return 0, False
                temporary.replace(final)
            sync_directory(final.parent)
        return size, True


# Object stores -------------------------------------------------------------------------------------------------


def _upload(loc: Location, data: Content) -> int:
    if isinstance(data, bytes):
        return _put(loc, pa.py_buffer(data))
    with tempfile.NamedTemporaryFile(prefix="vla_ray-") as spool:
        data(spool)  # type: ignore[arg-type]
        spool.flush()
        with pa.memory_map(spool.name) as mapped:
            return _put(loc, mapped.read_buffer())


def _put(loc: Location, content: pa.Buffer) -> int:
    # A store's stream publishes what it has got when it is closed, by an exception too and even by the garbage
    # collector. In a thread of its own no interrupt (Ctrl-C, a cancelled task) can end it between two parts; a part
    # that failed is remembered by the stream, whose close then fails as well and publishes nothing.
    with ThreadPoolExecutor(1, thread_name_prefix="vla_ray-upload") as thread:
        thread.submit(_send, loc, content).result()
    return content.size


def _send(loc: Location, content: pa.Buffer) -> None:
    with loc.filesystem.open_output_stream(loc.path, compression=None) as stream:
        for start in range(0, content.size, _UPLOAD_BYTES):
            stream.write(content.slice(start, min(_UPLOAD_BYTES, content.size - start)))
            stream.flush()  # waits for its parts: each was copied, and a payload may be gigabytes
