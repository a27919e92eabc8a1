"""What one can ask of the robot in a corridor, in words, and what it then does.

The counterfactual idea of CAST (arXiv 2508.13446): one picture, several instructions, different actions. Only what
the corridor supports is offered: no path comes near a wall or a person.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.corridors.expert import SCALE_M, Steer, arc, around, drive, enter, halt, keep, reach, to_robot
from vla_ray.data.corridors.world import LEFT, RIGHT, SIDES, Corridor, Person

_ADJUST = 0.2  # 1/m: 0.4 rad and 0.4 m in 2 m
_CLEARANCE_M = 0.18  # to walls
_PERSON_M = 0.38  # between the middles of robot and person
_BESIDE_M = 0.62  # where the robot passes a person
_BEFORE_DOOR_M = 0.38
_BEFORE_PERSON_M = 0.75

# Instructions by kind of task; {side} and {color} are filled in.
WORDS: dict[str, tuple[str, ...]] = {
    "forward": ("go forward", "move straight ahead", "keep moving forward"),
    "follow": ("follow the corridor", "move along the corridor", "follow the hallway"),
    "stop": ("stop", "stop moving", "stop here and wait"),
    "adjust": ("adjust {side}", "adjust a little to the {side}", "move slightly {side}"),
    "turn": ("turn {side}", "turn {side} into the side corridor", "take the {side} turn"),
    "only turn": ("turn into the side corridor", "turn at the junction", "take the next turn"),
    "door": ("go to the {side} door", "move to the door on the {side}", "move towards the {side} door"),
    "only door": ("go to the door", "move to the door", "move towards the door"),
    "color": ("go to the {color} door", "move to the {color} door", "move towards the {color} door"),
    "person": ("go to the person", "move towards the person", "move up to the person"),
    "pass": (
        "pass the person on the {side}",
        "move past the person on the {side}",
        "go around the person on the {side}",
    ),
}
_NAMES = {"color": "door", "only door": "door", "only turn": "turn"}


@dataclass(frozen=True, slots=True)
class Task:
    """An instruction and the actions that it demands.

    Attributes:
        name: forward, follow, stop, person, or with a side or a colour: adjust_left, turn_left, pass_left, door_left,
            door_red ...
        instructions: paraphrases, in an order that the scene's seed decides.
        object: the part of the picture that it names (`CorridorScene.mask` takes it), None if it names none.
        actions: float32 [steps, 2], deltas in units, robot frame: x forward, y left.
        goal: x, y in units in the robot frame, where the robot would stop; None if it would go on.
    """

    name: str
    instructions: tuple[str, ...]
    object: str | None
    actions: NDArray[np.float32]
    goal: tuple[float, float] | None = None


def tasks(corridor: Corridor, steps: int) -> tuple[Task, ...]:
    """All tasks that the corridor supports, in a fixed order."""
    rng = np.random.default_rng((corridor.seed, 1))
    found = []
    for kind, fill, thing, steer, goal in _wishes(corridor):
        order = rng.permutation(len(WORDS[kind]))
        path = drive(corridor, steer, steps)
        if not _is_free(corridor, path):
            continue
        found.append(
            Task(
                name=f"{_NAMES.get(kind, kind)}_{fill}" if fill else _NAMES.get(kind, kind),
                instructions=tuple(WORDS[kind][k].format(side=fill, color=fill) for k in order),
                object=thing,
                actions=(np.diff(to_robot(corridor, path), axis=0) / SCALE_M).astype(np.float32),
                goal=_units(corridor, goal) if goal else None,
            )
        )
    return tuple(found)


_Wish = tuple[str, str, str | None, Steer, tuple[float, float] | None]


def _wishes(corridor: Corridor) -> Iterator[_Wish]:
    """Kind, side or colour, part of the picture, how to drive, where to stop (m)."""
    w = corridor.half_width
    yield "forward", "", None, arc(0.0), None
    yield "follow", "", None, keep(0.0), None
    yield "stop", "", None, halt(), (0.0, corridor.robot_y)
    for name, side in SIDES.items():
        yield "adjust", name, None, arc(side * _ADJUST), None
    for name, side in SIDES.items():
        wall = corridor.wall(side)
        only = corridor.wall(-side).kind != wall.kind
        if wall.kind == "opening":
            for kind, fill in [("turn", name), ("only turn", "")][: 1 + only]:
                yield kind, fill, f"{name} opening", enter(wall.middle, side * (w + 0.3)), None
        if wall.kind == "door":
            goal = (wall.middle, side * (w - _BEFORE_DOOR_M))
            for kind, fill in [("door", name), ("color", wall.color), ("only door", "")][: 2 + only]:
                yield kind, fill, f"{name} door", reach(*goal), goal
    if corridor.person is not None:
        yield from _about_person(corridor, corridor.person)


def _about_person(corridor: Corridor, person: Person) -> Iterator[_Wish]:
    away = np.array([person.x, person.y - corridor.robot_y])
    before = np.array([person.x, person.y]) - away / np.linalg.norm(away) * _BEFORE_PERSON_M
    goal = (float(before[0]), float(before[1]))
    yield "person", "", "person", reach(*goal), goal
    if abs(person.y) < 0.3:  # beside a person at a wall there is only one way
        for name, side in SIDES.items():
            beside = person.y + side * _BESIDE_M
            yield "pass", name, "person", around(person.x, beside), None


def _is_free(corridor: Corridor, path: NDArray[np.float64]) -> bool:
    """Whether a path [n, 2] keeps away from walls and from the person."""
    x, y = path[:, 0], path[:, 1]
    free = np.abs(y) <= corridor.half_width - _CLEARANCE_M
    for side in (LEFT, RIGHT):
        wall = corridor.wall(side)
        if wall.kind == "opening":
            through = (x >= wall.start + _CLEARANCE_M) & (x <= wall.end - _CLEARANCE_M)
            free |= through & (y * side > 0)
    if corridor.person is not None:
        free &= np.hypot(x - corridor.person.x, y - corridor.person.y) >= _PERSON_M
    return bool(free.all())


def _units(corridor: Corridor, point: tuple[float, float]) -> tuple[float, float]:
    x, y = to_robot(corridor, np.array(point)) / SCALE_M
    return float(x), float(y)
