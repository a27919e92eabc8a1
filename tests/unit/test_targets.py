"""Kinematic scalars against the original's numbers and against physics; text targets; the parsing of settings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_ray.errors import TargetError
from vla_ray.schema import KINEMATIC_COLUMNS
from vla_ray.targets.kinematics import DT, KINEMATICS, kinematic, kinematic_scalar, kinematic_scalars
from vla_ray.targets.segments import MIN_SEGMENT
from vla_ray.targets.spline import Spline
from vla_ray.targets.target import Target, parse_targets, target_info
from vla_ray.targets.text import ChosenToken, choose_token, text_target_name

FRAMES = ("frame_0000", "frame_0001", "frame_0002")


class Golden:
    """One frame's reference arrays and scalars."""

    def __init__(self, root: Path, frame: str) -> None:
        expected = root / "simlingo_a" / "expected"
        self.arrays = np.load(expected / f"{frame}.npz")
        summary = json.loads((expected / "summary.json").read_text())
        self.summary = next(entry for entry in summary["frames"] if entry["frame"] == frame)

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


@pytest.fixture(params=FRAMES)
def frame(request: pytest.FixtureRequest, golden: Path) -> Golden:
    return Golden(golden, request.param)


def points(xy: list[tuple[float, float]], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([xy], dtype=dtype, requires_grad=True)


def arc(radius: float, step: float, count: int, clockwise: bool = False) -> Tensor:
    angles = [i * step / radius for i in range(count)]
    side = 1 if clockwise else -1
    return points([(radius * math.sin(a), side * radius * (1 - math.cos(a))) for a in angles])


def along_x(xs: list[float]) -> Tensor:
    return points([(x, 0.0) for x in xs])


def value_and_gradient(name: str, inputs: Tensor) -> tuple[float, Tensor]:
    inputs = inputs.detach().requires_grad_()
    value = KINEMATICS[name].function(inputs)
    (gradient,) = torch.autograd.grad(value.sum(), inputs)
    return value.item(), gradient


# Golden values


def test_scalars_equal_the_original(frame: Golden) -> None:
    ours = kinematic_scalars(frame.tensor("pred_route"), frame.tensor("pred_speed_wps"))
    reference = frame.summary["scalars"]
    shared = [name for name in KINEMATICS if name in reference]
    assert len(shared) == 7
    for name in shared:
        assert ours[name].item() == pytest.approx(reference[name], rel=1e-4), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_scalars_after_the_spline_equal_the_original(frame: Golden, smoothing: float) -> None:
    spline = Spline(enabled=True, smoothing=smoothing)
    ours = kinematic_scalars(frame.tensor("pred_route"), frame.tensor("pred_speed_wps"), spline)
    for name, value in frame.summary["scalars_with_spline"][f"smoothing_{smoothing}"].items():
        assert ours[name].item() == pytest.approx(value, rel=1e-3), name


def test_gradients_equal_the_original(frame: Golden) -> None:
    names = [name for name in KINEMATICS if f"grad_out/{name}" in frame.arrays]
    assert len(names) == 7
    for name in names:
        inputs = frame.tensor("pred_route" if KINEMATICS[name].head == "route" else "pred_speed_wps")
        _, gradient = value_and_gradient(name, inputs)
        reference = frame.tensor(f"grad_out/{name}")
        assert (gradient[0] - reference).abs().max() <= 1e-3 * reference.abs().max(), name


# Physics


@pytest.mark.parametrize("clockwise", [False, True])
def test_a_circle_has_the_curvature_of_its_radius(clockwise: bool) -> None:
    radius, step, count = 25.0, 1.0, 20
    chord = 2 * radius * math.sin(step / radius / 2)
    route = arc(radius, step, count, clockwise)
    curvature = step / radius / chord
    assert curvature == pytest.approx(1 / radius, rel=1e-3)
    assert value_and_gradient("curv_energy", route)[0] == pytest.approx((count - 2) * curvature**2)
    assert value_and_gradient("curv_diff", route)[0] == pytest.approx(0, abs=1e-18)
    assert value_and_gradient("yaw_rate_energy", route)[0] == pytest.approx((count - 2) * (step / radius / DT) ** 2)


def test_lateral_offset_is_positive_to_the_right() -> None:
    assert value_and_gradient("lateral_offset", arc(25, 1, 20, clockwise=True))[0] > 1
    assert value_and_gradient("lateral_offset", arc(25, 1, 20, clockwise=False))[0] < -1


def test_constant_acceleration() -> None:
    speed, acceleration, count = 5.0, 2.0, 10
    times = [i * DT for i in range(count)]
    waypoints = along_x([speed * t + acceleration * t**2 / 2 for t in times])
    assert value_and_gradient("acc_energy", waypoints)[0] == pytest.approx((count - 2) * acceleration**2)
    assert value_and_gradient("brake_energy", waypoints)[0] == 0
    assert value_and_gradient("jerk_energy", waypoints)[0] == pytest.approx(0, abs=1e-18)
    assert value_and_gradient("forward_speed", waypoints)[0] == pytest.approx(speed + acceleration * times[-1] / 2)
    assert value_and_gradient("longitudinal_progress", waypoints)[0] == pytest.approx(waypoints[0, -1, 0].item())


def test_constant_deceleration_is_brake_energy() -> None:
    waypoints = along_x([10 * i * DT - 1.5 * (i * DT) ** 2 for i in range(10)])
    assert value_and_gradient("brake_energy", waypoints)[0] == pytest.approx(8 * 9.0)
    assert value_and_gradient("acc_energy", waypoints)[0] == pytest.approx(8 * 9.0)


def test_headings_are_wrapped_where_they_cross_the_backward_axis() -> None:
    """A gentle bend while driving along -x: unwrapped headings jump by 2 pi there."""
    gentle = arc(25.0, 1.0, 20)
    turned = (gentle - gentle[:, 10:11]) @ torch.tensor([[-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    headings = torch.atan2(turned.diff(dim=1)[..., 1], turned.diff(dim=1)[..., 0])
    assert headings.abs().max() > 3  # the case is the one it says
    for name in ("curv_energy", "curv_diff", "yaw_rate_energy"):
        assert value_and_gradient(name, turned)[0] == pytest.approx(value_and_gradient(name, gentle)[0], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "xs",
    [
        [0.0] * 10,  # standstill
        [7.0] * 10,
        [0, 1, 2, 3, 4, 4, 4, 4, 4, 4],  # stops
        [0, 0, 0, 0, 0, 0.5, 1.5, 3, 5, 7],  # starts
        [0, 1, 1, 1, 1, 2, 3, 3, 4, 5],  # stop and go
        [0, 1, 2, 3, 2, 1, 0, -1, -2, -3],  # turns back on itself
        [float(i) for i in range(10)],  # straight on
        [i * 1e-6 for i in range(10)],  # creeps
        [i * MIN_SEGMENT for i in range(10)],  # on the threshold
        [i * 1e-30 for i in range(10)],  # squares underflow
    ],
)
def test_values_and_gradients_are_finite(xs: list[float], dtype: torch.dtype) -> None:
    for y in (0.0, 3.0):
        inputs = torch.tensor([[(x, y) for x in xs]], dtype=dtype)
        for name in KINEMATICS:
            value, gradient = value_and_gradient(name, inputs)
            assert math.isfinite(value), name
            assert gradient.isfinite().all(), name
            assert gradient.abs().max() < 1e6, name


def test_standstill_is_degenerate() -> None:
    for name in KINEMATICS:
        value, gradient = value_and_gradient(name, along_x([0.0] * 10))
        assert value == 0
        assert (gradient == 0).all() or name == "lateral_offset"


def test_a_standing_stretch_adds_no_curvature() -> None:
    """Standing points jitter by millimetres: their heading means nothing, and does not reach the scalar."""
    bend = arc(20.0, 1.0, 12)
    jitter = torch.tensor([[0.0, 0.0], [0.004, 0.001], [-0.002, 0.003], [0.001, -0.004]], dtype=torch.float64)
    stopped = torch.cat([bend, bend[:, -1:] + jitter], dim=1)
    for name in ("curv_energy", "curv_diff", "yaw_rate_energy"):
        assert value_and_gradient(name, stopped)[0] == pytest.approx(value_and_gradient(name, bend)[0])
        _, gradient = value_and_gradient(name, stopped)
        assert (gradient[:, len(bend[0]) :] == 0).all()


def test_direction_of_travel_is_that_of_the_first_real_step() -> None:
    """A car that waits and then drives off sideways made progress; noise while waiting chooses no direction."""
    waiting = [(0.0, 0.0), (-0.003, 0.001), (0.002, 0.0)]
    driving = [(0.002, float(y)) for y in range(1, 8)]
    value, _ = value_and_gradient("longitudinal_progress", points(waiting + driving))
    assert value == pytest.approx(7, abs=0.02)
    creeping = along_x([i * 0.005 for i in range(10)])  # no real step at all: x forward
    assert value_and_gradient("longitudinal_progress", creeping)[0] == pytest.approx(0.045)


def test_reversing_is_no_progress_beyond_the_turn() -> None:
    there_and_back = along_x([0, 1, 2, 3, 4, 5, 4, 3, 2, 1])
    assert value_and_gradient("longitudinal_progress", there_and_back)[0] == pytest.approx(5)
    assert value_and_gradient("forward_speed", there_and_back)[0] == pytest.approx(5 / 9 / DT)


@pytest.mark.parametrize("name", list(KINEMATICS))
def test_a_nan_is_never_hidden(name: str) -> None:
    inputs = torch.arange(40, dtype=torch.float64).reshape(1, 20, 2)
    inputs[0, -1] = torch.nan
    assert math.isnan(KINEMATICS[name].function(inputs).item())


@pytest.mark.parametrize("name", list(KINEMATICS))
def test_gradcheck(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    steps = torch.tensor([1.0, 0.1], dtype=torch.float64) + 0.3 * torch.randn(
        2, 8, 2, generator=generator, dtype=torch.float64
    )
    inputs = steps.cumsum(1).requires_grad_()
    assert torch.autograd.gradcheck(KINEMATICS[name].function, (inputs,))


@pytest.mark.parametrize("spline", [None, Spline(enabled=True, smoothing=0.1)])
def test_frames_of_a_batch_do_not_mix(golden: Path, spline: Spline | None) -> None:
    frames = [Golden(golden, name) for name in FRAMES]
    route = torch.cat([f.tensor("pred_route") for f in frames] + [torch.zeros(1, 20, 2)])
    speed = torch.cat([f.tensor("pred_speed_wps") for f in frames] + [torch.zeros(1, 10, 2)])
    batched = kinematic_scalars(route, speed, spline)
    for i in range(len(route)):
        single = kinematic_scalars(route[i : i + 1], speed[i : i + 1], spline)
        for name, value in batched.items():
            assert value.shape == (4,)
            assert value[i].item() == pytest.approx(single[name].item(), rel=1e-6, abs=1e-9)


# Registry


def test_the_registry_is_the_metrics_table() -> None:
    assert tuple(KINEMATICS) == KINEMATIC_COLUMNS
    route, speed = torch.rand(2, 20, 2), torch.rand(2, 10, 2)
    assert tuple(kinematic_scalars(route, speed)) == KINEMATIC_COLUMNS
    everything = kinematic_scalars(route, speed)
    for name in KINEMATICS:
        torch.testing.assert_close(kinematic_scalar(name, route, speed), everything[name])


def test_an_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(TargetError, match=r"curv_enrgy.*jerk_energy.*Did you mean 'curv_energy'"):
        kinematic("curv_enrgy")


# Text


def test_choice_of_token_equals_the_original(frame: Golden) -> None:
    scores = torch.tensor(frame.summary["token_logits"])
    assert choose_token(scores, "max") == frame.summary["text_max_index"]
    assert choose_token(scores, "last") == len(scores) - 1
    assert choose_token(scores, "index", frame.summary["text_index"]) == frame.summary["text_index"]


@pytest.mark.parametrize(("asked", "given"), [(-4, 0), (0, 0), (2, 2), (3, 2), (99, 2)])
def test_an_index_is_clamped(asked: int, given: int) -> None:
    assert choose_token(torch.tensor([1.0, 3.0, 2.0]), "index", asked) == given


def test_no_text_no_token() -> None:
    with pytest.raises(TargetError, match="no token was generated"):
        choose_token(torch.empty(0), "max")


def test_text_target_names() -> None:
    assert text_target_name("max") == "text_max"
    assert text_target_name("last", 5) == "text_last"
    assert text_target_name("index", 5) == "text_5"
    assert text_target_name("index", -5) == "text_0"


# Settings


@pytest.mark.parametrize("metrics", ["acc_energy,curv_energy", " acc_energy , curv_energy,acc_energy,"])
def test_metrics_as_text(metrics: str) -> None:
    expected = (Target("acc_energy", "action", head="speed"), Target("curv_energy", "action", head="route"))
    assert parse_targets("action", metrics) == expected
    assert parse_targets("action", ["acc_energy", "curv_energy", "acc_energy"]) == expected


def test_text_targets() -> None:
    assert parse_targets("text", text_token_strategy=["max", "index", "last", "max"], text_token_index=3) == (
        Target("text_max", "text", strategy="max"),
        Target("text_3", "text", strategy="index", index=3),
        Target("text_last", "text", strategy="last"),
    )
    assert parse_targets("text", "not read in this mode", "last")[0].name == "text_last"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("acton", "curv_energy", "max", 0), "unknown explain_mode 'acton'.*Did you mean 'action'"),
        (("action", "jerk", "max", 0), "unknown kinematic_metric 'jerk'.*yaw_rate_energy"),
        (("action", [], "max", 0), "kinematic_metric is empty.*curv_energy"),
        (("text", "curv_energy", "lst", 0), "unknown text_token_strategy 'lst'.*Did you mean 'last'"),
        (("text", "curv_energy", " , ", 0), "text_token_strategy is empty"),
    ],
)
def test_wrong_settings(settings: tuple[str, str, str, int], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_targets(*settings)


def test_target_info_of_an_action() -> None:
    (target,) = parse_targets("action", "brake_energy")
    info = target_info(target, Spline(enabled=True, smoothing=0.1))
    assert info == {
        "type": "action",
        "target_mode": "kinematic",
        "kinematic_metric": "brake_energy",
        "description": "sum of squared longitudinal deceleration [(m/s^2)^2]",
        "head": "speed",
        "spline": {"enabled": True, "smoothing": 0.1, "num_samples": 0},
    }
    assert target_info(target)["spline"]["enabled"] is False


def test_target_info_of_text() -> None:
    (target,) = parse_targets("text", text_token_strategy="index", text_token_index=40)
    assert target_info(target, token=ChosenToken(index=12, id=442, string="<|im_end|>")) == {
        "type": "text",
        "token_strategy": "index",
        "token_index": 12,
        "token_id": 442,
        "token_string": "<|im_end|>",
    }
    with pytest.raises(ValueError, match="text_40 needs the chosen token"):
        target_info(target)
