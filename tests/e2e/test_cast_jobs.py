"""The second workload from end to end: prepare, train, look; with no arguments, and on data in CAST's own format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PaliGemmaForConditionalGeneration

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
