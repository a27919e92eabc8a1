"""The report's files: what index.html and the map data hold, and in which order they are written."""

from __future__ import annotations

import base64
import io
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

from vla_ray.data.camera import Camera
from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import StorageError, TargetError
from vla_ray.explain.heatmap import HeatMap, assemble
from vla_ray.report import page
from vla_ray.report.page import Figure, ShownFrame, ShownMap, ShownTarget, Table, write_page
from vla_ray.report.page_data import colour_tables, quantised, safe_json
from vla_ray.storage.files import Location

METHODS = {"relevancy": "where it comes from", "signed": "with sign"}
GEOMETRY = TileGeometry(100, 200, 70, 32, 64, ((0, 0, 32, 32), (32, 0, 64, 32)), thumbnail=False)
ROUTE = np.stack([np.arange(1, 21), np.zeros(20)], axis=1).astype(float)


def heat(values: Any) -> HeatMap:
    return HeatMap(np.asarray(values, np.float32), GEOMETRY)


def shown(values: Any = ((0, 1), (2, 3)), method: str = "relevancy", direction: str = "positive") -> ShownMap:
    return ShownMap("progress", method, direction, heat(values), {"image": 0.75, "text": 0.25})


def frame(stem: str, scene: str = "s", image: Path | None = None, **changes: Any) -> ShownFrame:
    default = ShownFrame(
        frame_id=f"{scene}/{stem}",
        scene=scene,
        stem=stem,
        image=None if image is None else Location.of(image),
        text="Keep going.",
        speed_mps=5.0,
        route=ROUTE,
        speed_wps=ROUTE[:10],
        camera=Camera(),
        metrics={"curv_energy": 0.5},
        targets=[ShownTarget("progress", "m", 9.5, "ok")],
        maps=[shown()],
    )
    return replace(default, **changes)


def failed(stem: str) -> ShownFrame:
    target = ShownTarget("progress", "m", None, "failed", "ImageError: it is empty")
    return frame(stem, route=np.zeros((0, 2)), speed_wps=np.zeros((0, 2)), metrics={}, targets=[target], maps=[])


def write(directory: Path, frames: Sequence[ShownFrame], **more: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The index, and every frame's details in order."""
    assert write_page(Location.of(directory), "t", {}, METHODS, [("s", frames)], **more) == len(frames)
    return read_index(directory), [
        d for n in range(len(list((directory / "data").iterdir()))) for d in chunk(directory, n)
    ]


def read_index(directory: Path) -> dict[str, Any]:
    text = (directory / "index.html").read_text()
    found = re.findall(r'<script type="application/json" id="index">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def chunk(directory: Path, n: int) -> list[dict[str, Any]]:
    match = re.fullmatch(rf"vlaRayChunk\({n},(.*)\);\n", (directory / f"data/{n}.js").read_text())
    assert match
    return json.loads(match[1])


def values(entry: dict[str, Any], kind: Any = np.uint8) -> np.ndarray:
    levels = np.frombuffer(base64.b64decode(entry["data"]), kind).reshape(entry["rows"], entry["columns"])
    return levels / np.iinfo(kind).max * entry["peak"]


def picture(path: Path, width: int = 200, height: int = 100, **save: Any) -> Path:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (200, 0, 0)
    Image.fromarray(pixels).save(path, **save)
    return path


def test_a_report_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    image = picture(tmp_path / "in.png")
    out = tmp_path / "report"
    index, details = write(
        out,
        [frame("a", image=image)],
        tables=[Table("Faithfulness", "in metres", ["method", "value"], [["relevancy", 1.5], ["random", None]])],
        figures=[Figure("Curves", "", b"png")],
    )
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "data/0.js",
        "figures/0.png",
        "images/s/a.jpg",
        "index.html",
    ]
    text = (out / "index.html").read_text()
    assert "@@" not in text
    links = set(re.findall(r"\w+://[^\s\"'`]+", text))
    assert links == {"http://www.w3.org/2000/svg"}  # a namespace, not an address
    assert not re.search(r"\bfetch\(|XMLHttpRequest|\bimport\b|type=\"module\"|<link rel=\"stylesheet\"", text)
    assert index["tables"][0]["rows"] == [["relevancy", 1.5], ["random", None]]
    assert index["methods"] == [["relevancy", "where it comes from"], ["signed", "with sign"]]
    assert index["targets"] == [["progress", "m"]]
    assert index["columns"] == [["curv_energy", "1/m^2"]]
    assert details[0]["maps"]["progress\nrelevancy"]["shares"] == {"image": 0.75, "text": 0.25}
    assert (out / "figures/0.png").read_bytes() == b"png"


def test_nothing_from_data_can_end_a_script_or_become_markup(tmp_path: Path) -> None:
    evil = '</script><script>alert("1")</script><!-- \u2028 \u00e4 \U0001f600 @@style@@'
    target = ShownTarget(evil, evil, None, "failed", evil)
    bad = frame('a "b" <c>', text=evil, targets=[target], metrics={evil: evil}, maps=[])
    plain = tmp_path / "plain"
    write_page(Location.of(plain), "t", {}, {}, [])
    out = tmp_path / "evil"
    methods, facts = {evil: evil}, {evil: evil}
    write_page(Location.of(out), evil, facts, methods, [("s", [bad])], [Table(evil, evil, [evil], [[evil]])])
    text, reference = (out / "index.html").read_text(), (plain / "index.html").read_text()
    for mark in ("<script", "</script", "<!--", "<style"):
        assert text.count(mark) == reference.count(mark)
    assert "&lt;/script&gt;" in re.findall(r"<title>(.*)</title>", text)[0]
    index = read_index(out)
    assert index["frames"][0][7] == index["tables"][0]["title"] == index["facts"][0][1] == evil
    assert index["frames"][0][0] == 's/a "b" <c>'


def test_the_index_is_written_last_and_an_old_one_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(tmp_path / "in.png")
    out = tmp_path / "report"
    write(out, [frame("a", image=image)])
    seen: list[str] = []
    real = page.write_atomic

    def spy(loc: Location, data: Any, **options: Any) -> int:
        assert not (out / "index.html").exists()
        seen.append(loc.name)
        return real(loc, data, **options)

    monkeypatch.setattr(page, "write_atomic", spy)
    write(out, [frame("a", image=image)], figures=[Figure("f", "", b"png")])
    assert len(seen) == 4
    assert seen[-1] == "index.html"

    def full(loc: Location, data: Any, **options: Any) -> int:
        raise StorageError("Cannot write: no space left")

    monkeypatch.setattr(page, "write_atomic", full)
    with pytest.raises(StorageError):
        write(out, [frame("a")])
    assert not (out / "index.html").exists()


def test_scenes_are_consumed_one_by_one(tmp_path: Path) -> None:
    def scenes() -> Iterator[tuple[str, list[ShownFrame]]]:
        yield "one", [frame("a", "one")]
        assert (tmp_path / "data/0.js").exists()
        yield "empty", []
        yield "two", [frame("a", "two"), frame("b", "two")]
        assert (tmp_path / "data/1.js").exists()

    assert write_page(Location.of(tmp_path), "t", {}, METHODS, scenes()) == 3
    index = read_index(tmp_path)
    assert [(s["name"], s["first"], s["count"]) for s in index["scenes"]] == [("one", 0, 1), ("two", 1, 2)]


def test_a_long_scene_is_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [frame(f"{i:03d}", text=str(i), maps=[shown([[i + 1]])]) for i in range(130)]
    index, details = write(tmp_path, frames)
    assert [row[2] for row in index["frames"]] == [0] * 64 + [1] * 64 + [2] * 2
    peaks = [d["maps"]["progress\nrelevancy"]["peak"] for d in details]
    scale = index["scenes"][0]["scales"]["progress\nrelevancy"]
    assert peaks == [pytest.approx(min(i + 1, max(scale, i + 1))) for i in range(130)]
    monkeypatch.setattr(page, "CHUNK_CHARS", 1)
    index, _ = write(tmp_path / "small", frames[:3])
    assert [row[2] for row in index["frames"]] == [0, 1, 2]


def test_values_survive_in_eight_bits_and_the_scale_is_the_scenes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    faint, strong = rng.random((4, 8)), 100 * rng.random((4, 8))
    index, details = write(tmp_path, [frame("a", maps=[shown(faint)]), frame("b", maps=[shown(strong)])])
    scale = index["scenes"][0]["scales"]["progress\nrelevancy"]
    assert scale == pytest.approx(np.percentile(np.concatenate([faint, strong]), 99), rel=1e-5)
    first, second = (d["maps"]["progress\nrelevancy"] for d in details)
    # A faint frame keeps its levels: its error is that of its own range, not the scene's.
    assert np.abs(values(first) - faint).max() <= 0.51 * faint.max() / 255
    assert np.abs(values(second) - np.minimum(strong, second["peak"])).max() <= 0.51 * strong.max() / 255
    assert first["scale"] == pytest.approx(np.percentile(faint, 99), rel=1e-5)
    assert first["mass"] == pytest.approx(faint.sum(), rel=1e-5)


def test_an_outlier_takes_no_levels_from_what_is_told_apart() -> None:
    grid = np.full((20, 20), 0.5, np.float32)
    grid[0, 0] = 1000
    entry = quantised(grid, signed=False, scene_scale=2.0)
    assert entry["peak"] == 2.0
    assert values(entry)[1, 1] == pytest.approx(0.5, abs=0.005)


def test_a_map_of_few_cells_has_its_largest_as_scale(tmp_path: Path) -> None:
    sparse = np.zeros((20, 20))
    sparse[3, 4] = 7
    index, details = write(tmp_path, [frame("a", maps=[shown(sparse)]), frame("b", maps=[shown(np.zeros((2, 2)))])])
    assert index["scenes"][0]["scales"]["progress\nrelevancy"] == 7
    assert details[1]["maps"]["progress\nrelevancy"]["peak"] == 0


def test_signed_maps_keep_their_sign_and_others_do_not(tmp_path: Path) -> None:
    grid = [[-4.0, 2.0], [0.0, 4.0]]
    maps = [shown(grid), shown(grid, "signed", "signed")]
    _, details = write(tmp_path, [frame("a", maps=maps)])
    one, both = (details[0]["maps"][f"progress\n{name}"] for name in METHODS)
    assert np.allclose(values(one), [[0, 2], [0, 4]], atol=0.07)  # above the scale is cut
    assert np.allclose(values(both, np.int8), grid, atol=0.07)
    assert (one["direction"], both["direction"]) == ("positive", "signed")
    assert one["mass"] == pytest.approx(6)


def test_a_thumbnail_is_spread_over_the_canvas(tmp_path: Path) -> None:
    geometry = replace(GEOMETRY, boxes=(*GEOMETRY.boxes, (0, 0, 64, 32)), thumbnail=True)
    tiles = np.zeros((3, 2, 2))
    tiles[2] = [[8, 0], [0, 0]]  # the canvas's upper left quarter: two of its eight cells
    both = ShownMap("progress", "relevancy", "positive", assemble(tiles, geometry), {})
    _, details = write(tmp_path, [frame("a", maps=[both])])
    assert np.allclose(values(details[0]["maps"]["progress\nrelevancy"]), [[4, 4, 0, 0], [0, 0, 0, 0]], atol=0.02)


def test_where_the_model_saw_nothing_and_where_the_plan_lies(tmp_path: Path) -> None:
    image = picture(tmp_path / "in.png")
    degenerate = frame("b", image=image, maps=[], targets=[ShownTarget("progress", "m", 0.0, "degenerate")])
    index, details = write(tmp_path, [frame("a", image=image), degenerate, frame("c")])
    assert [row[5] for row in index["frames"]] == [0.7, 0.7, 0.7]  # a degenerate frame's is its scene's
    assert [row[4] for row in index["frames"]] == [[200, 100]] * 3  # without a picture: the map's
    assert index["frames"][1][9] == [["progress", 0.0, "degenerate", None]]
    assert details[1]["maps"] == {}
    assert np.allclose(details[0]["route_px"], Camera().project(ROUTE, 200, 100), atol=0.06)
    assert details[0]["speed"] == ROUTE[:10].tolist()
    assert index["scenes"][0]["range"] == [0, 20, 0]


def test_failed_frames_are_listed_with_their_reason(tmp_path: Path) -> None:
    index, details = write(tmp_path, [failed("a"), frame("b")])
    assert index["frames"][0][9] == [["progress", None, "failed", "ImageError: it is empty"]]
    assert index["frames"][0][3] is False
    assert details[0] == {"route": [], "route_px": [], "speed": [], "speed_px": [], "maps": {}}
    # It came before the columns of the table were known.
    assert index["frames"][0][8] == []
    assert index["columns"] == [["curv_energy", "1/m^2"]]
    alone, _ = write(tmp_path / "alone", [failed("a")])
    assert alone["frames"][0][4] is None


def test_no_frames_is_a_report_too(tmp_path: Path) -> None:
    assert write_page(Location.of(tmp_path), "t", {"run": "x"}, METHODS, []) == 0
    index = read_index(tmp_path)
    assert index["frames"] == index["scenes"] == []
    assert index["facts"] == [["run", "x"]]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    metrics = {"curv_energy": float("nan"), "x": float("-inf"), "y": np.float32(0.1), "n": np.int64(3)}
    target = ShownTarget("progress", "m", float("inf"), "ok")
    points = np.array([[1.0, np.nan]])
    odd = frame("a", metrics=metrics, targets=[target], route=points, speed_wps=points, speed_mps=float("nan"))
    index, details = write(tmp_path, [odd])
    assert index["frames"][0][8] == [None, None, 0.1, 3]
    assert index["frames"][0][6] is None
    assert index["frames"][0][9][0][1] is None
    assert details[0]["route"] == [[1.0, None]]
    assert safe_json({"x": 1 / 3}) == '{"x":0.333333}'


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([shown([[np.nan, 1.0]])], r"^the map of s/a for progress by relevancy has 1 values that are not finite\.$"),
        ([shown(), shown()], r"^the map of s/a for progress by relevancy is given twice; "),
    ],
)
def test_a_wrong_map_is_one_clear_line(tmp_path: Path, maps: list[ShownMap], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        write_page(Location.of(tmp_path), "t", {}, METHODS, [("s", [frame("a", maps=maps)])])
    assert not (tmp_path / "index.html").exists()


def test_pictures_are_small_and_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # stored lying on its side
    turned = picture(tmp_path / "turned.jpg", 1000, 2000, exif=exif)
    index, _ = write(tmp_path / "report", [frame("a", image=turned), frame("b", image=picture(tmp_path / "in.png"))])
    assert [row[4] for row in index["frames"]] == [[2000, 1000], [200, 100]]
    copies = [Image.open(tmp_path / f"report/images/s/{stem}.jpg") for stem in "ab"]
    assert [(c.format, c.size) for c in copies] == [("JPEG", (960, 480)), ("JPEG", (200, 100))]
    upright = np.asarray(copies[0])
    assert upright[10, 480, 0] > 150  # what was on the left is on top
    assert upright[470, 480, 0] < 50


def test_an_unreadable_picture_leaves_its_frame_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = tmp_path / "damaged.png"
    buffer = io.BytesIO()
    Image.new("RGB", (50, 50)).save(buffer, "PNG")
    damaged.write_bytes(buffer.getvalue()[:60])
    with caplog.at_level(logging.WARNING):
        index, details = write(tmp_path, [frame("a", image=damaged), frame("b", image=tmp_path / "gone.png")])
    assert [row[3] for row in index["frames"]] == [False, False]
    assert details[0]["maps"]
    assert [r.getMessage().split(";")[0] for r in caplog.records] == ["2 pictures are missing in the report"]


def test_colours_get_evenly_lighter_and_opposite_signs_differ() -> None:
    tables = {k: np.frombuffer(base64.b64decode(v), np.uint8).reshape(256, 3) for k, v in colour_tables().items()}
    luma = {k: t.astype(float) @ [0.2126, 0.7152, 0.0722] for k, t in tables.items()}
    assert (np.diff(luma["sequential"]) > -1).all()
    assert luma["sequential"][-1] > 4 * luma["sequential"][0]
    middle = luma["diverging"][127]
    assert middle == luma["diverging"].min()
    assert (np.diff(luma["diverging"][128:]) > -1).all()
    assert (np.diff(luma["diverging"][:128]) < 1).all()
    blue, orange = tables["diverging"][0].astype(int), tables["diverging"][-1].astype(int)
    assert blue[2] > blue[0] + 60
    assert orange[0] > orange[2] + 60
