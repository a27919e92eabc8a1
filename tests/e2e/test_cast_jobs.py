"""The second workload from end to end: prepare, train, infer, evaluate; with no arguments, and on CAST's own format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import PaliGemmaForConditionalGeneration

from vla_ray.schema import prediction_columns

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def validations(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "logs/train.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "validation"]


@pytest.mark.timeout(900)
def test_with_no_arguments_a_policy_learns_to_listen(
    process: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLA_RAY_ROOT", str(tmp_path))
    ended = process("train", seconds=800)
    assert ended.code == 0, ended.err
    (run,) = (tmp_path / "checkpoints").iterdir()
    last = validations(run)[-1]
    assert last["ade"] < 0.6 * last["ade_straight"] < 0.6 * last["ade_still"]
    assert last["language_use"] > 0.5
    assert f"{last['ade']:.2f}" in ended.out
    assert "straight on" in ended.out
    PaliGemmaForConditionalGeneration.from_pretrained(run / "best_model")

    ended = process("infer", "every=6")  # of all kinds; the first are those that need the picture most
    assert ended.code == 0, ended.err
    assert f"the newest trained tiny policy: {run}" in ended.err
    (predicted,) = (tmp_path / "outputs").iterdir()
    frame = pd.read_csv(predicted / "predictions.csv")
    assert list(frame.columns) == prediction_columns(8)
    assert len(frame) == 301
    ended = process("evaluate")
    assert ended.code == 0, ended.err
    assert f"the newest predictions: {predicted}" in ended.err
    numbers = json.loads((predicted / "evaluation/metrics.json").read_text())["summary"]
    assert numbers[""]["ade"]["mean"] < 0.6 * numbers["straight"]["ade"]["mean"]
    assert f"{numbers['']['ade']['mean']:.2f}" in ended.out
    assert (predicted / "report/index.html").exists()


@pytest.mark.timeout(600)
def test_from_published_files_to_a_policy(process: Callable[..., Any], golden: Path, tmp_path: Path) -> None:
    prepared = process("prepare_cast", f"source={golden / 'cast_rlds'}", f"output_dir={tmp_path}", "name=gold")
    assert prepared.code == 0, prepared.err
    assert "cast_counterfactual_dataset" in prepared.out
    shown = process("show", f"path={tmp_path / 'gold'}")
    assert shown.code == 0, shown.err
    assert (tmp_path / "gold/contact_sheet.png").exists()
    settings = ("training.max_steps=20", "training.batch_size=4", "workers=2", "run=r")
    ended = process(
        "train", f"data.path={tmp_path / 'gold'}", f"output_dir={tmp_path / 'runs'}", *settings, seconds=400
    )
    assert ended.code == 0, ended.err
    run = tmp_path / "runs/r"
    assert [line["step"] for line in validations(run)] == [20]
    assert json.loads((run / "run.json").read_text())["counts"] == {"steps": 20}
    PaliGemmaForConditionalGeneration.from_pretrained(run / "last")

    # Straight from the published files, which are prepared on the way.
    settings = (f"source={golden / 'cast_rlds'}", f"data.cache_dir={tmp_path / 'cache'}", f"model.name={run}")
    ended = process("infer", *settings, f"output_dir={tmp_path / 'out'}", "run=r", "samples=4", "split=train")
    assert ended.code == 0, ended.err
    predictions = tmp_path / "out/r/predictions.csv"
    frame = pd.read_csv(predictions)
    assert len(frame) > 30
    assert frame["pred_x_0"].notna().all()
    ended = process("evaluate", f"results={predictions}")
    assert ended.code == 0, ended.err
    assert "stand still" in ended.out
    numbers = json.loads((predictions.parent / "evaluation/metrics.json").read_text())["summary"][""]
    assert numbers["min_ade"]["mean"] < numbers["ade"]["mean"]  # the best of four
