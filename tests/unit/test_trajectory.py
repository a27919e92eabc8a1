"""The plan from above: metres are metres in both directions, forward is up and right is right."""

from __future__ import annotations

import numpy as np
import pytest

from vla_ray.report.trajectory import birds_eye

SIZE = (360, 420)


def spot(point: tuple[float, float], reach_m: float | None = 20.0) -> np.ndarray:
    """The pixel (u, v) of a single speed waypoint: the middle of what it adds to the empty plot."""
    empty = birds_eye(None, [[np.nan, np.nan]], SIZE, reach_m)
    v, u = np.nonzero((birds_eye(None, [point], SIZE, reach_m) != empty).any(-1))
    return np.array([u.mean(), v.mean()])


def test_the_picture_has_the_size_asked_for() -> None:
    assert birds_eye([[0, 0], [5, 1]], None, SIZE).shape == (420, 360, 3)
    assert birds_eye(None, None, (200, 300)).dtype == np.uint8


def test_both_axes_have_one_scale() -> None:
    here, ahead, right = spot((5.0, 0.0)), spot((15.0, 0.0)), spot((5.0, 5.0))
    assert ahead[0] == pytest.approx(here[0], abs=0.6)
    assert right[1] == pytest.approx(here[1], abs=0.6)
    assert right[0] > here[0]
    assert ahead[1] < here[1]
    assert (here[1] - ahead[1]) / 10 == pytest.approx((right[0] - here[0]) / 5, rel=0.02)


def test_the_axes_reach_as_far_as_the_plan() -> None:
    near, far = spot((10.0, 0.0)), spot((10.0, 0.0), reach_m=40.0)
    assert far[1] > near[1]
    for point in ((33.0, 0.0), (5.0, 21.0), (5.0, -21.0)):
        u, v = spot(point, reach_m=None)
        assert 58 <= u <= SIZE[0] - 12
        assert 28 <= v <= SIZE[1] - 48


def test_frames_with_equal_reach_have_equal_axes() -> None:
    a, b = (birds_eye([[0, 0], [x, 0]], None, SIZE, 25.0) for x in (10, 20))
    np.testing.assert_array_equal(a[:, :50], b[:, :50])
    assert (a != b).any()


def test_points_that_are_not_finite_are_left_out() -> None:
    assert (birds_eye([[0, 0], [np.nan, 1], [np.inf, 2]], [[1, 0]], SIZE) != birds_eye(None, None, SIZE)).any()
