"""Augmentation: whatever is done to the picture is done to the action and to the words."""

from __future__ import annotations

import numpy as np
import pytest

from vla_ray.config.train import AugmentConfig
from vla_ray.data.cast.instructions import swap_sides
from vla_ray.training.augment import augment

NONE = AugmentConfig(mirror=0, brightness=0, contrast=0, shift=0)
RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
ACTIONS = np.array([[1.0, 0.5], [1.0, -0.25]], np.float32)


def run(settings: AugmentConfig, text: str = "turn left", seed: int = 0):
    return augment(RGB, text, ACTIONS, settings, np.random.default_rng(seed))


def test_nothing_changes_nothing() -> None:
    rgb, text, actions = run(NONE)
    assert (rgb == RGB).all()
    assert text == "turn left"
    assert (actions == ACTIONS).all()


def test_a_mirrored_picture_asks_for_the_mirrored_action() -> None:
    rgb, text, actions = run(AugmentConfig(mirror=1, brightness=0, contrast=0))
    assert (rgb == RGB[:, ::-1]).all()
    assert text == "turn right"
    assert (actions == ACTIONS * [1, -1]).all()
    assert (ACTIONS[:, 1] == [0.5, -0.25]).all(), "the sample itself stays"


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("Turn left, then LEFT again", "Turn right, then RIGHT again"),
        ("pass the leftmost chair on your Right", "pass the rightmost chair on your Left"),
        ("turn clockwise", "turn counterclockwise"),
        ("leftover boxes, bright lights", "leftover boxes, bright lights"),
        ("go forward", "go forward"),
        ("turn counter-clockwise, then Anti clockwise", "turn clockwise, then Clockwise"),
        ("stop right before the door on your right-hand side", "stop right before the door on your left-hand side"),
        ("the chair right next to the left door", "the chair right next to the right door"),
        ("turn right after the chairs", "turn left after the chairs"),
        ("turn right next to the sofa", "turn left next to the sofa"),
        ("the topleft window, leftside wall", "the topright window, rightside wall"),
    ],
)
def test_words(text: str, mirrored: str) -> None:
    assert swap_sides(text) == mirrored


@pytest.mark.parametrize("text", ["turn left past the rightmost door", "Right-hand side, leftwards"])
def test_swapping_twice_is_nothing(text: str) -> None:
    assert swap_sides(swap_sides(text)) == text


def test_colours_change_within_bounds_and_shape_stays() -> None:
    settings = AugmentConfig(mirror=0, brightness=0.2, contrast=0.2)
    changed = [run(settings, seed=s)[0] for s in range(20)]
    assert all(c.dtype == np.uint8 and c.shape == RGB.shape for c in changed)
    means = [c.mean() / RGB.mean() for c in changed]
    assert 0.75 < min(means) < 0.95
    assert 1.05 < max(means) < 1.25


def test_a_shift_repeats_the_border() -> None:
    settings = AugmentConfig(mirror=0, brightness=0, contrast=0, shift=0.5)
    shifted = [run(settings, seed=s)[0] for s in range(10)]
    assert any((s != RGB).any() for s in shifted)
    for s in shifted:
        assert {tuple(p) for p in s.reshape(-1, 3)} <= {tuple(p) for p in RGB.reshape(-1, 3)}


def test_the_same_generator_gives_the_same() -> None:
    settings = AugmentConfig(mirror=0.5, brightness=0.3, contrast=0.3, shift=0.2)
    a, b = run(settings, seed=5), run(settings, seed=5)
    assert (a[0] == b[0]).all()
    assert a[1] == b[1]
