"""Locations and atomic writes on a local disk. Object stores: test_storage_s3.py."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from vla_ray.errors import StorageError
from vla_ray.storage import files
from vla_ray.storage.files import (
    Entry,
    Location,
    clean_temp,
    create_exclusive,
    free_bytes,
    read_json,
    write_atomic,
    write_json,
)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


# Locations


def test_a_local_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(Location.of("a/../b/c")) == f"{tmp_path}/b/c"
    assert str(Location.of("~/runs")) == "/home/someone/runs"
    assert str(Location.of(Path("epoch=013.ckpt"))) == f"{tmp_path}/epoch=013.ckpt"


def test_a_file_uri_is_a_local_path() -> None:
    loc = Location.of("file:///data/my%20scene")
    assert loc.is_local
    assert loc.local_path == Path("/data/my scene")
    with pytest.raises(StorageError, match="host 'server'"):
        Location.of("file://server/data")


def test_an_unknown_scheme_lists_the_supported_ones_and_hides_credentials() -> None:
    with pytest.raises(StorageError, match=r"gs://bucket.*Supported: a local path, file:///path, s3://bucket/key") as e:
        Location.of("gs://me:secret@bucket/key?token=secret")
    assert "secret" not in str(e.value)


def test_joining_names_parents_and_equality(tmp_path: Path) -> None:
    loc = Location.of(tmp_path)
    child = loc / "scene 1" / "a.pt"
    assert (child.name, child.parent, child.parent.parent) == ("a.pt", loc / "scene 1", loc)
    assert child == loc / "scene 1/a.pt"
    assert len({child, loc / "scene 1/a.pt"}) == 1
    assert Location.of("/").parent == Location.of("/")
    assert str(Location.of("/") / "x") == "/x"
    assert pickle.loads(pickle.dumps(child)) == child


@pytest.mark.parametrize("part", ["..", "../x", "a/../b", "/etc", "", ".", "a//b", "a/", "a\0b"])
def test_joining_never_leaves_the_directory(tmp_path: Path, part: str) -> None:
    with pytest.raises(StorageError, match="cannot be joined"):
        Location.of(tmp_path) / part


def test_listing_is_sorted_and_a_missing_directory_is_empty(tmp_path: Path) -> None:
    loc = Location.of(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"123")
    (tmp_path / "a").mkdir()
    os.utime(tmp_path / "b.txt", ns=(1, 1_700_000_000_123_456_789))
    first, second = loc.list()
    assert (first.name, first.is_dir, first.size) == ("a", True, 0)
    assert second == Entry("b.txt", False, 3, 1_700_000_000_123_456_789) == (loc / "b.txt").info()
    assert (loc / "none").list() == []
    assert [(loc / n).exists() for n in ("a", "b.txt", "none")] == [True, True, False]
    assert [(loc / n).is_dir() for n in ("a", "b.txt", "none")] == [True, False, False]


def test_reading(tmp_path: Path) -> None:
    loc = Location.of(tmp_path) / "x"
    assert loc.try_read_bytes() is None
    for read in (loc.read_bytes, loc.info, loc.open_input):
        with pytest.raises(StorageError, match=r"Cannot \w+ .*/x: no such file or directory\. Check the path\."):
            read()
    write_atomic(loc, b"hello")
    assert loc.try_read_bytes() == loc.read_bytes() == b"hello"
    with loc.open_input() as stream:
        stream.seek(2)
        assert stream.read(2) == b"ll"
    loc.delete()
    loc.delete()
    assert not loc.exists()


def test_a_name_that_is_not_text_is_an_expected_error(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    with pytest.raises(StorageError, match="Cannot list"):
        Location.of(tmp_path).list()


def test_what_the_system_refuses_is_one_line_with_a_remedy() -> None:
    loc = Location.of("/dev/null/run")  # denied even for root: a file stands where a directory is needed
    for action in (loc.mkdir, loc.read_bytes, lambda: write_atomic(loc, b"x"), lambda: create_exclusive(loc, b"x")):
        with pytest.raises(StorageError, match=r"^Cannot .*/dev/null/run: not a directory\. A file stands") as e:
            action()
        assert "\n" not in str(e.value)


def test_free_space_of_a_directory_that_does_not_exist_yet(tmp_path: Path) -> None:
    free = free_bytes(Location.of(tmp_path) / "not/yet")
    assert free is not None
    assert free > 0


# Writing


def stream_two(file: BinaryIO) -> None:
    file.write(b"one ")
    file.write(b"two")


def test_write_creates_directories_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    loc = Location.of(tmp_path) / "run" / "deep" / "x.bin"
    assert write_atomic(loc, stream_two) == 7
    assert write_atomic(loc, b"new") == 3
    assert loc.read_bytes() == b"new"
    assert names(tmp_path / "run" / "deep") == ["x.bin"]


def test_files_are_readable_by_colleagues(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_atomic(Location.of(tmp_path) / "x", b"")
    finally:
        os.umask(umask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_no_overwrite(tmp_path: Path) -> None:
    loc = Location.of(tmp_path) / "x"
    assert write_atomic(loc, b"old", overwrite=False) == 3
    with pytest.raises(StorageError, match="exists already"):
        write_atomic(loc, b"new", overwrite=False)
    assert loc.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("step", ["writer", "fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_full_disk_at_any_step_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, before: bytes | None
) -> None:
    loc = Location.of(tmp_path) / "x"
    if before is not None:
        write_atomic(loc, before)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "stub")

    def writer(file: BinaryIO) -> None:
        file.write(b"half")
        if step == "writer":
            full()

    if step != "writer":
        monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageError, match=r"Cannot write .*/x: no space left on device\. Free some space"):
        write_atomic(loc, writer)
    monkeypatch.undo()
    assert loc.try_read_bytes() == before
    assert names(tmp_path) == ([] if before is None else ["x"])


def test_any_exception_of_the_writer_passes_and_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    for write in (write_atomic, create_exclusive):
        with pytest.raises(KeyboardInterrupt):
            write(Location.of(tmp_path) / "x", interrupted)
    assert names(tmp_path) == []


def test_a_write_is_on_disk_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        steps.append("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def recorded_replace(*paths: str) -> None:
        steps.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_atomic(Location.of(tmp_path) / "x", b"1")
    assert steps == ["file", "replace", "directory"]


KILLED_WRITER = """
import os, signal, sys
from vla_ray.storage.files import Location, write_atomic

def writer(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

write_atomic(Location.of(sys.argv[1]), writer)
"""


def test_a_writer_killed_half_way_shows_no_file_and_its_rest_is_cleaned(tmp_path: Path) -> None:
    loc = Location.of(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(loc / "x.pt")], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".x.pt.")
    assert not (loc / "x.pt").exists()
    assert clean_temp(loc) == 1
    assert names(tmp_path) == []


def test_cleaning_keeps_files_of_others_and_own_files_in_use(tmp_path: Path) -> None:
    loc = Location.of(tmp_path)
    same_pid = f".x.{os.getpid()}-0123456789abcdef.tmp"  # a dead writer of another container had our pid
    for name in (same_pid, ".hidden.tmp", "x.tmp", ".x.12-notrandom.tmp", "part.parquet"):
        (tmp_path / name).touch()

    def writer(file: BinaryIO) -> None:
        assert clean_temp(loc) == 1
        file.write(b"kept")

    write_atomic(loc / "x", writer)
    assert names(tmp_path) == [".hidden.tmp", ".x.12-notrandom.tmp", "part.parquet", "x", "x.tmp"]
    assert clean_temp(loc / "none") == 0


# Exclusive creation


def no_hard_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "stub")


@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_creators_wins_and_the_content_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_hard_links)
    loc = Location.of(tmp_path) / "lock"
    barrier = threading.Barrier(8)
    winners: list[bytes] = []

    def create(content: bytes) -> None:
        barrier.wait()
        if create_exclusive(loc, content):
            winners.append(content)

    threads = [threading.Thread(target=create, args=(bytes([65 + i]) * 1000,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [loc.read_bytes()] == winners
    assert names(tmp_path) == ["lock"]


def test_exclusive_creation_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "stub")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(StorageError, match="no space left"):
        create_exclusive(Location.of(tmp_path) / "x", b"1")
    assert names(tmp_path) == []


# JSON


def test_json(tmp_path: Path) -> None:
    loc = Location.of(tmp_path) / "run.json"
    assert read_json(loc) is None
    write_json(loc, {"a": [1, None]})
    assert read_json(loc) == {"a": [1, None]}
    assert loc.read_bytes().endswith(b"}\n")
    write_atomic(loc, b'{"a": ')
    with pytest.raises(StorageError, match=r"run\.json is not valid JSON"):
        read_json(loc)


def test_temp_names_match_what_clean_temp_removes(tmp_path: Path) -> None:
    seen: list[str] = []
    write_atomic(Location.of(tmp_path) / "x.json", lambda _: seen.extend(names(tmp_path)))
    (name,) = seen
    assert files._TEMP.fullmatch(name)
    assert name.startswith(f".x.json.{os.getpid()}-")
