"""Maps by the explain job: the same from every payload level and online, resumed, and honest about what is bad."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla_ray.config import CaptureConfig, ExplainConfig, ModelConfig
from vla_ray.errors import ConfigError, RunError, StorageError, TargetError
from vla_ray.explain.heatmap import HeatMap
from vla_ray.explain.methods import METHODS, parse_methods
from vla_ray.explain.references import Occlusion
from vla_ray.pipelines import driver
from vla_ray.pipelines.capture import capture
from vla_ray.pipelines.explain import explain
from vla_ray.report.build import build_report
from vla_ray.report.shown import read_scene_maps, read_scenes
from vla_ray.stages.maps import read_map
from vla_ray.stages.original_maps import original_maps
from vla_ray.storage import payload as payload_file
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import commit

pytestmark = pytest.mark.ray

Configure = Callable[..., CaptureConfig]
Explaining = Callable[..., ExplainConfig]
Rows = Callable[[Path], list[dict[str, Any]]]
Maps = dict[tuple[str, str, str], dict[str, Any]]

FOLDS = tuple(m.name for m in METHODS.values() if m.kind == "fold")
METRICS_ASKED = ["longitudinal_progress", "curv_energy"]
ASKED: dict[str, dict[str, Any]] = {
    "action": {"kinematic_metric": METRICS_ASKED},
    "text": {"explain_mode": "text", "text_token_strategy": "max"},
}
FRAMES = ["narrow/frame_0000", "wide/frame_0000", "wide/frame_0001", "wide/frame_0002"]
HALF_ULP = 2.0**-11  # of a float16: what storing a map may change, relative to each value


def maps_of(run: Path, rows: Rows) -> Maps:
    """(frame, target, method) -> row of MAPS, of a run of maps."""
    found = read_scene_maps(Location.of(run), rows(run))
    flat = [(f, t, row) for (f, t), several in found.items() for row in several]
    maps = {(f, t, row["method"]): row for f, t, row in flat}
    assert len(maps) == len(flat), "a map is there twice"
    return maps


def values_of(row: dict[str, Any]) -> np.ndarray:
    heat: HeatMap = read_map(row)
    extra = [] if heat.thumbnail is None else [heat.thumbnail.ravel()]
    return np.concatenate([heat.values.ravel(), *extra])


@pytest.fixture(scope="module")
def scenes(demo_scene: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`narrow`, one frame of one tile, and `wide`, three of several: every batch over both is ragged."""
    root = tmp_path_factory.mktemp("scenes")
    for scene, width, count in (("narrow", 150, 1), ("wide", 448, 3)):
        (root / scene).mkdir()
        lines = []
        for i in range(count):
            with Image.open(Path(demo_scene) / f"images/frame_{2 * i + 1:04d}.png") as image:
                image.convert("RGB").crop((0, 0, width, image.height)).save(root / scene / f"frame_{i:04d}.png")
            lines.append({"image": f"frame_{i:04d}.png", "speed_mps": 5.0, "target_points": None, "question": None})
        (root / scene / "frames.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@dataclass(frozen=True)
class Stopped:
    """An online run that a full disk stopped at its second batch: its rows and its files then."""

    config: ExplainConfig
    rows: list[dict[str, Any]]
    files: dict[str, int]
    refusal: str


@dataclass(frozen=True)
class Levels:
    """Runs by what their maps were made from: full, reduced, relevance, online."""

    runs: dict[str, dict[str, Path]]  # mode -> source -> run
    stopped: Stopped


def map_files(run: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in run.glob("*.parquet")}


@pytest.fixture(scope="module")
def levels(
    scenes: Path, configure: Configure, explaining: Explaining, in_process: Any, rows: Rows, tmp_path_factory: Any
) -> Levels:
    """Every level for an action and for a text target. On Ray: full payloads, and an online run that a full disk has
    stopped, and whose worker is killed when it goes on; the others in this process."""
    root = tmp_path_factory.mktemp("levels")
    runs: dict[str, dict[str, Path]] = {}
    for mode, asked in ASKED.items():
        output_dir = root / mode

        def captured(level: str) -> None:
            common = {"scene_dir": str(scenes), "batch_size": 2, "run": level, "methods": FOLDS}
            assert capture(configure(output_dir, payload=level, **common, **asked)) == 0  # noqa: B023
            explained = explaining(output_dir, run=level, methods=FOLDS, batch_size=3)  # noqa: B023
            assert explain(explained) == 0

        if mode == "action":
            captured("full")
        with in_process():
            for level in ("reduced", "relevance") if mode == "action" else ("full", "reduced", "relevance"):
                captured(level)
            if mode == "text":
                online = explaining(output_dir, scene_dir=str(scenes), run="online", methods=FOLDS, **asked)
                assert explain(online) == 0
        runs[mode] = {source: output_dir / source / "maps" for source in ("full", "reduced", "relevance", "online")}

    methods = [*FOLDS, "gradient_x_input"]
    online = explaining(root / "action", scene_dir=str(scenes), run="online", methods=methods, **ASKED["action"])
    run = runs["action"]["online"]

    def second_fails(run_dir: Location, committed: Any, schema: Any) -> str:
        if {row["frame_id"] for row in committed} == set(FRAMES[2:]):
            raise StorageError("no space left on device. Make room.")
        return commit(run_dir, committed, schema)

    with in_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("vla_ray.stages.work.commit", second_fails)
        with pytest.raises(StorageError) as full:
            explain(ExplainConfig(**{**vars(online), "batch_size": 2}))
    stopped = Stopped(online, rows(run), map_files(run), str(full.value))
    faults = Path(os.environ["VLA_RAY_TEST_FAULTS"])
    faults.write_text(json.dumps({"kill_once": {"processed": FRAMES[2]}}))
    assert explain(ExplainConfig(**{**vars(online), "batch_size": 1})) == 0
    for file in faults.parent.iterdir():
        file.unlink()
    return Levels(runs, stopped)


# The same map from everywhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ASKED)
def test_the_same_map_from_every_source(levels: Levels, rows: Rows, mode: str) -> None:
    """Full and relevance payloads agree with online to 1e-4 of the map's maximum, reduced (float16 inside) to 1e-3.

    Maps are stored in float16. Two values that agree to a tolerance are read back with up to half a unit in the last
    place more on each side, 2^-11 of the value; that much is granted on top, and no more. What this hides is below
    the tolerance wherever a map is below a tenth of its maximum; the unrounded folds are compared in
    tests/unit/test_relevance_chain.py.
    """
    online = maps_of(levels.runs[mode]["online"], rows)
    targets = METRICS_ASKED if mode == "action" else ["text_max"]
    assert {key[:2] for key in online} == {(f, t) for f in FRAMES for t in targets}
    for source, tolerance in (("full", 1e-4), ("relevance", 1e-4), ("reduced", 1e-3)):
        found = maps_of(levels.runs[mode][source], rows)
        assert set(found) == {key for key in online if key[2] in FOLDS}
        equal = total = 0
        for key, row in found.items():
            ours, theirs = values_of(row), values_of(online[key])
            size = np.abs(theirs).max()
            if METHODS[key[2]].is_signed and source == "reduced":
                # A difference of two float16 maps is exact to their size, not to the size of what is left of it.
                sides = [found[(*key[:2], f"relevancy_{side}")] for side in ("positive", "negative")]
                size = max(np.abs(values_of(side)).max() for side in sides)
            granted = tolerance * size + HALF_ULP * (np.abs(ours) + np.abs(theirs))
            assert size > 0, key
            assert (np.abs(ours - theirs) <= granted).all(), (source, key)
            assert row["direction"] == online[key]["direction"]
            for share in ("image", "text", "prompt", "queries", "cls"):
                a, b = row[f"share_{share}"], online[key][f"share_{share}"]
                assert a == b or a == pytest.approx(b, abs=tolerance), (source, key, share)
            equal, total = equal + int((ours == theirs).sum()), total + len(ours)
        if source != "reduced":
            assert equal > 0.9 * total, "far from the tolerance, nearly every value rounds to the same float16"


def test_rows_are_the_captures(levels: Levels, rows: Rows) -> None:
    """Ragged batches really were, and what a row says of a frame does not depend on where its map comes from."""
    online = {(r["frame_id"], r["target"]): r for r in rows(levels.runs["action"]["online"])}
    assert {r["frame_id"]: r["num_tiles"] for r in online.values()}["narrow/frame_0000"] == 1
    assert min(r["num_tiles"] for r in online.values() if r["scene"] == "wide") > 1
    for source in ("full", "reduced", "relevance"):
        run = levels.runs["action"][source]
        captured = {(r["frame_id"], r["target"]): r for r in rows(run.parent)}
        for row in rows(run):
            key = (row["frame_id"], row["target"])
            assert row["status"] == "ok"
            assert row["target_scalar"] == captured[key]["target_scalar"]
            assert row["target_scalar"] == pytest.approx(online[key]["target_scalar"], rel=1e-4)
            assert (row["text"], row["geometry"]) == (online[key]["text"], online[key]["geometry"])
            assert (run / row["payload_path"]).is_file()


def test_maps_differ_by_target_and_frame(levels: Levels, rows: Rows) -> None:
    """What would make every comparison above worthless."""
    maps = maps_of(levels.runs["action"]["full"], rows)
    progress = values_of(maps["wide/frame_0000", "longitudinal_progress", "relevancy"])
    others = (("wide/frame_0002", "longitudinal_progress"), ("wide/frame_0000", "curv_energy"))
    for other in others:
        assert np.abs(progress - values_of(maps[*other, "relevancy"])).max() > 0.05 * progress.max()


# Resume ------------------------------------------------------------------------------------------------------------


def test_an_online_run_that_was_stopped_and_killed(levels: Levels, rows: Rows) -> None:
    """Whatever ended it: every row once, nothing done twice, and what a dead batch left behind is not read."""
    run, stopped = levels.runs["action"]["online"], levels.stopped
    assert "no space left on device" in stopped.refusal
    assert stopped.refusal.count("\n") == 0
    assert {(r["frame_id"], r["target"]) for r in stopped.rows} == {(f, t) for f in FRAMES[:2] for t in METRICS_ASKED}
    after = rows(run)
    assert [r for r in after if r["frame_id"] in FRAMES[:2]] == stopped.rows, "rows that were there are kept"
    assert len(after) == len({(r["frame_id"], r["target"]) for r in after}) == 8
    attempts = {r["frame_id"]: r["attempt"] for r in after}
    assert attempts[FRAMES[2]] == 2, "its process was killed once, after its maps were written"
    files = map_files(run)
    assert {n: t for n, t in files.items() if n in stopped.files} == stopped.files, "maps that were there are kept"
    used = {r["payload_path"] for r in after}
    strays = set(stopped.files) - used
    assert len(strays) == 1, "the batch that could not be committed had written its maps"
    for name in strays:
        (run / name).write_bytes(b"half a table")  # whoever reads it says so
    assert len(maps_of(run, rows)) == 8 * (len(FOLDS) + 1)
    assert sum(len(frames) for _, frames in read_scenes(Location.of(run))) == 4
    left = [*run.glob("ledger/*"), *run.glob("attempts/*"), *run.rglob(".*.tmp"), *run.glob("lease*")]
    assert left == []
    document = json.loads((run / "run.json").read_text())
    assert document["status"] == "finished"
    assert document["counts"] == {"ok": 8, "failed": 0, "degenerate": 0}


def test_killed_while_reading_payloads(
    levels: Levels, explaining: Explaining, rows: Rows, faults: Callable[..., None]
) -> None:
    """Without a model in the workers the protocol is the same."""
    run = levels.runs["action"]["relevance"].parent
    faults(kill_once={"process": FRAMES[1]})
    config = explaining(run.parent, run=run.name, maps="killed", methods=FOLDS, batch_size=1)
    assert explain(config) == 0
    killed, whole = maps_of(run / "killed", rows), maps_of(run / "maps", rows)
    assert set(killed) == set(whole)
    for key, row in killed.items():
        assert (values_of(row) == values_of(whole[key])).all()
    assert {r["frame_id"]: r["attempt"] for r in rows(run / "killed")}[FRAMES[1]] == 2


def test_a_finished_run_is_recognised(
    levels: Levels,
    explaining: Explaining,
    no_ray: None,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vla_ray.pipelines.explain_work.ExplainWork", lambda *_: pytest.fail("no model is needed"))
    caplog.set_level("INFO")
    before = {p: p.stat().st_mtime_ns for p in levels.runs["action"]["full"].rglob("*")}
    run = levels.runs["action"]["full"].parent
    assert explain(explaining(run.parent, run=run.name, methods=FOLDS)) == 0
    assert explain(levels.stopped.config) == 0
    assert caplog.text.count("is finished: nothing to do") == 2
    assert "8 rows" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in levels.runs["action"]["full"].rglob("*")} == before


def test_other_maps_need_another_name(levels: Levels, explaining: Explaining, in_process: Any, rows: Rows) -> None:
    run = levels.runs["action"]["full"].parent
    before = map_files(run / "maps")
    for changes, message in (
        ({"methods": "relevancy"}, 'asked ["relevancy"]'),
        ({"methods": FOLDS, "strength": 0.3}, "strength: run has 0.2, asked 0.3"),
        ({"methods": [*FOLDS, "iss"], "iss_samples": 50}, "iss_samples: run has null, asked 50"),
    ):
        with pytest.raises(RunError, match=r"started with other settings.*another maps=NAME") as refused:
            explain(explaining(run.parent, run=run.name, **changes))
        assert message in str(refused.value)
    assert map_files(run / "maps") == before
    methods = ["relevancy", "original_generic", "original_rollout", "gradient_x_input", "occlusion", "iss"]
    with in_process():
        settings = {"maps": "others", "methods": methods, "strength": 0.5, "iss_samples": 40, "limit": 1}
        assert explain(explaining(run.parent, run=run.name, **settings)) == 0
    assert map_files(run / "maps") == before
    others, first = maps_of(run / "others", rows), maps_of(run / "maps", rows)
    assert {key[0] for key in others} == {FRAMES[0]}
    assert {key[2] for key in others} == set(methods)
    online = maps_of(levels.runs["action"]["online"], rows)
    for key, row in others.items():
        values = values_of(row)
        assert np.isfinite(values).all()
        assert values.max() > 0
        if key[2] == "relevancy":
            changed = np.abs(values / values.sum() - values_of(first[key]) / values_of(first[key]).sum()).max()
            assert changed > 1e-3 * (values / values.sum()).max(), "another strength is another map"
        if key[2] == "gradient_x_input":  # the model beside payloads answers as it does online
            expected = values_of(online[key])
            assert (np.abs(values - expected) <= 1e-4 * expected.max() + HALF_ULP * (values + expected)).all()
        if key[2] == "iss":
            assert len(row["standard_error"]) == row["rows"] * row["columns"]
            assert row["forwards"] == 41


def test_a_run_of_maps_grows_with_its_capture(
    tmp_path: Path, configure: Configure, explaining: Explaining, in_process: Any, rows: Rows
) -> None:
    with in_process():
        assert capture(configure(tmp_path, limit=1)) == 0
        assert explain(explaining(tmp_path)) == 0
        first = map_files(tmp_path / "r/maps")
        assert capture(configure(tmp_path, limit=2, kinematic_metric=METRICS_ASKED)) == 0
        assert explain(explaining(tmp_path)) == 0
    assert {n: t for n, t in map_files(tmp_path / "r/maps").items() if n in first} == first
    maps = maps_of(tmp_path / "r/maps", rows)
    assert {key[:2] for key in maps} == {
        (f"red_light/frame_000{i}", target) for i in (0, 1) for target in METRICS_ASKED
    }


def test_limit_takes_frames_in_their_natural_order(
    tmp_path: Path, demo_scene: str, configure: Configure, explaining: Explaining, in_process: Any, rows: Rows
) -> None:
    scene = tmp_path / "scene"
    scene.mkdir()
    for i in (1, 2, 10):
        shutil.copy(Path(demo_scene) / f"images/frame_000{i % 8}.png", scene / f"frame_{i}.png")
    with in_process():
        assert capture(configure(tmp_path, scene_dir=str(scene))) == 0
        assert explain(explaining(tmp_path, limit=2)) == 0
    assert {r["tag"] for r in rows(tmp_path / "r/maps")} == {"frame_1", "frame_2"}


@pytest.mark.parametrize("source", ["payloads", "online"])
def test_the_command_that_goes_on_names_the_outer_run(
    tmp_path: Path,
    configure: Configure,
    explaining: Explaining,
    in_process: Any,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    source: str,
) -> None:
    """Maps are a run inside a run: pasting what is printed must find both."""
    add = driver.Progress.add

    def interrupted(self: driver.Progress, done: int, failed: int) -> None:
        add(self, done, failed)
        raise KeyboardInterrupt

    config = explaining(tmp_path, maps="m", limit=2, batch_size=1, source=source)
    with in_process():
        if source == "payloads":
            assert capture(configure(tmp_path, limit=2)) == 0
        with monkeypatch.context() as patch:
            patch.setattr(driver.Progress, "add", interrupted)
            patch.setattr("sys.argv", ["jobs/explain.py", f"output_dir={tmp_path}", "run=r", "maps=m"])
            assert explain(config) == 130
        before, files = rows(tmp_path / "r/m"), map_files(tmp_path / "r/m")
        assert len(before) == 1
        assert explain(config) == 0
    (line,) = (record.message for record in caplog.records if "to go on" in record.message)
    assert line.endswith("run=r maps=m")
    assert line.count("run=") == 1
    assert rows(tmp_path / "r/m")[0] == before[0]
    assert {n: t for n, t in map_files(tmp_path / "r/m").items() if n in files} == files


# Bad frames --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standing(tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The tiny driver, standing still: its speed waypoints are zero whatever it sees, its routes are as they were."""
    root, released = tmp_path_factory.mktemp("standing"), Path(tiny_model.checkpoint)
    shutil.copytree(released.parents[2], root, dirs_exist_ok=True)
    path = root / released.relative_to(released.parents[2])
    state = torch.load(path, weights_only=True)
    state["adaptors.driving.speed_wps_head.2.weight"].zero_()
    torch.save(state, path)
    return ModelConfig(checkpoint=str(path))


@pytest.fixture
def troubled(demo_scene: str, tmp_path: Path) -> Path:
    """A scene of a good picture, half a picture, and a frame whose numbers end as NaN."""
    scene = tmp_path / "troubled"
    scene.mkdir()
    whole = (Path(demo_scene) / "images/frame_0003.png").read_bytes()
    for name, content in (("good", whole), ("cut", whole[:4000]), ("far", whole)):
        (scene / f"{name}.png").write_bytes(content)
    far = {"image": "far.png", "speed_mps": 3.0, "target_points": [[1e38, 1e38], [1e38, 1e38]], "question": None}
    (scene / "frames.jsonl").write_text(json.dumps(far) + "\n")
    return scene


def test_what_failed_or_has_no_gradient_stays_so(
    tmp_path: Path,
    troubled: Path,
    standing: ModelConfig,
    configure: Configure,
    explaining: Explaining,
    in_process: Any,
    rows: Rows,
) -> None:
    common = {"scene_dir": str(troubled), "model": standing, "max_error_rate": 1.0}
    metrics = {"kinematic_metric": METRICS_ASKED}
    with in_process():
        assert capture(configure(tmp_path, methods=["relevancy", "rollout"], **common, **metrics)) == 0
        for maps, settings in {
            "maps": {"methods": ["relevancy", "rollout"]},
            "pixels": {"methods": ["relevancy", "gradient_x_input"]},
            "online": {"methods": ["relevancy", "gradient_x_input"], "source": "online", **metrics},
        }.items():
            assert explain(explaining(tmp_path, maps=maps, **common, **settings)) == 0
    before = {(r["tag"], r["target"]): r for r in rows(tmp_path / "r")}
    assert {key: row["status"] for key, row in before.items()} == {
        ("good", "longitudinal_progress"): "degenerate",
        ("good", "curv_energy"): "ok",
        **{(tag, target): "failed" for tag in ("cut", "far") for target in METRICS_ASKED},
    }
    for maps in ("maps", "pixels", "online"):
        found = {(r["tag"], r["target"]): r for r in rows(tmp_path / "r" / maps)}
        assert set(found) == set(before)
        for key, row in found.items():
            for column in ("status", "error_type", "error", "target_scalar"):
                assert row[column] == before[key][column] or row[column] != row[column], (maps, key, column)
            assert (row["payload_path"] is not None) == (row["status"] == "ok")
        shown = maps_of(tmp_path / "r" / maps, rows)
        assert {key[:2] for key in shown} == {("troubled/good", "curv_energy")}

    (troubled / "good.png").unlink()  # between capture and report
    for maps in ("maps", "online"):
        built = build_report(Location.of(tmp_path / "r"), maps)
        assert (built.frames, built.overlays) == (3, 0)
        page = (tmp_path / "r/report/index.html").read_text()
        assert "curv_energy is nan" in page
        assert "cannot be decoded" in page
        assert "degenerate" in page


def test_one_frame_whose_picture_vanished(
    tmp_path: Path, scenes: Path, configure: Configure, explaining: Explaining, in_process: Any, rows: Rows
) -> None:
    """Stored payloads hold all that a map needs; what asks about pixels says what it lacks; the report goes on."""
    scene = tmp_path / "narrow"
    shutil.copytree(scenes / "narrow", scene)
    with in_process():
        assert capture(configure(tmp_path, scene_dir=str(scene))) == 0
        assert explain(explaining(tmp_path, overlays=True, report=True)) == 0
        assert (tmp_path / "r/overlays/relevancy/narrow/frame_0000.png").is_file()
        (scene / "frame_0000.png").unlink()
        assert explain(explaining(tmp_path, maps="later", overlays=True, report=True)) == 0
        assert explain(explaining(tmp_path, maps="pixels", methods="gradient_x_input", max_error_rate=1.0)) == 0
    (row,) = rows(tmp_path / "r/pixels")
    assert (row["status"], row["error_type"]) == ("failed", "StorageError")
    assert "frame_0000.png" in row["error"]
    assert [key[2] for key in maps_of(tmp_path / "r/later", rows)] == ["relevancy"]
    assert "narrow/frame_0000" in (tmp_path / "r/report/index.html").read_text()


# Bad payloads ------------------------------------------------------------------------------------------------------


def test_damaged_payloads_are_rows_with_their_reason(
    levels: Levels, tmp_path: Path, explaining: Explaining, in_process: Any, rows: Rows
) -> None:
    shutil.copytree(levels.runs["action"]["full"].parent, tmp_path / "r", ignore=shutil.ignore_patterns("maps"))
    paths = {(r["frame_id"], r["target"]): tmp_path / "r" / r["payload_path"] for r in rows(tmp_path / "r")}

    def edit(key: tuple[str, str], change: Callable[[dict[str, Any]], None]) -> None:
        content = payload_file.load(Location.of(paths[key]), mmap=False)
        change(content)
        payload_file.save(Location.of(paths[key]), content)

    def each(content: dict[str, Any], **values: Any) -> None:
        for entries in content["attention"].values():
            entries[0].update(values)

    def not_finite(content: dict[str, Any]) -> None:
        content["attention"]["vision_block_0"][0]["grad"][0, 0, 3, 4] = float("nan")

    progress, curve = METRICS_ASKED
    bad = {
        (FRAMES[0], progress): ["TargetError", "payload of version 1, this is version", "another run=NAME"],
        (FRAMES[0], curve): ["StorageError", "is damaged or no payload"],
        (FRAMES[1], progress): ["TargetError", f"explains {curve}, not {progress}"],
        (FRAMES[1], curve): ["TargetError", "without its gradients", "payload=full"],
        (FRAMES[2], progress): ["TargetError", "relevancy", "not finite"],
        (FRAMES[2], curve): ["StorageError", "no such file"],
    }
    edit((FRAMES[0], progress), lambda content: content["meta"].update(schema_version=1))
    whole = paths[FRAMES[0], curve].read_bytes()
    paths[FRAMES[0], curve].write_bytes(whole[: len(whole) // 2])
    shutil.copy(paths[FRAMES[1], curve], paths[FRAMES[1], progress])
    edit((FRAMES[1], curve), lambda content: each(content, grad=None))
    edit((FRAMES[2], progress), not_finite)
    paths[FRAMES[2], curve].unlink()
    with in_process():
        config = {"methods": ["relevancy", "rollout"], "max_error_rate": 1.0, "batch_size": 8}
        assert explain(explaining(tmp_path, **config, overlays=True, report=True)) == 0
    found = {(r["frame_id"], r["target"]): r for r in rows(tmp_path / "r/maps")}
    for key, (kind, *words) in bad.items():
        row = found[key]
        assert (row["status"], row["error_type"]) == ("failed", kind), row["error"]
        assert row["payload_path"] is None
        assert "\n" not in row["error"]
        for word in words:
            assert word in row["error"]
    good = {key for key, row in found.items() if row["status"] == "ok"}
    assert good == {(FRAMES[3], target) for target in METRICS_ASKED}
    assert {key[:2] for key in maps_of(tmp_path / "r/maps", rows)} == good
    assert "explains curv_energy, not longitudinal_progress" in (tmp_path / "r/report/index.html").read_text()

    # What needs no gradient is made from the payload without one; what does says so.
    content = payload_file.load(Location.of(paths[FRAMES[1], curve]))
    geometry = read_map(next(iter(maps_of(levels.runs["action"]["full"], rows).values()))).geometry
    with pytest.raises(TargetError, match="without its gradients"):
        original_maps(parse_methods("original_generic"), content, geometry)


def test_hidden_cells_that_lead_to_nothing_finite(
    tmp_path: Path, explaining: Explaining, in_process: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method of forwards alone has no gradient that would have told; a map of NaN would break the whole report."""
    nothing = Occlusion(np.full((12, 24), np.nan, np.float32), np.zeros((12, 24), np.float32), 1)
    monkeypatch.setattr("vla_ray.stages.pixel_maps.occlusion", lambda *_: nothing)
    with in_process():
        config = explaining(tmp_path, methods=["relevancy", "occlusion"], limit=1, max_error_rate=1.0, report=True)
        assert explain(config) == 0
    (row,) = rows(tmp_path / "r/maps")
    assert (row["status"], row["error_type"]) == ("failed", "TargetError")
    assert row["error"].startswith("occlusion: ")
    assert "not finite" in row["error"]
    assert list((tmp_path / "r/maps").glob("*.parquet")) == []


# Refusals ----------------------------------------------------------------------------------------------------------


def refusal(kind: type[Exception], config: ExplainConfig) -> str:
    with pytest.raises(kind) as refused:
        explain(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_methods_that_a_level_does_not_hold(
    levels: Levels, scenes: Path, tmp_path: Path, explaining: Explaining, no_ray: None
) -> None:
    output_dir = levels.runs["action"]["reduced"].parents[1]
    for run in ("reduced", "relevance"):
        line = refusal(ConfigError, explaining(output_dir, run=run, maps="x", methods=["relevancy", "original_raw"]))
        assert line.startswith("original_raw need")
        assert "payload=full" in line
        assert f"payload={run}" in line
        assert not (output_dir / run / "x").exists()
    line = refusal(ConfigError, explaining(tmp_path, methods="original_raw", scene_dir=str(scenes)))
    assert "payload=full" in line
    assert not (tmp_path / "r").exists()
    line = refusal(ConfigError, explaining(output_dir, run="relevance", maps="x", strength=0.5))
    assert "strength=0.5" in line
    assert "payload=reduced" in line


def test_a_fold_that_relevance_payloads_lack(
    tmp_path: Path, configure: Configure, explaining: Explaining, in_process: Any, rows: Rows
) -> None:
    with in_process():
        metrics = {"kinematic_metric": METRICS_ASKED, "methods": "relevancy_positive"}
        assert capture(configure(tmp_path, limit=1, **metrics)) == 0
        line = refusal(ConfigError, explaining(tmp_path, methods=["relevancy_positive", "rollout"]))
        assert line.startswith("rollout: not in the relevance payloads")
        assert "they hold relevancy_positive" in line
        assert not (tmp_path / "r/maps").exists()
        # `relevancy` of an energy is the positive fold, of progress the negative one: only one of them is there.
        assert refusal(ConfigError, explaining(tmp_path)).startswith("relevancy: not in the relevance payloads")
        energy = configure(tmp_path, run="e", limit=1, kinematic_metric="curv_energy", methods="relevancy_positive")
        assert capture(energy) == 0
        assert explain(explaining(tmp_path, run="e")) == 0
    assert [r["status"] for r in rows(tmp_path / "e/maps")] == ["ok"]


def test_no_capture_or_no_capture(levels: Levels, tmp_path: Path, explaining: Explaining, no_ray: None) -> None:
    line = refusal(RunError, explaining(tmp_path, source="payloads"))
    assert f"no capture at {tmp_path / 'r'}" in line
    assert "source=online" in line
    line = refusal(TargetError, explaining(tmp_path, methods="relevanci"))
    assert "Did you mean 'relevancy'?" in line
    line = refusal(RunError, explaining(tmp_path, run="a/b"))
    assert "run='a/b'" in line
    run = levels.runs["action"]["full"].parent
    line = refusal(RunError, explaining(run, run="maps"))
    assert f"{run / 'maps'} is a run of explain, not of capture" in line
    assert list(tmp_path.iterdir()) == []
