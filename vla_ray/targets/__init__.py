"""What is explained: kinematic scalars of a trajectory, the logit of a generated token, or what a policy expects."""

from vla_ray.targets.acting import acting_direction
from vla_ray.targets.kinematics import DT, KINEMATICS, Kinematic, kinematic_scalar, kinematic_scalars
from vla_ray.targets.policy import POLICY_SCALARS, policy_scalar, policy_targets
from vla_ray.targets.spline import Spline
from vla_ray.targets.target import Target, named_target, parse_targets, target_info
from vla_ray.targets.text import ChosenToken, choose_token, text_target_name

__all__ = [
    "DT",
    "KINEMATICS",
    "POLICY_SCALARS",
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
    "policy_scalar",
    "policy_targets",
    "target_info",
    "text_target_name",
]
