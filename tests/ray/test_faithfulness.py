"""The faithfulness job: measures of maps on small scenes with masks, and what it does with frames that have none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vla_ray.config import ExplainConfig, FaithfulnessConfig, ModelConfig
from vla_ray.data.masks import find_masks
from vla_ray.data.scenes import discover
from vla_ray.data.synthetic import decisive_scenes, write_scene
from vla_ray.errors import ClusterError, ConfigError, RunError
from vla_ray.explain.faithfulness import mean_map, randomisation_stages
from vla_ray.explain.faithfulness.dependence import PERTURBATIONS
from vla_ray.models.simlingo import load_model, load_processor
from vla_ray.models.simlingo.config import read_config
from vla_ray.pipelines.capture import capture
from vla_ray.pipelines.explain import explain
from vla_ray.pipelines.faithfulness import companions, faithfulness, priors
from vla_ray.report.build import build_report
from vla_ray.report.shown import read_scene_maps
from vla_ray.schema import SCORES
from vla_ray.stages.maps import evidence_of, read_map
from vla_ray.stages.scores import PICTURE, PRIOR, RANDOM
from vla_ray.storage.files import Location
from vla_ray.storage.fragments import read_rows

pytestmark = pytest.mark.ray

Rows = Callable[[Path], list[dict[str, Any]]]
Explaining = Callable[..., ExplainConfig]
Measuring = Callable[..., FaithfulnessConfig]

METHODS = ["relevancy", "relevancy_signed", "rollout", "gradient_x_input"]
SEED = 7_000_000  # of scenes that nothing was trained on
TARGET = "longitudinal_progress"


@pytest.fixture(scope="module")
def measuring(tiny_model: ModelConfig) -> Measuring:
    """A FaithfulnessConfig of run `r`, small and without a report unless said otherwise."""

    def make(output_dir: Path, **settings: Any) -> FaithfulnessConfig:
        small = {"num_random": 2, "regenerate": 0, "randomise": 0, "report": False}
        defaults = {"run": "r", "replicas": 1, "model": tiny_model}
        return FaithfulnessConfig(output_dir=str(output_dir), **{**defaults, **small, **settings})

    return make


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first` and `second`: a red light and a car that make the expert stop in each, with masks of them."""
    root = tmp_path_factory.mktemp("scenes")
    for i, (name, causes) in enumerate(
        {"first": ("red_light", "lead_car"), "second": ("lead_car", "red_light")}.items()
    ):
        moments = [next(iter(decisive_scenes(SEED + 1000 * i + 100 * k, 1, c))) for k, c in enumerate(causes)]
        write_scene(root / name, moments)
    return root


@pytest.fixture(scope="module")
def measured(
    scenes: Path,
    explaining: Explaining,
    measuring: Measuring,
    in_process: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> FaithfulnessConfig:
    """Maps of four frames, measured on Ray."""
    output_dir = tmp_path_factory.mktemp("measured")
    with in_process():
        config = explaining(output_dir, scene_dir=str(scenes), methods=METHODS, kinematic_metric=TARGET)
        assert explain(config) == 0
    config = measuring(output_dir, regenerate=2, randomise=1, report=True)
    assert faithfulness(config) == 0
    return config


def run_of(config: FaithfulnessConfig) -> Path:
    return Path(config.output_dir) / config.run


def scores_of(run: Path, rows: Rows) -> pd.DataFrame:
    paths = {row["payload_path"] for row in rows(run) if row["payload_path"]}
    return pd.concat([table.to_pandas() for _, table in read_rows(Location.of(run), sorted(paths), SCORES)])


def mean_of(run: Path, subject: str, measure: str) -> float:
    table = pd.read_parquet(run / "table.parquet")
    (value,) = table[(table["subject"] == subject) & (table["measure"] == measure)]["mean"]
    return float(value)


# What is written ---------------------------------------------------------------------------------------------------


def test_tables_figure_and_report(measured: FaithfulnessConfig) -> None:
    run = run_of(measured)
    text = (run / "faithfulness/table.md").read_text()
    for title in (f"Maps of {TARGET}", f"Dependence on the picture, {TARGET}", f"Weights randomised, {TARGET}"):
        assert f"## {title}" in text
    for subject in (*METHODS, RANDOM, PRIOR):
        assert f"| {subject} |" in text
    summary = json.loads((run / "faithfulness/summary.json").read_text())
    titles = [table["title"] for table in summary["tables"]]
    assert f"Maps of {TARGET}" in titles
    (figure,) = summary["figures"]
    with Image.open(run / "faithfulness" / figure["file"]) as image:
        assert min(image.size) > 300
    page = (run / "report/index.html").read_text()
    for title in titles:
        assert title in page
    assert (run / "report/figures/0.png").read_bytes() == (run / "faithfulness" / figure["file"]).read_bytes()


def test_every_frame_has_every_measure(measured: FaithfulnessConfig, rows: Rows) -> None:
    run = run_of(measured) / "faithfulness"
    table = rows(run)
    assert [r["status"] for r in table] == ["ok"] * 4
    scores = scores_of(run, rows)
    assert np.isfinite(scores["value"].dropna()).all()
    found = {key: set(part["measure"]) for key, part in scores.groupby(["frame_id", "subject"])}
    frames = [r["frame_id"] for r in table]
    for frame in frames:
        for subject in (*METHODS, RANDOM, PRIOR):
            assert {"early", "gap", "flip_auc", "deleted", "lift", "pointing", "lift_elsewhere"} <= found[
                frame, subject
            ]
        assert "all_hidden_m" in found[frame, PICTURE]
        for name in PERTURBATIONS:
            assert {"route_m", "speed_m"} <= found[frame, name]
    # The text is written anew on the two frames that were asked for, and there for everything.
    anew = {frame: "early_regenerated" in found[frame, "relevancy"] for frame in frames}
    assert sum(anew.values()) == 2
    for frame, expected in anew.items():
        for subject in (*METHODS, RANDOM, PRIOR):
            assert ("early_regenerated" in found[frame, subject]) == expected
        assert ("speed_m_regenerated" in found[frame, "blank"]) == expected


def test_every_stage_is_randomised(measured: FaithfulnessConfig, rows: Rows) -> None:
    settings = measured.model
    config = read_config(str(settings.config))
    model = load_model(config, settings.checkpoint, load_processor(config).placeholder_id)
    stages = [stage.name for stage in randomisation_stages(model)]
    scores = scores_of(run_of(measured) / "faithfulness", rows)
    found = scores[scores["measure"] == "randomised_similarity"]
    assert found["frame_id"].nunique() == 1
    assert found["subject"].tolist() == stages
    assert len(stages) >= 4
    assert found["value"].iloc[-1] < 0.7, "a model of noise does not give the same map"
    table = (run_of(measured) / "faithfulness/table.md").read_text()
    for stage in stages:
        assert f"| {stage} |" in table


# What it says ------------------------------------------------------------------------------------------------------


def test_cells_of_the_map_move_the_car(measured: FaithfulnessConfig) -> None:
    run = run_of(measured) / "faithfulness"
    early = {subject: mean_of(run, subject, "early") for subject in ("relevancy", RANDOM)}
    assert early["relevancy"] > early[RANDOM] + 0.1
    assert mean_of(run, "relevancy", "lift") > 2 * mean_of(run, RANDOM, "lift")


def test_a_finished_run_says_so_again(
    measured: FaithfulnessConfig, no_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vla_ray.pipelines.faithfulness.FaithfulnessWork", lambda *_: pytest.fail("no model is needed"))
    assert faithfulness(measured) == 0
    out = capsys.readouterr().out
    assert "4 rows" in out
    assert f"{TARGET}: the action depends on the picture" in out
    assert f"{TARGET} by relevancy: early deletion" in out
    assert "table.md" in out
    with pytest.raises(RunError, match="num_random: run has 2, asked 3"):
        faithfulness(FaithfulnessConfig(**{**vars(measured), "num_random": 3}))


@pytest.mark.parametrize("method", ["relevancy", "relevancy_signed"])
def test_the_prior_leaves_its_own_scene_out(measured: FaithfulnessConfig, rows: Rows, method: str) -> None:
    maps = run_of(measured) / "maps"
    of_scene: dict[str, list[np.ndarray]] = {}
    for several in read_scene_maps(Location.of(maps), rows(maps)).values():
        for row in several:
            if row["method"] == method:
                # Progress is held back by what acts: a signed map shows that below zero.
                sign = -1 if row["direction"] == "signed" else 1
                of_scene.setdefault(row["scene"], []).append(sign * read_map(row).combined().values)
    found = priors(Location.of(maps), method)
    assert set(found) == {(TARGET, "first"), (TARGET, "second")}
    for scene, other in (("first", "second"), ("second", "first")):
        expected = mean_map(of_scene[other])
        assert np.allclose(found[TARGET, scene], expected, atol=1e-9)
        assert not np.allclose(found[TARGET, scene], mean_map(of_scene[scene]), atol=1e-3)


def test_a_signed_map_is_turned_to_what_acts(measured: FaithfulnessConfig, rows: Rows) -> None:
    maps = run_of(measured) / "maps"
    found = read_scene_maps(Location.of(maps), rows(maps))
    (row,) = [r for r in next(iter(found.values())) if r["method"] == "relevancy_signed"]
    values = read_map(row).combined().values
    assert (evidence_of(row, 10.0) == -values).all()
    assert (evidence_of({**row, "target": "brake_energy"}, 10.0) == values).all()
    assert (evidence_of({**row, "direction": "negative"}, 10.0) == values).all()


def test_companions_are_of_another_scene_and_the_same_cause(scenes: Path) -> None:
    frames = discover(str(scenes))
    masks = find_masks(frames, "truth/masks")
    assert {m.cause for m in masks.values()} == {"red_light", "lead_car"}
    found = companions(frames, masks)
    assert set(found) == {f.frame_id for f in frames}
    by_image = {f.image: f for f in frames}
    for frame in frames:
        other = by_image[found[frame.frame_id].image]
        assert other.scene != frame.scene
        assert masks[other.frame_id].cause == masks[frame.frame_id].cause
        assert found[frame.frame_id].mask == masks[other.frame_id].path
    # One of its kind: any frame of another scene is swapped in, and its mask says nothing about position.
    alone = companions(frames[:3], {k: v for k, v in masks.items() if v.cause == "red_light" or "second" in k})
    assert alone["first/frame_0001"].mask is None
    assert by_image[alone["first/frame_0001"].image].scene == "second"
    assert companions(frames[:1], masks) == {}


def blind(tiny_model: ModelConfig, root: Path) -> ModelConfig:
    """The tiny driver whose projector forgets what it is shown."""
    released = Path(tiny_model.checkpoint)
    shutil.copytree(released.parents[2], root)
    path = root / released.relative_to(released.parents[2])
    state = torch.load(path, weights_only=True)
    names = [name for name in state if "mlp1" in name and name.endswith("weight")]
    assert names
    for name in names:
        state[name].zero_()
    torch.save(state, path)
    return ModelConfig(checkpoint=str(path))


def test_a_model_that_does_not_look(
    tmp_path: Path,
    scenes: Path,
    tiny_model: ModelConfig,
    configure: Any,
    explaining: Explaining,
    measuring: Measuring,
    in_process: Any,
    rows: Rows,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, settings = blind(tiny_model, tmp_path / "blind"), {"scene_dir": str(scenes), "kinematic_metric": TARGET}
    online = {"source": "online", "methods": ["relevancy", "gradient_x_input"], "model": model}
    with in_process():
        assert capture(configure(tmp_path, limit=1, **settings)) == 0
        assert explain(explaining(tmp_path, **online, **settings)) == 0
        capsys.readouterr()
        # The model is the maps' own, whatever else was captured under this name, and whatever the configuration says.
        assert faithfulness(measuring(tmp_path, frames=2, regenerate=1, randomise=1, report=True)) == 0
    verdict = "the action does not depend on the picture"
    assert f"{TARGET}: {verdict}" in capsys.readouterr().out
    assert verdict in (tmp_path / "r/faithfulness/table.md").read_text().lower()
    assert verdict in (tmp_path / "r/report/index.html").read_text().lower()
    scores = scores_of(tmp_path / "r/faithfulness", rows)
    assert scores[(scores["subject"] == PICTURE) & (scores["measure"] == "all_hidden_m")]["value"].max() < 1e-3
    assert "early" not in set(scores["measure"]), "nothing is scored where nothing moves"


# Bad input ---------------------------------------------------------------------------------------------------------


def test_masks_that_do_not_fit(
    tmp_path: Path,
    scenes: Path,
    explaining: Explaining,
    measuring: Measuring,
    in_process: Any,
    rows: Rows,
) -> None:
    """A frame's own failure, in one line; neither the run nor the frame that was to be compared with it suffers."""
    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    masks = root / "first/truth/masks"
    Image.open(masks / "frame_0000.png").resize((100, 50)).save(masks / "frame_0000.png")
    Image.open(masks / "frame_0001.png").convert("RGB").save(masks / "frame_0001.png")
    config = {"scene_dir": str(root), "methods": ["relevancy"], "kinematic_metric": TARGET}
    with in_process():
        assert explain(explaining(tmp_path, overlays=True, report=True, **config)) == 0
        assert faithfulness(measuring(tmp_path, max_error_rate=0.4)) == 1, "half of the frames are more than that"
    found = {r["frame_id"]: r for r in rows(tmp_path / "r/faithfulness")}
    for name, words in (("first/frame_0000", "is 50 x 100, its picture 224 x 448"), ("first/frame_0001", "3 channels")):
        row = found[name]
        assert (row["status"], row["error_type"]) == ("failed", "SceneError")
        assert str(masks / f"{row['tag']}.png") in row["error"]
        assert words in row["error"]
        assert "\n" not in row["error"]
    scores = scores_of(tmp_path / "r/faithfulness", rows)
    for frame in ("second/frame_0000", "second/frame_0001"):
        assert found[frame]["status"] == "ok"
        mine = scores[(scores["frame_id"] == frame) & (scores["subject"] == "relevancy")]
        assert "lift" in set(mine["measure"])
        assert "lift_elsewhere" not in set(mine["measure"]), "the other frame's mask is no use"
    with in_process():
        whole = measuring(tmp_path, scores="again", masks_subdir="nowhere", frames=2, report=True)
        assert faithfulness(whole) == 0
    assert "lift" not in set(scores_of(tmp_path / "r/again", rows)["measure"])
    assert "early" in set(scores_of(tmp_path / "r/again", rows)["measure"])
    # The report shows the scores that were asked for, not those of another name, and those of its own maps.
    page = tmp_path / "r/report/index.html"
    assert "2 frames of 2 scenes" in page.read_text()
    with in_process():
        assert explain(explaining(tmp_path, maps="others", report=True, **{**config, "methods": "rollout"})) == 0
    assert "2 frames of 2 scenes" not in page.read_text()
    build_report(Location.of(tmp_path / "r"), scores="again")
    assert "2 frames of 2 scenes" in page.read_text()


def test_frames_that_failed_or_have_no_gradient(
    tmp_path: Path,
    demo_scene: str,
    tiny_model: ModelConfig,
    configure: Any,
    explaining: Explaining,
    measuring: Measuring,
    in_process: Any,
    rows: Rows,
) -> None:
    """They stay what they are; a run in which nothing else is left has tables all the same, or none."""
    released, root = Path(tiny_model.checkpoint), tmp_path / "standing"
    shutil.copytree(released.parents[2], root)
    path = root / released.relative_to(released.parents[2])
    state = torch.load(path, weights_only=True)
    state["adaptors.driving.speed_wps_head.2.weight"].zero_()
    torch.save(state, path)
    model = ModelConfig(checkpoint=str(path))
    scene = tmp_path / "scene"
    scene.mkdir()
    whole = (Path(demo_scene) / "images/frame_0003.png").read_bytes()
    (scene / "good.png").write_bytes(whole)
    (scene / "cut.png").write_bytes(whole[:4000])
    common = {"scene_dir": str(scene), "model": model, "max_error_rate": 1.0}
    metrics = ["curv_energy", "forward_speed"]
    with in_process():
        assert capture(configure(tmp_path, kinematic_metric=metrics, **common)) == 0
        assert explain(explaining(tmp_path, **common)) == 0
        measure = {"max_error_rate": 1.0, "randomise": 2, "report": True}
        assert faithfulness(measuring(tmp_path, **measure)) == 0
    expected = {
        ("cut", "curv_energy"): "failed",
        ("cut", "forward_speed"): "failed",
        ("good", "curv_energy"): "ok",
        ("good", "forward_speed"): "degenerate",
    }
    found = {(r["tag"], r["target"]): r for r in rows(tmp_path / "r/faithfulness")}
    assert {key: row["status"] for key, row in found.items()} == expected
    assert found["cut", "curv_energy"]["error_type"] == "ImageError"
    assert "Maps of curv_energy" in (tmp_path / "r/faithfulness/table.md").read_text()

    (scene / "good.png").unlink()  # between maps and scores
    with in_process():
        assert faithfulness(measuring(tmp_path, scores="later", **measure)) == 0
    assert {r["status"] for r in rows(tmp_path / "r/later")} == {"failed"}
    assert {r["error_type"] for r in rows(tmp_path / "r/later") if r["tag"] == "good"} == {"StorageError"}
    assert (tmp_path / "r/later/summary.json").is_file()


def test_a_text_target(
    tmp_path: Path, scenes: Path, explaining: Explaining, measuring: Measuring, in_process: Any, rows: Rows
) -> None:
    with in_process():
        config = explaining(tmp_path, scene_dir=str(scenes / "first"), explain_mode="text", limit=1)
        assert explain(config) == 0
        assert faithfulness(measuring(tmp_path, regenerate=1, randomise=1)) == 0
    scores = scores_of(tmp_path / "r/faithfulness", rows)
    assert {"early", "flip_auc", "lift"} <= set(scores["measure"])
    assert "randomised_similarity" not in set(scores["measure"]), "a random model would choose another token"
    assert "early_regenerated" not in set(scores["measure"]), "a token of the text is explained: the text stays"


def refusal(kind: type[Exception], config: FaithfulnessConfig) -> str:
    with pytest.raises(kind) as refused:
        faithfulness(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_refusals(
    measured: FaithfulnessConfig,
    tmp_path: Path,
    demo_scene: str,
    measuring: Measuring,
    explaining: Explaining,
    configure: Any,
    in_process: Any,
    tiny_model: ModelConfig,
) -> None:
    run = run_of(measured)
    line = refusal(RunError, measuring(tmp_path))
    assert f"{tmp_path / 'r/maps'} holds no maps" in line
    assert "jobs/explain.py run=r" in line
    line = refusal(ConfigError, measuring(run.parent, reference="occlusion"))
    assert "reference=occlusion is not among the maps" in line
    assert "relevancy, relevancy_signed, rollout, gradient_x_input" in line
    line = refusal(RunError, measuring(run.parent, maps="faithfulness"))
    assert "is a run of faithfulness, not of explain" in line
    with pytest.raises(RunError, match="is a run of faithfulness, not of capture"):
        explain(explaining(run, run="faithfulness"))
    assert list(tmp_path.iterdir()) == []

    # The model's files must be those that the maps were made with.
    released, root = Path(tiny_model.checkpoint), tmp_path / "copy"
    shutil.copytree(released.parents[2], root)
    path = root / released.relative_to(released.parents[2])
    with in_process():
        assert capture(configure(tmp_path, limit=1, model=ModelConfig(checkpoint=str(path)))) == 0
        assert explain(explaining(tmp_path)) == 0
        cuda = ModelConfig(checkpoint=tiny_model.checkpoint, device="cuda")
        assert "model.device=cuda needs a GPU" in refusal(ClusterError, measuring(tmp_path, model=cuda))
        state = torch.load(path, weights_only=True)
        state["adaptors.driving.speed_wps_head.2.weight"].mul_(1.5)
        torch.save(state, path)
        line = refusal(RunError, measuring(tmp_path, scores="other"))
        assert "model.checkpoint changed since" in line
        assert not (tmp_path / "r/other").exists()
        with pytest.raises(RunError, match=r"model.checkpoint changed since"):
            explain(explaining(tmp_path, maps="pixels", methods="gradient_x_input"))
        assert explain(explaining(tmp_path, maps="folds", methods="relevancy_signed")) == 0, "payloads need no model"
    (tmp_path / "r/run.json").unlink()
    line = refusal(RunError, measuring(tmp_path, scores="other"))
    assert "the capture at" in line
    assert "is gone" in line
