"""Tracking by W&B: what is asked for arrives, and whatever W&B does, the work it watches goes on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vla_ray.config import WandbConfig
from vla_ray.tracking import Tracker, WandbTracker, make_tracker
from vla_ray.training.checkpoints import RunFiles
from vla_ray.training.run_log import RunLog


class FakeRun:
    """Stands for W&B's own run object; `down` makes each call fail."""

    def __init__(self, down: bool = False) -> None:
        self.down, self.logged, self.ended = down, [], []  # type: ignore[var-annotated]
        self.summary: dict[str, Any] = {}

    def log(self, values: Mapping[str, Any]) -> None:
        self.logged.append(values)
        if self.down:
            raise ConnectionError("the service\nis down")

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


def track(monkeypatch: pytest.MonkeyPatch, directory: Path, run: Any) -> tuple[Tracker, dict[str, Any]]:
    given: dict[str, Any] = {}

    def init(**settings: Any) -> Any:
        given.update(settings)
        if isinstance(run, Exception):
            raise run
        return run

    monkeypatch.setattr("wandb.init", init)
    return make_tracker(WandbConfig(mode="online", project="p"), "r", "abc", {"a": 1}, directory), given


def test_a_run_is_known_by_its_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = FakeRun()
    tracker, given = track(monkeypatch, tmp_path / "r", run)
    with tracker:
        tracker.log({"train/loss": 1.0})
        tracker.log_table("t", ("x", "path"), [[1, [[0.0, 1.0]]]])
        tracker.summarise({"ade": 0.5})
    assert (given["project"], given["name"], given["id"], given["resume"]) == ("p", "r", "abc", "allow")
    assert given["config"] == {"a": 1}
    assert given["dir"] == str(tmp_path / "r")
    assert run.logged[0] == {"train/loss": 1.0}
    assert run.logged[1]["t"].columns == ["x", "path"]
    assert run.logged[1]["t"].data == [[1, "[[0.0, 1.0]]"]]
    assert run.summary == {"ade": 0.5}
    assert run.ended == [0]


def test_an_error_of_the_work_is_told_and_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = FakeRun()
    tracker, _ = track(monkeypatch, tmp_path, run)
    with pytest.raises(ValueError, match="of the work"), tracker:
        raise ValueError("of the work")
    assert run.ended == [1]


def test_a_service_that_is_down_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun(down=True)
    tracker, _ = track(monkeypatch, tmp_path, run)
    with tracker:
        for value in range(3):
            tracker.log({"loss": value})
        tracker.log_table("t", ("x",), [[1]])
        tracker.summarise({"ade": 0.5})
    assert len(run.logged) == 1
    assert run.ended == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "W&B failed and is left alone from now on: the service is down"


def test_a_service_that_refuses_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, _ = track(monkeypatch, tmp_path, RuntimeError("no API key"))
    assert type(tracker) is Tracker
    assert "wandb.mode=online does not work here (no API key)" in caplog.text
    assert "wandb=offline" in caplog.text
    with tracker:
        tracker.log({"loss": 1.0})


def test_off_means_that_wandb_is_not_even_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = make_tracker(WandbConfig(), "r", "abc", {}, tmp_path / "r")
    assert not isinstance(tracker, WandbTracker)
    assert not (tmp_path / "r").exists()


# What a training run tells it -----------------------------------------------------------------------------------


class Told(Tracker):
    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []
        self.tables: list[tuple[str, Any, Any]] = []

    def log(self, values: Mapping[str, Any]) -> None:
        self.points.append(dict(values))

    def log_table(self, name: str, columns: Any, rows: Any) -> None:
        self.tables.append((name, tuple(columns), rows))


def line(step: int, **values: Any) -> dict[str, Any]:
    speed = {"samples_per_s": 10.0, "tokens_per_s": 100.0, "waiting": 0.0, "learning_rate": 1e-3}
    return {"step": step, "total": 9, "kind": "train", "loss": 5.0 - step, **speed, **values}


def test_each_line_of_a_log_is_told_once_also_when_it_is_cut_and_written_again(tmp_path: Path) -> None:
    files, told = RunFiles(tmp_path), Told()
    files.append_log(line(1))
    log = RunLog(files)  # of a run that is resumed: what was told before is not told again
    for step in (2, 3):
        files.append_log(line(step))
        log.follow(told)
    files.cut_logs(1)
    log.follow(told)
    for step in (2, 3, 4):
        files.append_log(line(step))
    with files.log.open("a") as file:
        file.write('{"step": 5, "tot')  # under way
    log.follow(told)
    assert [point["step"] for point in told.points] == [2, 3, 4]
    assert told.points[0]["train/loss"] == 3.0
    assert log.step == 4


def test_trajectories_become_a_table(tmp_path: Path) -> None:
    files, told = RunFiles(tmp_path), Told()
    example = {"sample_id": "a", "instruction": "go", "predicted": [[0.0, 0.0]], "target": [[1.0, 0.0]], "ade": 1.0}
    files.append_examples({"step": 3, "examples": [example]})
    RunLog(files).follow(told)
    assert told.tables == []
    log = RunLog(files)
    files.append_examples({"step": 6, "examples": [example]})
    log.follow(told)
    columns = ("step", "sample_id", "instruction", "predicted", "target", "ade")
    assert told.tables == [("trajectories", columns, [[6, "a", "go", [[0.0, 0.0]], [[1.0, 0.0]], 1.0]])]
