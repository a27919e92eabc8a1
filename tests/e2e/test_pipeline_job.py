"""jobs/pipeline.py: one command from frames to the report, resumed at whatever stage it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vla_ray.data.synthetic import decisive_scenes, write_scene

Run = Callable[..., "object"]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    for i, scene in enumerate(decisive_scenes(5000, 2)):
        write_scene(tmp_path / f"scenes/s{i}", [scene])
    return tmp_path / "scenes"


def test_from_frames_to_the_report_and_again(process: Run, scenes: Path, tmp_path: Path) -> None:
    arguments = [
        f"scene_dir={scenes}",
        f"output_dir={tmp_path / 'runs'}",
        "run=p",
        "kinematic_metric=longitudinal_progress",
        "methods=[relevancy,gradient_x_input]",
        "num_random=2",
        "regenerate=1",
        "randomise=1",
    ]
    first = process("pipeline", *arguments)
    assert first.code == 0, first.err  # type: ignore[attr-defined]
    run = tmp_path / "runs/p"
    for path in ("metrics", "maps/run.json", "faithfulness/table.md", "report/index.html"):
        assert (run / path).exists(), path
    overlay = run / "overlays/relevancy/s0/frame_0000.png"
    assert Image.open(overlay).size[0] >= 448
    assert Image.open(run / "overlays/sheet.png").size[0] == 1600
    assert "early deletion" in first.out  # type: ignore[attr-defined]
    page = (run / "report/index.html").read_text()
    assert "Maps of longitudinal_progress" in page
    assert json.loads((run / "maps/run.json").read_text())["settings"]["source"] == "payloads"

    again = process("pipeline", *arguments)
    assert again.code == 0  # type: ignore[attr-defined]
    assert again.err.count("is finished: nothing to do") == 3, "no stage is done twice"  # type: ignore[attr-defined]
    other = process("pipeline", *arguments, "methods=[relevancy,rollout]")
    assert other.code == 2  # type: ignore[attr-defined]
    assert "was started with other settings" in other.err  # type: ignore[attr-defined]


def test_the_reference_must_be_among_the_methods(here: Run) -> None:
    line = here("pipeline", "methods=rollout").refused("pipeline")  # type: ignore[attr-defined]
    assert "relevancy must be among them" in line
