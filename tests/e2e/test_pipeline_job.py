"""jobs/pipeline.py: one command from frames to the report, resumed at whatever stage it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vla_ray.data.synthetic import decisive_scenes, write_scene
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import read_metrics

Run = Callable[..., "object"]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    moments = list(decisive_scenes(5000, 4))
    for i in range(2):
        write_scene(tmp_path / f"scenes/s{i}", moments[2 * i : 2 * i + 2])
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
        "every=2",
    ]
    first = process("pipeline", *arguments)
    assert first.code == 0, first.err  # type: ignore[attr-defined]
    run = tmp_path / "runs/p"
    for path in ("metrics", "maps/run.json", "faithfulness/table.md", "report/index.html"):
        assert (run / path).exists(), path
    counts = [len(read_metrics(Location.of(run / stage))) for stage in (".", "maps", "faithfulness")]
    assert counts == [2, 2, 2], "every second frame of each scene, in every stage"
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


@pytest.mark.parametrize(
    ("job", "arguments", "words"),
    [
        ("pipeline", ["methods=rollout"], "relevancy must be among them"),
        ("pipeline", ["methods=[relevancy,original_raw]"], "use payload=full"),
        ("pipeline", ["strength=0.5"], "needs payload=reduced or full"),
        ("pipeline", ["strength=-1", "payload=reduced"], "must be positive"),
        ("pipeline", ["regenerate=-3"], "regenerate=-3 is too small"),
        ("make_scenes", ["decisive=true", "cause=clear", "output_dir=nowhere"], "cause='clear' decides nothing"),
        ("explain", ["methods=iss", "iss_samples=20"], "iss_samples=20 is too small"),
    ],
)
def test_refused_before_anything_runs(here: Run, job: str, arguments: list[str], words: str) -> None:
    assert words in here(job, *arguments).refused(job)  # type: ignore[attr-defined]
