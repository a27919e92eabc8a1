"""Where a file is: a path on a local disk or in an object store, and what a listing says about it.

The one place that turns what a user typed into a filesystem, and whatever an operating system or a store can refuse
into a `StorageError` with the path, the reason and what to do. Writing is in files.py.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from vla_ray.errors import StorageError

SUPPORTED = "a local path, file:///path, s3://bucket/key"

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or directory as a listing sees it. `size` is 0 and `mtime_ns` may be 0 for a directory."""

    name: str
    is_dir: bool
    size: int  # bytes
    mtime_ns: int  # nanoseconds since 1970


@dataclass(frozen=True, slots=True)
class Location:
    """A path on one filesystem. Cheap, picklable, and equal to another one of the same scheme and path."""

    filesystem: pafs.FileSystem = field(compare=False, repr=False)
    path: str  # absolute for local files, bucket/key for object stores
    scheme: str  # file | s3

    @staticmethod
    def of(path_or_uri: str | os.PathLike[str]) -> Location:
        """The location a user meant: a local path (relative and `~` allowed), `file://` or `s3://`.

        S3 takes credentials and region from the usual AWS variables and files, the endpoint from AWS_ENDPOINT_URL.
        """
        text = os.fspath(path_or_uri)
        match = _URI.match(text)
        if match is None:
            if not text:
                raise StorageError(f"An empty path was given. Give {SUPPORTED}.")
            return Location(pafs.LocalFileSystem(), os.path.abspath(Path(text).expanduser()), "file")  # noqa: PTH100
        scheme = match[1].lower()
        if scheme == "file":
            return Location(pafs.LocalFileSystem(), _local_path_of_uri(text), "file")
        if scheme == "s3":
            return _s3_location(text)
        raise StorageError(f"Unknown scheme '{match[1]}://' in {_without_secrets(text)}. Supported: {SUPPORTED}.")

    def __truediv__(self, part: str) -> Location:
        """A file or directory below this one. `part` may hold several names, never `..`, `.` or an absolute path."""
        names = part.split("/")
        if any(name in ("", ".", "..") or "\0" in name for name in names):
            raise StorageError(f"{part!r} cannot be joined to {self}: give a relative path without '.', '..' or '//'.")
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{part}", self.scheme)

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.scheme}://{self.path}"

    @property
    def is_local(self) -> bool:
        return self.scheme == "file"

    @property
    def local_path(self) -> Path:
        if not self.is_local:
            raise StorageError(f"{self} is not on a local disk. Give a local path here.")
        return Path(self.path)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        """The directory above; a root or a bucket is its own parent."""
        head, slash, _ = self.path.rpartition("/")
        return Location(self.filesystem, head or slash or self.path, self.scheme)

    def exists(self) -> bool:
        return self._stat().type != pafs.FileType.NotFound

    def is_dir(self) -> bool:
        """Whether this is a directory; on an object store, whether any object lies below it."""
        return self._stat().type == pafs.FileType.Directory

    def info(self) -> Entry:
        """Size and modification time. A missing file is a StorageError."""
        stat = self._stat()
        if stat.type == pafs.FileType.NotFound:
            raise StorageError(f"Cannot find {self}: no such file or directory. {_REMEDIES[errno.ENOENT]}")
        return _entry(stat)

    def list(self) -> list[Entry]:
        """What lies directly in this directory, by name; nothing if it does not exist."""
        with storage_errors("list", self):
            selector = pafs.FileSelector(self.path, recursive=False, allow_not_found=True)
            return sorted((_entry(stat) for stat in self.filesystem.get_file_info(selector)), key=lambda e: e.name)

    def read_bytes(self) -> bytes:
        with storage_errors("read", self), self.filesystem.open_input_file(self.path) as stream:
            return stream.read()

    def try_read_bytes(self) -> bytes | None:
        """The content, or None if there is no such file (also if it vanishes at this very moment)."""
        try:
            return self.read_bytes()
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def open_input(self) -> pa.NativeFile:
        """A readable, seekable file. The caller closes it."""
        with storage_errors("open", self):
            return self.filesystem.open_input_file(self.path)

    def mkdir(self) -> None:
        """Create this directory and its parents, durably. Object stores have no directories: nothing to do there."""
        if self.is_local:
            with storage_errors("create the directory", self):
                make_directory(self.local_path)

    def delete(self) -> None:
        """Delete this file; a missing one is fine."""
        with storage_errors("delete", self), suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path)

    def _stat(self) -> pafs.FileInfo:
        with storage_errors("look at", self):
            return self.filesystem.get_file_info(self.path)


def make_directory(path: Path) -> None:
    """Create a local directory and its parents, each one durable in the directory above it."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)
    path.mkdir(exist_ok=True)  # a file in its place is an error, not a directory


def sync_directory(path: Path) -> None:
    """Make the names in a local directory durable: a rename may otherwise be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # network mounts that cannot sync a directory say so with EINVAL
            raise
    finally:
        os.close(descriptor)


def _s3_location(uri: str) -> Location:
    """`s3://bucket[/key]`; the key is taken as typed, without percent-decoding, a `?` in it included."""
    bucket, _, key = uri[len("s3://") :].partition("/")
    if not bucket or "@" in bucket:
        # A URI ends up in run.json, logs and metrics: no place for secrets.
        what = "no bucket" if not bucket else "credentials do not belong into a URI"
        raise StorageError(
            f"{_without_secrets(uri)}: {what}. Give s3://bucket/key, and AWS_ACCESS_KEY_ID etc. for access."
        )
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    with storage_errors("use", uri):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not region:
            region = "us-east-1" if endpoint.netloc else pafs.resolve_s3_region(bucket)
        filesystem = pafs.S3FileSystem(
            region=region,
            endpoint_override=endpoint.netloc or None,
            scheme=endpoint.scheme or "https",
            background_writes=True,  # else a stream forgets a part that failed and publishes the others: files.py
            allow_delayed_open=True,  # small files are one request instead of three
        )
    path = "/".join(name for name in (bucket, *key.split("/")) if name)
    return Location(filesystem, path, "s3")


def _local_path_of_uri(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise StorageError(f"{uri} names the host {parts.netloc!r}. Give file:///absolute/path or {SUPPORTED}.")
    return os.path.normpath(unquote(parts.path) or "/")


def _without_secrets(uri: str) -> str:
    return re.sub(r"//[^/]*@", "//", uri.partition("?")[0])


def _entry(stat: pafs.FileInfo) -> Entry:
    is_dir = stat.type == pafs.FileType.Directory
    return Entry(stat.base_name, is_dir, 0 if is_dir else stat.size, stat.mtime_ns or 0)


# Errors --------------------------------------------------------------------------------------------------------

_FULL = "Free some space or choose another output_dir; what is finished stays, the same command resumes."
_DENIED = "Check the permissions or choose another directory."
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: _DENIED,
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A file stands where a directory is needed: check the path.",
    errno.EISDIR: "A directory stands where a file is needed: check the path.",
    errno.ENAMETOOLONG: "Shorten the run name, the scene name or output_dir.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
}
_REMOTE_REMEDY = "Check the bucket, the AWS credentials, AWS_REGION and AWS_ENDPOINT_URL."


@contextmanager
def storage_errors(action: str, loc: Location | str) -> Iterator[None]:
    """Turn what the system or a store refuses into one line: `Cannot <action> <loc>: <reason>. <remedy>`."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number).lower() if number else " ".join(str(error).split())
        local = isinstance(loc, Location) and loc.is_local
        remedy = _REMEDIES.get(number or 0, "Check the path and the disk.") if local else _REMOTE_REMEDY
        raise StorageError(f"Cannot {action} {loc}: {reason}. {remedy}") from error
