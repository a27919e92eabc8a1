"""Random worlds from seeds, and drives through them. What is drawn here is all the variety that training sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from vla_ray.data.synthetic.world import (
    CAUSE_KIND,
    CAUSES,
    LEAD_SPEED_MPS,
    MIN_GAP_M,
    SPEED_DT_S,
    STANDOFF_M,
    Color,
    Kind,
    Look,
    Scene,
    Thing,
    advance,
    road_to_ego,
)
from vla_ray.errors import ConfigError, nearest

_HALF_WIDTH_M = {Kind.WALKER: 0.4, Kind.PARKED_CAR: 1.2, Kind.ONCOMING_CAR: 1.2, Kind.POLE: 0.3, Kind.TREE: 2.2}
_PALETTE: tuple[Color, ...] = (
    (170, 36, 36),
    (36, 66, 140),
    (225, 226, 228),
    (44, 45, 50),
    (140, 143, 148),
    (205, 160, 48),
    (38, 104, 70),
    (118, 64, 124),
)


def sample_scene(seed: int, cause: str | None = None, curve: bool | None = None) -> Scene:
    """A random scene; `cause` (one of CAUSES) and `curve` fix what would otherwise be drawn.

    The speed is drawn independently of the cause, so that the prompt does not give the answer away; the distance to the
    cause is drawn such that a stop is still possible.
    """
    if cause is not None and cause not in CAUSES:
        raise ConfigError(f"unknown cause {cause!r}: one of {', '.join(CAUSES)}.{nearest(cause, CAUSES)}")
    rng = np.random.default_rng(seed)
    drawn = str(rng.choice(CAUSES, p=[0.31, 0.23, 0.23, 0.23]))
    cause = drawn if cause is None else cause
    drawn_curve = bool(rng.random() < 0.6)
    curve = drawn_curve if curve is None else curve
    kappa = float(rng.uniform(0.012, 0.05) * rng.choice([-1, 1]))
    spacing = float(rng.uniform(8.0, 13.0))
    scene = Scene(
        seed=seed,
        cause=cause,
        speed=round(float(rng.uniform(0, 10)), 1),
        kappa=kappa if curve else 0.0,
        bend_at=float(rng.uniform(-12, 9)),
        ego_s=0.0,
        ego_e=float(rng.uniform(-0.5, 0.5)),
        node_spacing=spacing,
        node_phase=float(rng.uniform(0, spacing)),
        things=(),
        look=_sample_look(rng),
    )
    causal = _sample_cause(rng, scene)
    scenery = [t for t in _sample_scenery(rng, cause) if causal is None or not _hides(scene, t, causal)]
    return replace(scene, things=tuple(scenery if causal is None else [causal, *scenery]))


def drive(
    seed: int, num_frames: int, cause: str | None = None, curve: bool | None = None, dt: float = SPEED_DT_S
) -> Iterator[Scene]:
    """`num_frames` moments of one world, `dt` seconds apart, the ego following the expert."""
    scene = sample_scene(seed, cause, curve)
    for _ in range(num_frames):
        yield scene
        scene = advance(scene, dt)


def _sample_cause(rng: np.random.Generator, scene: Scene) -> Thing | None:
    v, u, color, size = scene.speed, float(rng.random()), _color(rng), float(rng.uniform(0.9, 1.1))
    side = float(rng.uniform(-1, 1))
    if scene.cause == "clear":
        return None
    closing = v - LEAD_SPEED_MPS if scene.cause == "lead_car" else v
    near = STANDOFF_M[scene.cause] + MIN_GAP_M + max(0.0, closing) ** 2 / 10.0
    far = max({"red_light": 23.0, "lead_car": 22.0, "pedestrian": 18.0}[scene.cause], near + 5.0)
    s = near + (far - near) * u
    e = {"red_light": 2.9 + 0.5 * side, "lead_car": 0.3 * side, "pedestrian": 1.4 * side}[scene.cause]
    return Thing(CAUSE_KIND[scene.cause], s, e, color, size)


def _sample_scenery(rng: np.random.Generator, cause: str) -> list[Thing]:
    def uniform(a: float, b: float) -> float:
        return float(rng.uniform(a, b))

    def either(right: tuple[float, float], left: tuple[float, float]) -> float:
        return uniform(*right) if rng.random() < 0.6 else uniform(*left)

    things: list[Thing] = []
    green = Thing(Kind.GREEN_LIGHT, uniform(8, 24), uniform(2.4, 3.4))
    if rng.random() < 0.4 and cause != "red_light":
        things.append(green)
    for _ in range(rng.integers(0, 3)):
        e = either((3.9, 4.8), (-8.4, -7.4))
        things.append(Thing(Kind.PARKED_CAR, uniform(8, 45), e, _color(rng), uniform(0.9, 1.1)))
    for _ in range(rng.integers(0, 3)):
        e = either((3.6, 5.4), (-8.9, -6.6))
        things.append(Thing(Kind.WALKER, uniform(7, 32), e, _color(rng), uniform(0.9, 1.1)))
    if rng.random() < 0.45:
        things.append(Thing(Kind.ONCOMING_CAR, uniform(10, 50), uniform(-3.7, -3.3), _color(rng), uniform(0.9, 1.1)))
    for _ in range(rng.integers(0, 3)):
        e = float(rng.choice([-1, 1])) * uniform(10, 16)
        things.append(Thing(Kind.BILLBOARD, uniform(14, 55), e, _color(rng), uniform(0.8, 1.3)))
    for _ in range(rng.integers(0, 6)):
        e = float(rng.choice([-1, 1])) * uniform(10, 25)
        green_tone = (int(rng.integers(34, 60)), int(rng.integers(78, 118)), int(rng.integers(34, 56)))
        things.append(Thing(Kind.TREE, uniform(14, 70), e, green_tone, uniform(0.7, 1.4)))
    if rng.random() < 0.5:
        gap, phase, e = uniform(16, 26), uniform(0, 16), uniform(-9.6, -9.2)
        things += [Thing(Kind.POLE, 8 + phase + k * gap, e) for k in range(4)]
    return things


def _sample_look(rng: np.random.Generator) -> Look:
    def jitter(base: Color, by: int) -> Color:
        r, g, b = (int(c) + int(rng.integers(-by, by + 1)) for c in base)
        return r, g, b

    return Look(
        brightness=float(rng.uniform(0.75, 1.08)),
        sky=jitter((104, 152, 208), 18),
        grass=jitter((96, 124, 70), 18),
        asphalt=int(rng.integers(72, 112)),
        yellow_centre=bool(rng.random() < 0.5),
        dash_phase_m=float(rng.uniform(0, 6)),
        pitch=float(rng.uniform(-0.02, 0.02)),
        noise_seed=int(rng.integers(0, 500)),
        clouds=tuple(
            (float(rng.uniform(-1.5, 1.5)), float(rng.random()), float(rng.random())) for _ in range(rng.integers(0, 8))
        ),
        skyline=tuple(
            (float(rng.uniform(-1.5, 1.5)), float(rng.random()), float(rng.random()), float(rng.random()))
            for _ in range(rng.integers(0, 14))
        ),
        hills=(float(rng.uniform(0, 6.3)), float(rng.uniform(0, 6.3)), float(rng.uniform(0.2, 1.0))),
    )


def _color(rng: np.random.Generator) -> Color:
    base, by = _PALETTE[rng.integers(len(_PALETTE))], rng.integers(-18, 19, 3)
    r, g, b = (int(np.clip(c + d, 0, 255)) for c, d in zip(base, by, strict=True))
    return r, g, b


def _hides(scene: Scene, thing: Thing, cause: Thing) -> bool:
    """Whether `thing` would stand in front of the cause: then it is left out, so that the mask is never empty."""
    (x, y), (cx, cy) = road_to_ego(scene, np.array([thing.s, cause.s]), np.array([thing.e, cause.e]))
    if not 0.0 < x < cx:
        return False
    reach = _HALF_WIDTH_M.get(thing.kind, 3.0) / x + 1.1 / cx
    return bool(abs(y / x - cy / cx) < reach)
