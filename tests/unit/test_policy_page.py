"""The files of a policy's report: what the index and the data of samples hold, and what is missing is said."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import StorageError, TargetError
from vla_ray.explain.heatmap import HeatMap
from vla_ray.report import policy_page
from vla_ray.report.policy_page import RIGHT, Figure, ShownMap, ShownSample, Table, write_policy_page
from vla_ray.schema import ACTION_UNITS
from vla_ray.storage.files import Location

GEOMETRY = TileGeometry(48, 64, 48, 64, 64, ((0, 0, 64, 64),), False)
AHEAD = np.tile([1.0, 0.0], (8, 1))
FIELDS = (
    *("id", "number", "chunk", "size", "no_picture", "instruction", "kind"),
    *("dataset", "recording", "status", "error", "metrics"),
)


def sample(number: int = 0, **changes: Any) -> ShownSample:
    default = ShownSample(
        sample_id=f"s{number}",
        number=number,
        instruction="go to the door",
        kind="landmark",
        dataset="halls",
        recording="one",
        image=None,
        predicted=AHEAD,
        target=AHEAD + [0.0, 0.1],
        scale_m=0.25,
        status="ok",
        metrics={"fde": 0.8, "ade": 0.45, "ade_m": 0.1125, "turn_side": RIGHT},
    )
    return replace(default, **changes)


def failed(number: int = 0) -> ShownSample:
    error = "ImageError: it is empty"
    return sample(number, predicted=None, target=None, status="failed", error=error, metrics={})


def heat(values: Any, target: str = "side", direction: str = "positive") -> ShownMap:
    return ShownMap(target, "relevancy", direction, HeatMap(np.asarray(values, np.float32), GEOMETRY), {"image": 1.0})


def picture(path: Path) -> Location:
    Image.new("RGB", (64, 48), (200, 0, 0)).save(path)
    return Location.of(path)


def write(directory: Path, samples: Sequence[ShownSample], **more: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The index, its samples as dictionaries, and the details of every sample in order."""
    assert write_policy_page(Location.of(directory), "t", {}, samples, **more) == len(samples)
    text = (directory / "index.html").read_text()
    found = re.findall(r'<script type="application/json" id="index">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    index = json.loads(found[0])
    index["samples"] = [dict(zip(FIELDS, row, strict=True)) for row in index["samples"]]
    return index, [d for n in range(len(list((directory / "data").iterdir()))) for d in chunk(directory, n)]


def chunk(directory: Path, n: int) -> list[dict[str, Any]]:
    match = re.fullmatch(rf"vlaRayChunk\({n},(.*)\);\n", (directory / f"data/{n}.js").read_text())
    assert match
    return json.loads(match[1])


def test_a_report_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    out = tmp_path / "report"
    shown = sample(3, image=picture(tmp_path / "in.png"), variants={"turn left": AHEAD}, probability=AHEAD * 0.5)
    index, details = write(
        out,
        [shown],
        tables=[Table("Metrics", "in units", ["metric", "t"], [["ADE", 0.45]])],
        figures=[Figure("Errors", "", b"png")],
        median_step=1.0,
    )
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert files == ["data/0.js", "figures/0.png", "images/000000.jpg", "index.html"]
    text = (out / "index.html").read_text()
    assert "@@" not in text
    assert set(re.findall(r"\w+://[^\s\"'`]+", text)) == {"http://www.w3.org/2000/svg"}  # a namespace, not an address
    assert not re.search(r"\bfetch\(|XMLHttpRequest|\bimport\b|type=\"module\"|<link rel=\"stylesheet\"", text)
    assert index["units"] == ACTION_UNITS
    assert index["straight"] == 1
    assert index["tables"][0]["rows"] == [["ADE", 0.45]]
    assert index["samples"][0] | {"metrics": None} == {
        "id": "s3", "number": 3, "chunk": 0, "size": [64, 48], "no_picture": None, "instruction": "go to the door",
        "kind": "landmark", "dataset": "halls", "recording": "one", "status": "ok", "error": None, "metrics": None,
    }  # fmt: skip
    assert details[0]["predicted"] == AHEAD.tolist()
    assert details[0]["target"] == [[1.0, 0.1]] * 8
    assert details[0]["probability"] == [[0.5, 0]] * 8
    assert details[0]["variants"] == [["turn left", AHEAD.tolist()]]
    assert details[0]["scale_m"] == 0.25


def test_nothing_from_data_can_end_a_script_or_become_markup(tmp_path: Path) -> None:
    evil = '</script><script>alert("1")</script><!-- \u2028 \U0001f600 @@policy.js@@'
    bad = sample(sample_id=evil, instruction=evil, kind=evil, dataset=evil, recording=evil, error=evil)
    bad = replace(bad, variants={evil: AHEAD}, metrics={evil: 1.0, "turn_side": evil}, maps=[heat([[1]], evil)])
    write_policy_page(Location.of(tmp_path / "plain"), "t", {}, [])
    out = tmp_path / "evil"
    write_policy_page(Location.of(out), evil, {evil: evil}, [bad], [Table(evil, evil, [evil], [[evil]])])
    text, reference = (out / "index.html").read_text(), (tmp_path / "plain" / "index.html").read_text()
    for mark in ("<script", "</script", "<!--", "<style"):
        assert text.count(mark) == reference.count(mark)
    assert "&lt;/script&gt;" in re.findall(r"<title>(.*)</title>", text)[0]
    assert "</script" not in (out / "data/0.js").read_text()
    assert chunk(out, 0)[0]["variants"][0][0] == evil


def test_columns_are_those_with_a_value_in_their_own_order(tmp_path: Path) -> None:
    unknown = sample(1, metrics={"ade": None, "heading": 3.5, "confidence": float("nan")})
    index, _ = write(tmp_path, [sample(), unknown])
    assert [(c[0], c[2], c[4]) for c in index["columns"]] == [
        ("ade", "units", True),
        ("fde", "units", True),
        ("ade_m", "m", True),
        ("turn_side", "", False),
        ("heading", "", False),
    ]
    assert [s["metrics"] for s in index["samples"]] == [
        [0.45, 0.8, 0.1125, "right", None],
        [None, None, None, None, 3.5],
    ]


def test_a_failed_sample_has_a_reason_and_no_trajectory(tmp_path: Path) -> None:
    index, details = write(tmp_path, [failed(), sample(1)])
    assert (index["samples"][0]["status"], index["samples"][0]["error"]) == ("failed", "ImageError: it is empty")
    assert details[0]["predicted"] is None
    assert details[0]["target"] is None
    assert set(index["samples"][0]["metrics"]) == {None}


def test_without_targets_there_are_no_error_columns(tmp_path: Path) -> None:
    index, details = write(tmp_path, [sample(target=None, metrics={"ade": None, "confidence": 0.5})])
    assert [c[0] for c in index["columns"]] == ["confidence"]
    assert index["straight"] is None
    assert details[0]["target"] is None


def test_steps_that_do_not_count_are_null_and_the_rest_is_seen(tmp_path: Path) -> None:
    target = AHEAD.copy()
    target[5:] = np.nan
    index, details = write(tmp_path, [sample(target=target, predicted=-AHEAD * [0.5, 1])])
    assert details[0]["target"][4:6] == [[1.0, 0.0], [None, None]]
    assert index["range"] == [4, 5, 0]  # back, forward, to a side


def test_missing_pictures_say_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = sample(1, image=Location.of(tmp_path / "gone.jpg"), maps=[heat(np.ones((2, 2)))])
    with caplog.at_level(logging.WARNING):
        index, _ = write(tmp_path / "report", [sample(), gone])
    assert index["samples"][0]["no_picture"] == "none was kept"
    assert "gone.jpg: no such file or directory" in index["samples"][1]["no_picture"]
    assert index["samples"][1]["size"] == [64, 48]  # as the map says
    assert [r.message[:42] for r in caplog.records] == ["1 pictures are missing in the report; the "]


def test_maps_keep_every_cell_and_share_a_scale(tmp_path: Path) -> None:
    faint, strong = np.full((4, 4), 0.1), np.full((4, 4), 2.0)
    strong[0, 0] = 8
    maps = [[heat(faint), heat(-faint, "signed", "signed")], [heat(strong)]]
    index, details = write(tmp_path, [sample(i, maps=m) for i, m in enumerate(maps)], methods={"relevancy": "how"})
    assert index["targets"] == ["side", "signed"]
    assert index["methods"] == [["relevancy", "how"]]
    assert index["scales"]["side\nrelevancy"] == pytest.approx(np.percentile(np.stack([faint, strong]), 99), rel=1e-5)
    assert details[1]["maps"]["side\nrelevancy"]["peak"] == 8
    assert details[0]["maps"]["side\nrelevancy"]["scale"] == pytest.approx(0.1)
    assert details[0]["maps"]["signed\nrelevancy"]["direction"] == "signed"


def test_a_wrong_map_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"^the map of s0 for side by relevancy has 1 values that are not finite\.$"):
        write(tmp_path, [sample(maps=[heat([[np.nan, 1.0]])])])
    assert not (tmp_path / "index.html").exists()


def test_samples_are_consumed_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_page, "CHUNK_SAMPLES", 2)

    def samples() -> Iterator[ShownSample]:
        yield sample(0)
        yield sample(1)
        yield sample(2)
        assert (tmp_path / "data/0.js").exists()
        yield sample(3)
        yield sample(4)

    assert write_policy_page(Location.of(tmp_path), "t", {}, samples()) == 5
    assert [len(chunk(tmp_path, n)) for n in range(3)] == [2, 2, 1]
    monkeypatch.setattr(policy_page, "CHUNK_CHARS", 1)
    index, details = write(tmp_path / "small", [sample(i) for i in range(4)])
    assert [s["chunk"] for s in index["samples"]] == [0, 1, 2, 3]
    assert len(details) == 4


def test_the_index_is_written_last_and_an_old_one_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [sample()])
    seen: list[str] = []
    real = policy_page.write_atomic

    def spy(loc: Location, data: Any, **options: Any) -> int:
        assert not (tmp_path / "index.html").exists()
        seen.append(loc.name)
        return real(loc, data, **options)

    monkeypatch.setattr(policy_page, "write_atomic", spy)
    write(tmp_path, [sample()], figures=[Figure("f", "", b"png")])
    assert seen == ["0.js", "0.png", "index.html"]

    def full(loc: Location, data: Any, **options: Any) -> int:
        raise StorageError("Cannot write: no space left")

    monkeypatch.setattr(policy_page, "write_atomic", full)
    with pytest.raises(StorageError):
        write(tmp_path, [sample()])
    assert not (tmp_path / "index.html").exists()


def test_no_samples_is_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    index, _ = write(tmp_path, [])
    assert index["samples"] == index["columns"] == index["targets"] == []
    assert index["range"] == [0, 0, 0]
