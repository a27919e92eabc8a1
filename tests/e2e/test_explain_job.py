"""Maps, their measures and the report as a user makes them: one command after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vla_ray.report.shown import read_scene_maps
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import read_metrics

pytestmark = pytest.mark.ray

Run = Callable[..., Any]

WORKER = re.compile(r"(\x1b\[\d+m)?\(MapWorker\(Map\((\w+)\)\) pid=\d+\)(\x1b\[0m)? \d\d:")


def quiet(text: str, worker: str) -> None:
    """Nothing on stderr but our own log lines, in the driver and in workers of this name."""
    known = "actor restart will fail"  # Ray says so of every pool of actors: ray-project/ray#53727
    for line in text.splitlines():
        told = WORKER.match(line)
        assert line[:2].isdigit() or known in line or (told and told[2] == worker), line


def rows_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(Location.of(run)).to_pylist()


def test_capture_then_explain(process: Run, here: Run, tmp_path: Path) -> None:
    """From stored payloads: no model is loaded, and no picture read but for the overlays."""
    arguments = (f"output_dir={tmp_path}", "run=two_steps")
    asked = ("payload=full", "every=4", "explain_mode=text", "text_token_strategy=last")
    captured = process("capture", *arguments, *asked)
    assert captured.code == 0, captured.err
    done = process("explain", *arguments, "methods=[relevancy,original_generic]")
    assert done.code == 0, done.err
    quiet(done.err, "MapMaker")
    run = tmp_path / "two_steps"
    assert "explain maps: 8 rows" in done.out
    assert "overlays 16 pictures in overlays/" in done.out
    assert f"report   {run / 'report/index.html'}" in done.out
    rows = rows_of(run / "maps")
    assert {r["target"] for r in rows} == {"text_last"}
    maps = read_scene_maps(Location.of(run / "maps"), rows)
    assert {row["method"] for several in maps.values() for row in several} == {"relevancy", "original_generic"}
    with Image.open(run / "overlays/original_generic/curve/frame_0004.png") as image:
        assert image.size[0] >= 448
    again = here("explain", *arguments, "methods=[relevancy,original_generic]")
    assert again.code == 0
    assert "is finished: nothing to do" in again.err
    line = here("explain", *arguments, "methods=relevancy").refused("explain")
    assert 'methods: run has ["relevancy", "original_generic"], asked ["relevancy"]' in line
    line = here("faithfulness", *arguments, "reference=rollout").refused("faithfulness")
    assert "relevancy, original_generic" in line
    assert not (run / "faithfulness").exists()


def test_no_arguments_then_measures_and_report(process: Run, here: Run, tmp_path: Path) -> None:
    """Bundled scenes, bundled driver, online; then what the maps are worth, and the page again."""
    arguments = ("run=bundled", f"output_dir={tmp_path}")
    done = process("explain", *arguments, "overlays=false")
    assert done.code == 0, done.err
    quiet(done.err, "SimLingoExplain")
    run = tmp_path / "bundled"
    rows = rows_of(run / "maps")
    assert len(rows) == 32
    assert {r["target"] for r in rows} == {"curv_energy"}
    assert {r["status"] for r in rows} <= {"ok", "degenerate"}
    assert not (run / "overlays").exists()

    small = ("frames=3", "num_random=1", "regenerate=1", "randomise=1", "report=false")
    measured = process("faithfulness", *arguments, *small)
    assert measured.code == 0, measured.err
    quiet(measured.err, "SimLingoFaithfulness")
    assert "faithfulness faithfulness: 3 rows" in measured.out
    assert "curv_energy: the action depends on the picture" in measured.out
    assert "curv_energy by relevancy: early deletion" in measured.out
    assert f"tables   {run / 'faithfulness/table.md'}" in measured.out
    page = run / "report/index.html"
    assert "Maps of curv_energy" not in page.read_text()

    again = here("report", *arguments)
    assert again.code == 0, again.err
    assert f"report of 32 frames, {sum(r['status'] == 'ok' for r in rows)} overlays" in again.out
    assert "Maps of curv_energy" in page.read_text()
    assert (run / "overlays/relevancy/red_light/frame_0003.png").is_file()
    document = json.loads((run / "faithfulness/run.json").read_text())
    assert document["status"] == "finished"
