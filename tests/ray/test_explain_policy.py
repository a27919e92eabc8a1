"""Maps of a policy's predictions, their evaluation and their page: stages of one run, each resumed on its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla_ray.config import EvaluateConfig, InferConfig, PolicyExplainConfig
from vla_ray.config.infer import TrainedModelConfig
from vla_ray.errors import DataError, RunError, TargetError
from vla_ray.pipelines.captured import read_captured
from vla_ray.pipelines.evaluate import evaluate
from vla_ray.pipelines.explain_policy import explain_policy
from vla_ray.pipelines.infer import infer
from vla_ray.report.build import build_report
from vla_ray.schema import MAPS, PREDICTIONS
from vla_ray.storage.files import Location
from vla_ray.storage.fragments import read_rows
from vla_ray.storage.ledger import commit, read_metrics

pytestmark = pytest.mark.ray

Asking = Callable[..., PolicyExplainConfig]


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: Any, corridors: Path, policy_dir: Path, in_process: Any) -> Path:
    """A run of inference over all validation samples."""
    out = tmp_path_factory.mktemp("runs")
    model = TrainedModelConfig(name=str(policy_dir), device="cpu")
    with in_process():
        assert infer(InferConfig(output_dir=str(out), run="r", source=str(corridors), model=model)) == 0
    return out / "r"


@pytest.fixture
def asking(predictions: Path, tmp_path: Path) -> Asking:
    """Explain a copy of that run."""
    shutil.copytree(predictions, tmp_path / "r")

    def make(**settings: Any) -> PolicyExplainConfig:
        defaults: dict[str, Any] = {"samples": 6, "targets": ["token_1", "lateral_offset"], "report": False}
        model = TrainedModelConfig(name="tiny", device="cpu")
        return PolicyExplainConfig(output_dir=str(tmp_path), run="r", model=model, **{**defaults, **settings})

    return make


def test_maps_are_made_once_and_shown(
    tmp_path: Path, asking: Asking, in_process: Any, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_process():
        assert explain_policy(asking(match="door", samples=None)) == 0
    location = Location.of(tmp_path / "r/maps")
    rows = read_metrics(location).to_pylist()
    assert len(rows) >= 20
    assert {row["status"] for row in rows} == {"ok"}
    assert all("door" in row["text"] for row in rows)
    found = [r for _, t in read_rows(location, {row["payload_path"] for row in rows}, MAPS) for r in t.to_pylist()]
    assert {(r["target"], r["method"]) for r in found} == {
        (target, method) for target in ("token_1", "lateral_offset") for method in ("relevancy", "relevancy_signed")
    }
    assert {(r["rows"], r["columns"]) for r in found} == {(4, 4)}
    said = capsys.readouterr().out
    assert "relevance on what instructions name" in said
    assert (tmp_path / "r/maps/localisation.txt").read_text() in said
    (door,) = (line.split() for line in said.splitlines() if line.split()[:3] == ["token_1", "relevancy", "door"])
    assert "-" not in door, "all instructions of a picture are there: whether maps follow them is measured"
    # Finished: no Ray; the page shows the maps.
    assert explain_policy(asking(match="door", samples=None, report=True)) == 0
    page = (tmp_path / "r/report/index.html").read_text()
    assert "token_1" in page
    assert "relevancy_signed" in page


def test_what_cannot_be_explained(tmp_path: Path, asking: Asking) -> None:
    with pytest.raises(
        TargetError, match=r"unknown target 'curv_energy' of a policy of 8 steps; known: lateral_offset"
    ):
        explain_policy(asking(targets="curv_energy"))
    with pytest.raises(TargetError, match="the method 'occlusion' does not explain a policy"):
        explain_policy(asking(methods="occlusion"))
    with pytest.raises(DataError, match=r"no instruction of .*/r contains 'zebra'"):
        explain_policy(asking(match="zebra"))
    document = json.loads((tmp_path / "r/run.json").read_text())
    document["checkpoints"]["model/model.safetensors"]["sha256"] = "other"
    (tmp_path / "r/run.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match=r"model/model\.safetensors changed since .* Put the old files back"):
        explain_policy(asking())


def test_a_run_of_another_kind(tmp_path: Path, asking: Asking) -> None:
    document = json.loads((tmp_path / "r/run.json").read_text())
    document["settings"]["job"] = "capture"
    (tmp_path / "r/run.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match=r"is a run of capture, not of infer\. Give the run=NAME of a run of jobs/infer"):
        explain_policy(asking())


def test_jobs_of_the_driving_model_say_where_to_go(tmp_path: Path, asking: Asking, in_process: Any) -> None:
    with pytest.raises(RunError, match=r"is a run of infer, not of capture.* model=paligemma-tiny run=NAME"):
        read_captured(Location.of(tmp_path / "r"))
    with in_process():
        assert explain_policy(asking(samples=1)) == 0
    with pytest.raises(RunError, match=r"explains a policy, .* python jobs/evaluate\.py results="):
        build_report(Location.of(tmp_path / "r"))


def test_other_instructions_are_asked_once(
    tmp_path: Path, asking: Asking, in_process: Any, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(
        results=str(tmp_path / "r/predictions.csv"), counterfactual=True, counterfactual_samples=10, report=False
    )
    with in_process():
        assert evaluate(config) == 0
    assert "left > forward > right 1.00" in capsys.readouterr().out
    nested = read_metrics(Location.of(tmp_path / "r/counterfactual"), schema=PREDICTIONS)
    assert len(set(nested["frame_id"].to_pylist())) in range(8, 11)
    assert evaluate(config) == 0  # finished: nobody is asked
    assert (tmp_path / "r/evaluation/language_fan.png").exists()
    numbers = json.loads((tmp_path / "r/evaluation/metrics.json").read_text())
    assert numbers["language"]["estimates"]["retrieval"]["mean"] > 0.7


def test_predictions_from_elsewhere_have_nobody_to_ask(tmp_path: Path, asking: Asking) -> None:
    (tmp_path / "r/run.json").unlink()
    with pytest.raises(
        RunError, match=r"counterfactual=true needs the policy that predicted, and .* is no run of jobs"
    ):
        evaluate(EvaluateConfig(results=str(tmp_path / "r/predictions.csv"), counterfactual=True))


def test_the_actions_of_the_run_are_explained(tmp_path: Path, asking: Asking, in_process: Any) -> None:
    """And not what the policy would decode by now."""
    run = Location.of(tmp_path / "r")
    rows = read_metrics(run, schema=PREDICTIONS).to_pylist()
    other = [0.9, 0.3] * 8
    shutil.rmtree(tmp_path / "r/metrics")
    commit(run, [{**row, "predicted": other} for row in rows], PREDICTIONS)
    with in_process():
        assert explain_policy(asking(maps="others", samples=2)) == 0
    ids = read_metrics(run / "others", ["text_ids"])["text_ids"].to_pylist()
    assert len({tuple(i) for i in ids}) == 1
