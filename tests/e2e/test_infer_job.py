"""jobs/infer.py, jobs/evaluate.py and jobs/explain.py of a policy refuse in one line, before anything is started."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from vla_ray.schema import prediction_columns

Here = Callable[..., Any]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A predictions.csv as the original script would have left it: nothing beside it."""
    rows = []
    for i in range(5):
        row = dict.fromkeys(prediction_columns(8), 0.1 * i)
        row |= {"sample_id": f"s{i}", "image_filename": "x.jpg", "image_path": "gone/x.jpg", "instruction": "turn left"}
        row |= {"predicted_actions": "[0.0]", "target_actions": "[0.0]"}
        rows.append(row)
    path = tmp_path / "elsewhere" / "predictions.csv"
    path.parent.mkdir()
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def changed(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame | None]) -> Path:
    frame = pd.read_csv(path)
    result = change(frame)
    (frame if result is None else result).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["decode=best"], "decode='best' is unknown; known: greedy, expected"),
        (["temperature=0"], "temperature=0 must be positive"),
        (["instructions=oposite"], "instructions: 'oposite' is unknown.*Did you mean 'opposite'"),
        (["split=valid"], r"no samples of the split 'valid'; it has train, val"),
        (["source=/nowhere/at/all"], "/nowhere/at/all"),
        (["model.name=/nowhere/run"], "there is no policy at /nowhere/run"),
        (["model=paligemma-3b"], r"Of the hub's models none has a tokenizers\.pt"),
        (["limt=3"], "unknown setting 'limt'.*limit"),
    ],
)
def test_infer_refuses(
    here: Here, corridors: Path, policy_dir: Path, tmp_path: Path, overrides: list[str], reason: str
) -> None:
    usual = {"source": str(corridors), "model.name": str(policy_dir), "output_dir": str(tmp_path / "out")}
    given = {o.partition("=")[0].split(".")[0] for o in overrides}
    rest = [f"{k}={v}" for k, v in usual.items() if k.split(".")[0] not in given]
    ended = here("infer", *rest, *overrides)
    line = ended.refused("infer")
    assert re.search(reason, line), line
    assert not (tmp_path / "out").exists()


def test_a_policy_without_its_tokens_is_asked_for_them(
    here: Here, corridors: Path, policy_dir: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(policy_dir, plain)
    (plain / "tokenizers.pt").unlink()
    line = here("infer", f"source={corridors}", f"model.name={plain}").refused("infer")
    assert "no tokenizers.pt" in line
    assert "model.tokenizers=FILE" in line


def test_tokens_in_other_units_are_refused(here: Here, corridors: Path, policy_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(policy_dir, other)
    content = torch.load(other / "tokenizers.pt", weights_only=True)
    torch.save({**content, "units": "metres"}, other / "tokenizers.pt")
    line = here("infer", f"source={corridors}", f"model.name={other}").refused("infer")
    assert "'metres'" in line
    assert "waypoint" in line


def test_dry_run_says_what_would_be_asked(here: Here, corridors: Path, policy_dir: Path, tmp_path: Path) -> None:
    settings = (f"source={corridors}", f"model.name={policy_dir}", f"output_dir={tmp_path / 'out'}", "dry_run=true")
    ended = here("infer", *settings, "instructions=[atomic]", "limit=7")
    assert ended.code == 0
    assert "7 samples in 1 sub-datasets, instructions: given, go forward, stop, turn left" in ended.out
    assert "49 are to do" in ended.out
    assert not (tmp_path / "out").exists()


def test_predictions_from_elsewhere_are_measured(here: Here, foreign: Path) -> None:
    ended = here("evaluate", f"results={foreign}")
    assert ended.code == 0, ended.err
    assert "Evaluation Summary: MSE: 0.0000" in ended.out
    assert "picture" in ended.out
    written = {p.name for p in (foreign.parent / "evaluation").iterdir()}
    assert {"evaluation_report.txt", "error_distributions.png", "trajectory_examples.png"} < written
    assert {"instruction_performance.png", "instruction_analysis.txt", "metrics.parquet", "metrics.json"} < written
    assert (foreign.parent / "report/index.html").exists()


def test_several_predictions_are_compared(here: Here, foreign: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "predictions.csv"
    shutil.copytree(foreign.parent, other.parent)
    changed(other, lambda f: f.assign(pred_x_7=f["pred_x_7"] + 1))
    ended = here("evaluate", f"results=[{foreign},{other}]")
    assert ended.code == 0, ended.err
    assert (foreign.parent / "evaluation/comparison.png").exists()
    assert "other" in ended.out


def test_evaluate_refuses(here: Here, foreign: Path, tmp_path: Path) -> None:
    assert "matches nothing" in here("evaluate", f"results={tmp_path}/no*/predictions.csv").refused("evaluate")
    changed(foreign, lambda f: f.drop(columns=["pred_y_3"]))
    assert "pred_y_3" in here("evaluate", f"results={foreign}").refused("evaluate")
    changed(foreign, lambda f: f.drop(columns=["instruction"]))
    assert "lacks the column instruction" in here("evaluate", f"results={foreign}").refused("evaluate")
    foreign.write_text("")
    assert "empty" in here("evaluate", f"results={foreign}").refused("evaluate")


def test_a_policy_is_explained_by_its_own_settings(here: Here, tmp_path: Path) -> None:
    line = here("explain", "model=paligemma-tiny", f"output_dir={tmp_path}", "run=gone").refused("explain")
    assert "python jobs/infer.py run=gone" in line
    line = here("explain", "model=paligemma-tiny", "kinematic_metric=curv_energy").refused("explain")
    assert "unknown setting 'kinematic_metric'" in line
