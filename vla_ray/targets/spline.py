"""The optional smoothing spline that trajectories pass through before their kinematics are taken.

Two steps, both differentiable and per frame: Whittaker smoothing of the points, then a cubic Hermite curve with
Catmull-Rom tangents through them, read at evenly spaced parameters: arc length for a route, time for speed waypoints.
The definition reproduces the original scripts (kdh10086/TML_UDD_Team at d90539c) to float32 rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vla_ray.errors import ConfigError
from vla_ray.targets.segments import segments

MIN_SAMPLES = 4  # jerk is a third difference


@dataclass(frozen=True, slots=True)
class Spline:
    """Settings: `smoothing` is Whittaker's lambda (0: none), `num_samples` the points to read (0: keep the count)."""

    enabled: bool = False
    smoothing: float = 0.0
    num_samples: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.smoothing) and self.smoothing >= 0):
            raise ConfigError(f"spline.smoothing is {self.smoothing}; give 0 (no smoothing) or a positive number")
        if self.num_samples != 0 and self.num_samples < MIN_SAMPLES:
            raise ConfigError(
                f"spline.num_samples is {self.num_samples}; "
                f"give 0 (keep the count) or at least {MIN_SAMPLES} (jerk needs them)"
            )


def smooth(points: Tensor, smoothing: float) -> Tensor:
    """Whittaker smoothing of points [B, N, 2]: (I + lambda D^T D)^-1 p, D the second-difference matrix [N-2, N].

    Straight, evenly spaced points are left as they are; lambda 0 is the identity. (Eilers 2003, "A perfect smoother".)
    """
    if smoothing == 0:
        return points
    matrix = _whittaker(points.shape[1], float(smoothing)).to(points)
    # Not a matmul: TF32 and autocast would round it, and the third differences of the result amplify that.
    return (matrix[None, :, :, None] * points[:, None]).sum(2)


@lru_cache(maxsize=16)
def _whittaker(count: int, smoothing: float) -> Tensor:
    identity = torch.eye(count, dtype=torch.float64)
    differences = identity.diff(n=2, dim=0)
    return torch.linalg.inv(identity + smoothing * differences.T @ differences)


def hermite(knots: Tensor, points: Tensor, at: Tensor) -> Tensor:
    """Cubic Hermite curve through points [B, N, 2] at increasing knots [B, N], read at [B, M] -> [B, M, 2].

    Tangents are non-uniform Catmull-Rom: (p[i+1] - p[i-1]) / (t[i+1] - t[i-1]), one-sided at both ends.
    """
    slopes = points.diff(dim=1) / knots.diff(dim=1)[..., None]
    inner = (points[:, 2:] - points[:, :-2]) / (knots[:, 2:] - knots[:, :-2])[..., None]
    tangents = torch.cat([slopes[:, :1], inner, slopes[:, -1:]], dim=1)
    left = torch.searchsorted(knots.detach(), at.detach(), right=True).sub(1).clamp(0, points.shape[1] - 2)
    right = left + 1
    rows = torch.arange(len(points), device=points.device)[:, None]
    width = (knots[rows, right] - knots[rows, left])[..., None]
    u = (at - knots[rows, left])[..., None] / width
    return (
        (2 * u**3 - 3 * u**2 + 1) * points[rows, left]
        + (u**3 - 2 * u**2 + u) * width * tangents[rows, left]
        + (3 * u**2 - 2 * u**3) * points[rows, right]
        + (u**3 - u**2) * width * tangents[rows, right]
    )


def resample_route(route: Tensor, spline: Spline) -> Tensor:
    """Route [B, N, 2] smoothed and read at M points evenly spaced in arc length [B, M, 2].

    The knots are the cumulative segment lengths of the route *before* smoothing, as in the original. A segment
    shorter than MIN_SEGMENT counts as MIN_SEGMENT, so that repeated points keep distinct knots and finite gradients.
    """
    _, lengths, _ = segments(route)
    knots = torch.cat([torch.zeros_like(lengths[:, :1]), lengths.cumsum(1)], dim=1)
    return hermite(knots, smooth(route, spline.smoothing), knots[:, -1:] * _fractions(route, spline))


def resample_speed(speed_wps: Tensor, dt: float, spline: Spline) -> tuple[Tensor, float]:
    """Speed waypoints [B, N, 2] smoothed and read at M evenly spaced times, with the new time step in seconds.

    The duration stays: dt (N - 1) / (M - 1). With the count kept, reading is the identity and only the smoothing acts.
    """
    smoothed = smooth(speed_wps, spline.smoothing)
    count = speed_wps.shape[1]
    samples = spline.num_samples or count
    if samples == count:
        return smoothed, dt
    knots = torch.arange(count, device=speed_wps.device, dtype=speed_wps.dtype).expand(len(speed_wps), -1).contiguous()
    at = (knots[:, -1:] * _fractions(speed_wps, spline)).contiguous()
    return hermite(knots, smoothed, at), dt * (count - 1) / (samples - 1)


def _fractions(points: Tensor, spline: Spline) -> Tensor:
    """M numbers from 0 to 1 inclusive."""
    samples = spline.num_samples or points.shape[1]
    return torch.arange(samples, device=points.device, dtype=points.dtype) / (samples - 1)
