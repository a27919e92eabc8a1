"""Procedural driving scenes in which the cause of every action is known, pixel by pixel.

They train the bundled tiny driver, feed the demo and the tests, and let relevance maps be checked against the truth.
Deterministic: a seed gives the same bytes every time.
"""

from vla_ray.data.synthetic.demo import DEMO_DRIVES, write_demo
from vla_ray.data.synthetic.held_out import decisive_scenes, is_decisive
from vla_ray.data.synthetic.render import MASKS, causal_mask, project, render
from vla_ray.data.synthetic.sampling import drive, sample_scene
from vla_ray.data.synthetic.world import (
    CAUSES,
    COMMENTARY,
    Kind,
    Plan,
    Scene,
    Thing,
    advance,
    commentary,
    effect,
    expert,
    target_points,
)
from vla_ray.data.synthetic.write import Truth, read_truth, write_scene

__all__ = [
    "CAUSES",
    "COMMENTARY",
    "DEMO_DRIVES",
    "MASKS",
    "Kind",
    "Plan",
    "Scene",
    "Thing",
    "Truth",
    "advance",
    "causal_mask",
    "commentary",
    "decisive_scenes",
    "drive",
    "effect",
    "expert",
    "is_decisive",
    "project",
    "read_truth",
    "render",
    "sample_scene",
    "target_points",
    "write_demo",
    "write_scene",
]
