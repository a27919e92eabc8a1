"""The capture job as a user runs it: the golden command, no arguments at all, and real road frames."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_ray.storage import payload as payload_file
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import read_metrics

pytestmark = pytest.mark.ray

Run = Callable[..., Any]

WORKER = re.compile(r"(\x1b\[\d+m)?\(MapWorker\(Map\(SimLingoCapture\)\) pid=\d+\)(\x1b\[0m)? \d\d:")


def close(actual: Any, expected: np.ndarray, tolerance: float) -> bool:
    actual = np.asarray(actual)
    return actual.shape == expected.shape and bool(
        np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()
    )


def rows_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(Location.of(run)).to_pylist()


def quiet(text: str) -> None:
    """Nothing on stderr but our own log lines, in the driver and in workers."""
    known = "actor restart will fail"  # Ray says so of every pool of actors: ray-project/ray#53727
    strange = [line for line in text.splitlines() if not (line[:2].isdigit() or WORKER.match(line) or known in line)]
    assert strange == []


def test_the_golden_command(process: Run, golden: Path, tmp_path: Path) -> None:
    root = golden / "simlingo_a"
    done = process(
        "capture",
        f"scene_dir={root}/scene",
        f"model.config={root}/checkpoint_root/.hydra/config.yaml",
        f"model.checkpoint={root}/checkpoint_root/checkpoints/epoch=013.ckpt/pytorch_model.pt",
        f"model.variant_dir={root}/pretrained/InternVL2-tiny-a",
        "model.dtype=float32",
        "payload=full",
        f"output_dir={tmp_path}",
        "run=golden",
    )
    assert done.code == 0, done.err
    quiet(done.err)
    run = tmp_path / "golden"
    assert f"look     python jobs/show.py path={run}" in done.out
    assert {p.name for p in run.iterdir()} - {"ledger", "attempts"} == {
        "run.json",
        "config.yaml",
        "metrics",
        json.loads((run / "run.json").read_text())["scene_dirs"]["scene/action"],
    }
    summary = json.loads((root / "expected/summary.json").read_text())["frames"]
    rows = rows_of(run)
    assert [r["status"] for r in rows] == ["ok"] * 3
    for row, frame in zip(rows, summary, strict=True):
        assert Path(row["payload_path"]).name == f"{row['tag']}_action.pt"
        content = payload_file.load(Location.of(run / row["payload_path"]))
        expected = np.load(root / f"expected/{row['tag']}.npz")
        assert content["text_outputs"]["token_ids"] == expected["generated_ids"].tolist()
        assert content["outputs"]["language"] == [frame["language"]]
        assert close(content["outputs"]["pred_route"], expected["pred_route"], 1e-4)
        assert close(content["outputs"]["pred_speed_wps"], expected["pred_speed_wps"], 1e-4)
        assert row["curv_energy"] == pytest.approx(frame["scalars"]["curv_energy"], rel=1e-3)
        for block, (entry,) in content["attention"].items():
            squeeze = 0 if block.startswith("language") else slice(None)
            assert close(entry["attn"][squeeze], expected[f"attn/{block}"], 1e-4)
            cam = (entry["attn"] * entry["grad"]).clamp_min(0).mean(1)[squeeze]
            assert close(cam, expected[f"cam/curv_energy/{block}"], 1e-3)


def test_no_arguments(process: Run, here: Run, tmp_path: Path) -> None:
    """Bundled scenes, bundled driver; and what show says about each thing that a run holds."""
    output_dir = tmp_path / "my runs (a=b)"
    done = process("capture", "run=bundled", f"output_dir={output_dir}")
    assert done.code == 0, done.err
    quiet(done.err)
    run = output_dir / "bundled"
    assert f"look     python jobs/show.py 'path={run}'" in done.out, "to be pasted into a shell as it is"
    assert "32/32 frames" in done.err
    assert "capture bundled: 32 rows" in done.out
    rows = rows_of(run)
    assert {r["scene"] for r in rows} == {"curve", "lead_car", "pedestrian", "red_light"}
    assert {r["status"] for r in rows} <= {"ok", "degenerate"}

    again = here("capture", "run=bundled", f"output_dir={output_dir}")
    assert again.code == 0
    assert "run bundled is finished: nothing to do" in again.err

    shown = here("show", f"path={run}").out
    assert "run bundled: finished" in shown
    assert "metrics: 32 rows" in shown
    assert rows[0]["payload_path"] in shown
    shown = here("show", f"path={run / rows[0]['payload_path']}").out
    assert "target     curv_energy" in shown
    assert repr(rows[0]["text"]) in shown
    assert "relevancy_negative: language float32" in shown
    (part,) = run.glob("metrics/*.parquet")
    assert "32 rows" in here("show", f"path={part}").out
    assert "holds 1 runs: bundled" in here("show", f"path={output_dir}").out


def test_real_road_frames(process: Run, repo: Path, tmp_path: Path) -> None:
    """A root of two scenes: one with images/, one with its images directly in it; no speeds recorded."""
    scenes = Path(os.environ.get("VLA_RAY_SHARED", repo.parent / "shared")) / "scenes"
    if not scenes.is_dir():
        pytest.skip(f"no road frames at {scenes}")
    done = process(
        "capture",
        f"scene_dir={scenes}",
        f"output_dir={tmp_path}",
        "run=road",
        "every=3",
        "default_speed_mps=12",
        "kinematic_metric=[curv_energy,lateral_offset]",
    )
    assert done.code == 0, done.err
    quiet(done.err)
    assert "frames have no speed" in done.err
    rows = rows_of(tmp_path / "road")
    frames = {r["frame_id"] for r in rows}
    assert sum(f.startswith("highway_white_right/") for f in frames) == 13
    assert sum(f.startswith("highway_mixed/") for f in frames) == 2
    assert len(rows) == 30
    assert {r["input_speed_mps"] for r in rows} == {12.0}
    assert {r["status"] for r in rows} == {"ok"}
    for row in rows:
        content = payload_file.load(Location.of(tmp_path / "road" / row["payload_path"]))
        assert (content["meta"]["original_width"], content["meta"]["original_height"]) == (960, 540)
