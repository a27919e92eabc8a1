"""Which evidence acts: what a map shows when nobody asks for one direction."""

from __future__ import annotations

from typing import Literal

from vla_ray.targets.kinematics import KINEMATICS
from vla_ray.targets.policy import policy_acts


def acting_direction(name: str, value: float) -> Literal["positive", "negative"]:
    """Which fold shows the evidence that acts on a target of this value: see `Acts`. A token's is positive."""
    acts = KINEMATICS[name].acts if name in KINEMATICS else policy_acts(name)
    return "negative" if acts == "lowering" or (acts == "outward" and value < 0) else "positive"
