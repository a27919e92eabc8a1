"""From scores to tables: means over frames, intervals over scenes, verdicts in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_ray.data.tiles import Tiler
from vla_ray.evaluation.faithfulness import markdown, summarise, write_summary
from vla_ray.explain.heatmap import HeatMap
from vla_ray.explain.methods import METHODS
from vla_ray.report.build import faithfulness_parts
from vla_ray.report.page import Table
from vla_ray.schema import MAPS, SCORES
from vla_ray.stages.maps import MadeMap
from vla_ray.storage.files import Location, write_json
from vla_ray.storage.fragments import write_rows
from vla_ray.storage.ledger import Ledger, commit

_, GEOMETRY = Tiler(28, 2, True, False)(np.zeros((60, 120, 3), np.uint8))
TARGET = "longitudinal_progress"


def metrics_row(frame_id: str, path: str) -> dict[str, Any]:
    scene, stem = frame_id.split("/")
    ref = {
        "frame_id": frame_id,
        "scene": scene,
        "stem": stem,
        "image": "/nowhere.png",
        "speed_mps": 5.0,
        "target_points": None,
        "question": None,
        "camera": None,
    }
    return {
        "frame_id": frame_id,
        "target": TARGET,
        "scene": scene,
        "status": "ok",
        "frame": json.dumps(ref),
        "payload_path": path,
        "text": "Stop for the pedestrian.",
        "route": [0.0, 0.0] * 20,
        "speed_wps": [x for k in range(10) for x in (1.25 * (k + 1), 0.0)],
        "target_scalar": 1.0,
    }


@pytest.fixture
def run(tmp_path: Path) -> Location:
    """Two scenes of two frames, in which relevancy always moves more than the prior."""
    maps, run = Location.of(tmp_path / "maps"), Location.of(tmp_path / "faithfulness")
    frames = ["a/0", "a/1", "b/0", "b/1"]
    rows, scores = [], []
    for i, frame_id in enumerate(frames):
        heat = HeatMap(np.roll(np.arange(8, dtype=np.float32).reshape(2, 4), i), GEOMETRY)
        rows.append(MadeMap(METHODS["relevancy"], "negative", heat).row(frame_id, frame_id[0], TARGET))
        values = {
            ("relevancy", "early"): 0.8 + 0.01 * i,
            ("prior (mean map)", "early"): 0.3 + 0.01 * i,
            ("relevancy", "lift"): 10.0 + i,
            ("picture", "all_hidden_m"): 4.0,
            ("heads", "randomised_similarity"): 0.1,
            **{(name, f"{head}_m"): 2.0 for name in ("blank", "blur") for head in ("route", "speed")},
        }
        for (subject, measure), value in values.items():
            scores.append(score(frame_id, subject, measure, value))
        scores += [score(frame_id, "relevancy", "deleted", share, share) for share in (0.0, 0.5, 1.0)]
    # What a batch wrote before it died, done again in another file: it must not count.
    write_rows(run / "stray.parquet", [score("a/0", "relevancy", "early", 100.0)], SCORES)
    write_rows(run / "s.parquet", scores, SCORES)
    write_rows(maps / "m.parquet", rows, MAPS)
    for place, file in ((maps, "m.parquet"), (run, "s.parquet")):
        commit(place, [metrics_row(f, file) for f in frames])
        Ledger(place).load()
    write_json(maps / "run.json", {"fingerprint": {"targets": [TARGET]}})
    return run


def score(frame_id: str, subject: str, measure: str, value: float, at: float | None = None) -> dict[str, Any]:
    key = {"frame_id": frame_id, "scene": frame_id[0], "target": TARGET}
    return {**key, "subject": subject, "measure": measure, "at": at, "value": value}


def by_title(tables: tuple[Table, ...], start: str) -> Table:
    (found,) = [t for t in tables if t.title.startswith(start)]
    return found


def test_tables(run: Location) -> None:
    summary = summarise(run, run.parent / "maps")
    methods = by_title(summary.tables, "Maps of longitudinal")
    assert list(methods.columns) == ["method", "early deletion", "- prior", "lift"]
    assert [row[0] for row in methods.rows] == ["relevancy", "prior (mean map)"]
    assert str(methods.rows[0][1]).startswith("0.82 [0.81, 0.83")
    assert methods.rows[0][2] == "0.50 [0.50, 0.50]", "paired by frame: what is hard for both cancels"
    assert methods.rows[1][3] is None, "no lift was measured for the prior"
    assert "4 frames of 2 scenes" in methods.note
    dependence = by_title(summary.tables, "Dependence")
    assert "depends on the picture" in dependence.note
    assert summary.warnings == ()
    assert by_title(summary.tables, "Weights randomised").rows == [["heads", "0.10 [0.10, 0.10]"]]
    said = by_title(summary.tables, "Does it do what it says")
    assert said.rows == [["stop", 4, 4, "100%"]], "it says stop and drives on at 5 m/s"
    assert "early deletion 0.82" in summary.text


def test_an_action_that_ignores_the_picture_is_said_to(run: Location) -> None:
    still = [score("a/0", name, f"{head}_m", 0.01) for name in ("blank", "blur") for head in ("route", "speed")]
    write_rows(run / "s.parquet", still, SCORES)
    summary = summarise(run, run.parent / "maps")
    assert len(summary.warnings) == 1
    assert "does not depend on the picture" in summary.text


def test_what_is_written_is_what_the_report_shows(run: Location) -> None:
    summary = summarise(run, run.parent / "maps")
    write_summary(run, summary)
    tables, figures = faithfulness_parts(run.parent)
    assert [t.title for t in tables] == [t.title for t in summary.tables]
    assert [f.title for f in figures] == ["Deletion curves, longitudinal_progress"]
    assert figures[0].png.startswith(b"\x89PNG")
    text = (run / "table.md").read_bytes().decode()
    assert "| relevancy | 0.82" in text
    assert faithfulness_parts(run) == ([], [])


def test_markdown() -> None:
    text = markdown(Table("T", "n.", ["a", "b"], [["x", 1.23456], [None, 7]]))
    assert text.splitlines() == ["## T", "", "n.", "", "| a | b |", "|---|---|", "| x | 1.23 |", "| - | 7 |"]
