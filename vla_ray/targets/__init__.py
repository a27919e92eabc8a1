"""What is explained: kinematic scalars of a trajectory, or the logit of a generated token."""

from vla_ray.targets.kinematics import DT, KINEMATICS, Kinematic, acting_direction, kinematic_scalar, kinematic_scalars
from vla_ray.targets.spline import Spline
from vla_ray.targets.target import Target, named_target, parse_targets, target_info
from vla_ray.targets.text import ChosenToken, choose_token, text_target_name

__all__ = [
    "DT",
    "KINEMATICS",
    "ChosenToken",
    "Kinematic",
    "Spline",
    "Target",
    "acting_direction",
    "choose_token",
    "kinematic_scalar",
    "kinematic_scalars",
    "named_target",
    "parse_targets",
    "target_info",
    "text_target_name",
]
