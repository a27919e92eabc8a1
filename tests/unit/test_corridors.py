"""The bundled CAST-like set: deterministic, true to its geometry, and unsolvable without both picture and words."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest

from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.shards import ReadOptions, Shard, Tally
from vla_ray.data.cast.trajectory import ade, positions, still, straight
from vla_ray.data.corridors import COUNTERFACTUAL, NATURAL, CorridorScene, Task, read, scene, shards
from vla_ray.data.corridors.expert import MAX_CURVATURE, SCALE_M
from vla_ray.data.corridors.render import Camera
from vla_ray.data.corridors.world import DOOR_COLORS, SIDES
from vla_ray.data.images import decode_rgb
from vla_ray.errors import ConfigError, DataError

SCENES = [scene(seed) for seed in range(200)]
TASKS = [(s, task) for s in SCENES for task in s.tasks]


def end(task: Task) -> np.ndarray:
    return positions(task.actions)[-1]


def in_corridor(s: CorridorScene, task: Task) -> np.ndarray:
    """Positions [8, 2] in the corridor frame, m, by a rotation written out again."""
    c, at = s.corridor, positions(task.actions).astype(float) * SCALE_M
    turn = complex(math.cos(c.robot_yaw), math.sin(c.robot_yaw))
    z = (at[:, 0] + 1j * at[:, 1]) * turn
    return np.stack([z.real, z.imag + c.robot_y], -1)


def samples(shard: Shard, **options: object) -> list[Sample]:
    return list(read(shard, ReadOptions(**options), Tally()))  # type: ignore[arg-type]


def test_a_seed_gives_the_same_scene() -> None:
    for seed in (0, 7, 1_000_003):
        a, b = scene(seed), scene(seed)
        assert a.corridor == b.corridor
        assert a.png() == b.png()
        assert [t.instructions for t in a.tasks] == [t.instructions for t in b.tasks]
        assert all((x.actions == y.actions).all() for x, y in zip(a.tasks, b.tasks, strict=True))
    assert len({s.png() for s in SCENES}) == len(SCENES)


def test_the_png_is_the_picture() -> None:
    for s in SCENES[:5]:
        assert (decode_rgb(s.png(), s.name) == s.picture()).all()
        assert s.picture().shape == (128, 128, 3)
        assert s.picture(56).shape == (56, 56, 3)


def test_order_of_sides_and_stop() -> None:
    compared = 0
    for s in SCENES:
        by_name = {task.name: task for task in s.tasks}
        forward = by_name.get("forward")
        assert not end(by_name["stop"]).any()
        for kind in ("turn", "adjust", "door", "pass"):
            left, right = by_name.get(f"{kind}_left"), by_name.get(f"{kind}_right")
            for task, sign in ((left, 1), (right, -1)):
                if task and forward and kind != "pass":  # where straight ahead is free, it may be the way past
                    assert sign * (end(task)[1] - end(forward)[1]) > 1.0, (s.name, task.name)
                    compared += 1
            if left and right:
                assert end(left)[1] > end(right)[1] + 2.0, (s.name, kind)
    assert compared > 200


def test_stop_is_zeros_and_everything_else_moves_about_one_unit_a_step() -> None:
    for s, task in TASKS:
        steps = np.linalg.norm(task.actions, axis=-1)
        if task.name == "stop":
            assert not task.actions.any()
        else:
            assert steps.max() <= 1.0 + 1e-5
            assert steps[0] > 0.75, (s.name, task.name)
    moving = np.concatenate([np.linalg.norm(t.actions, axis=-1) for _, t in TASKS if t.name != "stop"])
    assert np.median(moving) == pytest.approx(1.0, abs=0.02)


def test_paths_are_smooth() -> None:
    for _, task in TASKS:
        moving = task.actions[np.linalg.norm(task.actions, axis=-1) > 0.05]
        heading = np.unwrap(np.arctan2(moving[:, 1], moving[:, 0]))
        assert (np.abs(np.diff(heading)) <= MAX_CURVATURE * SCALE_M + 1e-3).all()
        if len(heading):
            assert abs(heading[0]) <= MAX_CURVATURE * SCALE_M, "it starts in the direction it looks"


def test_paths_keep_clear() -> None:
    for s, task in TASKS:
        c, path = s.corridor, in_corridor(s, task)
        for x, y in path:
            wall = c.left if y > 0 else c.right
            if abs(y) > c.half_width - 0.15:
                assert wall.kind == "opening"
                assert wall.start < x < wall.end
            if c.person is not None:
                assert math.hypot(x - c.person.x, y - c.person.y) > 0.35


def test_a_door_is_approached_where_it_is() -> None:
    count, gains = 0, []
    for s, task in TASKS:
        if not task.name.startswith("door"):
            continue
        c = s.corridor
        wall, side = (c.left, 1) if task.object == "left door" else (c.right, -1)
        foot = np.array([wall.middle, side * c.half_width])
        last = in_corridor(s, task)[-1]
        assert np.linalg.norm(last - foot) < 1.05
        others = [t for t in s.tasks if t.object not in (task.object, "person")]  # who may stand beside the door
        gains += [np.linalg.norm(end(t) - task.goal) - np.linalg.norm(end(task) - task.goal) for t in others]
        if task.name.removeprefix("door_") in DOOR_COLORS:
            assert wall.color == task.name.removeprefix("door_")
        count += 1
    assert count > 200
    assert np.min(gains) > -0.5  # another way may graze the place
    assert np.median(gains) > 4.0


def test_a_goal_is_where_the_robot_ends() -> None:
    goals = [(s, task) for s, task in TASKS if task.goal is not None]
    for s, task in goals:
        assert np.linalg.norm(end(task) - task.goal) < (4.0 if task.name == "person" else 2.6), (
            "maybe too far for 8 steps"
        )
        longer = scene(s.corridor.seed, steps=24).task(task.name)
        assert longer is not None
        assert np.linalg.norm(end(longer) - task.goal) < 0.2
    assert {task.name.split("_")[0] for _, task in goals} == {"stop", "door", "person"}


def test_turns_end_up_in_the_opening_when_there_is_time() -> None:
    turned = 0
    for s in SCENES[:80]:
        for name, side in SIDES.items():
            task = scene(s.corridor.seed, steps=12).task(f"turn_{name}")
            if task is not None:
                x, y = in_corridor(s, task)[-1]
                wall = s.corridor.wall(side)
                assert y * side > s.corridor.half_width - 0.1
                assert wall.start < x < wall.end
                turned += 1
    assert turned > 20


def test_one_picture_demands_different_actions() -> None:
    for s in SCENES:
        assert len(s.tasks) >= 4
        distinct = {tuple(np.round(task.actions.ravel(), 2)) for task in s.tasks}
        assert len(distinct) >= 4


def test_instructions() -> None:
    meanings = defaultdict(set)
    for _, task in TASKS:
        assert 2 <= len(task.instructions) <= 4
        assert len(set(task.instructions)) == len(task.instructions)
        for text in task.instructions:
            assert len(text.split()) <= 10
            meanings[text].add(task.name)
    assert all(len(names) == 1 for names in meanings.values()), "an instruction means one task"
    assert len({task.instructions[0] for _, task in TASKS if task.name == "forward"}) == 3, "the first one varies"
    for s, task in TASKS:
        if task.name == "door":
            assert [s.corridor.left.kind, s.corridor.right.kind].count("door") == 1
        if task.name == "turn":
            assert [s.corridor.left.kind, s.corridor.right.kind].count("opening") == 1


def test_masks_are_where_things_project() -> None:
    columns, rows = np.meshgrid(np.arange(128) + 0.5, np.arange(128) + 0.5)
    for s in SCENES:
        for name in {task.object for task in s.tasks} - {None}:
            mask = s.mask(str(name))
            assert mask.sum() > 150, (s.name, name)
            assert s.mask(str(name), 56).sum() > 25
            c, camera = s.corridor, Camera(s.corridor)
            if name == "person":
                assert c.person is not None
                top = camera.project((c.person.x, c.person.y, c.person.height))
                foot = camera.project((c.person.x, c.person.y, 0.0))
                assert rows[mask].min() == pytest.approx(max(0.0, top[1]), abs=3)
                assert rows[mask].max() == pytest.approx(foot[1], abs=3)
                assert columns[mask].mean() == pytest.approx(foot[0], abs=2)
            else:
                wall, side = (c.left, 1) if str(name).startswith("left") else (c.right, -1)
                corners = [camera.project((x, side * c.half_width, z)) for x in (wall.start, wall.end) for z in (0, 2)]
                low, high = min(u for u, _ in corners), max(u for u, _ in corners)
                assert columns[mask].min() >= max(0.0, low) - 2
                assert columns[mask].max() <= min(128.0, high) + 2


def test_a_door_shows_its_colour() -> None:
    for s in SCENES:
        for name, side in SIDES.items():
            wall = s.corridor.wall(side)
            if wall.kind == "door":
                r, g, b = np.median(s.picture()[s.mask(f"{name} door")], axis=0).astype(int)
                seen = {
                    "red": r > 1.8 * max(g, b),
                    "green": g > 1.8 * max(r, b),
                    "blue": b > 1.8 * max(r, g),
                    "yellow": min(r, g) > 1.8 * b,
                }
                assert [color for color, is_it in seen.items() if is_it] == [wall.color], s.name


def test_doors_are_wide_enough_for_56_pixels() -> None:
    widths = []
    for s in SCENES:
        for name, side in SIDES.items():
            if s.corridor.wall(side).kind == "door":
                widths.append(np.flatnonzero(s.mask(f"{name} door", 56).any(0)).size)
    assert np.mean(np.array(widths) >= 9) > 0.9


def test_masks_do_not_overlap_and_know_their_names() -> None:
    for s in SCENES[:20]:
        assert s.parts[:5] == ("floor", "ceiling", "end wall", "left wall", "right wall")
        total = sum(s.mask(name).astype(int) for name in s.parts)
        assert np.max(total) == 1
        assert np.mean(total) > 0.999
    with pytest.raises(DataError, match=r"scene_000000 has no 'window'; it has: floor, ceiling"):
        SCENES[0].mask("window")


def test_baselines_are_bad() -> None:
    """Without the words, without the picture, and without either: what a model has to beat. Units."""
    actions = np.stack([task.actions for _, task in TASKS])
    step = float(np.median(np.linalg.norm(actions, axis=-1)))
    assert ade(still(actions), actions).mean() > 3.5
    assert ade(straight(actions, step), actions).mean() > 1.2
    by_scene, by_name = defaultdict(list), defaultdict(list)
    for s, task in TASKS:
        by_scene[s.name].append(task.actions)
        by_name[task.name].append(task.actions)

    def of_means(groups: dict[str, list[np.ndarray]]) -> float:
        return float(np.mean(np.concatenate([ade(np.mean(g, 0), np.stack(g)) for g in groups.values()])))

    assert of_means(by_scene) > 1.2, "the best that can be said without the instruction"
    assert of_means(by_name) > 0.35, "the best that can be said without the picture"
    colors = {name: g for name, g in by_name.items() if name.removeprefix("door_") in DOOR_COLORS}
    assert of_means(colors) > 1.0


def test_shards() -> None:
    found = shards(train=600, val=40)
    assert [(s.dataset, s.split, s.path) for s in found] == [
        (dataset, split, f"seeds:{span}")
        for dataset in (NATURAL, COUNTERFACTUAL)
        for split, span in (
            ("train", "0-250"),
            ("train", "250-500"),
            ("train", "500-600"),
            ("val", "1000000-1000040"),
        )
    ]
    assert len({s.name for s in found}) == len(found)
    assert {s.layout for s in found} == {"synthetic"}
    assert found[0] == shards(train=3000)[0], "more pictures leave full shards as they are"
    assert len(shards()) == 2 * (12 + 1)
    with pytest.raises(ConfigError, match="train pictures=0 is too small"):
        shards(train=0)
    with pytest.raises(DataError, match="at most 1,000,000"):
        shards(train=1_000_001)


def test_reading_gives_every_instruction_once() -> None:
    train, val, other, other_val = shards(train=12, val=5)
    tally = Tally()
    natural = list(read(train, ReadOptions(), tally))
    assert (tally.episodes, tally.steps, tally.samples, tally.problems) == (12, 12, 12, [])
    rest = samples(other)
    assert len(natural) + len(rest) == sum(len(scene(k).tasks) for k in range(12))
    assert len({s.sample_id for s in natural + rest}) == len(natural + rest)
    assert {s.recording for s in natural} == {s.recording for s in rest} == {f"scene_{k:06d}" for k in range(12)}
    assert not {s.recording for s in samples(val) + samples(other_val)} & {s.recording for s in natural}
    by_recording = {s.recording: s for s in natural}
    for s in rest:
        assert s.image == by_recording[s.recording].image
        assert s.instruction not in by_recording[s.recording].instructions
    assert [s.sample_id for s in samples(other)] == [s.sample_id for s in rest]


def test_samples_fit_the_contract() -> None:
    for shard in shards(train=3, val=2):
        for s in samples(shard, horizon=5):
            assert s.sample_id.startswith(f"{shard.dataset}/{shard.split}/")
            assert s.sample_id.split("/")[2].endswith(f":{s.recording}")
            assert (s.dataset, s.split, s.t, s.scale_m) == (shard.dataset, shard.split, 0, 0.25)
            assert s.actions.shape == (5, 2)
            assert s.actions.dtype == np.float32
            assert s.valid.dtype == bool
            assert s.valid.all()
            assert s.instruction == s.instructions[0]
            assert decode_rgb(s.image, s.sample_id).shape == (128, 128, 3)


def test_regrouping_by_recording_splits_both_sub_datasets_alike() -> None:
    train, _, other, _ = shards(train=60, val=1)
    kinds = {s.recording: s.split for s in samples(train, split_by="recording", val_share=0.3)}
    assert set(kinds.values()) == {"train", "val"}
    assert all(kinds[s.recording] == s.split for s in samples(other, split_by="recording", val_share=0.3))


def test_a_shard_of_another_source() -> None:
    with pytest.raises(DataError, match="corridors need seeds:<first>-<end>"):
        samples(Shard("corridors", "train", "x", "synthetic", "/data/x", "1"))
