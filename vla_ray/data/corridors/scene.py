"""One corridor as others use it: its picture, its tasks, and masks of what they name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.corridors.render import SIZE, part_image, parts, png, render
from vla_ray.data.corridors.tasks import Task, tasks
from vla_ray.data.corridors.world import Corridor, sample_corridor
from vla_ray.errors import DataError, nearest

HORIZON = 8  # steps

# One of these, where there is one, is what somebody would naturally say in a corridor.
_LANDMARKS = ("turn", "door", "person", "pass", "follow")


@dataclass(frozen=True, slots=True)
class CorridorScene:
    """A corridor and what can be asked in it; `tasks[natural]` is what somebody would say first."""

    corridor: Corridor
    tasks: tuple[Task, ...]
    natural: int

    @property
    def name(self) -> str:
        """`scene_000123`, from the seed."""
        return f"scene_{self.corridor.seed:06d}"

    @property
    def parts(self) -> tuple[str, ...]:
        """What `mask` knows."""
        return parts(self.corridor)

    def picture(self, size: int = SIZE) -> NDArray[np.uint8]:
        """uint8 [size, size, 3]."""
        return render(self.corridor, size)

    def png(self) -> bytes:
        return png(self.corridor)

    def task(self, name: str) -> Task | None:
        """None if the corridor does not support it."""
        return next((task for task in self.tasks if task.name == name), None)

    def mask(self, name: str, size: int = SIZE) -> NDArray[np.bool_]:
        """bool [size, size]: the pixels that show a part (`Task.object`); all False where it is hidden.

        Raises:
            DataError: the corridor has no such part.
        """
        if name not in self.parts:
            known = ", ".join(self.parts)
            raise DataError(f"{self.name} has no {name!r}; it has: {known}.{nearest(name, self.parts)}")
        return np.asarray(part_image(self.corridor, size) == self.parts.index(name) + 1)


def scene(seed: int, steps: int = HORIZON) -> CorridorScene:
    """The scene of a seed, the same one every time; actions of `steps` steps."""
    corridor = sample_corridor(seed)
    found = tasks(corridor, steps)
    natural = [k for k, task in enumerate(found) if task.name.split("_")[0] in _LANDMARKS]
    pick = np.random.default_rng((seed, 2)).random()
    return CorridorScene(corridor, found, natural[int(pick * len(natural))])
