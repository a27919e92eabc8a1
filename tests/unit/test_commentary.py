"""What a commentary claims, and whether the trajectory does it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vla_ray.data.synthetic import CAUSES, COMMENTARY, commentary, drive, expert
from vla_ray.explain.faithfulness.consistency import Claim, commentary_consistency, parse_claim


@pytest.mark.parametrize(
    ("text", "pace", "way"),
    [
        ("Keep going, the road is clear.", "keep", None),
        ("Stop because of the red traffic light.", "stop", None),
        ("SLOW DOWN behind the lead car.", "slow", None),
        ("Stop for the pedestrian.", "stop", None),
        ("Remain stopped until the light turns green.", "stop", None),
        ("Come to a full stop.", "stop", None),
        ("Wait, then proceed.", "stop", None),
        ("Follow the route. Accelerate since the road is clear.", "accelerate", None),
        ("Maintain the reduced speed.", "keep", None),
        ("Continue slowing down.", "slow", None),
        ("We are stopping.", "stop", None),
        ("The ego vehicle slows down.", "slow", None),
        ("Turn left at the junction.", None, "left"),
        ("Change lanes to the right and accelerate.", "accelerate", "right"),
        ("Continue straight and slow down.", "slow", "straight"),
        # denied
        ("Do not stop, the light is green.", "keep", None),
        ("Don\u2019t slow down.", "keep", None),
        ("No need to stop.", "keep", None),
        ("Drive past the stop sign without stopping.", "keep", None),
        ("Do not proceed.", "stop", None),
        ("Do not accelerate, brake.", "slow", None),
        ("Do not turn left.", None, None),
        # somebody else's, a reason, a possibility, another word
        ("The car ahead has stopped, slow down.", "slow", None),
        ("Since the cars stop, keep going slowly.", "keep", None),
        ("The car ahead is stopping.", None, None),
        ("Slow traffic ahead.", None, None),
        ("Be ready to stop.", None, None),
        ("The bus stop is empty, nonstop.", None, None),
        ("The stop line is rightly bright.", None, None),
        ("Waypoints:", None, None),
        ("", None, None),
    ],
)
def test_claims(text: str, pace: str | None, way: str | None) -> None:
    assert parse_claim(text) == Claim(pace, way)


def waypoints(first: float, last: float) -> np.ndarray:
    """Speed waypoints whose speed changes evenly from `first` to `last` m/s."""
    steps = np.linspace(first, last, 10) * 0.25
    return np.stack([steps.cumsum(), np.zeros(10)], -1)


def route(heading_deg: float = 0.0, lateral: float = 0.0) -> np.ndarray:
    """Straight for 10 m, then in this direction, all moved sideways."""
    a = math.radians(heading_deg)
    steps = np.array([[1.0, 0.0]] * 10 + [[math.cos(a), math.sin(a)]] * 10)
    return steps.cumsum(0) + [0, lateral]


@pytest.mark.parametrize(
    ("text", "before", "after", "outcome"),
    [
        ("Stop.", 6, 0, "consistent"),
        ("Stop.", 6, 2.9, "consistent"),  # on its way to a stop
        ("Stop.", 6, 6, "contradicted"),
        ("Stop.", 6, 4, "contradicted"),
        ("Stop.", 0.1, 0.6, "consistent"),  # hardly moves
        ("Slow down.", 6, 5, "consistent"),
        ("Slow down.", 6, 5.8, "contradicted"),
        ("Slow down.", 0, 0, "consistent"),
        ("Keep going.", 6, 5, "consistent"),
        ("Keep going.", 6, 0, "contradicted"),
        ("Keep going.", 0, 0, "contradicted"),
        ("Keep going.", 0, 3, "consistent"),
        ("Accelerate.", 3, 5, "consistent"),
        ("Accelerate.", 3, 3, "contradicted"),
        ("Hello.", 3, 3, "no claim"),
        ("Do not stop.", 6, 0, "contradicted"),
    ],
)
def test_pace(text: str, before: float, after: float, outcome: str) -> None:
    found = commentary_consistency(text, route(), waypoints(before, after), before)
    assert found.outcome == outcome
    assert found.input_speed_mps == before
    assert found.end_speed_mps == pytest.approx(after)
    assert found.way_holds is None


@pytest.mark.parametrize(
    ("text", "heading", "lateral", "outcome"),
    [
        ("Turn left.", -30, 0, "consistent"),
        ("Turn left.", 30, 0, "contradicted"),
        ("Turn right.", 30, 0, "consistent"),
        ("Turn right.", 0, 0, "contradicted"),
        ("Change lanes to the left.", 0, -3, "consistent"),
        ("Go straight.", 0, 0, "consistent"),
        ("Go straight.", 40, 0, "contradicted"),
    ],
)
def test_way(text: str, heading: float, lateral: float, outcome: str) -> None:
    found = commentary_consistency(text, route(heading, lateral), waypoints(5, 5), 5)
    assert found.outcome == outcome
    assert found.heading_deg == pytest.approx(heading, abs=1e-6)


def test_one_claim_that_does_not_hold_contradicts() -> None:
    found = commentary_consistency("Turn left and slow down.", route(-30), waypoints(5, 5), 5)
    assert (found.way_holds, found.pace_holds, found.outcome) == (True, False, "contradicted")


def test_without_an_input_speed_the_first_waypoint_gives_it() -> None:
    found = commentary_consistency("Slow down.", route(), waypoints(5, 3))
    assert found.input_speed_mps == pytest.approx(5)
    assert found.outcome == "consistent"


def test_the_synthetic_driver_says_what_the_expert_does() -> None:
    """At the end of a drive the cause is near, and the expert's plan shows it."""
    assert [parse_claim(COMMENTARY[c]).pace for c in CAUSES] == ["keep", "stop", "slow", "stop"]
    for cause in ("clear", "red_light", "pedestrian"):
        *_, scene = drive(12, 4, cause, curve=False)
        plan = expert(scene)
        found = commentary_consistency(commentary(scene), plan.route, plan.speed_waypoints, scene.speed)
        assert found.outcome == "consistent", cause
