"""The contact sheet of a dataset: every sample on it, and paths where they belong."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vla_ray.data.cast.sample import Sample
from vla_ray.errors import ImageError
from vla_ray.report.contact_sheet import SIDE, contact_sheet
from vla_ray.report.overlay import PAPER
from vla_ray.report.trajectory import ROUTE

MARGIN, GAP = 14, 6
CARD = 2 * SIDE + GAP


def picture(color: tuple[int, int, int] = (200, 30, 90), size: tuple[int, int] = (128, 128)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def sample(actions: Any = ((1.0, 0.0),) * 8, **changes: Any) -> Sample:
    values: dict[str, Any] = {
        "sample_id": "a/train/0:0/0000",
        "dataset": "a",
        "split": "train",
        "recording": "scene_1",
        "t": 0,
        "image": picture(),
        "instruction": "go forward",
        "instructions": ("go forward", "move ahead"),
        "actions": np.array(actions, np.float32),
        "valid": np.ones(len(actions), bool),
        "scale_m": 0.25,
    }
    return Sample(**values | changes)


def plans(samples: list[Sample], columns: int = 6) -> list[np.ndarray]:
    """The plans of a sheet with a single row."""
    page = np.asarray(contact_sheet(samples, columns))
    lefts = [MARGIN + k * (CARD + MARGIN) + SIDE + GAP for k in range(len(samples))]
    return [page[MARGIN : MARGIN + SIDE, left : left + SIDE].astype(int) for left in lefts]


def route(plan: np.ndarray) -> np.ndarray:
    """Pixels [n, 2] (right, down) that the path covers, from the middle of the plan's lower part."""
    rows, columns = np.nonzero((np.abs(plan - ROUTE) < 30).all(-1))
    return np.stack([columns - SIDE / 2, rows], -1)


LEFT = [(0.9, 0.1 * k) for k in range(8)]
RIGHT = [(x, -y) for x, y in LEFT]


def test_forward_is_up_left_is_left_and_scales_are_shared() -> None:
    ahead, left, right, short = (
        route(p) for p in plans([sample(), sample(LEFT), sample(RIGHT), sample([(0.5, 0.0)] * 8)])
    )
    assert np.abs(ahead[:, 0]).max() < 5
    assert left[:, 0].min() < -30
    assert np.abs(left[:, 0].min() + right[:, 0].max()) < 3
    length = np.ptp(ahead[:, 1])
    assert length > 0.6 * SIDE
    assert np.ptp(short[:, 1]) == pytest.approx(length / 2, abs=4)
    tip = left[left[:, 1].argmin()]
    assert -tip[0] / (ahead[:, 1].max() - tip[1]) == pytest.approx(2.8 / 7.2, abs=0.05), "equal scales both ways"


@pytest.mark.parametrize("actions", [LEFT, RIGHT, [(-1.0, 0.0)] * 8, [(0.0, 3.0)] * 8, [(0.001, 0.0)] * 8, [(90, 9)]])
def test_paths_stay_inside_their_plan(actions: Any) -> None:
    (plan,) = plans([sample(actions)])
    at = route(plan)
    assert np.abs(at[:, 0]).max(initial=0) < SIDE / 2 - 1
    assert at[:, 1].max(initial=1) < SIDE - 1
    assert at[:, 1].min(initial=1) > 0


def test_standing_still_is_said() -> None:
    moving, still = plans([sample(), sample([(0.0, 0.0)] * 8)])
    assert len(route(moving)) > 50
    assert len(route(still)) == 0
    assert (still[100:136, 84:120].sum(-1) < 150).any(), "a word beside the robot"


def test_without_actions_nobody_stays() -> None:
    empty = np.zeros((0, 2), np.float32)
    log, stop, go = plans([sample(empty), sample([(0.0, 0.0)] * 8), sample()])
    assert not np.array_equal(log, stop)
    assert not len(route(log))
    assert len(route(go))
    plans([sample(empty)])


def test_every_sample_has_a_card() -> None:
    colors = [(10 + 30 * k, 40, 200 - 20 * k) for k in range(8)]
    page = np.asarray(contact_sheet([sample(image=picture(color)) for color in colors], columns=3))
    assert page.shape[1] == MARGIN + 3 * (CARD + MARGIN)
    height = (page.shape[0] - MARGIN - 32) // 3
    for k, color in enumerate(colors):
        x, y = MARGIN + (k % 3) * (CARD + MARGIN) + SIDE // 2, MARGIN + (k // 3) * height + SIDE // 2
        assert tuple(page[y, x]) == color
    assert (page[MARGIN + 2 * height : -40, MARGIN + 2 * (CARD + MARGIN) :] == PAPER).all(), "the ninth place is empty"
    assert contact_sheet([sample()]).width == 2 * MARGIN + CARD, "no empty columns"


def test_pictures_keep_their_proportions() -> None:
    page = np.asarray(contact_sheet([sample(image=picture((9, 9, 9), (160, 40)))]))
    column = (page[MARGIN : MARGIN + SIDE, MARGIN + SIDE // 2] == 9).all(-1)
    assert column.sum() == SIDE // 4


def test_any_text_is_taken() -> None:
    odd = sample(instruction="\ud800 x\n" * 300, dataset="d" * 300, recording="/".join("r" * 300), scale_m=None)
    short = contact_sheet([sample(), odd])
    assert short.size == contact_sheet([sample(), sample()]).size
    words = sample(valid=np.array([True] * 5 + [False] * 3))
    assert np.any(np.asarray(contact_sheet([words])) != np.asarray(contact_sheet([sample()]))), "ends after 5 steps"


def test_refusals() -> None:
    with pytest.raises(ValueError, match="needs samples"):
        contact_sheet([])
    with pytest.raises(ImageError, match=r"a/train/0:0/0000 is not a PNG or JPEG"):
        contact_sheet([sample(image=b"GIF89a")])
