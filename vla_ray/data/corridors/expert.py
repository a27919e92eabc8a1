"""How the robot drives where it is told to: a unicycle that steers towards goals (pure pursuit), curvature bounded.

Poses are in the corridor frame of world.py. A path is what the kinematics give, so it is smooth, and it ends before
its goal where the horizon does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.corridors.world import Corridor

SCALE_M = 0.25  # metres per unit: one step at full speed
MAX_CURVATURE = 1.5  # 1/m

_SUBSTEPS = 5
_BRAKING_M = 0.5  # to a goal: slower from here on
_HOLD_M = 0.2  # so near to a goal its direction means nothing any more

Command = tuple[float, float]  # curvature in 1/m (left positive), speed in units per step
Steer = Callable[[float, float, float], Command]  # of x, y, heading


def halt() -> Steer:
    return lambda x, y, heading: (0.0, 0.0)


def arc(curvature: float) -> Steer:
    """Full speed with one curvature; 0 is straight ahead."""
    return lambda x, y, heading: (curvature, 1.0)


def reach(goal_x: float, goal_y: float) -> Steer:
    """To a point, and stop there."""

    def steer(x: float, y: float, heading: float) -> Command:
        dx, dy = goal_x - x, goal_y - y
        ahead = dx * math.cos(heading) + dy * math.sin(heading)
        speed = max(0.0, min(1.0, ahead / _BRAKING_M))
        return (_towards(goal_x, goal_y, x, y, heading) if math.hypot(dx, dy) > _HOLD_M else 0.0), speed

    return steer


def enter(goal_x: float, goal_y: float) -> Steer:
    """Through a point, slower the tighter the bend."""

    def steer(x: float, y: float, heading: float) -> Command:
        curvature = _towards(goal_x, goal_y, x, y, heading)
        return curvature, 1.0 - 0.2 * abs(curvature) / MAX_CURVATURE

    return steer


def keep(line_y: float, ahead: float = 1.0) -> Steer:
    """Along the corridor, on the line at `line_y`; `ahead` metres are taken to come near to it."""
    return lambda x, y, heading: (_towards(x + ahead, line_y, x, y, heading), 1.0)


def around(pass_x: float, pass_y: float) -> Steer:
    """Through a point beside an obstacle, then along the corridor."""
    beyond = keep(pass_y)

    def steer(x: float, y: float, heading: float) -> Command:
        if pass_x - x < 0.5:
            return beyond(x, y, heading)
        return _towards(pass_x, pass_y, x, y, heading), 1.0

    return steer


def _towards(goal_x: float, goal_y: float, x: float, y: float, heading: float) -> float:
    """Curvature of the circle from a pose through a point (Coulter 1992), within the robot's bounds."""
    dx, dy = goal_x - x, goal_y - y
    lateral = dy * math.cos(heading) - dx * math.sin(heading)
    return max(-MAX_CURVATURE, min(MAX_CURVATURE, 2 * lateral / max(dx * dx + dy * dy, 1e-6)))


def drive(corridor: Corridor, steer: Steer, steps: int) -> NDArray[np.float64]:
    """Positions [1 + steps, 2] in the corridor frame, m, from the robot's pose on."""
    x, y, heading = 0.0, corridor.robot_y, corridor.robot_yaw
    path = [(x, y)]
    for _ in range(steps):
        for _ in range(_SUBSTEPS):
            curvature, speed = steer(x, y, heading)
            length = speed * SCALE_M / _SUBSTEPS
            middle = heading + curvature * length / 2
            x, y, heading = x + length * math.cos(middle), y + length * math.sin(middle), heading + curvature * length
        path.append((x, y))
    return np.array(path)


def to_robot(corridor: Corridor, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [..., 2] of the corridor frame in the robot's: x forward, y left, m."""
    c, s = math.cos(corridor.robot_yaw), math.sin(corridor.robot_yaw)
    return (points - [0.0, corridor.robot_y]) @ np.array([[c, -s], [s, c]])
