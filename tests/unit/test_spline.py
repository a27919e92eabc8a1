"""The smoothing spline against the original's points, and what it must keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vla_ray.errors import ConfigError
from vla_ray.targets.kinematics import DT, kinematic_scalars
from vla_ray.targets.spline import Spline, hermite, resample_route, resample_speed, smooth


@pytest.mark.parametrize("frame", ["frame_0000", "frame_0001", "frame_0002"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_points_equal_the_original(golden: Path, frame: str, smoothing: float) -> None:
    arrays = np.load(golden / "simlingo_a" / "expected" / f"{frame}.npz")
    spline = Spline(enabled=True, smoothing=smoothing)
    route = resample_route(torch.from_numpy(arrays["pred_route"]), spline)
    speed, dt = resample_speed(torch.from_numpy(arrays["pred_speed_wps"]), DT, spline)
    torch.testing.assert_close(route, torch.from_numpy(arrays[f"spline/route_{smoothing}"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(speed, torch.from_numpy(arrays[f"spline/speed_{smoothing}"]), rtol=0, atol=1e-5)
    assert dt == DT


def wiggly_route(count: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    steps = torch.tensor([1.0, 0.1], dtype=torch.float64) + 0.2 * torch.randn(
        2, count, 2, generator=generator, dtype=torch.float64
    )
    return steps.cumsum(1)


def test_a_route_is_evenly_spaced_and_keeps_its_ends() -> None:
    route = wiggly_route()
    resampled = resample_route(route, Spline(enabled=True, num_samples=40))
    assert resampled.shape == (2, 40, 2)
    lengths = resampled.diff(dim=1).norm(dim=-1)
    assert ((lengths / lengths.mean(1, keepdim=True) - 1).abs() < 0.1).all()
    torch.testing.assert_close(resampled[:, [0, -1]], route[:, [0, -1]])


def test_a_straight_line_stays_as_it_is() -> None:
    line = torch.stack([torch.arange(10.0), 2 * torch.arange(10.0)], dim=-1)[None].double()
    spline = Spline(enabled=True, smoothing=10.0)
    torch.testing.assert_close(smooth(line, 10.0), line)
    torch.testing.assert_close(resample_route(line, spline), line)
    torch.testing.assert_close(resample_speed(line, DT, spline)[0], line)


def test_smoothing_calms_a_route() -> None:
    route = wiggly_route()
    roughness = [smooth(route, s).diff(n=2, dim=1).square().sum().item() for s in (0.0, 0.1, 1.0, 10.0)]
    assert roughness == sorted(roughness, reverse=True)
    assert roughness[-1] < roughness[0] / 10


def test_more_speed_samples_keep_duration_and_physics() -> None:
    times = torch.arange(10, dtype=torch.float64) * DT
    waypoints = torch.stack([6 * times, torch.zeros_like(times)], dim=-1)[None]
    spline = Spline(enabled=True, num_samples=19)
    resampled, dt = resample_speed(waypoints, DT, spline)
    assert resampled.shape == (1, 19, 2)
    assert dt == pytest.approx(DT / 2)
    torch.testing.assert_close(resampled[:, ::2], waypoints)
    scalars = kinematic_scalars(wiggly_route()[:1], waypoints, spline)
    assert scalars["forward_speed"].item() == pytest.approx(6)
    assert scalars["longitudinal_progress"].item() == pytest.approx(6 * times[-1].item())


def test_the_curve_passes_through_its_points() -> None:
    points = wiggly_route(6)
    knots = torch.tensor([[0.0, 0.5, 2.0, 2.5, 4.0, 7.0]] * 2, dtype=torch.float64)
    torch.testing.assert_close(hermite(knots, points, knots), points)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_standing_points_stay_put_with_finite_gradients(smoothing: float) -> None:
    standing = torch.full((1, 20, 2), 3.0)
    half = torch.cat([torch.stack([torch.arange(10.0), torch.zeros(10)], -1), torch.tensor([[9.0, 0.0]] * 10)])[None]
    for num_samples in (0, 33):
        spline = Spline(enabled=True, smoothing=smoothing, num_samples=num_samples)
        torch.testing.assert_close(resample_route(standing, spline)[0, 0], standing[0, 0])
        for inputs in (standing, half):
            inputs = inputs.clone().requires_grad_()
            scalars = kinematic_scalars(inputs, inputs, spline)
            for name, value in scalars.items():
                (gradient,) = torch.autograd.grad(value.sum(), inputs, retain_graph=True)
                assert value.isfinite().all(), name
                assert gradient.isfinite().all(), name


def test_gradcheck() -> None:
    route = wiggly_route(7).requires_grad_()
    for spline in (Spline(enabled=True, smoothing=0.1), Spline(enabled=True, num_samples=11)):
        assert torch.autograd.gradcheck(lambda points, s=spline: resample_route(points, s), (route,))
        assert torch.autograd.gradcheck(lambda points, s=spline: resample_speed(points, DT, s)[0], (route,))


@pytest.mark.parametrize("smoothing", [-0.1, float("nan"), float("inf")])
def test_smoothing_is_checked(smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"spline\.smoothing"):
        Spline(smoothing=smoothing)


@pytest.mark.parametrize("num_samples", [-1, 1, 3])
def test_num_samples_is_checked(num_samples: int) -> None:
    with pytest.raises(ConfigError, match=r"spline\.num_samples"):
        Spline(num_samples=num_samples)
