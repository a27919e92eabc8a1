"""Frames on which maps can be judged: one thing decides what the expert does, and it can be seen.

Everything that would blur the verdict is left out: slow egos that would stop anyway, causes too far to matter or too
small to be covered by a few pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

from vla_ray.data.synthetic.render import causal_mask, render
from vla_ray.data.synthetic.sampling import sample_scene
from vla_ray.data.synthetic.world import CAUSE_KIND, Scene, effect
from vla_ray.errors import ConfigError, nearest

MIN_SPEED_MPS = 3.0
MIN_EFFECT_M = 1.0  # mean distance between the plans with and without the cause
MIN_PIXELS = 60  # of the cause, in a picture 448 pixels wide


def is_decisive(scene: Scene) -> bool:
    """Whether the scene's cause clearly changes the expert's speed waypoints, and is visible."""
    if scene.cause not in CAUSE_KIND or scene.speed < MIN_SPEED_MPS or effect(scene) < MIN_EFFECT_M:
        return False
    _, ids = render(scene)
    return int(causal_mask(scene, ids).sum()) >= MIN_PIXELS


def decisive_scenes(seed: int, count: int, cause: str | None = None) -> Iterator[Scene]:
    """`count` decisive scenes from seeds `seed`, `seed + 1` ...; causes take turns unless one is given."""
    if cause is not None and cause not in CAUSE_KIND:
        raise ConfigError(
            f"cause={cause!r} decides nothing; known: {', '.join(CAUSE_KIND)}.{nearest(cause, CAUSE_KIND)}"
        )
    causes = [cause] if cause else list(CAUSE_KIND)
    found = 0
    while found < count:
        scene = sample_scene(seed, causes[found % len(causes)])
        seed += 1
        if is_decisive(scene):
            found += 1
            yield scene
