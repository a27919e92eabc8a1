"""Does the car do what its commentary says? Says stop, does it stop?

The commentary's main verb is its claim; reasons ("because the car ahead has stopped") are not. The claim is compared
with the predicted trajectory by stated thresholds. A commentary without a verb that can be checked makes no claim.
English only, and plain patterns: what they miss becomes "no claim", which is counted, not guessed.

A stop announced from afar, or by a car that has yet to drive up, reads as contradicted: the waypoints end after 2.5 s.
Where an expert's plan is known, quote its own rate beside the model's (the synthetic expert's is 28 % of its stops).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from vla_ray.targets import DT

Pace = Literal["stop", "slow", "accelerate", "keep"]
Way = Literal["left", "right", "straight"]
Outcome = Literal["consistent", "contradicted", "no claim"]

STANDING_MPS = 0.5  # slower than this at the end of the speed waypoints: it stands
STANDING_M = 1.0  # less progress than this over all of them: it stands
BRAKING_SHARE = 0.5  # at most this share of the input speed left: on its way to a stop that the 2.5 s cut off
CHANGE_MPS = 0.5  # a change of speed that counts
TURN_DEG = 10.0  # heading at the route's end that counts as a turn
LATERAL_M = 1.5  # lateral position of the route's end that counts as going to that side (a lane change has no heading)
_LAST_POINTS = 4  # of the route, whose direction is its heading at the end

# A plan in another form than the imperative: what it is in the imperative.
_INFLECTED = {
    "stopping": "stop", "stops": "stop", "halting": "halt", "waiting": "wait", "waits": "wait",
    "slowing": "slow", "slows": "slow", "braking": "brake", "brakes": "brake", "yielding": "yield", "yields": "yield",
    "decelerating": "decelerate", "decelerates": "decelerate", "reducing": "reduce", "coming": "come", "comes": "come",
    "accelerating": "accelerate", "accelerates": "accelerate", "speeding": "speed", "increasing": "increase",
    "maintaining": "maintain", "maintains": "maintain", "keeping": "keep", "keeps": "keep",
    "proceeding": "proceed", "proceeds": "proceed", "continuing": "continue", "continues": "continue",
    "remaining": "remain", "remains": "remain", "staying": "stay", "stays": "stay",
    "turning": "turn", "turns": "turn", "steering": "steer", "changing": "change", "moving": "move", "merging": "merge",
}  # fmt: skip
# Only after these is such a form the ego's own plan; elsewhere somebody else's ("the car ahead is stopping").
_EGO_FORM = re.compile(
    r"(^|[.;:,!?] |\b(?:i am|i'm|we are|we're|you are|you're|ego(?: vehicle| car)?(?: is)?"
    r"|continue|keep|start|begin|without|avoid|instead of|and) )(" + "|".join(_INFLECTED) + r")\b"
)
# From such a word to the end of its clause a reason or a condition is given, not the plan.
_SUBORDINATE = re.compile(
    r"\b(?:because|since|due to|as|while|until|unless|if|when|where|which|who|that|after|before)\b[^.,;:!?]*"
)
_DENIED = re.compile(
    r"(?:\b(?:not|never|without|avoid|instead of|rather than|no (?:need|reason))|n't) "
    r"(?:(?:need |have )?to )?(?:\w+ly )?$"
)
_POSSIBLE = re.compile(r"\b(?:(?:ready|prepared?|able) to|may|might|could) $")

_PACES: dict[Pace, re.Pattern[str]] = {
    "stop": re.compile(
        r"(?<!the )(?<!a )(?<!bus )\bstop\b(?! (?:sign|line|light)s?\b)|\bcome to an? (?:\w+ )?(?:stop|halt)\b|\bhalt\b"
        r"|\bwait\b|\b(?:remain|stay) (?:stopped|stationary|still)\b|\bstand still\b"
    ),
    "slow": re.compile(
        r"(?<!the )(?<!a )(?<!this )\bslow\b(?![- ](?:car|vehicle|truck|traffic|moving|lane))|\bdecelerate\b|\byield\b"
        r"|(?<!the )\bbrake\b(?! light)|\bapply the brakes?\b|\bgive way\b|\bdrive slower\b"
        r"|\breduce (?:\w+ ){0,2}speed\b"
    ),
    "accelerate": re.compile(
        r"\baccelerate\b|\bspeed up\b|\b(?:go|drive) faster\b|\b(?:pick up|gain) speed\b"
        r"|\bincrease (?:\w+ ){0,2}speed\b|\b(?:start|begin) (?:to )?(?:mov|driv)(?:e|ing)\b|\bset off\b"
    ),
    "keep": re.compile(
        r"\bkeep (?:going|driving|moving)\b|\bcarry on\b|\b(?:go|drive|keep|head) (?:on|ahead|straight|forward)\b"
        r"|\b(?:maintain|keep|hold) (?:\w+ ){0,3}speed\b|\bproceed\b|\bcontinue\b|\bcruise\b|\bresume\b"
    ),
}
_OPPOSITE: dict[Pace, Pace] = {"stop": "keep", "slow": "keep", "keep": "stop"}  # what a denied plan says
_STEER = (
    r"\b(?:turn|steer|bear|veer|swerve|merge|move|shift|pull|change|curve|keep|go) "
    r"(?:(?:to|the|into|over|towards?|lanes?|slightly|sharply|gently|hard) ){0,3}"
)
_WAYS: dict[Way, re.Pattern[str]] = {
    "left": re.compile(_STEER + r"left\b|\bmake a left\b|\btake the (?:next |first )?left\b"),
    "right": re.compile(_STEER + r"right\b|\bmake a right\b|\btake the (?:next |first )?right\b"),
    "straight": re.compile(r"\b(?:go|drive|keep|head|continue|proceed) (?:\w+ )?straight\b"),
}


@dataclass(frozen=True, slots=True)
class Claim:
    """What a commentary says the car will do with its speed, and where it will go; None: it says nothing of it."""

    pace: Pace | None
    way: Way | None


def parse_claim(commentary: str) -> Claim:
    """The claim of a commentary's main clauses, whatever its case.

    Of several paces the first counts, and "keep going" only if there is no other ("continue straight and slow down").
    A denied plan says its opposite where it has one ("do not stop": keep); a possible one ("be ready to stop") nothing.
    """
    text = " ".join(commentary.lower().replace("\u2019", "'").split())
    text = _SUBORDINATE.sub("", text)
    text = _EGO_FORM.sub(lambda m: m[1] + _INFLECTED[m[2]], text)
    said: list[tuple[int, Pace]] = []
    denied: list[tuple[int, Pace]] = []
    for pace, pattern in _PACES.items():
        for match in pattern.finditer(text):
            before = text[: match.start()]
            if _DENIED.search(before):
                denied += [(match.start(), _OPPOSITE[pace])] if pace in _OPPOSITE else []
            elif not _POSSIBLE.search(before):
                said.append((match.start(), pace))
    ways = [
        (match.start(), way)
        for way, pattern in _WAYS.items()
        for match in pattern.finditer(text)
        if not _DENIED.search(text[: match.start()])
    ]
    paces = sorted(said, key=lambda found: (found[1] == "keep", found[0])) or sorted(denied)
    return Claim(paces[0][1] if paces else None, min(ways)[1] if ways else None)


@dataclass(frozen=True, slots=True)
class Consistency:
    """A commentary beside the trajectory that came with it.

    Attributes:
        outcome: `contradicted` if one of its claims is. pace_holds, way_holds: None without such a claim.
        input_speed_mps: as given, else the speed over the first waypoint interval.
        end_speed_mps: over the last waypoint interval. progress_m: along the speed waypoints, from the car.
        heading_deg, lateral_m: of the route's end; right positive.
    """

    claim: Claim
    outcome: Outcome
    pace_holds: bool | None
    way_holds: bool | None
    input_speed_mps: float
    end_speed_mps: float
    progress_m: float
    heading_deg: float
    lateral_m: float


def commentary_consistency(
    commentary: str, route: ArrayLike, speed_waypoints: ArrayLike, input_speed_mps: float | None = None
) -> Consistency:
    """Whether a predicted trajectory does what the commentary says.

    * stop: it stands at the end (slower than 0.5 m/s, or less than 1 m of progress), or has lost half its input speed;
    * slow: it stands, or ends 0.5 m/s slower than the input speed;
    * keep: it does not stand, and keeps more than half its input speed; accelerate: it ends 0.5 m/s faster;
    * left, right: the route's end heads 10 degrees, or lies 1.5 m, to that side; straight: it heads less than that.

    Args:
        route: [20, 2], speed_waypoints: [10, 2] every 0.25 s; metres, x forward, y right, the car at the origin.
        input_speed_mps: what the model was told.
    """
    claim = parse_claim(commentary)
    points = np.concatenate([np.zeros((1, 2)), np.asarray(speed_waypoints, np.float64)])
    steps = np.linalg.norm(np.diff(points, axis=0), axis=-1)
    path = np.asarray(route, np.float64)
    direction = path[-1] - path[-_LAST_POINTS]
    before = float(steps[0] / DT) if input_speed_mps is None else input_speed_mps
    after, progress = float(steps[-1] / DT), float(steps.sum())
    heading, lateral = float(np.degrees(np.arctan2(direction[1], direction[0]))), float(path[-1, 1])
    pace = None if claim.pace is None else _pace_holds(claim.pace, before, after, progress)
    way = None if claim.way is None else _way_holds(claim.way, heading, lateral)
    held = [h for h in (pace, way) if h is not None]
    outcome: Outcome = "no claim" if not held else "consistent" if all(held) else "contradicted"
    return Consistency(claim, outcome, pace, way, before, after, progress, heading, lateral)


def _pace_holds(pace: Pace, before: float, after: float, progress: float) -> bool:
    stands = after < STANDING_MPS or progress < STANDING_M
    if pace == "stop":
        return stands or after <= BRAKING_SHARE * before
    if pace == "slow":
        return stands or after <= before - CHANGE_MPS
    if pace == "accelerate":
        return after >= before + CHANGE_MPS
    return not stands and after > BRAKING_SHARE * before


def _way_holds(way: Way, heading: float, lateral: float) -> bool:
    if way == "straight":
        return abs(heading) < TURN_DEG
    side = 1 if way == "right" else -1
    return side * heading >= TURN_DEG or side * lateral >= LATERAL_M
