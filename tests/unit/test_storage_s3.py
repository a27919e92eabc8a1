"""The same promises on an object store: a real S3 server (moto) on loopback."""

from __future__ import annotations

import errno
import logging
import pickle
import secrets
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.request import Request, urlopen

import pytest
import torch
from moto.s3.exceptions import InvalidPart
from moto.s3.models import S3Backend
from moto.server import ThreadedMotoServer

from vla_ray.errors import RunError, StorageError
from vla_ray.storage import files, payload
from vla_ray.storage.attempts import Attempts, Prior, consolidate
from vla_ray.storage.files import Location, clean_temp, create_exclusive, free_bytes, write_atomic
from vla_ray.storage.lease import Lease
from vla_ray.storage.ledger import Ledger, commit, read_metrics
from vla_ray.storage.run import RunDirectory, file_identity


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A new, empty bucket, found the way a user's would be."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    name = f"bucket-{secrets.token_hex(4)}"
    urlopen(Request(f"{server}/{name}", method="PUT")).close()
    return Location.of(f"s3://{name}")


def test_uris_are_taken_as_typed_and_shown_without_secrets(bucket: Location) -> None:
    loc = Location.of(f"s3://{bucket.path}/my run//a%20b?c=d/")
    assert str(loc) == f"s3://{bucket.path}/my run/a%20b?c=d"
    assert Location.of(str(loc)) == loc
    assert (loc.name, loc.parent.name, loc.is_local) == ("a%20b?c=d", "my run", False)
    assert bucket.parent == bucket
    with pytest.raises(StorageError, match="no bucket"):
        Location.of("s3:///key")
    with pytest.raises(StorageError, match="credentials do not belong into a URI") as e:
        Location.of("s3://me:pass@bucket/key")
    assert "pass" not in str(e.value)
    with pytest.raises(StorageError, match="not on a local disk"):
        _ = loc.local_path


def test_a_location_travels_to_a_worker_without_the_environment(
    bucket: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(bucket / "x", b"1")
    data = pickle.dumps(bucket)
    assert b"very-secret" not in data  # each worker finds its own credentials
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert (pickle.loads(data) / "x").read_bytes() == b"1"


def test_files(bucket: Location) -> None:
    directory = bucket / "a dir" / "100%"
    assert (directory.list(), directory.exists(), directory.is_dir()) == ([], False, False)
    directory.mkdir()
    assert write_atomic(directory / "y", lambda file: file.write(b"streamed") and None) == 8
    assert write_atomic(directory / "x", b"old") == write_atomic(directory / "x", b"new") == 3
    (directory / "sub" / "z").delete()  # missing is fine
    write_atomic(directory / "sub" / "z", b"")
    assert [(e.name, e.is_dir, e.size) for e in directory.list()] == [
        ("sub", True, 0),
        ("x", False, 3),
        ("y", False, 8),
    ]
    assert directory.is_dir()
    assert (directory / "x").info().mtime_ns > 1_600_000_000_000_000_000
    assert (directory / "x").read_bytes() == b"new"
    assert (directory / "none").try_read_bytes() is None
    with (directory / "y").open_input() as stream:
        stream.seek(2)
        assert stream.read(4) == b"ream"
    (directory / "x").delete()
    assert [e.name for e in directory.list()] == ["sub", "y"]
    assert free_bytes(directory) is None
    assert clean_temp(directory) == 0


def test_exclusive_creation(bucket: Location) -> None:
    assert create_exclusive(bucket / "lock", b"me")
    assert not create_exclusive(bucket / "lock", b"you")
    with pytest.raises(StorageError, match="exists already"):
        write_atomic(bucket / "lock", b"you", overwrite=False)
    assert (bucket / "lock").read_bytes() == b"me"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "stub"), KeyboardInterrupt()])
def test_a_writer_that_fails_half_way_publishes_nothing(
    bucket: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write_atomic(bucket / "x", b"old")

    def writer(file: BinaryIO) -> None:
        file.write(b"half" * 5_000_000)
        raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        write_atomic(bucket / "x", writer)
    assert (bucket / "x").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == []  # the spool file is gone


@pytest.mark.parametrize("bad_part", [1, 2, 3])
@pytest.mark.parametrize("chunk", [10 * 1024 * 1024, 64 * 1024 * 1024])
def test_an_upload_that_breaks_down_at_one_part_publishes_nothing(
    bucket: Location, monkeypatch: pytest.MonkeyPatch, bad_part: int, chunk: int
) -> None:
    write_atomic(bucket / "x", b"old")
    upload_part = S3Backend.upload_part
    parts: set[int] = set()

    def fails_once(self: S3Backend, bucket_name: str, multipart_id: str, part_id: int, value: bytes) -> Any:
        parts.add(part_id)
        if part_id == bad_part:
            raise InvalidPart
        return upload_part(self, bucket_name, multipart_id, part_id, value)

    monkeypatch.setattr(S3Backend, "upload_part", fails_once)
    monkeypatch.setattr(files, "_UPLOAD_BYTES", chunk)
    with pytest.raises(StorageError, match="Cannot write s3://"):
        write_atomic(bucket / "x", b"n" * 25_000_000)
    assert bad_part in parts
    assert (bucket / "x").read_bytes() == b"old"


def test_a_small_upload_that_is_refused_publishes_nothing(bucket: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(bucket / "x", b"old")

    def refused(*_: Any, **__: Any) -> Any:
        raise InvalidPart

    monkeypatch.setattr(S3Backend, "put_object", refused)
    with pytest.raises(StorageError, match="Cannot write s3://"):
        write_atomic(bucket / "x", b"new")
    assert (bucket / "x").read_bytes() == b"old"


def test_an_interrupt_during_an_upload_leaves_all_or_nothing(bucket: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"n" * 25_000_000
    upload_part = S3Backend.upload_part

    def interrupts(self: S3Backend, bucket_name: str, multipart_id: str, part_id: int, value: bytes) -> Any:
        if part_id == 1:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C; Python hands it to the main thread, which waits
        return upload_part(self, bucket_name, multipart_id, part_id, value)

    monkeypatch.setattr(S3Backend, "upload_part", interrupts)
    monkeypatch.setattr(files, "_UPLOAD_BYTES", 10 * 1024 * 1024)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(bucket / "x", content)
    assert (bucket / "x").read_bytes() == content


def test_a_missing_bucket_and_a_dead_server_are_expected_errors(
    bucket: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        StorageError, match=r"Cannot write s3://no-such-bucket/x: .*NO_SUCH_BUCKET.*Check the bucket"
    ) as e:
        write_atomic(Location.of("s3://no-such-bucket/x"), b"1")
    assert "\n" not in str(e.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"Cannot read s3://b/x: .*Check the bucket"):
        Location.of("s3://b/x").read_bytes()


def test_payload(bucket: Location) -> None:
    loc = bucket / "scene" / "1.pt"
    content = {"x": torch.arange(3_000_000), "tag": "a"}
    assert payload.save(loc, content) == loc.info().size > 24_000_000  # several parts
    for mmap in (True, False):
        back = payload.load(loc, mmap=mmap)
        assert back["tag"] == "a"
        assert torch.equal(back["x"], content["x"])
    write_atomic(loc, b"junk")
    with pytest.raises(StorageError, match=r"s3://.*/scene/1\.pt is damaged"):
        payload.load(loc)
    with pytest.raises(StorageError, match=r"Cannot open s3://.*/none\.pt: no such file"):
        payload.load(bucket / "none.pt")


def row(frame: str, status: str = "ok") -> dict[str, Any]:
    return {"frame_id": frame, "target": "curv_energy", "status": status}


def test_ledger(bucket: Location) -> None:
    run_dir = bucket / "run"
    assert Ledger(run_dir).load().done == set()
    name = commit(run_dir, [row("s/1"), row("s/2", "failed")])
    assert commit(run_dir, [row("s/2", "failed"), row("s/1")]) == name
    commit(run_dir, [row("s/2"), row("s/3")])
    ledger = Ledger(run_dir).load()
    assert sorted(ledger.done) == [(f"s/{i}", "curv_energy") for i in (1, 2, 3)]
    assert [e.name for e in (run_dir / "metrics").list()] == ["part-000000.parquet"]
    assert (run_dir / "ledger").list() == []
    commit(run_dir, [row("s/4", "failed")])
    assert read_metrics(run_dir, ["frame_id"])["frame_id"].to_pylist() == ["s/1", "s/2", "s/3", "s/4"]
    assert ledger.fold(None) == 1
    before = ledger.counts["failed"]
    assert ledger.drop_failed() == before >= 1
    assert read_metrics(run_dir).num_rows == 4 - before


def test_lease(bucket: Location) -> None:
    run_dir = bucket / "run"
    with Lease.acquire(run_dir, command="first") as lease:
        with pytest.raises(RunError, match="in use by another driver"):
            Lease.acquire(run_dir, command="second")
        lease.beat()
        lease.check()
    assert run_dir.list() == []
    Lease.acquire(run_dir, command="third").release()


def test_attempts(bucket: Location) -> None:
    worker = Attempts(bucket / "run", "d1")
    assert [worker.begin("b", ["s/1", "s/2"], solo=False, prior=0) for _ in range(2)] == [1, 2]
    worker.begin("c", ["s/1"], solo=True, prior=0)
    assert (worker.died_alone("s/1"), worker.died_alone("s/2")) == (True, False)
    worker.finish("b")
    assert consolidate(bucket / "run") == {"s/1": Prior(1, 1)}
    assert consolidate(bucket / "run") == {"s/1": Prior(1, 1)}


def test_run_directory(bucket: Location) -> None:
    arguments: dict[str, Any] = {"settings": {"payload": "full"}, "config_yaml": "", "command": "x"}
    write_atomic(bucket / "weights.pt", b"w" * 100)
    arguments["checkpoints"] = {"model.checkpoint": file_identity(bucket / "weights.pt")}
    run = RunDirectory.open(str(bucket / "out"), "night", **arguments)
    run.start({"manifest": "abc", "frames": 1, "targets": []})
    scene_dir = run.scene_dir("town", "action")
    write_atomic(scene_dir / "1.pt", b"1")
    run.update(status="finished")
    again = RunDirectory.open(bucket / "out", "night", **arguments)
    assert again.is_finished("abc")
    assert again.scene_dir("town", "action") == scene_dir
    assert str(scene_dir) == f"{bucket}/out/night/town_action_{run.stamp}"
