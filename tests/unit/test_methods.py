"""The table of methods: every name leads to something that exists, and the README tells of every one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vla_ray.errors import TargetError
from vla_ray.explain.folds import FOLDS, chains
from vla_ray.explain.methods import DEFAULT_METHOD, METHODS, folds_of, parse_methods
from vla_ray.stages.pixel_maps import _MAKERS
from vla_ray.targets import KINEMATICS, acting_direction


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda m: m.name)
def test_every_method_can_be_made(method: object) -> None:
    from vla_ray.explain.methods import Method

    assert isinstance(method, Method)
    if method.kind == "fold":
        for direction in ("positive", "negative"):
            assert method.fold_for(direction) in FOLDS
        assert set(method.folds()) <= set(FOLDS)
        assert not (method.tokens and FOLDS[method.folds()[0]].language is None)
    elif method.needs_pixels:
        assert method.name in _MAKERS
    else:
        assert method.kind == "original"


def test_names_are_parsed_in_order_and_once() -> None:
    assert [m.name for m in parse_methods("rollout, relevancy,rollout")] == ["rollout", "relevancy"]
    assert [m.name for m in parse_methods(["relevancy", "occlusion,iss"])] == ["relevancy", "occlusion", "iss"]
    with pytest.raises(TargetError, match=r"unknown method 'relevance'.*Did you mean 'relevancy'"):
        parse_methods("relevance")
    with pytest.raises(TargetError, match="methods is empty"):
        parse_methods([])


def test_the_default_folds_both_directions_once() -> None:
    folds = folds_of(parse_methods([DEFAULT_METHOD, "relevancy_lm", "relevancy_negative"]))
    assert folds == ("relevancy_positive", "relevancy_negative")
    towers = chains(folds)
    assert set(towers["vision"]) == set(folds)
    assert len(towers["language"]) == 3, "and what the first hop moves, by which both are scaled"


def test_what_acts() -> None:
    assert {name for name in KINEMATICS if acting_direction(name, 1.0) == "negative"} == {
        "longitudinal_progress",
        "forward_speed",
    }
    assert acting_direction("lateral_offset", -0.1) == "negative"
    assert acting_direction("lateral_offset", 0.1) == acting_direction("text_max", -3.0) == "positive"


def test_the_readme_lists_every_method(repo: Path) -> None:
    table = (repo / "README.md").read_text().split("## Methods")[1].split("## ")[0]
    listed: set[str] = set()
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", row)
        listed.add(first.removeprefix("methods="))
        for other in others:
            stem = re.sub(r"_(positive|raw)$", "", first)
            listed.add(stem + other if other.startswith("_") else other)
    assert listed - {""} == set(METHODS)
