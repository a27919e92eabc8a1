"""Which generated token a text target explains.

The scalar of a text target is the raw logit (not the log-probability) of one sampled token, as in the original scripts;
a strategy says which. Scores are those of the sampled ids of one frame, in order, including the end-of-sequence token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vla_ray.errors import TargetError, nearest

Strategy = Literal["max", "last", "index"]

STRATEGIES: tuple[Strategy, ...] = ("max", "last", "index")


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """The token that was explained: its position among the generated ones, its id, and its text in the vocabulary."""

    index: int
    id: int
    string: str


def check_strategy(strategy: str) -> Strategy:
    """The strategy itself; TargetError with the known ones otherwise."""
    for known in STRATEGIES:
        if strategy == known:
            return known
    raise TargetError(
        f"unknown text_token_strategy {strategy!r}; known: {', '.join(STRATEGIES)}.{nearest(strategy, STRATEGIES)}"
    )


def text_target_name(strategy: Strategy, index: int = 0) -> str:
    """`text_max`, `text_last`, or `text_<i>` for the strategy `index`; a negative index counts as 0."""
    return f"text_{max(index, 0)}" if strategy == "index" else f"text_{strategy}"


def choose_token(scores: Tensor, strategy: Strategy, index: int = 0) -> int:
    """Position of the token to explain among the generated ones.

    Args:
        scores: raw logits [n] of the n sampled tokens of one frame.
        strategy: `max` the highest score (the first of equals), `last` the last token (normally end-of-sequence),
            `index` the token number `index`, clamped to 0 ... n-1.

    Raises:
        TargetError: nothing was generated.
    """
    count = len(scores)
    if count == 0:
        raise TargetError(
            "no token was generated for this frame, so there is no text to explain; use explain_mode=action"
        )
    if strategy == "max":
        return int(scores.argmax())
    if strategy == "last":
        return count - 1
    return min(max(index, 0), count - 1)
