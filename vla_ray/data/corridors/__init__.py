"""Procedural corridors: a CAST-like set in which one picture carries several instructions with different actions.

They train the bundled tiny policy and let every later question be checked against the truth: which door was meant,
where it is in the picture, how the robot should drive. Deterministic: a seed gives the same bytes every time.
"""

from vla_ray.data.corridors.scene import HORIZON, CorridorScene, scene
from vla_ray.data.corridors.shards import COUNTERFACTUAL, NATURAL, VERSION, read, shards
from vla_ray.data.corridors.tasks import Task

__all__ = ["COUNTERFACTUAL", "HORIZON", "NATURAL", "VERSION", "CorridorScene", "Task", "read", "scene", "shards"]
