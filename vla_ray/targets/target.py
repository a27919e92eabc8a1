"""What a run explains: settings in, a tuple of named targets out, and each target's description in the payload.

The name of a target is half of a metrics row's key (frame_id, target) and part of a payload's file name, so it is
unique in a run and safe in a path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vla_ray.errors import TargetError, nearest
from vla_ray.targets.kinematics import KINEMATICS, Head, kinematic
from vla_ray.targets.spline import Spline
from vla_ray.targets.text import STRATEGIES, ChosenToken, Strategy, check_strategy, text_target_name

Mode = Literal["action", "text"]

MODES: tuple[Mode, ...] = ("action", "text")


@dataclass(frozen=True, slots=True)
class Target:
    """One explained scalar: of a `head` (action), or of the token that `strategy` (and `index`) chooses (text).

    An action policy's has no head; `index` is the action token that it reads, None for all of an axis.
    """

    name: str
    mode: Mode
    head: Head | None = None
    strategy: Strategy | None = None
    index: int | None = None


def parse_targets(
    explain_mode: str,
    kinematic_metric: str | Sequence[str] = "curv_energy",
    text_token_strategy: str | Sequence[str] = "max",
    text_token_index: int = 0,
) -> tuple[Target, ...]:
    """The targets of a run, in the order given, without duplicates.

    `kinematic_metric` and `text_token_strategy` are one name, a list, or a comma separated string; only the one of the
    chosen mode is read. Raises TargetError for an unknown mode, metric or strategy, or when none is named.
    """
    if explain_mode == "action":
        names = _names(kinematic_metric, "kinematic_metric", KINEMATICS)
        targets = [Target(name, "action", head=kinematic(name).head) for name in names]
    elif explain_mode == "text":
        strategies = _names(text_token_strategy, "text_token_strategy", STRATEGIES)
        targets = [_text_target(check_strategy(name), text_token_index) for name in strategies]
    else:
        raise TargetError(
            f"unknown explain_mode {explain_mode!r}; known: {', '.join(MODES)}.{nearest(explain_mode, MODES)}"
        )
    return tuple(dict.fromkeys(targets))


def named_target(name: str) -> Target:
    """The target of this name: a kinematic scalar, or text_max, text_last, text_<i>. TargetError otherwise."""
    strategy = name.removeprefix("text_")
    if strategy == name:
        return parse_targets("action", name)[0]
    if strategy.isdigit():
        return parse_targets("text", text_token_strategy="index", text_token_index=int(strategy))[0]
    return parse_targets("text", text_token_strategy=strategy)[0]


def _text_target(strategy: Strategy, index: int) -> Target:
    name = text_target_name(strategy, index)
    return Target(name, "text", strategy=strategy, index=max(index, 0) if strategy == "index" else None)


def _names(value: str | Sequence[str], setting: str, known: Iterable[str]) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else [part for item in value for part in str(item).split(",")]
    names = [part.strip() for part in parts if part.strip()]
    if not names:
        raise TargetError(f"{setting} is empty; give one or more of: {', '.join(known)}")
    return names


def target_info(target: Target, spline: Spline | None = None, token: ChosenToken | None = None) -> dict[str, Any]:
    """The payload's `target_info`: plain values only. Text targets need the `token` that was chosen for this frame."""
    if target.mode == "action":
        spline = spline or Spline()
        return {
            "type": "action",
            "target_mode": "kinematic",
            "kinematic_metric": target.name,
            "description": f"{kinematic(target.name).description} [{kinematic(target.name).unit}]",
            "head": target.head,
            "spline": {
                "enabled": spline.enabled,
                "smoothing": spline.smoothing,
                "num_samples": spline.num_samples,
            },
        }
    if token is None:
        raise ValueError(f"target_info of {target.name} needs the chosen token")
    return {
        "type": "text",
        "token_strategy": target.strategy,
        "token_index": token.index,
        "token_id": token.id,
        "token_string": token.string,
    }
