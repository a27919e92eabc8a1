"""Where ground points land in a picture: worked examples, and the original's projection written out."""

from __future__ import annotations

import numpy as np
import pytest

from vla_ray.data.camera import NEAREST_M, SIMLINGO_CAMERA, Camera


def test_a_worked_example() -> None:
    camera = Camera(fov_deg=90, height_m=2, behind_m=1)  # focal length: half the width
    np.testing.assert_allclose(camera.project([9.0, 0.0], 800, 400), [400, 200 + 400 * 2 / 10])
    np.testing.assert_allclose(camera.project([9.0, 5.0], 800, 400), [400 + 400 * 5 / 10, 280])
    np.testing.assert_allclose(camera.project([9.0, 10.0], 800, 400)[0], 800)  # 45 degrees to the right: the edge


def test_simlingos_projection() -> None:
    """f = W / (2 tan(55 deg)), the principal point in the middle; camera coordinates (y, 0, x) + (0, 2, 1.5)."""
    width, height = 1024, 512
    focal = width / (2 * np.tan(np.radians(55)))
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    points = np.random.default_rng(0).uniform([0, -10], [30, 10], (50, 2))
    seen = np.stack([points[:, 1], np.zeros(50), points[:, 0]], -1) + [0, 2.0, 1.5]
    expected = seen @ K.T
    np.testing.assert_allclose(SIMLINGO_CAMERA.project(points, width, height), expected[:, :2] / expected[:, 2:])


def test_right_is_right_near_is_low_and_the_horizon_is_far() -> None:
    left, right = SIMLINGO_CAMERA.project([[10, -2], [10, 2]], 448, 224)
    assert left[0] < 224 < right[0]
    near, far, horizon = SIMLINGO_CAMERA.project([[5, 0], [50, 0], [1e9, 3]], 448, 224)
    assert near[1] > far[1] > horizon[1]
    np.testing.assert_allclose(horizon, [224, 112], atol=1e-4)


def test_a_positive_pitch_moves_the_horizon_down() -> None:
    level, pitched = (Camera(pitch_rad=p).project([1e9, 0], 448, 224)[1] for p in (0.0, 0.02))
    assert pitched - level == pytest.approx(0.02 * 448 / (2 * np.tan(np.radians(55))))


def test_what_is_not_in_front_of_the_camera_has_no_place() -> None:
    camera = Camera(behind_m=1.5)
    edge = NEAREST_M - 1.5
    found = camera.project([[edge, 0], [edge - 1e-6, 0], [-1.5, 1], [-30, 0]], 448, 224)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1:]).all()
    assert camera.project(np.zeros((2, 3, 2)), 448, 224).shape == (2, 3, 2)


def test_the_field_of_view_scales_with_the_picture() -> None:
    small, large = (SIMLINGO_CAMERA.project([8, 3], w, h) for w, h in ((448, 224), (896, 448)))
    np.testing.assert_allclose(large, 2 * small)


def test_plain_values() -> None:
    camera = Camera(85.0, 1.5, 0.0, 0.01)
    assert Camera(**camera.to_dict()) == camera
