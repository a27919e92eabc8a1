"""Scene directories as people lay them out, and the mistakes they make. No image is opened, so files are empty."""

from __future__ import annotations

import json
import logging
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from vla_ray.data.camera import SIMLINGO_CAMERA, Camera
from vla_ray.data.scenes import FrameRef, discover, natural_key
from vla_ray.errors import ConfigError, SceneError, VlaRayError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def table(scene: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (scene / "frames.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return scene


def ids(scene_dir: Any, **options: Any) -> list[str]:
    return [
        frame.frame_id for frame in discover(scene_dir if isinstance(scene_dir, list) else str(scene_dir), **options)
    ]


def refused(message: str, *args: Any, **options: Any) -> str:
    with pytest.raises(SceneError, match=message) as caught:
        discover(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Where images are


@pytest.mark.parametrize("where", ["", "images/", "frames/"])
def test_one_scene(tmp_path: Path, where: str) -> None:
    touch(tmp_path / "town", f"{where}a.png", f"{where}b.JPG", f"{where}c.Jpeg", f"{where}d.txt", f"{where}.hidden.png")
    frames = discover(str(tmp_path / "town"))
    assert [f.frame_id for f in frames] == ["town/a", "town/b", "town/c"]
    assert frames[1] == FrameRef("town/b", "town", "b", f"{tmp_path}/town/{where}b.JPG", 0.0, None, None)


def test_images_directly_inside_come_before_the_usual_sub_directories(tmp_path: Path) -> None:
    touch(tmp_path / "town", "a.png", "images/b.png", "frames/c.png")
    assert ids(tmp_path / "town") == ["town/a"]


@pytest.mark.parametrize("name", ["rgb", "camera/front", "rgb/"])
def test_the_named_sub_directory_comes_first(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "town", f"{name.strip('/')}/wanted.png", "preview.png", "images/other.png")
    assert ids(tmp_path / "town", image_subdir=name) == ["town/wanted"]
    assert ids(tmp_path / "town") == ["town/preview"]


def test_a_sub_directory_that_no_scene_has_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path / "town", "images/a.png")
    assert ids(tmp_path / "town", image_subdir="rgbb") == ["town/a"]
    assert "image_subdir=rgbb: no scene has images there" in caplog.text


def test_a_root(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(
        tmp_path,
        "town10/a.png",
        "town2/images/a.png",
        "town2/frames/x.png",
        ".cache/a.png",
        "notes/readme.txt",
        "x.txt",
    )
    with caplog.at_level(logging.DEBUG):
        assert ids(tmp_path) == ["town2/a", "town10/a"]
    assert f"{tmp_path}/notes holds no images" in caplog.text
    assert ".cache" not in caplog.text


def test_roots_are_one_level_deep(tmp_path: Path) -> None:
    touch(tmp_path, "drives/town/a.png")
    refused("no frames found", str(tmp_path))


def test_a_list_in_any_order_and_with_repeats(tmp_path: Path) -> None:
    touch(tmp_path, "roots/b/1.png", "roots/c/1.png", "single/a/1.png")
    expected = ["a/1", "b/1", "c/1"]
    assert ids([str(tmp_path / "roots"), str(tmp_path / "single/a")]) == expected
    assert ids([str(tmp_path / "single/a"), str(tmp_path / "roots/b"), str(tmp_path / "roots")]) == expected
    assert [f.frame_id for f in discover(tmp_path / "roots/b")] == ["b/1"]  # type: ignore[arg-type]


def test_natural_order(tmp_path: Path) -> None:
    touch(tmp_path, "s10/f.png", "s9/frame_10.png", "s9/frame_2.png", "s9/frame_02.png", "s9/a.png", "s9/1x2.png")
    assert ids(tmp_path) == ["s9/1x2", "s9/a", "s9/frame_02", "s9/frame_2", "s9/frame_10", "s10/f"]


def test_natural_key_of_odd_digits() -> None:
    names = ["x\u00b2", "x1", "", "7", "\u0663", "x01"]
    assert sorted(names, key=natural_key) == ["", "7", "x01", "x1", "x\u00b2", "\u0663"]


def test_stems_keep_their_dots(tmp_path: Path) -> None:
    touch(tmp_path / "s", "1700.25.png", "1700.5.png")
    assert ids(tmp_path / "s") == ["s/1700.5", "s/1700.25"]


# Globs


def test_glob(tmp_path: Path) -> None:
    touch(tmp_path, "run_1/town1/a.png", "run_2/town2/a.png", "run_3/other/a.png", "town.png", ".run_4/town4/a.png")
    assert ids(f"{tmp_path}/run_*/town?") == ["town1/a", "town2/a"]
    assert ids(f"{tmp_path}/run_[13]") == ["other/a", "town1/a"]
    assert ids(f"{tmp_path}/*/town[12]/") == ["town1/a", "town2/a"]
    assert ids(f"{tmp_path}/.run*") == ["town4/a"]


def test_glob_with_a_plain_segment_behind(tmp_path: Path) -> None:
    touch(tmp_path, "a/front/town1/x.png", "b/front/town2/x.png", "c/rear/town3/x.png")
    assert ids(f"{tmp_path}/*/front") == ["town1/x", "town2/x"]


def test_relative_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "town1/a.png", "town2/a.png")
    monkeypatch.chdir(tmp_path)
    assert ids("town*") == ["town1/a", "town2/a"]
    assert discover("town1")[0].image == f"{tmp_path}/town1/a.png"


def test_glob_without_a_match(tmp_path: Path) -> None:
    touch(tmp_path, "town1/a.png", "town2.png")
    refused("matches no directory", f"{tmp_path}/city*")
    refused("matches no directory", f"{tmp_path}/town2*")


@pytest.mark.parametrize("name", ["drive [1]", "what?", "a*b", "epoch=3 (copy), final", "\u00fcn\u00efcode"])
def test_a_name_with_special_characters_is_taken_as_typed(tmp_path: Path, name: str) -> None:
    touch(tmp_path / name, "a.png")
    assert ids(tmp_path / name) == [f"{name}/a"]


# Nothing there, or ambiguous


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    message = refused("does not exist", str(tmp_path / "nowhere"))
    assert f"{tmp_path}/nowhere" in message


def test_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    refused("a.png is a file; give its directory", str(tmp_path / "a.png"))


def test_no_paths_at_all() -> None:
    refused("scene_dir is empty", [])


def test_an_empty_scene(tmp_path: Path) -> None:
    touch(tmp_path, "good/a.png", "bad/readme.txt", "bad/sub/notes.txt")
    message = refused("no frames found in", [str(tmp_path / "good"), str(tmp_path / "bad")], image_subdir="rgb")
    for part in ("bad", ".png, .jpg, .jpeg", "rgb/, images/, frames/", "1 sub-directories"):
        assert part in message


def test_equal_scene_names_from_different_roots(tmp_path: Path) -> None:
    touch(tmp_path, "one/town/a.png", "two/town/b.png")
    message = refused("two scenes are named 'town'", [str(tmp_path / "one"), str(tmp_path / "two")])
    assert f"{tmp_path}/one/town" in message
    assert f"{tmp_path}/two/town" in message
    refused("two scenes are named 'town'", f"{tmp_path}/*/town")


def test_equal_stems(tmp_path: Path) -> None:
    touch(tmp_path / "town", "images/a.png", "images/a.jpg")
    message = refused("stem 'a'", str(tmp_path / "town"))
    assert "images/a.png" in message
    assert "images/a.jpg" in message


@pytest.mark.parametrize("path", ["to\\wn/a.png", "town/a\\b.png"])
def test_names_that_are_no_path_segments(tmp_path: Path, path: str) -> None:
    touch(tmp_path, path)
    refused("cannot be part of a frame id", str(tmp_path))


def test_parent_directory_is_resolved(tmp_path: Path) -> None:
    touch(tmp_path, "town/images/a.png")
    assert ids(f"{tmp_path}/town/images/..") == ["town/a"]


# Speeds


def speed_files(scene: Path, **speeds: str) -> None:
    (scene / "speed").mkdir(parents=True, exist_ok=True)
    for stem, text in speeds.items():
        (scene / "speed" / f"{stem}.txt").write_text(text)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_speed_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "s1/a.png", "s1/b.png", "s2/a.png")
    speed_files(tmp_path / "s1", a="5.25\n", b=" \ufeff0 ".strip(), c="no frame has this stem")
    frames = discover(str(tmp_path), speed_subdir="speed", default_speed_mps=2.0)
    assert [f.speed_mps for f in frames] == [5.25, 0.0, 2.0]
    (warning,) = warnings(caplog)
    assert "1 of 3 frames have no speed" in warning
    assert "default_speed_mps=2 m/s" in warning


def test_without_any_speed_there_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, *(f"s{i}/{j}.png" for i in range(3) for j in range(4)))
    assert {f.speed_mps for f in discover(str(tmp_path))} == {0.0}
    (warning,) = warnings(caplog)
    assert "12 of 12 frames have no speed" in warning


@pytest.mark.parametrize("text", ["", "fast", "5,3", "-1", "nan", "inf", "1 2", "5 m/s"])
def test_a_speed_file_that_is_no_speed(tmp_path: Path, text: str) -> None:
    touch(tmp_path / "s", "a.png")
    speed_files(tmp_path / "s", a=text)
    message = refused("expected one finite number >= 0", str(tmp_path / "s"), speed_subdir="speed")
    assert f"{tmp_path}/s/speed/a.txt" in message
    assert repr(text) in message


def test_binary_speed_file(tmp_path: Path) -> None:
    touch(tmp_path / "s", "a.png")
    speed_files(tmp_path / "s", a="")
    (tmp_path / "s/speed/a.txt").write_bytes(b"\xff\xfe\x00")
    refused(r"a\.txt", str(tmp_path / "s"), speed_subdir="speed")


@pytest.mark.parametrize("speed", [-1.0, float("nan"), float("inf")])
def test_default_speed_is_checked(speed: float) -> None:
    with pytest.raises(ConfigError, match="default_speed_mps"):
        discover("x", default_speed_mps=speed)


# frames.jsonl


def test_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene = touch(tmp_path / "s", "images/a.png", "images/b.png", "images/c.png")
    points = [[7.5, 0.4], [21, -2.75]]
    table(
        scene,
        {"image": "images/b.png", "speed_mps": 3, "target_points": points, "question": "Stop?\u2028Now."},
        "",
        {"image": "./images/a.png"},
    )
    frames = discover(str(scene), default_speed_mps=1.5)
    assert [(f.stem, f.speed_mps, f.target_points, f.question) for f in frames] == [
        ("a", 1.5, None, None),
        ("b", 3.0, ((7.5, 0.4), (21.0, -2.75)), "Stop?\u2028Now."),
        ("c", 1.5, None, None),
    ]
    assert "2 of 3 frames have no speed" in warnings(caplog)[0]


def test_a_camera_per_frame(tmp_path: Path) -> None:
    scene = touch(tmp_path / "s", *(f"{name}.png" for name in "abcd"))
    given = {"fov_deg": 85, "height_m": 1.5, "behind_m": -0.25, "pitch_rad": -0.01}
    table(
        scene,
        {"image": "a.png", "camera": given},
        {"image": "b.png", "camera": {"height_m": 3}},
        {"image": "c.png", "camera": None},
    )
    cameras = [frame.camera for frame in discover(str(scene), default_speed_mps=1)]
    assert cameras == [Camera(85.0, 1.5, -0.25, -0.01), Camera(height_m=3.0), None, None]
    assert (SIMLINGO_CAMERA.fov_deg, SIMLINGO_CAMERA.behind_m) == (110.0, 1.5)


def test_the_tables_speed_beats_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene = table(touch(tmp_path / "s", "a.png", "b.png"), {"image": "a.png", "speed_mps": 7}, {"image": "b.png"})
    speed_files(scene, a="not read, so it cannot fail", b="2")
    assert [f.speed_mps for f in discover(str(scene), speed_subdir="speed")] == [7.0, 2.0]
    assert not warnings(caplog)


def test_table_names_images_elsewhere(tmp_path: Path) -> None:
    scene = touch(tmp_path / "root/s", "cam/left/1.png", "cam/left/2.png", "cam/right/3.png", "frames/4.png")
    table(scene, {"image": "cam/right/3.png"}, {"image": "cam/left/1.png"})
    frames = discover(str(tmp_path / "root"))
    assert [f.stem for f in frames] == ["1", "3", "4"]
    assert frames[0].image == f"{scene}/cam/left/1.png"
    table(scene, {"image": "cam/right/3.png"}, {"image": "cam/left/1.png"}, {"image": "cam/left/4.png"})
    touch(scene, "cam/left/4.png")
    refused("stem '4'.*frames/4.png and cam/left/4.png", str(scene))


def test_a_scene_may_consist_of_its_table(tmp_path: Path) -> None:
    table(touch(tmp_path / "s", "cam/1.png"), {"image": "cam/1.png"})
    assert ids(tmp_path / "s") == ["s/1"]
    table(touch(tmp_path / "empty", "cam/left/1.png"))
    refused("no frames found", str(tmp_path / "empty"))


GOOD = {"image": "a.png", "speed_mps": 1.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "found \\[1, 2\\]; expected an object"),
        ({"imagee": "b.png"}, "the key 'image' is missing \\(found: 'imagee'\\)"),
        ({"image": 5}, "image is 5; expected a path relative to the scene"),
        ({"image": "../other/b.png"}, "expected a path relative to the scene"),
        ({"image": "/etc/b.png"}, "expected a path relative to the scene"),
        ({"image": ""}, "expected a path relative to the scene"),
        ({"image": "nowhere.png"}, "image 'nowhere.png' does not exist"),
        ({"image": "nowhere/b.png"}, "image 'nowhere/b.png' does not exist"),
        ({"image": "notes.txt"}, "image 'notes.txt' is no visible .png"),
        ({"image": "a.png"}, "'a.png' is listed already in line 1"),
        ({"image": "./a.png"}, "'a.png' is listed already in line 1"),
        ({"image": "b.png", "speed_mps": -0.1}, "speed_mps is -0.1; expected a finite number >= 0"),
        ({"image": "b.png", "speed_mps": "5"}, 'speed_mps is "5"'),
        ({"image": "b.png", "speed_mps": True}, "speed_mps is true"),
        ('{"image": "b.png", "speed_mps": NaN}', "speed_mps is NaN"),
        ('{"image": "b.png", "speed_mps": Infinity}', "speed_mps is Infinity"),
        ('{"image": "b.png", "speed_mps": 1' + "0" * 400 + "}", "speed_mps is 1000.*\\.\\.\\.;"),
        ({"image": "b.png", "target_points": [1, 2]}, "target_points is \\[1, 2\\]; expected two points"),
        ({"image": "b.png", "target_points": [[1, 2]]}, "expected two points"),
        ({"image": "b.png", "target_points": [[1, 2, 3], [4, 5, 6]]}, "expected two points"),
        ({"image": "b.png", "target_points": [[1, 2], [3, None]]}, "expected two points"),
        ({"image": "b.png", "target_points": [[1, 2], [3, float("inf")]]}, "expected two points"),
        ({"image": "b.png", "question": 3}, "question is 3; expected a text"),
        ({"image": "b.png", "question": " "}, "question is"),
        ({"image": "b.png", "camera": 110}, "camera is 110; expected an object"),
        ({"image": "b.png", "camera": {"fov": 90}}, "unknown key 'fov'; expected fov_deg, .* Did you mean 'fov_deg'"),
        ({"image": "b.png", "camera": {"fov_deg": 180}}, "camera.fov_deg is 180; expected .* between 0 and 180"),
        ({"image": "b.png", "camera": {"fov_deg": 0}}, "camera.fov_deg is 0"),
        ({"image": "b.png", "camera": {"fov_deg": "90"}}, 'camera.fov_deg is "90"'),
        ({"image": "b.png", "camera": {"height_m": 0}}, "camera.height_m is 0; expected a finite number of metres > 0"),
        ({"image": "b.png", "camera": {"behind_m": True}}, "camera.behind_m is true"),
        ('{"image": "b.png", "camera": {"pitch_rad": NaN}}', "camera.pitch_rad is NaN; expected a finite number"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    scene = table(touch(tmp_path / "s", "a.png", "b.png", "notes.txt"), GOOD, "", line)
    assert f"{scene}/frames.jsonl, line 3: " in refused(message, str(scene))


def test_a_table_that_is_not_text(tmp_path: Path) -> None:
    scene = touch(tmp_path / "s", "a.png")
    (scene / "frames.jsonl").write_bytes(b'{"image": "\xff.png"}')
    assert f"{scene}/frames.jsonl: not UTF-8" in refused("byte 11", str(scene))


def test_a_table_with_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    scene = touch(tmp_path / "s", "a.png")
    (scene / "frames.jsonl").write_bytes(b'\xef\xbb\xbf{"image": "a.png", "speed_mps": 4}\r\n\r\n')
    assert discover(str(scene))[0].speed_mps == 4


def test_unknown_keys_are_ignored_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene = touch(tmp_path / "s", "a.png", "b.png")
    table(scene, GOOD | {"speed": 4}, {"image": "b.png", "speed_mps": 2, "weather": "rain"})
    discover(str(scene))
    (warning,) = warnings(caplog)
    assert "['speed', 'weather']" in warning
    assert "Did you mean 'speed_mps'" in warning


def test_golden_scene(golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene = golden / "simlingo_a" / "scene"
    frames = discover(str(scene))
    expected = json.loads((scene / "inputs.json").read_text())["scene"]
    assert len(frames) == len(expected) == 3
    for frame, entry in zip(frames, expected, strict=True):
        assert frame.frame_id == f"scene/{Path(entry['frame']).stem}"
        assert Path(frame.image) == scene / "frames" / entry["frame"]
        assert frame.speed_mps == entry["speed_mps"]
        assert frame.to_dict()["target_points"] == entry["target_points_m"]
        assert frame.question == entry["question"]
    assert not warnings(caplog)


# Frames


@pytest.mark.parametrize("camera", [None, Camera(85.0, 1.5, 0.0, 0.0125)])
@pytest.mark.parametrize("points", [None, ((1.0, 2.0), (3.0, 4.0))])
def test_a_frame_travels_as_plain_values(points: Any, camera: Camera | None) -> None:
    frame = FrameRef("s/a", "s", "a", "/data/s/a.png", 1.5, points, None, camera)
    plain = json.loads(json.dumps(frame.to_dict()))
    assert plain == frame.to_dict()
    assert FrameRef.from_dict(plain) == frame
    assert pickle.loads(pickle.dumps(frame)) == frame


def test_errors_are_expected_errors() -> None:
    assert issubclass(SceneError, VlaRayError)


def test_one_listing_per_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many frames cost no calls per frame: neither listings nor stats."""
    from vla_ray.storage.files import Location

    scene = touch(tmp_path / "s", *(f"images/{i}.png" for i in range(50)))
    table(scene, *({"image": f"images/{i}.png", "speed_mps": 1} for i in range(50)))
    calls: list[str] = []
    for name in ("list", "exists", "is_dir", "read_bytes"):
        original = getattr(Location, name)
        monkeypatch.setattr(Location, name, lambda self, o=original: calls.append(o.__name__) or o(self))
    assert len(discover(str(scene))) == 50
    assert sorted(calls) == ["is_dir", "list", "list", "read_bytes"]


@pytest.mark.slow
def test_a_hundred_thousand_frames(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for i in range(100_000):
        (tmp_path / "s" / f"frame_{i}.png").touch()
    start = time.perf_counter()
    assert len(discover(str(tmp_path / "s"))) == 100_000
    assert time.perf_counter() - start < 10  # 1.5 s here; a call per frame would take far longer on a slow disk
