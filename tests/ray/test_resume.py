"""Naming a run again: only what is missing is done, whatever ended the run before."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla_ray.config import CaptureConfig, ModelConfig, WandbConfig
from vla_ray.errors import CheckpointError, RunError, StorageError
from vla_ray.pipelines import driver
from vla_ray.pipelines.capture import capture
from vla_ray.storage import payload as payload_file
from vla_ray.storage.files import Location

pytestmark = pytest.mark.ray

Configure = Callable[..., CaptureConfig]
Rows = Callable[[Path], list[dict[str, Any]]]


def document(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def payloads(run: Path) -> dict[str, int]:
    """File name -> modification time of every payload."""
    return {p.name: p.stat().st_mtime_ns for p in run.glob("*/*.pt")}


def left_behind(run: Path) -> list[str]:
    """What only a run under way may hold."""
    rest = [
        *run.glob("ledger/*"),
        *run.glob("attempts/*"),
        *run.rglob("*.tmp"),
        *run.rglob(".*.tmp"),
        *run.glob("lease*"),
    ]
    return [str(p.relative_to(run)) for p in rest]


def test_an_interrupted_run_goes_on(
    tmp_path: Path,
    configure: Configure,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    config, run = configure(tmp_path, batch_size=2, payload="full"), tmp_path / "r"
    add = driver.Progress.add

    def interrupted(self: driver.Progress, done: int, failed: int) -> None:
        add(self, done, failed)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(driver.Progress, "add", interrupted)
        assert capture(config) == 130
    assert document(run)["status"] == "stopped"
    assert "stopped; to go on: python" in caplog.text
    assert "run=r" in caplog.text
    before, files = rows(run), payloads(run)
    assert 2 <= len(before) < 8
    assert len(files) >= len(before)
    assert not list(run.glob("lease*"))

    assert capture(config) == 0
    after = rows(run)
    assert [r["frame_id"] for r in after] == [f"red_light/frame_{i:04d}" for i in range(8)]
    assert [r for r in after if r["frame_id"] in {b["frame_id"] for b in before}] == before
    committed = {Path(r["payload_path"]).name for r in before}
    assert {n: t for n, t in payloads(run).items() if n in committed} == {n: files[n] for n in committed}
    assert len(payloads(run)) == 8
    assert left_behind(run) == []

    monkeypatch.setattr("vla_ray.pipelines.model_work.connect", lambda *_: pytest.fail("no Ray is needed"))
    monkeypatch.setattr("vla_ray.pipelines.capture_work.CaptureWork", lambda *_: pytest.fail("no model is needed"))
    capsys.readouterr()
    assert capture(config) == 0
    assert "nothing to do" in caplog.text
    assert "8 rows" in capsys.readouterr().out
    for changes, message in (
        ({"payload": "reduced"}, 'payload: run has "full", asked "reduced"'),
        ({"explain_mode": "text"}, 'explain_mode: run has "action", asked "text"'),
        ({"default_speed_mps": 3.0}, "default_speed_mps: run has 0.0, asked 3.0"),
    ):
        with pytest.raises(RunError, match="started with other settings") as refused:
            capture(configure(tmp_path, **{"batch_size": 2, "payload": "full", **changes}))
        assert message in str(refused.value)
    # Neither of these changes results.
    assert capture(configure(tmp_path, batch_size=7, payload="full", replicas=3)) == 0


def test_a_run_grows_by_targets_and_frames(tmp_path: Path, configure: Configure, rows: Rows) -> None:
    run = tmp_path / "r"
    assert capture(configure(tmp_path, limit=2)) == 0
    first = payloads(run)
    assert set(first) == {"frame_0000_action.pt", "frame_0001_action.pt"}

    assert capture(configure(tmp_path, limit=3, kinematic_metric=["curv_energy", "acc_energy"])) == 0
    second = payloads(run)
    assert {n: t for n, t in second.items() if n in first} == first, "what was there is not computed again"
    assert set(second) - set(first) == {
        "frame_0000_action_acc_energy.pt",
        "frame_0001_action_acc_energy.pt",
        "frame_0002_action_acc_energy.pt",
        "frame_0002_action_curv_energy.pt",
    }
    # One target again, but another one: the name that the first run's payloads have is taken.
    assert capture(configure(tmp_path, limit=3, kinematic_metric="brake_energy")) == 0
    third = payloads(run)
    assert {n: t for n, t in third.items() if n in second} == second, "another target's payload was overwritten"

    table = rows(run)
    assert len({(r["frame_id"], r["target"]) for r in table}) == len(table) == 9
    for row in table:
        content = payload_file.load(Location.of(run / row["payload_path"]))
        assert content["meta"]["target"] == row["target"]
        assert content["meta"]["frame_id"] == row["frame_id"]
        assert content["target_scalar"] == row["target_scalar"]
    assert left_behind(run) == []


def test_one_bad_frame_of_a_batch_fails_alone_and_can_be_done_again(
    tmp_path: Path, configure: Configure, rows: Rows, faults: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "r"
    config = configure(tmp_path, kinematic_metric=["curv_energy", "forward_speed"])
    faults(**{"raise": {"red_light/frame_0003": "two lines\nof trouble"}})
    assert capture(config) == 1, "one of eight is more than five per cent"
    failed = [r for r in rows(run) if r["status"] == "failed"]
    assert [(r["tag"], r["target"]) for r in failed] == [("frame_0003", "curv_energy"), ("frame_0003", "forward_speed")]
    assert {(r["error_type"], r["error"]) for r in failed} == {("RuntimeError", "two lines of trouble")}
    assert all(r["payload_path"] is None for r in failed)
    assert len(payloads(run)) == 14
    out = capsys.readouterr().out
    assert "failed   2 rows; the first: red_light/frame_0003" in out
    assert "RuntimeError: two lines of trouble" in out

    assert capture(config) == 1, "the rows of failed frames are final"
    faults()
    before = payloads(run)
    retry = configure(tmp_path, kinematic_metric=["curv_energy", "forward_speed"], retry_failed=True)
    assert capture(retry) == 0
    table = rows(run)
    assert len(table) == 16
    assert {r["status"] for r in table} == {"ok"}
    assert {n: t for n, t in payloads(run).items() if n in before} == before
    assert document(run)["counts"] == {"ok": 16, "failed": 0, "degenerate": 0}
    assert left_behind(run) == []


HOLD = """
import sys
from vla_ray.storage.files import Location
from vla_ray.storage.lease import Lease
with Lease.acquire(Location.of(sys.argv[1]), command="the other driver"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_driver_is_refused(tmp_path: Path, configure: Configure, no_ray: None) -> None:
    run = tmp_path / "r"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=r"in use by another driver.*the other driver") as refused:
            capture(configure(tmp_path))
        assert str(other.pid) in str(refused.value)
        assert [p.name for p in run.iterdir()] == ["lease.json"], "a refused driver writes nothing"
    finally:
        other.communicate("")
    assert other.returncode == 0


def test_a_full_disk_stops_cleanly(
    tmp_path: Path, configure: Configure, rows: Rows, faults: Callable[..., None]
) -> None:
    config, run = configure(tmp_path, batch_size=2, limit=6), tmp_path / "r"
    faults(full_disk="frame_0003")
    for _ in range(2):
        with pytest.raises(StorageError, match="no space left on device") as full:
            capture(config)
        assert str(full.value).count("\n") == 0
        assert "run=r" in str(full.value)
        assert document(run)["status"] == "failed"
        assert not list(run.rglob(".*.tmp"))
        assert "frame_0003" not in {r["tag"] for r in rows(run)}, "a full disk is not the frame's fault"
    faults()
    assert capture(config) == 0
    assert [r["status"] for r in rows(run)] == ["ok"] * 6
    assert left_behind(run) == []


def test_a_replica_that_cannot_start(tmp_path: Path, configure: Configure, faults: Callable[..., None]) -> None:
    faults(refuse_start="the checkpoint changed under our feet")
    with pytest.raises(CheckpointError, match="changed under our feet") as refused:
        capture(configure(tmp_path, limit=2))
    assert "Traceback" not in str(refused.value)
    assert str(refused.value).count("\n") == 0
    assert document(tmp_path / "r")["status"] == "failed"


def test_wandb_offline(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, tiny_model: ModelConfig
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for hooked in ("exit", "excepthook"):  # W&B replaces them and leaves them so
        monkeypatch.setattr(sys, hooked, getattr(sys, hooked))
    assert capture(configure(tmp_path, limit=1, wandb=WandbConfig(mode="offline"))) == 0
    (record,) = (tmp_path / "r").glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"exit_code" in content
    assert b"curv_energy" in content
    assert not list((tmp_path / "r").glob("wandb/run-*")), "nothing was meant for the network"
