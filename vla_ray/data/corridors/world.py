"""Random corridors from seeds: where walls, doors, openings, people and the camera are.

Metres. Corridor frame: x along the corridor from the robot on, y left of its middle, z up; the robot stands at
(0, robot_y) and looks along `robot_yaw` (left positive). Ranges are moderate on purpose: whatever an instruction may
name is large enough to be seen in a picture of 56 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Color = tuple[int, int, int]

LEFT, RIGHT = 1, -1  # signs of y
SIDES = {"left": LEFT, "right": RIGHT}
DOOR_COLORS: dict[str, Color] = {
    "red": (204, 36, 32),
    "green": (28, 142, 54),
    "blue": (34, 70, 206),
    "yellow": (240, 204, 36),
}

_WALLS: tuple[Color, ...] = ((226, 216, 196), (206, 210, 214), (196, 208, 216), (206, 216, 200), (220, 204, 200))
_FLOORS: tuple[Color, ...] = ((124, 116, 106), (150, 134, 112), (104, 110, 118), (138, 142, 140), (116, 96, 82))
_CLOTHES: tuple[Color, ...] = ((40, 42, 48), (112, 60, 132), (216, 120, 36), (24, 128, 136), (240, 240, 240))
_SKIN: tuple[Color, ...] = ((236, 196, 166), (198, 146, 108), (132, 88, 62))
_CLUTTER: tuple[Color, ...] = ((96, 98, 104), (130, 100, 70), (70, 80, 84), (168, 166, 160))


@dataclass(frozen=True, slots=True)
class Wall:
    """A side wall: `plain`, with a `door` or with an `opening` into a side corridor, from x = start to end."""

    kind: str
    start: float = 0.0
    end: float = 0.0
    color: str = ""  # of the door, a key of DOOR_COLORS

    @property
    def middle(self) -> float:
        return (self.start + self.end) / 2


@dataclass(frozen=True, slots=True)
class Person:
    x: float
    y: float
    height: float
    clothes: Color
    trousers: Color
    skin: Color


@dataclass(frozen=True, slots=True)
class Clutter:
    """A chair, a bin or a poster: scenery that no instruction names. `size` is about 1."""

    kind: str
    x: float
    y: float
    size: float
    color: Color


@dataclass(frozen=True, slots=True)
class Look:
    """Appearance only: the expert never reads it."""

    wall: Color
    floor: Color
    ceiling: Color
    side_light: float  # how bright side corridors are; 1 would be as bright as this one
    fade: float  # how much darker the far end is
    light: tuple[float, float]  # factors of the left and the right wall
    pattern: str  # of the floor: plain | tiles | runner | planks
    dado: bool  # darker lower part of the walls
    lamps: float  # m between ceiling lamps, 0: none
    window: bool  # in the end wall
    phase: float  # of everything that repeats, 0..1


@dataclass(frozen=True, slots=True)
class Corridor:
    seed: int
    half_width: float
    height: float
    end: float  # x of the end wall
    left: Wall
    right: Wall
    person: Person | None
    clutter: tuple[Clutter, ...]
    robot_y: float
    robot_yaw: float  # rad
    camera_height: float
    camera_pitch: float  # rad, up positive
    look: Look

    def wall(self, side: int) -> Wall:
        return self.left if side == LEFT else self.right


def sample_corridor(seed: int) -> Corridor:
    """The corridor of a seed; the same one every time."""
    rng = np.random.default_rng(seed)
    half_width = float(rng.uniform(1.2, 1.4))
    colors = rng.permutation(list(DOOR_COLORS)).tolist()
    left, right = _wall(rng, colors[0]), _wall(rng, colors[1])
    end = float(rng.uniform(4.6, 9.0))
    person = _person(rng, left, right, half_width)
    return Corridor(
        seed=seed,
        half_width=half_width,
        height=float(rng.uniform(2.35, 2.75)),
        end=end,
        left=left,
        right=right,
        person=person,
        clutter=tuple(_clutter(rng, left, right, half_width, person)),
        robot_y=float(rng.uniform(-0.25, 0.25)),
        robot_yaw=float(rng.uniform(-0.16, 0.16)),
        camera_height=float(rng.uniform(0.5, 0.95)),
        camera_pitch=float(rng.uniform(-0.03, 0.03)),
        look=_look(rng),
    )


def _wall(rng: np.random.Generator, color: str) -> Wall:
    kind = str(rng.choice(["door", "opening", "plain"], p=[0.5, 0.35, 0.15]))
    middle, width = float(rng.uniform(1.65, 2.1)), float(rng.uniform(1.15, 1.35))
    if kind == "plain":
        return Wall(kind)
    if kind == "opening":
        return Wall(kind, middle - width / 2, middle + width / 2 + 0.1)
    return Wall(kind, middle - width / 2, middle + width / 2, color)


def _person(rng: np.random.Generator, left: Wall, right: Wall, half_width: float) -> Person | None:
    place = str(rng.choice(["none", "left", "middle", "right"], p=[0.4, 0.2, 0.2, 0.2]))
    if place == "none":
        return None
    if place == "middle":
        x, y = rng.uniform(1.7, 2.4), rng.uniform(-0.15, 0.15)
    else:  # beside what is in that wall, or beyond it
        plain = (left if place == "left" else right).kind == "plain"
        x = rng.uniform(1.8, 2.6) if plain else rng.uniform(2.9, 3.4)
        y = SIDES[place] * (half_width - rng.uniform(0.4, 0.55))
    clothes, skin = rng.integers(len(_CLOTHES)), rng.integers(len(_SKIN))
    trousers = (int(rng.integers(30, 70)), int(rng.integers(30, 70)), int(rng.integers(40, 90)))
    return Person(float(x), float(y), float(rng.uniform(1.6, 1.85)), _CLOTHES[clothes], trousers, _SKIN[skin])


def _clutter(
    rng: np.random.Generator, left: Wall, right: Wall, half_width: float, person: Person | None
) -> list[Clutter]:
    things = []
    for side, wall in ((LEFT, left), (RIGHT, right)):
        if rng.random() < 0.55:
            kind = str(rng.choice(["chair", "bin"]))
            x = float(rng.uniform(1.5, 4.2) if wall.kind == "plain" else rng.uniform(wall.end + 0.35, 4.4))
            thing = Clutter(kind, x, side * (half_width - 0.28), float(rng.uniform(0.85, 1.15)), _tone(rng, _CLUTTER))
            if person is None or abs(person.x - x) > 0.6 or person.y * side < 0.2:
                things.append(thing)
        if wall.kind == "plain" and rng.random() < 0.6:
            size = float(rng.uniform(0.8, 1.3))
            things.append(
                Clutter("poster", float(rng.uniform(1.6, 3.0)), side * half_width, size, _tone(rng, _CLUTTER))
            )
    return things


def _look(rng: np.random.Generator) -> Look:
    brightness = rng.uniform(0.8, 1.08)
    return Look(
        wall=_tone(rng, _WALLS, brightness),
        floor=_tone(rng, _FLOORS, brightness),
        ceiling=_tone(rng, ((236, 236, 232), (222, 224, 226)), brightness),
        side_light=float(rng.uniform(0.35, 0.6)),  # lit ones look like walls at 56 pixels
        fade=float(rng.uniform(0.1, 0.4)),
        light=(float(rng.uniform(0.82, 0.98)), float(rng.uniform(0.82, 0.98))),
        pattern=str(rng.choice(["plain", "tiles", "runner", "planks"])),
        dado=bool(rng.random() < 0.5),
        lamps=float(rng.choice([0.0, 1.6, 2.4])),
        window=bool(rng.random() < 0.4),
        phase=float(rng.random()),
    )


def _tone(rng: np.random.Generator, palette: tuple[Color, ...], brightness: float = 1.0) -> Color:
    r, g, b = (np.array(palette[rng.integers(len(palette))]) + rng.integers(-10, 11, 3)) * brightness
    return int(r), int(g), int(b)
