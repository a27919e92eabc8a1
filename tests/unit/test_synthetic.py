"""Synthetic scenes: same seed, same bytes; the masks, the expert and the coordinates are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_ray.data.scenes import discover
from vla_ray.data.synthetic import (
    CAUSES,
    COMMENTARY,
    DEMO_DRIVES,
    MASKS,
    Kind,
    Thing,
    advance,
    causal_mask,
    commentary,
    drive,
    effect,
    expert,
    project,
    read_truth,
    render,
    sample_scene,
    target_points,
    write_demo,
    write_scene,
)
from vla_ray.data.synthetic.world import CAUSE_KIND, along_path, cause_distance, road_to_ego
from vla_ray.errors import ConfigError, SceneError

STOPS = ("red_light", "lead_car", "pedestrian")


def test_same_seed_same_bytes() -> None:
    for seed in range(6):
        first, second = render(sample_scene(seed)), render(sample_scene(seed))
        assert first[0].tobytes() == second[0].tobytes()
        assert first[1].tobytes() == second[1].tobytes()
    assert render(sample_scene(0))[0].tobytes() != render(sample_scene(1))[0].tobytes()


def test_picture_and_ids_have_the_documented_form() -> None:
    rgb, ids = render(sample_scene(3), width=320)
    assert rgb.shape == (160, 320, 3)
    assert rgb.dtype == np.uint8
    assert ids.shape == (160, 320)
    assert ids.dtype == np.uint8
    assert set(np.unique(ids)) <= set(map(int, Kind))


@pytest.mark.parametrize("cause", STOPS)
def test_the_cause_is_always_visible_above_the_crop(cause: str) -> None:
    for seed in range(25):
        for scene in list(drive(seed, 6, cause))[::5]:
            _, ids = render(scene)
            visible = causal_mask(scene, ids)[:157]  # SimLingo drops the bottom 4.8/16
            assert visible.sum() > 100, (seed, scene.ego_s)


@pytest.mark.parametrize("cause", STOPS)
def test_the_cause_mask_is_where_the_picture_changes_without_the_cause(cause: str) -> None:
    scene = sample_scene(4, cause)
    kinds = {CAUSE_KIND[cause]}
    without = replace(scene, things=tuple(t for t in scene.things if t.kind not in kinds))
    (rgb, ids), (bare, _) = render(scene), render(without)
    mask = causal_mask(scene, ids)
    changed = np.abs(rgb.astype(int) - bare.astype(int)).sum(-1) > 30
    assert changed[mask].mean() > 0.9
    # What else changes is the object's rim, its shadow, and a light's stop line.
    rim = np.zeros_like(mask)
    rim[2:-2, 2:-2] = np.any([np.roll(mask, (i, j), (0, 1))[2:-2, 2:-2] for i in (-2, 2) for j in (-2, 2)], 0)
    assert (changed & ~mask & ~rim & (ids != Kind.STOP_LINE)).sum() < 0.3 * mask.sum()


def test_masks_are_disjoint_and_distractors_leave_out_what_is_read() -> None:
    for seed in range(20):
        scene = sample_scene(seed)
        _, ids = render(scene)
        masks = [causal_mask(scene, ids, what) for what in MASKS]
        assert np.sum(masks, 0).max() <= 1
        assert masks[0].any() == (scene.cause != "clear")
        assert masks[1].any()
        assert not np.isin(ids[masks[2]], [Kind.GREEN_LIGHT, Kind.RED_LIGHT, Kind.STOP_LINE, Kind.ROAD]).any()
    with pytest.raises(ConfigError, match="Did you mean 'cause'"):
        causal_mask(scene, ids, "causes")


def test_distractors_do_not_change_the_plan() -> None:
    scene = sample_scene(7, "pedestrian")
    scenery = tuple(t for t in scene.things if t.kind == Kind.PEDESTRIAN)
    more = (*scene.things, Thing(Kind.PARKED_CAR, 12.0, 4.2), Thing(Kind.WALKER, 9.0, 4.0))
    for things in (scenery, more):
        other = expert(replace(scene, things=things))
        np.testing.assert_array_equal(other.speed_waypoints, expert(scene).speed_waypoints)
        np.testing.assert_array_equal(other.route, expert(scene).route)


@pytest.mark.parametrize("cause", ["red_light", "pedestrian"])
def test_the_expert_stops_before_the_cause(cause: str) -> None:
    for seed in range(15):
        scene = sample_scene(seed, cause)
        start = cause_distance(scene)
        for _ in range(60):
            scene = advance(scene)
        left = cause_distance(scene)
        assert start is not None
        assert left is not None
        assert scene.speed < 0.3
        assert 4.0 < left < 9.0, seed


def test_the_expert_follows_the_lead_car_and_cruises_on_a_clear_road() -> None:
    *_, following = drive(2, 60, "lead_car")
    *_, cruising = drive(2, 60, "clear")
    assert following.speed == pytest.approx(3.0, abs=0.3)
    assert cruising.speed == pytest.approx(8.0, abs=0.1)


def test_ignoring_the_cause_changes_the_speed_and_not_the_route() -> None:
    for cause in STOPS:
        scene = sample_scene(5, cause)
        free = expert(scene, ignore_cause=True)
        np.testing.assert_array_equal(free.route, expert(scene).route)
        assert effect(scene) > 0.1
        assert free.speed_waypoints[-1, 0] > expert(scene).speed_waypoints[-1, 0]
    assert effect(sample_scene(5, "clear")) == 0.0


def test_route_spacing_and_straight_road() -> None:
    for seed in range(10):
        route = expert(sample_scene(seed)).route
        assert route.shape == (20, 2)
        np.testing.assert_allclose(route[0], 0.0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(np.diff(route, axis=0), axis=1), 1.0, atol=0.02)
    straight = replace(sample_scene(1, curve=False), ego_e=0.0)
    np.testing.assert_allclose(expert(straight).route[:, 1], 0.0, atol=1e-6)


def test_right_is_positive_in_metres_and_in_pixels() -> None:
    scene = replace(sample_scene(1, "clear"), kappa=0.04, bend_at=2.0, ego_e=0.0)
    assert expert(scene).route[-1, 1] > 3.0
    assert expert(replace(scene, kappa=-0.04)).route[-1, 1] < -3.0
    assert target_points(scene)[1, 1] > 0.0
    (right, near), (left, far) = project(scene, [[10.0, 2.0], [20.0, -2.0]])
    assert right > 224 > left
    assert near > far  # rows grow downwards


def test_an_ego_beside_the_lane_centre_steers_back() -> None:
    scene = replace(sample_scene(1, "clear", curve=False), ego_e=0.5)
    route = expert(scene).route
    assert abs(route[1, 1]) < 0.05
    np.testing.assert_allclose(route[12:, 1], -0.5, atol=1e-3)


def test_lane_geometry_is_continuous_and_keeps_lengths() -> None:
    scene = replace(sample_scene(1), kappa=0.05, bend_at=5.0, ego_e=0.0)
    points = road_to_ego(scene, np.arange(0.0, 60.0, 0.1))
    np.testing.assert_allclose(np.linalg.norm(np.diff(points, axis=0), axis=1), 0.1, rtol=1e-3)


def test_target_points_lie_on_the_expert_path_and_stay_put_in_the_world() -> None:
    for seed in range(20):
        points = target_points(sample_scene(seed))
        path = along_path(sample_scene(seed), np.arange(0.0, 45.0, 0.05))
        gaps = np.linalg.norm(path[None] - points[:, None], axis=-1)
        assert gaps.min(1).max() < 0.05
        first, second = gaps.argmin(1) * 0.05
        assert 6.9 <= first <= 20.1
        assert 14.9 <= second <= 33.1
    scene = replace(sample_scene(3, "clear", curve=False), ego_e=0.0, speed=8.0, node_phase=10.0, node_spacing=12.0)
    later = advance(scene)
    driven = later.ego_s - scene.ego_s
    np.testing.assert_allclose(target_points(scene) - target_points(later), [[driven, 0.0]] * 2, atol=1e-4)


def test_a_drive_is_one_world_seen_later() -> None:
    assert list(drive(11, 2, "lead_car"))[1] == advance(sample_scene(11, "lead_car"))
    frames = [replace(sample_scene(11, "lead_car"), ego_e=0.0)]
    for _ in range(7):
        frames.append(advance(frames[-1]))
    plan = expert(frames[0]).speed_waypoints
    for k, frame in enumerate(frames[1:]):
        here = road_to_ego(frames[0], frame.ego_s, frame.ego_e)
        np.testing.assert_allclose(here, plan[k], atol=0.02)
        assert frame.look == frames[0].look
    distances = [cause_distance(f) for f in frames]
    assert len(set(distances)) == len(distances)


def test_causes_are_all_drawn_and_speed_does_not_tell_them() -> None:
    scenes = [sample_scene(s) for s in range(400)]
    speeds = {c: np.mean([s.speed for s in scenes if s.cause == c]) for c in CAUSES}
    assert max(speeds.values()) - min(speeds.values()) < 1.0
    assert {commentary(s) for s in scenes} == set(COMMENTARY.values())
    with pytest.raises(ConfigError, match="Did you mean 'red_light'"):
        sample_scene(0, "red light")


def test_write_scene_round_trip(tmp_path: Path) -> None:
    scenes = list(drive(3, 3, "red_light"))
    root = write_scene(tmp_path / "a", scenes)
    rows = [json.loads(line) for line in (root / "frames.jsonl").read_text().splitlines()]
    assert [r["image"] for r in rows] == [f"images/frame_{k:04d}.png" for k in range(3)]
    assert set(rows[0]) == {"image", "speed_mps", "target_points", "question", "camera"}
    truth = read_truth(root)
    for scene, row in zip(scenes, rows, strict=True):
        rgb, ids = render(scene)
        np.testing.assert_array_equal(np.asarray(Image.open(root / row["image"])), rgb)
        np.testing.assert_allclose(row["target_points"], target_points(scene), atol=1e-3)
        found = truth[Path(row["image"]).stem]
        for what in MASKS:
            np.testing.assert_array_equal(found.masks[what], causal_mask(scene, ids, what))
        np.testing.assert_allclose(found.route, expert(scene).route, atol=1e-3)
        np.testing.assert_allclose(found.speed_waypoints, expert(scene).speed_waypoints, atol=1e-3)
        assert (found.cause, found.commentary) == ("red_light", COMMENTARY["red_light"])


@pytest.mark.parametrize("width", [448, 960])
def test_the_written_camera_is_the_renderers(tmp_path: Path, width: int) -> None:
    points = np.stack(np.meshgrid(np.linspace(1, 60, 25), np.linspace(-8, 8, 9)), -1)
    scenes = [sample_scene(seed) for seed in range(6)]
    for scene, frame in zip(scenes, discover(str(write_scene(tmp_path / "s", scenes))), strict=True):
        assert frame.camera is not None
        drawn = project(scene, points, width)
        np.testing.assert_allclose(frame.camera.project(points, width, width // 2), drawn, rtol=0, atol=1e-6)
    assert len({scene.look.pitch > 0 for scene in scenes}) == 2  # both signs were among them


def test_write_scene_is_reproducible_and_may_leave_out_target_points(tmp_path: Path) -> None:
    first, second = (write_scene(tmp_path / name, [5, 6], with_target_points=False) for name in "ab")
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert len(files) == 6
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
    rows = (first / "frames.jsonl").read_text().splitlines()
    assert [json.loads(r)["target_points"] for r in rows] == [None, None]
    with pytest.raises(SceneError, match="no truth"):
        read_truth(tmp_path)


def test_the_bundled_demo_is_what_the_code_writes(tmp_path: Path, repo: Path) -> None:
    bundled = repo / "datasets" / "demo_drive"
    assert {p.name for p in bundled.iterdir()} == {d.name for d in DEMO_DRIVES}
    for scene in write_demo(tmp_path, num_frames=2):
        known = bundled / scene.name
        assert len(list((known / "images").iterdir())) == 8
        for stem in ("frame_0000", "frame_0001"):
            for folder in ("images", "truth/masks"):
                new, old = (np.asarray(Image.open(root / folder / f"{stem}.png")) for root in (scene, known))
                np.testing.assert_array_equal(new, old)
        assert (known / "frames.jsonl").read_text().startswith((scene / "frames.jsonl").read_text())
