"""Masks beside scenes, and the held-out frames they judge maps on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_ray.data.masks import MASKS_SUBDIR, find_masks, read_labels
from vla_ray.data.scenes import discover
from vla_ray.data.synthetic import causal_mask, decisive_scenes, effect, is_decisive, render, sample_scene, write_scene
from vla_ray.data.synthetic.held_out import MIN_EFFECT_M, MIN_PIXELS, MIN_SPEED_MPS
from vla_ray.errors import SceneError


def test_masks_are_found_where_scenes_keep_them(tmp_path: Path) -> None:
    scenes = list(decisive_scenes(5000, 3))
    for i, scene in enumerate(scenes):
        write_scene(tmp_path / f"s{i}", [scene])
    plain = tmp_path / "plain"
    plain.mkdir()
    Image.new("RGB", (32, 16)).save(plain / "a.png")
    frames = discover(str(tmp_path))
    found = find_masks(frames, MASKS_SUBDIR)
    assert {f.frame_id for f in frames} - set(found) == {"plain/a"}
    assert [found[f"s{i}/frame_0000"].cause for i in range(3)] == [s.cause for s in scenes]
    labels = read_labels(found["s0/frame_0000"].path)
    _, ids = render(scenes[0])
    assert np.array_equal(labels == 1, causal_mask(scenes[0], ids))
    assert find_masks(frames, "nowhere") == {}


def test_masks_that_cannot_be_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    with pytest.raises(
        SceneError, match=r"has 3 channels; a mask is a palette or grey image of labels: 0 neither, 1 cause"
    ):
        read_labels(str(tmp_path / "colour.png"))
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(SceneError, match="cannot be read"):
        read_labels(str(tmp_path / "broken.png"))
    with pytest.raises(SceneError, match="cannot be read"):
        read_labels(str(tmp_path / "missing.png"))


def test_a_damaged_truth_table_is_named(tmp_path: Path) -> None:
    write_scene(tmp_path / "s", [next(decisive_scenes(5000, 1))])
    (tmp_path / "s/truth/truth.jsonl").write_text('{"image": "images/frame_0000.png"}\n')
    with pytest.raises(SceneError, match=r"truth.jsonl: 'cause'; expected lines with 'image' and 'cause'"):
        find_masks(discover(str(tmp_path / "s")), MASKS_SUBDIR)


def test_held_out_frames_are_decisive_and_take_turns() -> None:
    scenes = list(decisive_scenes(5000, 6))
    assert [s.cause for s in scenes] == ["red_light", "lead_car", "pedestrian"] * 2
    for scene in scenes:
        _, ids = render(scene)
        assert scene.speed >= MIN_SPEED_MPS
        assert effect(scene) >= MIN_EFFECT_M
        assert causal_mask(scene, ids).sum() >= MIN_PIXELS
    assert len({s.seed for s in scenes}) == 6
    assert not is_decisive(sample_scene(5000, "clear"))


def test_a_question_is_asked_with_the_frame_s_speed(tmp_path: Path) -> None:
    scene = next(decisive_scenes(5000, 1))
    write_scene(tmp_path / "s", [scene], question="Current speed: {speed} m/s. Predict the waypoints.")
    (frame,) = discover(str(tmp_path / "s"))
    assert frame.question == f"Current speed: {scene.speed:.1f} m/s. Predict the waypoints."
