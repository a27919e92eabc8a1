"""What an instruction asks for, read from its words, and what asks for something else.

Regular expressions over short English commands as those of CAST: good for tables by kind, no understanding. The other
instructions (permuted, opposite, atomic) are what shows whether a policy listens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

# Commands of CAST's atomic data sets; as a variant of an inference run, each is its own name.
ATOMIC = ("go forward", "stop", "turn left", "turn right", "adjust left", "adjust right")
KINDS = ("stop", "turn left", "turn right", "adjust", "forward", "landmark", "other")

# Left and right -------------------------------------------------------------------------------------------------

_PAIRS: tuple[str, ...] = (
    "left right",
    "leftmost rightmost",
    "leftward rightward",
    "leftwards rightwards",
    "lefthand righthand",
)
_PAIRS += ("leftside rightside", "topleft topright", "clockwise counterclockwise")
_SIDES = {a: b for pair in _PAIRS for a, b in (pair.split(), pair.split()[::-1])}
# What is no side stays: "stop right before the door", "the chair right next to you"; but "turn right behind the chair".
_NO_SIDE = (
    r"\b(?:stop|wait|stay|stand|halt|park)\w* right(?= (?:before|after|at|by|next|in|behind|beside|here|there)\b)"
    r"|(?<!turn )(?<!go )(?<!bear )(?<!keep )(?<!move )(?<!adjust )"
    r"\bright (?:away|now|here|there|next to|in front|beside)\b"
)
_TURNING = r"\b(?:counter|anti)[- ]?clockwise\b"
_TEXT = re.compile(rf"(?P<kept>{_NO_SIDE})|(?P<turning>{_TURNING})|[A-Za-z]+", re.IGNORECASE)


def swap_sides(text: str) -> str:
    """The instruction for the mirrored picture: left <-> right in every form, letter case kept."""

    def swap(match: re.Match[str]) -> str:
        word = match[0]
        other = "clockwise" if match["turning"] else None if match["kept"] else _SIDES.get(word.lower())
        if other is None:
            return word
        return other.upper() if word.isupper() else other.title() if word[0].isupper() else other

    return _TEXT.sub(swap, text)


def side(text: str) -> int:
    """Where it points: 1 left, -1 right, 0 if it names no side or both."""
    words = {"counterclockwise" if m["turning"] else m[0].lower() for m in _TEXT.finditer(text) if not m["kept"]}
    left = any("left" in word or word == "counterclockwise" for word in words & _SIDES.keys())
    right = any("right" in word or word == "clockwise" for word in words & _SIDES.keys())
    return int(left) - int(right)


# Kinds ----------------------------------------------------------------------------------------------------------

_STOP = re.compile(
    r"^(?:please |now |just )*"
    r"(?:stop|halt|freeze|wait|pause|park|stand still|stay (?:here|put|still|there|in place|where)|stay$|do not move|"
    r"don'?t move|come to a (?:stop|halt|standstill)|remain)\b"
)
_ADJUST = re.compile(
    r"\b(?:adjust|nudge|drift|shift|lean)\w*\b.*\b(?:left|right)\b"
    r"|\b(?:slight|slightly|a little|a bit|gently)\b.{0,20}\b(?:left|right)\b"
    r"|\b(?:left|right)\b.{0,3}\b(?:slightly|a little|a bit)\b"
)
# A side that a verb of motion points to, not the side of a thing: what follows it is not a noun.
_TURN = re.compile(
    r"\b(?:turn|rotate|pivot|swing|spin|veer|bear|curve|go|head|move|steer|make|take|keep|hang)(?:ing|s)? "
    r"(?:(?:a|the|to|your|next|first|second|then|sharp|sharply|hard|immediately|around|off|back|towards) )*"
    r"(?P<side>left|right)(?:wards?)?"
    r"(?=$|[.,;:!]| (?:turn|and|then|at|into|onto|in|on|around|after|before|behind|beside|between|when|where|once|down|"
    r"towards?|to|past|by|through|along|up|until|for|again|now|here|there|from|away)\b)"
)
_ALONG = re.compile(
    r"\b(?:along|down|up|through|follow(?:ing)?|on|in)(?: the| this| that| your)?"
    r" (?:hall|hallway|corridor|aisle|path|pathway|road|sidewalk|pavement|trail|street|lane|passage|walkway)\b"
)
_LANDMARK = re.compile(
    r"\b(?:to|towards?|past|from|around|near|by|beside|behind|between|through|into|at|of|beyond|under|over|across|onto)"
    r" (?:the|a|an|your|that|this|those|these|any|another)\b"
    r"|\b(?:approach|avoid|pass|reach|find|enter|exit|leave|visit|circle|bypass)(?:ing|es|s)? (?:the|a|an|that|this)\b"
)
_FORWARD = re.compile(
    r"\b(?:forwards?|straight|ahead|onwards?|continue|follow|proceed|along|keep (?:going|moving|driving)|go on)\b"
)


def kind(instruction: str) -> str:
    """One of KINDS. "turn left at the door" is a turn, "the door on the left" a landmark, "move slightly left" adjust.

    Forward includes following a corridor or whoever walks ahead. A landmark is anything to go to, past, away from ...
    """
    text = " ".join(re.sub(r"[^a-z.,;:!' ]+", " ", instruction.lower()).split())
    if _STOP.search(text):
        return "stop"
    if _ADJUST.search(text):
        return "adjust"
    if turn := _TURN.search(text):
        return f"turn {turn['side']}"
    rest = _ALONG.sub("along", text)
    if _LANDMARK.search(rest):
        return "landmark"
    return "forward" if _FORWARD.search(rest) or rest != text else "other"


# Other instructions ---------------------------------------------------------------------------------------------


def opposite(instruction: str) -> str | None:
    """What asks for the contrary: left for right, "stop" for going forward, "go forward" for stopping; None if nothing.

    Sides come first: the opposite of "follow the wall on the left" is the same with the right.
    """
    swapped = swap_sides(instruction)
    if swapped != instruction:
        return swapped
    return {"stop": "go forward", "forward": "stop"}.get(kind(instruction))


def permuted(instructions: Sequence[str], seed: int) -> list[str]:
    """Each place gets the instruction of another one, with another text wherever there is one."""
    order = np.random.default_rng(seed).permutation(len(instructions))
    shuffled = [instructions[i] for i in order]
    # For each text where a partner to swap with was last found: few texts among many samples stay one pass each.
    looked: dict[str, int] = {}
    for place, own in enumerate(instructions):
        if shuffled[place] != own:
            continue
        for other in range(looked.get(own, 0), len(shuffled)):
            if shuffled[other] != own and instructions[other] != own:
                shuffled[place], shuffled[other] = shuffled[other], shuffled[place]
                looked[own] = other + 1
                break
        else:
            looked[own] = len(shuffled)
    return shuffled
