"""What of an action policy a map can explain: scalars of its distributions over bins.

Action tokens are x0 y0 x1 y1 ..., each a distribution over K bins given those chosen before it. An expected value over
bins is differentiable where the chosen bin is not. Tokens chosen before are held fixed, and they tell most of what is
to come: an end point's later steps read the steps before them more than the picture. Where a policy decides, and what
it looks at then, is asked of the first step: `token_1` (why this bin), `side`, `y_0`. An expected value also moves with
how far, and what shows the way may well lower it; `side` does not, but turns its sign with the instruction, and what
acts with it, even where the policy looks at the same things.

Shapes: B samples, N of the 2H action tokens, K bins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_ray.errors import TargetError, nearest
from vla_ray.targets.kinematics import Acts
from vla_ray.targets.target import Target

_ONE = re.compile(r"(token|x|y)_(\d{1,4})")
_AXES = "xy"
UNIT = "waypoint spacings"


@dataclass(frozen=True, slots=True)
class PolicyScalar:
    """A scalar with a name of its own; `axis` of the tokens that it reads is 0 for x, 1 for y."""

    name: str
    axis: int
    unit: str
    description: str
    acts: Acts


POLICY_SCALARS: dict[str, PolicyScalar] = {
    scalar.name: scalar
    for scalar in (
        PolicyScalar("lateral_offset", 1, UNIT, "expected y of the end point, left positive", "outward"),
        PolicyScalar("forward_progress", 0, UNIT, "expected x of the end point", "lowering"),
        PolicyScalar("side", 1, "nats", "log-odds of the first step: to the left, against to the right", "outward"),
    )
}
_SIDE_TOKEN = 1  # y of the first step
_STEPS_ACT: dict[str, Acts] = {"x": "lowering", "y": "outward"}


def policy_targets(names: str | Sequence[str], num_steps: int) -> tuple[Target, ...]:
    """Targets by name, in the order given, without duplicates: `[a,b]` or `"a,b"`.

    Known are those of POLICY_SCALARS; `x_<k>` and `y_<k>`, the expected delta of step k of num_steps; `token_<k>`,
    the log-probability of the bin that was chosen for action token k of 2 * num_steps.

    Raises:
        TargetError: none, or an unknown one.
    """
    known = (
        f"{', '.join(POLICY_SCALARS)}, x_0 ... x_{num_steps - 1}, y_0 ... y_{num_steps - 1}, "
        f"token_0 ... token_{2 * num_steps - 1}"
    )
    given = names.split(",") if isinstance(names, str) else [part for n in names for part in str(n).split(",")]
    wanted = [name.strip() for name in given if name.strip()]
    if not wanted:
        raise TargetError(f"no target is named; give one or more of: {known}")
    found = []
    for name in wanted:
        index = _token_of(name)
        if name not in POLICY_SCALARS and (index is None or index >= 2 * num_steps):
            raise TargetError(
                f"unknown target {name!r} of a policy of {num_steps} steps; known: {known}."
                f"{nearest(name, POLICY_SCALARS)}"
            )
        found.append(Target(name, "action", index=_SIDE_TOKEN if name == "side" else index))
    return tuple(dict.fromkeys(found))


def policy_acts(name: str) -> Acts | None:
    """Which evidence acts on a target of a policy; None if it is none."""
    if name in POLICY_SCALARS:
        return POLICY_SCALARS[name].acts
    return _STEPS_ACT.get(_word(name))


def tokens_read(target: Target, num_steps: int) -> slice:
    """Which of the 2 * num_steps action tokens a target reads."""
    if target.index is not None:
        return slice(target.index, target.index + 1)
    return slice(POLICY_SCALARS[target.name].axis, 2 * num_steps, 2)


def policy_scalar(target: Target, logits_BNK: Tensor, bins_BN: Tensor, centers_2K: Tensor) -> Tensor:
    """The scalar of every sample, [B].

    Args:
        logits_BNK: of the tokens that it reads, over action bins.
        bins_BN: the chosen ones.
        centers_2K: of the bins of x and y, in units (ActionTokenizer.centers).
    """
    if target.name == "side":
        left_K = centers_2K[1] > 0
        logits_BK = logits_BNK[:, 0]
        return logits_BK[:, left_K].logsumexp(-1) - logits_BK[:, ~left_K].logsumexp(-1)
    if _word(target.name) == "token":
        return logits_BNK.log_softmax(-1).gather(-1, bins_BN[..., None])[:, 0, 0]
    axis = _AXES.index(_word(target.name)) if target.index is not None else POLICY_SCALARS[target.name].axis
    return (torch.softmax(logits_BNK, -1) @ centers_2K[axis].to(logits_BNK)).sum(1)


def _word(name: str) -> str:
    """`y` of `y_3`; nothing of a name without a number."""
    one = _ONE.fullmatch(name)
    return one[1] if one else ""


def _token_of(name: str) -> int | None:
    """The one action token that a numbered target reads."""
    one = _ONE.fullmatch(name)
    if one is None:
        return None
    number = int(one[2])
    return number if one[1] == "token" else 2 * number + _AXES.index(one[1])
