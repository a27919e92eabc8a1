"""Means with intervals over scenes: exact where it can be, honest where it is random."""

from __future__ import annotations

import numpy as np
import pytest

from vla_ray.evaluation.bootstrap import mean_with_interval, paired_difference


def test_every_frame_counts_alike_and_missing_ones_are_left_out() -> None:
    found = mean_with_interval([1.0, 2.0, 3.0, None, 10.0], ["a", "a", "a", "b", "b"])
    assert found.mean == 4
    assert (found.frames, found.scenes) == (4, 2)
    assert found.reason is None
    # Scenes are drawn whole: both from a gives 2, both from b gives 10; these are a quarter of the draws each.
    assert (found.low, found.high) == (2, 10)


def test_fewer_than_two_scenes_have_no_interval_and_say_why() -> None:
    alone = mean_with_interval([1.0, 3.0], ["a", "a"])
    assert (alone.mean, alone.low, alone.high) == (2, None, None)
    assert alone.reason is not None
    assert "one scene" in alone.reason
    nothing = mean_with_interval([None, None], ["a", "b"])
    assert (nothing.mean, nothing.low, nothing.frames) == (None, None, 0)
    assert nothing.reason
    assert (str(alone), str(nothing)) == ("2.00", "-")


def test_equal_seeds_repeat() -> None:
    values, scenes = list(np.random.default_rng(0).normal(size=40)), [f"s{i // 4}" for i in range(40)]
    assert mean_with_interval(values, scenes) == mean_with_interval(values, scenes)
    assert mean_with_interval(values, scenes) != mean_with_interval(values, scenes, seed=1)


def test_the_interval_covers_the_truth_although_frames_of_a_scene_agree() -> None:
    """Frames are nearly copies of their scene; an interval over frames would cover the truth in half of the cases."""
    rng = np.random.default_rng(0)
    scenes = [f"s{i // 10}" for i in range(400)]
    covered = naive = 0
    for _ in range(200):
        values = rng.normal(size=40).repeat(10) + 0.1 * rng.normal(size=400)
        by_scene = mean_with_interval(list(values), scenes, samples=400)
        by_frame = mean_with_interval(list(values), [str(i) for i in range(400)], samples=400)
        assert by_scene.low is not None
        assert by_scene.high is not None
        assert by_frame.low is not None
        assert by_frame.high is not None
        covered += by_scene.low < 0 < by_scene.high
        naive += by_frame.low < 0 < by_frame.high
    assert 0.88 < covered / 200 < 0.99
    assert naive / 200 < 0.7


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=30)  # how hard a scene is, for both
    scenes = [f"s{i}" for i in range(30)]
    first, second = list(hard + 0.2 + 0.05 * rng.normal(size=30)), list(hard)
    a, b = mean_with_interval(first, scenes), mean_with_interval(second, scenes)
    assert a.low is not None
    assert b.high is not None
    assert a.low < b.high  # the two intervals overlap
    difference = paired_difference(first, second, scenes)
    assert difference.low is not None
    assert difference.low > 0.1
    assert difference.mean == pytest.approx(0.2, abs=0.05)
    assert paired_difference([1.0, None, 3.0], [0.0, 5.0, None], ["a", "b", "c"]).frames == 1


def test_values_that_are_not_finite_are_a_bug_and_raise() -> None:
    with pytest.raises(ValueError, match="1 of 2"):
        mean_with_interval([1.0, float("nan")], ["a", "b"])
    with pytest.raises(ValueError):
        mean_with_interval([1.0], ["a", "b"])
