"""Every row exactly once: commits, folds, and a crash between any two steps."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_ray.errors import StorageError
from vla_ray.schema import METRICS
from vla_ray.storage import ledger as ledger_module
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import Ledger, commit, fragment_name, read_metrics


@pytest.fixture
def run_dir(tmp_path: Path) -> Location:
    return Location.of(tmp_path) / "run"


def row(frame: int, target: str = "curv_energy", status: str = "ok", **more: Any) -> dict[str, Any]:
    return {"frame_id": f"s/{frame:04d}", "target": target, "status": status, "target_scalar": float(frame), **more}


def batches(run_dir: Location, count: int = 3, size: int = 2) -> list[str]:
    return [commit(run_dir, [row(b * size + i) for i in range(size)]) for b in range(count)]


def frames(run_dir: Location) -> list[str]:
    return read_metrics(run_dir, ["frame_id"])["frame_id"].to_pylist()


def stored(run_dir: Location) -> list[str]:
    """Frame ids in the part files as they lie on disk, duplicates included."""
    parts = sorted((run_dir.local_path / "metrics").glob("part-*.parquet"))
    return sorted(x for part in parts for x in pq.read_table(part, columns=["frame_id"])["frame_id"].to_pylist())


def names(run_dir: Location, directory: str) -> list[str]:
    return [entry.name for entry in (run_dir / directory).list()]


ALL = [f"s/{i:04d}" for i in range(6)]


def test_a_fragment_is_named_by_its_set_of_keys() -> None:
    keys = [("s/1", "a"), ("s/2", "a")]
    assert fragment_name(keys) == fragment_name(reversed(keys)) == fragment_name([list(k) for k in keys])
    assert len(fragment_name(keys)) == 32
    others = [[("s/1", "a")], [("s/1a", ""), ("s/2", "a")], [("s/1", "b"), ("s/2", "a")]]
    assert len({fragment_name(k) for k in [keys, *others]}) == 4


def test_commit_writes_one_typed_fragment_and_is_idempotent(run_dir: Location) -> None:
    rows = [row(1, num_tiles=np.int64(2), target_scalar=np.float32(0.5)), row(2, status="failed", error_type="X")]
    name = commit(run_dir, rows)
    assert commit(run_dir, list(reversed(rows))) == name
    assert names(run_dir, "ledger") == [f"{name}.parquet"]
    table = pq.read_table(run_dir.local_path / "ledger" / f"{name}.parquet")
    assert table.schema.equals(METRICS)
    assert table["num_tiles"].to_pylist() == [None, 2]
    assert sorted(table["target_scalar"].to_pylist()) == [0.5, 2.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, target_scaler=1.0)], r"No column 'target_scaler'\. Did you mean 'target_scalar'\?"),
        ([row(1, num_tiles=1.5)], r"Column 'num_tiles' \(int32\)"),
        ([row(1, num_tiles="two")], r"Column 'num_tiles' \(int32\)"),
        ([row(1, num_tiles=2**40)], r"Column 'num_tiles' \(int32\)"),
        ([{"frame_id": "s/1", "target": "a"}], "Column 'status' must not be null"),
        ([], "No rows"),
    ],
)
def test_commit_refuses_what_the_table_cannot_hold(run_dir: Location, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        commit(run_dir, rows)
    assert not run_dir.exists()


def test_fold_moves_rows_into_one_part(run_dir: Location) -> None:
    ledger = Ledger(run_dir).load()
    first, second, third = batches(run_dir)
    assert ledger.fold([first, third, first]) == 4
    assert names(run_dir, "metrics") == ["part-000000.parquet"]
    assert names(run_dir, "ledger") == [f"{second}.parquet"]
    assert ledger.fold([first]) == 0  # gone: folded before
    assert ledger.fold(None) == 2
    assert names(run_dir, "metrics") == ["part-000000.parquet", "part-000001.parquet"]
    assert names(run_dir, "ledger") == []
    assert ledger.done == {(frame, "curv_energy") for frame in ALL}
    assert ledger.fold(None) == 0
    assert stored(run_dir) == ALL


def test_rows_known_already_or_twice_among_the_fragments_are_dropped(run_dir: Location) -> None:
    ledger = Ledger(run_dir).load()
    commit(run_dir, [row(1), row(2)])
    ledger.fold(None)
    commit(run_dir, [row(1), row(2)])  # a retried task commits again
    commit(run_dir, [row(2), row(3)])  # batches were cut differently
    commit(run_dir, [row(3), row(4), row(3)])
    assert ledger.fold(None) == 2
    assert stored(run_dir) == ["s/0001", "s/0002", "s/0003", "s/0004"]
    assert ledger.counts["ok"] == 4
    assert names(run_dir, "ledger") == []


def test_load_resumes_from_parts_and_left_over_fragments(run_dir: Location) -> None:
    first, *_ = batches(run_dir)
    Ledger(run_dir).load()
    commit(run_dir, [row(6, status="degenerate"), row(7, status="failed", error_type="ImageError", error="truncated")])
    (run_dir.local_path / "ledger" / f".{first}.parquet.1-0123456789abcdef.tmp").touch()
    ledger = Ledger(run_dir).load()
    assert len(ledger.done) == 8
    assert ledger.counts == {"ok": 6, "degenerate": 1, "failed": 1}
    assert str(ledger.first_failure) == "s/0007 curv_energy: ImageError: truncated"
    assert names(run_dir, "ledger") == []


def test_fold_needs_load(run_dir: Location) -> None:
    with pytest.raises(RuntimeError, match="load"):
        Ledger(run_dir).fold(None)


class CrashError(BaseException):
    """Stands for SIGKILL: nothing that handles ordinary exceptions may save the day."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int, after: bool) -> Callable[[], bool]:
    """Crash before or after the given call that changes the disk: publishing a file (link, replace), deleting one."""
    calls = 0

    def guarded(action: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call and not after:
                raise CrashError
            result = action(*args, **kwargs)
            if calls == call:
                raise CrashError
            return result

        return wrapper

    monkeypatch.setattr(os, "link", guarded(os.link))
    monkeypatch.setattr(os, "replace", guarded(os.replace))
    monkeypatch.setattr(Location, "delete", guarded(Location.delete))
    return lambda: calls >= call


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_crash_at_any_step_of_a_fold_is_harmless(
    run_dir: Location, monkeypatch: pytest.MonkeyPatch, call: int, after: bool
) -> None:
    batches(run_dir)
    ledger = Ledger(run_dir)
    crashed = crash_at(monkeypatch, call, after)  # one part is published, three fragments are deleted
    with pytest.raises(CrashError):
        ledger.load()
    assert crashed()
    monkeypatch.undo()
    assert frames(run_dir) == ALL  # a reader in between
    resumed = Ledger(run_dir).load()
    assert len(resumed.done) == 6
    assert stored(run_dir) == ALL
    assert names(run_dir, "ledger") == []
    assert names(run_dir, "metrics") == ["part-000000.parquet"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_crash_at_any_step_of_dropping_failed_rows_is_harmless(
    run_dir: Location, monkeypatch: pytest.MonkeyPatch, call: int, after: bool
) -> None:
    ledger = Ledger(run_dir).load()
    for i in range(3):  # parts: mixed, only failed, mixed
        commit(run_dir, [row(i, status="failed"), row(10 + i, status="failed" if i == 1 else "ok")])
        ledger.fold(None)
    crash_at(monkeypatch, call, after)
    with pytest.raises(CrashError):
        ledger.drop_failed()
    monkeypatch.undo()
    resumed = Ledger(run_dir).load()
    resumed.drop_failed()
    assert stored(run_dir) == ["s/0010", "s/0012"]
    assert resumed.done == {("s/0010", "curv_energy"), ("s/0012", "curv_energy")}


def test_dropping_failed_rows_frees_their_keys(run_dir: Location) -> None:
    commit(run_dir, [row(1), row(2, status="failed", error_type="A"), row(3, status="degenerate")])
    ledger = Ledger(run_dir).load()
    commit(run_dir, [row(4, status="failed")])
    ledger.fold(None)
    assert ledger.drop_failed() == 2
    assert ledger.counts == {"ok": 1, "degenerate": 1, "failed": 0}
    assert ledger.first_failure is None
    assert names(run_dir, "metrics") == ["part-000000.parquet"]
    assert ledger.drop_failed() == 0
    commit(run_dir, [row(4)])
    assert ledger.fold(None) == 1
    assert names(run_dir, "metrics") == ["part-000000.parquet", "part-000002.parquet"]  # no number twice
    assert frames(run_dir) == ["s/0001", "s/0003", "s/0004"]


def test_a_second_driver_cannot_lose_rows_of_the_first(run_dir: Location) -> None:
    one, two = Ledger(run_dir).load(), Ledger(run_dir).load()  # the lease failed to stop this
    commit(run_dir, [row(1)])
    one.fold(None)
    commit(run_dir, [row(2)])
    with pytest.raises(StorageError, match=r"part-000000\.parquet: it exists already"):
        two.fold(None)
    assert one.fold(None) == 1
    assert stored(run_dir) == ["s/0001", "s/0002"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other table"])
def test_a_damaged_fragment_is_named_and_nothing_is_folded(run_dir: Location, damage: str) -> None:
    _, second, _ = batches(run_dir)
    path = run_dir.local_path / "ledger" / f"{second}.parquet"
    data = path.read_bytes()
    if damage == "other table":
        pq.write_table(pa.table({"x": [1]}), path)
    else:
        path.write_bytes(
            {"truncated": data[:-20], "flipped": data[:4] + b"\xff" * 40 + data[44:], "empty": b""}[damage]
        )
    with pytest.raises(StorageError, match=rf"{second}\.parquet is damaged .* Delete it and run"):
        Ledger(run_dir).load()
    assert len(names(run_dir, "ledger")) == 3
    path.unlink()
    assert len(Ledger(run_dir).load().done) == 4


def test_a_part_of_an_older_version_reads_with_nulls(run_dir: Location) -> None:
    old = pa.schema([METRICS.field(n) for n in ("frame_id", "target", "status")])
    commit(run_dir, [{"frame_id": "s/1", "target": "a", "status": "ok"}], schema=old)
    assert Ledger(run_dir).load().done == {("s/1", "a")}
    assert read_metrics(run_dir).schema.equals(METRICS)
    assert read_metrics(run_dir, ["text"]).to_pylist() == [{"text": None}]


def test_readers_see_each_key_once_sorted_with_the_columns_they_ask_for(run_dir: Location) -> None:
    commit(run_dir, [row(3), row(1), row(1, target="brake_energy")])
    Ledger(run_dir).load()
    commit(run_dir, [row(2), row(3)])
    table = read_metrics(run_dir, ["target_scalar", "target"])
    assert table.column_names == ["target_scalar", "target"]
    assert table["target"].to_pylist() == ["brake_energy"] + ["curv_energy"] * 3
    assert table["target_scalar"].to_pylist() == [1.0, 1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"No column 'target_scalr'\. Did you mean 'target_scalar'"):
        read_metrics(run_dir, ["target_scalr"])
    assert read_metrics(run_dir / "none").num_rows == 0


def test_a_reader_during_a_fold_misses_nothing(run_dir: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    batches(run_dir)
    folded = []
    read = ledger_module._read

    def fold_first(loc: Location, schema: pa.Schema) -> pa.Table | None:
        if not folded:
            folded.append(True)
            Ledger(run_dir).load()  # between the reader's listing and its first read
        return read(loc, schema)

    monkeypatch.setattr(ledger_module, "_read", fold_first)
    assert frames(run_dir) == ALL


def test_another_workload_brings_its_own_table(run_dir: Location) -> None:
    schema = pa.schema([("episode", pa.string()), ("step", pa.int32()), ("status", pa.string()), ("ade", pa.float64())])
    key = ("episode", "step")
    name = commit(run_dir, [{"episode": "e", "step": 10, "status": "ok"}], schema, key)
    assert name == fragment_name([("e", 10)])
    commit(run_dir, [{"episode": "e", "step": 9, "status": "failed"}], schema, key)
    ledger = Ledger(run_dir, schema, key).load()
    assert ledger.done == {("e", 9), ("e", 10)}
    assert ledger.first_failure is not None
    assert ledger.first_failure.key == ("e", 9)
    assert read_metrics(run_dir, ["step"], schema, key)["step"].to_pylist() == [9, 10]


def test_workers_commit_while_the_driver_folds(run_dir: Location) -> None:
    ledger = Ledger(run_dir).load()
    workers = [
        threading.Thread(target=lambda w=w: [commit(run_dir, [row(w * 100 + i)]) for i in range(20)]) for w in range(3)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        ledger.fold(None)
    ledger.fold(None)
    assert stored(run_dir) == sorted(f"s/{w * 100 + i:04d}" for w in range(3) for i in range(20))


WITHOUT_PANDAS = """
import sys
from importlib.abc import MetaPathFinder

class NoPandas(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "pandas":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPandas())
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import Ledger, read_metrics

run = Location.of(sys.argv[1])
assert read_metrics(run).num_rows == len(Ledger(run).load().done) == 6
"""


def test_reading_a_run_works_without_pandas(run_dir: Location) -> None:
    batches(run_dir)
    subprocess.run([sys.executable, "-c", WITHOUT_PANDAS, str(run_dir)], check=True, timeout=60)
