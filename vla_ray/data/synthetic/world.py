"""The world behind the synthetic frames: a road, things on and beside it, and an expert that drives.

A scene is a pure function of its seed. At most one thing *causes* the plan (a red light, a lead car, a pedestrian on
the road); every other thing is scenery that the expert never reads. Ego frame: metres, x forward, y right, origin at
the ego. Things have road coordinates: arc length `s` along the ego's lane and lateral offset `e` from its centre.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float32]
Color = tuple[int, int, int]

CAUSES = ("clear", "red_light", "lead_car", "pedestrian")
COMMENTARY = {
    "clear": "Keep going, the road is clear.",
    "red_light": "Stop because of the red traffic light.",
    "lead_car": "Slow down behind the lead car.",
    "pedestrian": "Stop for the pedestrian.",
}

ROUTE_POINTS, ROUTE_SPACING_M = 20, 1.0
SPEED_POINTS, SPEED_DT_S = 10, 0.25
LEAD_SPEED_MPS = 3.0  # one value, because a single frame cannot show how fast the lead car goes
CRUISE_SPEED_MPS = 8.0
MAX_HEADING_RAD = 1.15  # the bend ends here, so that the road always stays in front of the camera
RECENTRE_M = 10.0  # the expert is back in the lane's centre after this distance
STANDOFF_M = {
    "red_light": 6.0,
    "lead_car": 4.0,
    "pedestrian": 4.0,
}  # camera to cause; a light must stay in the picture
MIN_GAP_M = 1.0
_HEADWAY_S, _ACCEL, _BRAKE, _MAX_BRAKE = 0.8, 2.0, 3.0, 8.0
_STEP_S = 0.05


class Kind(IntEnum):
    """What a pixel shows: the values of the id image."""

    BACKGROUND = 0
    ROAD = 1
    MARKING = 2  # lane markings and road edges
    STOP_LINE = 3
    LEAD_CAR = 4
    RED_LIGHT = 5
    GREEN_LIGHT = 6
    LIGHT_POLE = 7
    POLE = 8  # lamp posts, billboard posts
    PEDESTRIAN = 9
    WALKER = 10
    PARKED_CAR = 11
    ONCOMING_CAR = 12
    BILLBOARD = 13
    CLOUD = 14
    TREE = 15
    BUILDING = 16


CAUSE_KIND = {"red_light": Kind.RED_LIGHT, "lead_car": Kind.LEAD_CAR, "pedestrian": Kind.PEDESTRIAN}
# No change to any of these, within the rules of this world, changes the expert's plan. A green light is not among them:
# it is read (were it red, the ego would stop).
DISTRACTORS = (
    Kind.POLE,
    Kind.WALKER,
    Kind.PARKED_CAR,
    Kind.ONCOMING_CAR,
    Kind.BILLBOARD,
    Kind.CLOUD,
    Kind.TREE,
    Kind.BUILDING,
)
# m/s along s, for things that move while the ego drives
_DRIFT = {Kind.LEAD_CAR: LEAD_SPEED_MPS, Kind.ONCOMING_CAR: -6.0, Kind.WALKER: 0.8}


@dataclass(frozen=True, slots=True)
class Thing:
    kind: Kind
    s: float
    e: float
    color: Color = (128, 128, 128)
    size: float = 1.0


@dataclass(frozen=True, slots=True)
class Look:
    """Appearance only; the expert never reads it. Angles in radians from the road's first heading."""

    brightness: float
    sky: Color
    grass: Color
    asphalt: int
    yellow_centre: bool
    dash_phase_m: float
    pitch: float
    noise_seed: int
    clouds: tuple[tuple[float, float, float], ...]  # azimuth, height 0..1, size 0..1
    skyline: tuple[tuple[float, float, float, float], ...]  # azimuth, width, height, shade, all but azimuth 0..1
    hills: tuple[float, float, float]  # phases of the silhouette


@dataclass(frozen=True, slots=True)
class Scene:
    """One moment of one world. `advance` gives a later moment of the same world."""

    seed: int
    cause: str
    speed: float  # m/s
    kappa: float  # curvature of the bend, 1/m, right positive
    bend_at: float  # s where the bend starts
    ego_s: float
    ego_e: float
    node_spacing: float  # m between route nodes; nodes lie at s = node_phase + k * node_spacing
    node_phase: float
    things: tuple[Thing, ...]
    look: Look


@dataclass(frozen=True, slots=True)
class Plan:
    """The expert's answer: `route` [20, 2] one metre apart from the ego on, `speed_waypoints` [10, 2] every 0.25 s."""

    route: FloatArray
    speed_waypoints: FloatArray


def heading(scene: Scene, s: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """The road's heading at arc length `s`, rad from its first straight, right positive."""
    bend = scene.kappa * np.maximum(0.0, np.asarray(s, np.float64) - scene.bend_at)
    return np.clip(bend, -MAX_HEADING_RAD, MAX_HEADING_RAD)


def _lane_world(scene: Scene, s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lane centre [n, 2] in the frame of the first straight: straight, circular bend, straight."""
    th, k, b = heading(scene, s), scene.kappa, scene.bend_at
    if k == 0.0:
        return np.stack([s, np.zeros_like(s)], -1)
    past = np.maximum(0.0, s - b - MAX_HEADING_RAD / abs(k))
    x = np.where(s <= b, s, b + np.sin(th) / k + past * np.cos(th))
    y = np.where(s <= b, 0.0, (1.0 - np.cos(th)) / k + past * np.sin(th))
    return np.stack([x, y], -1)


def road_to_ego(
    scene: Scene, s: NDArray[np.float64] | float, e: NDArray[np.float64] | float = 0.0
) -> NDArray[np.float64]:
    """Road coordinates (m) to the ego frame: [..., 2] for broadcast `s` and `e`."""
    s, e = np.broadcast_arrays(np.asarray(s, np.float64), np.asarray(e, np.float64))

    def world(s: NDArray[np.float64], e: NDArray[np.float64]) -> NDArray[np.float64]:
        th = heading(scene, s)
        return _lane_world(scene, s) + np.stack([-e * np.sin(th), e * np.cos(th)], -1)

    origin = world(np.array([scene.ego_s]), np.array([scene.ego_e]))[0]
    th_ego = heading(scene, scene.ego_s)
    c, sn = np.cos(th_ego), np.sin(th_ego)
    d = world(s, e) - origin
    return np.stack([c * d[..., 0] + sn * d[..., 1], -sn * d[..., 0] + c * d[..., 1]], -1)


def _recentring(scene: Scene, ahead: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lateral offset of the expert's path `ahead` metres along the lane; leaves the ego parallel to the lane."""
    u = np.clip(ahead / RECENTRE_M, 0.0, 1.0)
    return scene.ego_e * (1.0 - u * u * (3.0 - 2.0 * u))


def _path(scene: Scene) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The expert's path: metres along the lane [n], metres along the path [n], points [n, 2]."""
    ahead = np.arange(0.0, 50.25, 0.25)
    points = road_to_ego(scene, scene.ego_s + ahead, _recentring(scene, ahead))
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    return ahead, np.concatenate([[0.0], np.cumsum(steps)]), points


def along_path(scene: Scene, distance: ArrayLike) -> FloatArray:
    """Points of the expert's path at these distances (m) from the ego: [n, 2]."""
    _, d, p = _path(scene)
    at = np.asarray(distance, np.float64)
    return np.stack([np.interp(at, d, p[:, 0]), np.interp(at, d, p[:, 1])], -1).astype(np.float32)


def cause_distance(scene: Scene) -> float | None:
    """Metres along the lane to what the ego reacts to, or None on a clear road."""
    if scene.cause == "clear":
        return None
    return next(t.s for t in scene.things if t.kind == CAUSE_KIND[scene.cause]) - scene.ego_s


def _simulate(scene: Scene, seconds: float, ignore_cause: bool = False) -> tuple[NDArray[np.float64], float]:
    """Distance driven (m) after each 0.05 s step, and the final speed.

    Longitudinal control: the intelligent-driver model (Treiber et al. 2000), braking limited to 8 m/s^2.
    """
    cause = "clear" if ignore_cause else scene.cause
    distance = cause_distance(scene)
    gap0 = distance - STANDOFF_M[cause] if distance is not None and cause != "clear" else np.inf
    v_cause = LEAD_SPEED_MPS if cause == "lead_car" else 0.0
    v, x, driven = scene.speed, 0.0, []
    for k in range(round(seconds / _STEP_S)):
        acc = _ACCEL * (1.0 - (v / CRUISE_SPEED_MPS) ** 4)
        if np.isfinite(gap0):
            gap = max(0.2, gap0 + v_cause * k * _STEP_S - x)
            wanted = MIN_GAP_M + max(0.0, v * _HEADWAY_S + v * (v - v_cause) / (2.0 * np.sqrt(_ACCEL * _BRAKE)))
            acc -= _ACCEL * (wanted / gap) ** 2
        v = max(0.0, v + float(np.clip(acc, -_MAX_BRAKE, _ACCEL)) * _STEP_S)
        x += v * _STEP_S
        driven.append(x)
    return np.array(driven), v


def expert(scene: Scene, ignore_cause: bool = False) -> Plan:
    """What a careful driver would do; `ignore_cause=True` is the counterfactual world without the cause.

    The route never depends on the cause (as in SimLingo, where it comes from the map), the speed waypoints do.
    """
    driven, _ = _simulate(scene, SPEED_POINTS * SPEED_DT_S, ignore_cause)
    every = round(SPEED_DT_S / _STEP_S)
    route = along_path(scene, np.arange(ROUTE_POINTS) * ROUTE_SPACING_M)
    return Plan(route, along_path(scene, driven[every - 1 :: every]))


def effect(scene: Scene) -> float:
    """Mean distance (m) between the expert's speed waypoints with and without the cause."""
    with_cause, without = expert(scene).speed_waypoints, expert(scene, ignore_cause=True).speed_waypoints
    return float(np.linalg.norm(with_cause - without, axis=-1).mean())


def target_points(scene: Scene) -> FloatArray:
    """The next two route nodes [2, 2], ego frame, m: the first one 7-20 m ahead, the second one 8-13 m further on.

    Nodes are fixed in the world, so they come closer while the ego drives, and the next pair takes over.
    """
    first = np.ceil((scene.ego_s + 7.0 - scene.node_phase) / scene.node_spacing)
    ahead = scene.node_phase + (first + np.arange(2)) * scene.node_spacing - scene.ego_s
    return along_path(scene, ahead)


def commentary(scene: Scene) -> str:
    """One sentence that names the cause, as the model is trained to say it."""
    return COMMENTARY[scene.cause]


def advance(scene: Scene, seconds: float = SPEED_DT_S) -> Scene:
    """The same world after the ego has followed the expert and everything that moves has moved."""
    driven, speed = _simulate(scene, seconds)
    ahead, distance, _ = _path(scene)
    x = float(np.interp(driven[-1], distance, ahead))  # along the lane, which is longer or shorter beside its centre
    things = tuple(replace(t, s=t.s + _DRIFT.get(t.kind, 0.0) * seconds) for t in scene.things)
    ego_e = float(_recentring(scene, np.array([x]))[0])
    return replace(scene, speed=speed, ego_s=scene.ego_s + x, ego_e=ego_e, things=things)
