"""The nine scalars of a predicted trajectory that a map can explain, as differentiable torch functions.

Every function maps points [B, N, 2] (metres, ego frame, x forward, y right) to one value per frame [B]: frames never
mix, so one backward pass of the sum gives every frame its own gradient. Formulas are those of the original SimLingo
explanation scripts (kdh10086/TML_UDD_Team at d90539c), with three differences that ordinary trajectories never meet:

* heading changes lie in (-pi, pi] (the original's jump by 2 pi where a heading crosses the -x axis);
* a segment shorter than MIN_SEGMENT has no heading: terms that need it are zero, in value and in gradient
  (the original divides by 1e-6 there, so that a standing car has an enormous curvature);
* the direction of travel is that of the first segment that is not short, and x forward if there is none.

Values and gradients are finite for every trajectory in metres, a NaN in gives a NaN out. Compute in float32 or better:
second and third differences of a smooth arc cancel in bfloat16. The origin (the car now) is not prepended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vla_ray.errors import TargetError, nearest
from vla_ray.targets.segments import segments
from vla_ray.targets.spline import Spline, resample_route, resample_speed

Head = Literal["route", "speed"]
# Which evidence a map should show first: what raises the scalar (a manoeuvre's energy), what lowers it (progress: a
# red light is evidence *against* it), or what pushes it away from zero (a signed offset).
Acts = Literal["raising", "lowering", "outward"]

DT = 0.25  # seconds between two speed waypoints


def _turns(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per inner point [B, N-2]: heading change in (-pi, pi], mean length of its two segments, whether it is defined."""
    steps, lengths, short = segments(points)
    before, after = steps[:, :-1], steps[:, 1:]
    cross = before[..., 0] * after[..., 1] - before[..., 1] * after[..., 0]
    dot = (before * after).sum(-1)
    # One atan2 of (cross, dot) is the wrapped difference of the two headings, without the rounding of subtracting them.
    # Adding zero turns -0.0 into 0.0, so that an exact U-turn is +pi.
    turns = torch.atan2(cross + 0.0, dot)
    defined = ~(short[:, :-1] | short[:, 1:])
    return torch.where(defined, turns, torch.zeros_like(turns)), (lengths[:, :-1] + lengths[:, 1:]) / 2, defined


def _forward_steps(speed_wps: Tensor) -> Tensor:
    """Displacement along the direction of travel per segment [B, N-1], in metres; negative backwards."""
    steps, lengths, short = segments(speed_wps)
    first = (~short).int().argmax(dim=1)  # index 0 where all are short: there `steps` points along x
    rows = torch.arange(len(steps), device=steps.device)
    direction = steps[rows, first] / lengths[rows, first, None]
    return (speed_wps.diff(dim=1) * direction[:, None]).sum(-1)


def _accelerations(speed_wps: Tensor, dt: float) -> Tensor:
    """Longitudinal acceleration [B, N-2], m/s^2."""
    return (_forward_steps(speed_wps) / dt).diff(dim=1) / dt


def curv_energy(route: Tensor) -> Tensor:
    """Sum of squared curvature, 1/m^2: (heading change / mean length of the two segments)^2 over the inner points."""
    turns, lengths, _ = _turns(route)
    return (turns / lengths).square().sum(-1)


def curv_diff(route: Tensor) -> Tensor:
    """Sum of squared differences of neighbouring curvatures, 1/m^2; zero where one of the two is undefined."""
    turns, lengths, defined = _turns(route)
    change = (turns / lengths).diff(dim=1)
    both = defined[:, :-1] & defined[:, 1:]
    return torch.where(both, change, torch.zeros_like(change)).square().sum(-1)


def lateral_offset(route: Tensor) -> Tensor:
    """Signed lateral position of the last route point in metres: right positive, left negative."""
    return route[:, -1, 1]


def longitudinal_progress(speed_wps: Tensor, dt: float = DT) -> Tensor:
    """Metres travelled forward from the first to the last waypoint, along the direction of travel, whatever dt is."""
    return _forward_steps(speed_wps).relu().sum(-1)


def forward_speed(speed_wps: Tensor, dt: float = DT) -> Tensor:
    """Mean forward speed, m/s."""
    return (_forward_steps(speed_wps) / dt).relu().mean(-1)


def acc_energy(speed_wps: Tensor, dt: float = DT) -> Tensor:
    """Sum of squared longitudinal acceleration, (m/s^2)^2."""
    return _accelerations(speed_wps, dt).square().sum(-1)


def brake_energy(speed_wps: Tensor, dt: float = DT) -> Tensor:
    """Sum of squared longitudinal deceleration, (m/s^2)^2."""
    return (-_accelerations(speed_wps, dt)).relu().square().sum(-1)


def jerk_energy(speed_wps: Tensor, dt: float = DT) -> Tensor:
    """Sum of squared longitudinal jerk, (m/s^3)^2."""
    return (_accelerations(speed_wps, dt).diff(dim=1) / dt).square().sum(-1)


def yaw_rate_energy(speed_wps: Tensor, dt: float = DT) -> Tensor:
    """Sum of squared yaw rate, (rad/s)^2: (heading change / dt)^2 over the inner waypoints."""
    turns, _, _ = _turns(speed_wps)
    return (turns / dt).square().sum(-1)


@dataclass(frozen=True, slots=True)
class Kinematic:
    """A scalar by name. `function` takes (points) if `head` is route, (points, dt) if it is speed."""

    name: str
    head: Head
    unit: str
    description: str
    function: Callable[..., Tensor]
    acts: Acts = "raising"


KINEMATICS: dict[str, Kinematic] = {
    kinematic.name: kinematic
    for kinematic in (
        Kinematic("curv_energy", "route", "1/m^2", "sum of squared curvature of the route", curv_energy),
        Kinematic("curv_diff", "route", "1/m^2", "sum of squared curvature changes along the route", curv_diff),
        Kinematic(
            "lateral_offset",
            "route",
            "m",
            "lateral position of the route's end, right positive",
            lateral_offset,
            "outward",
        ),
        Kinematic(
            "longitudinal_progress", "speed", "m", "distance travelled forward", longitudinal_progress, "lowering"
        ),
        Kinematic("forward_speed", "speed", "m/s", "mean forward speed", forward_speed, "lowering"),
        Kinematic("acc_energy", "speed", "(m/s^2)^2", "sum of squared longitudinal acceleration", acc_energy),
        Kinematic("brake_energy", "speed", "(m/s^2)^2", "sum of squared longitudinal deceleration", brake_energy),
        Kinematic("jerk_energy", "speed", "(m/s^3)^2", "sum of squared longitudinal jerk", jerk_energy),
        Kinematic("yaw_rate_energy", "speed", "(rad/s)^2", "sum of squared yaw rate", yaw_rate_energy),
    )
}


def kinematic(name: str) -> Kinematic:
    """The scalar of this name; TargetError with the known names otherwise."""
    if name not in KINEMATICS:
        known = ", ".join(KINEMATICS)
        raise TargetError(f"unknown kinematic_metric {name!r}; known: {known}.{nearest(name, KINEMATICS)}")
    return KINEMATICS[name]


def kinematic_scalar(name: str, route: Tensor, speed_wps: Tensor, spline: Spline | None = None) -> Tensor:
    """One scalar per frame [B] of route [B, 20, 2] and speed_wps [B, 10, 2], after the spline if that is enabled."""
    return _evaluate((kinematic(name),), route, speed_wps, spline)[name]


def kinematic_scalars(route: Tensor, speed_wps: Tensor, spline: Spline | None = None) -> dict[str, Tensor]:
    """All nine scalars [B] by name, in the order of the metrics table."""
    return _evaluate(tuple(KINEMATICS.values()), route, speed_wps, spline)


def _evaluate(
    kinematics: tuple[Kinematic, ...], route: Tensor, speed_wps: Tensor, spline: Spline | None
) -> dict[str, Tensor]:
    dt = DT
    if spline is not None and spline.enabled:
        route = resample_route(route, spline)
        speed_wps, dt = resample_speed(speed_wps, DT, spline)
    return {k.name: k.function(route) if k.head == "route" else k.function(speed_wps, dt) for k in kinematics}
