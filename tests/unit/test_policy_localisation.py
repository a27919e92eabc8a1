"""Relevance against the masks of what an instruction names, with maps whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from vla_ray.data.corridors import CorridorScene, scene
from vla_ray.data.corridors.render import SIZE
from vla_ray.data.tiles import Tiler
from vla_ray.errors import DataError
from vla_ray.evaluation.policy_localisation import locate, policy_localisation, table
from vla_ray.explain.faithfulness.grid import coverage
from vla_ray.explain.heatmap import HeatMap

GRID = (8, 8)
_, GEOMETRY = Tiler(56, max_tiles=1, cut_bottom=False, use_thumbnail=False)(np.zeros((SIZE, SIZE, 3), np.uint8))


@pytest.fixture(scope="module")
def places() -> list[CorridorScene]:
    """With two doors."""
    found = []
    for seed in range(200):
        place = scene(seed)
        if place.task("door_left") and place.task("door_right"):
            found.append(place)
        if len(found) == 4:
            break
    return found


def on(place: CorridorScene, part: str) -> HeatMap:
    return HeatMap(coverage(place.mask(part), GEOMETRY, GRID), GEOMETRY)


def asked(places: list[CorridorScene], looks_at: str) -> list[tuple[str, str, str, HeatMap]]:
    """Maps of both door instructions; `looks_at` is `named`, `other`, `left` or `nothing`."""
    rows = []
    for place in places:
        for side, other in (("left", "right"), ("right", "left")):
            task = place.task(f"door_{side}")
            assert task is not None
            part = {"named": side, "other": other, "left": "left", "nothing": ""}[looks_at]
            heat = on(place, f"{part} door") if part else HeatMap(np.ones(GRID, np.float32), GEOMETRY)
            rows.append((f"{place.name}/{side}", place.name, task.instructions[-1], heat))
    return rows


def test_a_map_that_follows_the_instruction(places: list[CorridorScene]) -> None:
    found = policy_localisation(asked(places, "named"))
    assert set(found) == {"door", "all"}
    door = found["door"]
    assert door.maps == 8
    assert door.lift.mean is not None
    assert door.lift.low is not None
    assert door.lift.low > 3
    assert door.pointing.mean == 1
    assert door.follows.mean == 1
    assert door.other_lift.mean == pytest.approx(0, abs=1e-6)
    assert door.shift.mean == pytest.approx(door.lift.mean)
    assert door.lift.scenes == 4, "intervals are over pictures, not over maps"


def test_a_map_that_looks_at_the_other_door(places: list[CorridorScene]) -> None:
    door = policy_localisation(asked(places, "other"))["door"]
    assert door.follows.mean == 0
    assert door.shift.high is not None
    assert door.shift.high < 0


def test_a_salient_door_is_no_language(places: list[CorridorScene]) -> None:
    """Half of the time what is always looked at is what was named: lift over chance, but none of it by listening."""
    door = policy_localisation(asked(places, "left"))["door"]
    assert door.lift.mean is not None
    assert door.lift.mean > 1.5
    assert door.shift.mean == pytest.approx(0, abs=1e-6)
    assert door.preference.mean == pytest.approx(0, abs=1.5)
    assert door.follows.mean == 0.5


def test_a_map_of_nothing_is_chance(places: list[CorridorScene]) -> None:
    door = policy_localisation(asked(places, "nothing"))["door"]
    assert door.lift.mean == pytest.approx(1, abs=1e-3)
    assert door.shift.mean == pytest.approx(0, abs=1e-6)
    assert door.pointing.mean == pytest.approx(door.chance.mean)


def test_other_wordings_of_one_door_are_the_same_door(places: list[CorridorScene]) -> None:
    """`go to the red door` names the left one too, and is compared with the maps of the right one."""
    place = places[0]
    color = place.corridor.left.color
    by_color = place.task(f"door_{color}")
    assert by_color is not None
    one = locate("x", place.name, by_color.instructions[0], on(place, "left door"))
    assert one is not None
    assert one.part == "left door"
    assert one.kind == "door"
    assert one.other is not None


def test_an_instruction_that_names_nothing_has_no_score(places: list[CorridorScene]) -> None:
    heat = HeatMap(np.ones(GRID, np.float32), GEOMETRY)
    assert locate("x", places[0].name, "stop", heat) is None
    assert policy_localisation([("x", places[0].name, "stop", heat)]) == {}


def test_what_cannot_be_scored_is_said(places: list[CorridorScene]) -> None:
    heat = HeatMap(np.ones(GRID, np.float32), GEOMETRY)
    with pytest.raises(DataError, match="'kitchen_7' is no corridor"):
        locate("x", "kitchen_7", "stop", heat)
    with pytest.raises(DataError, match=r"is never asked to 'fly'; it is asked: "):
        locate("x", places[0].name, "fly", heat)


def test_the_table_has_a_line_for_each_method(places: list[CorridorScene]) -> None:
    text = table({"relevancy": policy_localisation(asked(places, "named")), "none": {}})
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["method", "part"],
        ["relevancy", "door"],
        ["relevancy", "all"],
    ]
