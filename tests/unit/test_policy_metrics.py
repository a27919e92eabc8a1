"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import json
from math import comb

import numpy as np
import pytest

from vla_ray.evaluation.policy.calibration import risk_coverage_auc, token_hits
from vla_ray.evaluation.policy.intervals import Resampler, binomial_p, rank_correlation, ranks, wilcoxon_p
from vla_ray.evaluation.policy.metrics import STILL, STRAIGHT, score, score_all
from vla_ray.evaluation.policy.predictions import Predictions
from vla_ray.evaluation.policy.summary import kind_table, summarise, turn_side
from vla_ray.models.paligemma.actions import ActionNormalizer, ActionTokenizer
from vla_ray.storage.location import Location

AHEAD = [[1.0, 0.0], [1.0, 0.0]]
LEFT = [[1.0, 0.0], [0.0, 1.0]]
RIGHT = [[1.0, 0.0], [0.0, -1.0]]


def arrays(*rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, float)


def predictions(predicted: np.ndarray, target: np.ndarray, **more) -> Predictions:
    count = len(predicted)
    values = {
        "name": "p", "location": Location.of("/nowhere/p.csv"), "sample_id": tuple(f"s{i}" for i in range(count)),
        "instruction": ("turn left",) * count, "dataset": (None,) * count, "recording": (None,) * count,
        "picture_hash": (None,) * count, "predicted": predicted,
        "target": target, "valid": np.isfinite(target).all(-1), "scale_m": np.full(count, np.nan),
        "image_path": (None,) * count, "error": (None,) * count, "median_step": 1.0, "median_from": "a test",
    }  # fmt: skip
    return Predictions(**(values | more))


def scored(predicted: np.ndarray, target: np.ndarray, scale: float = np.nan, **more):
    return score(predicted, target, np.isfinite(target).all(-1), np.full(len(predicted), scale), **more)


def test_one_trajectory_by_hand() -> None:
    found = scored(arrays(AHEAD), arrays(LEFT), scale=0.5).columns
    # deltas differ by (0, 0) and (1, -1); positions (1, 0) and (2, 0) against (1, 0) and (1, 1)
    assert found["mse"] == pytest.approx([0.5])
    assert found["mae"] == pytest.approx([0.5])
    assert found["rmse"] == pytest.approx([np.sqrt(0.5)])
    assert found["success_rate_0.1"] == [0.5]
    assert found["ade"] == pytest.approx([np.sqrt(2) / 2])
    assert found["fde"] == pytest.approx([np.sqrt(2)])
    assert found["fde_m"] == pytest.approx([np.sqrt(2) / 2])
    assert [found[f"success_fde_{t}"][0] for t in ("0.5", "1", "2")] == [0, 0, 1]
    assert [found[f"success_fde_{t}_m"][0] for t in ("0.25", "0.5", "1")] == [0, 0, 1]
    assert found["miss"] == [0]
    assert found["heading_error"] == pytest.approx([45])
    assert found["cosine"] == pytest.approx([(1 + np.cos(np.pi / 4)) / 2])
    assert found["turn_side"] == [0], "straight ahead is not to the left"


def test_errors_add_up_along_the_way() -> None:
    target = np.zeros((1, 4, 2))
    predicted = target.copy()
    predicted[0, 0, 0] = 1.0
    found = scored(predicted, target).columns
    assert found["ade"] == [1.0], "one wrong step moves all positions after it"
    assert found["success_rate_0.1"] == [0.75]


def test_sides_headings_and_cosines_only_where_they_exist() -> None:
    small = [[0.01, 0.0], [0.01, 0.0]]
    found = scored(arrays(LEFT, RIGHT, LEFT, [[0, 0], [0, 0]], AHEAD), arrays(LEFT, LEFT, AHEAD, LEFT, small)).columns
    np.testing.assert_array_equal(found["turn_side"], [1, 0, np.nan, 0, np.nan])
    np.testing.assert_allclose(found["heading_error"], [0, 90, 45, 90, np.nan], atol=1e-5)
    np.testing.assert_allclose(found["cosine"][3:], [0, np.nan])


def test_failed_and_padded_samples() -> None:
    predicted = arrays(AHEAD, AHEAD, AHEAD)
    predicted[0] = np.nan
    target = arrays(AHEAD, LEFT, AHEAD)
    valid = np.array([[True, True], [True, False], [True, True]])
    found = score(predicted, target, valid, np.full(3, np.nan)).columns
    np.testing.assert_array_equal(found["mse"], [np.nan, 0, 0])
    np.testing.assert_array_equal(found["ade"], [np.nan, np.nan, 0])


def test_the_best_of_the_samples() -> None:
    samples = np.stack([arrays(RIGHT, LEFT, AHEAD)])
    assert scored(arrays(AHEAD), arrays(LEFT), samples=samples).columns["min_ade"] == [0.0]


def test_failures_are_scored_for_no_one() -> None:
    predicted = arrays(AHEAD, AHEAD)
    predicted[0] = np.nan
    p = predictions(predicted, arrays(LEFT, AHEAD))
    found = summarise(score_all(p), Resampler(p.sample_id))
    assert found.estimates[""]["ade"].frames == found.estimates[STILL]["ade"].frames == 1
    assert found.mean("ade") == 0
    assert found.mean("ade", STILL) == 1.5
    assert found.mean("ade", STRAIGHT) == 0
    assert found.estimates[""]["ade"].low is None, "one sample: no interval"


def test_summary_is_over_samples_and_steps() -> None:
    target = arrays(AHEAD, AHEAD)
    target[1, 1] = np.nan
    predicted = arrays(AHEAD, [[2.0, 0.0], [1.0, 0.0]])
    p = predictions(predicted, target)
    found = summarise(score_all(p), Resampler(p.sample_id))
    assert found.mean("mse") == pytest.approx(0.5 / 3), "three steps count: 0, 0 and 0.5"
    assert found.mean("rmse") == pytest.approx(np.sqrt(0.5 / 3))
    assert found.mean("success_rate_0.1") == pytest.approx(2 / 3)


def test_turn_side_against_a_coin() -> None:
    p = predictions(arrays(LEFT, RIGHT, LEFT, AHEAD), arrays(LEFT, RIGHT, RIGHT, AHEAD))
    found = turn_side(p, score_all(p))
    assert (found["n"], found["right"]) == (3, 2)
    assert found["always_one_side"] == pytest.approx(2 / 3)
    assert turn_side(predictions(arrays(LEFT), arrays(AHEAD)), score_all(predictions(arrays(LEFT), arrays(AHEAD)))) == {
        "n": 0
    }


def test_by_kind() -> None:
    p = predictions(arrays(LEFT, AHEAD), arrays(LEFT, LEFT), instruction=("turn left", "go to the door"))
    table, kinds = kind_table(p, score_all(p), Resampler(p.sample_id))
    assert [row[:2] for row in table.rows] == [("turn left", 1), ("landmark", 1)]
    assert kinds["turn left"]["ade"].mean == 0
    assert kinds["landmark"]["turn_side"].mean == 0


# Intervals and tests --------------------------------------------------------------------------------------------


def test_whole_recordings_are_drawn() -> None:
    values = np.repeat([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0], 50)
    single, grouped = Resampler([str(i) for i in range(400)]), Resampler(np.repeat(list("abcdefgh"), 50).tolist())
    narrow, wide = single.estimate(values), grouped.estimate(values)
    assert narrow.mean == wide.mean == 0.5
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)
    assert (wide.frames, wide.scenes) == (400, 8)


@pytest.mark.parametrize(("count", "groups", "value"), [(7, 7, 0.507887), (50, 7, 0.1), (97, 50, 0.1)])
def test_the_mean_of_equal_values_lies_in_its_interval(count: int, groups: int, value: float) -> None:
    found = Resampler([f"g{i % groups}" for i in range(count)]).estimate(np.full(count, value))
    assert found.low <= found.mean <= found.high, "rounding must not make an error bar negative"


def test_weighted_means_and_what_does_not_apply() -> None:
    found = Resampler(list("abc")).estimates(
        np.array([[1.0, np.nan], [4.0, np.nan], [np.nan, np.nan]]), np.array([1.0, 2.0, 5.0])
    )
    assert found[0].mean == 3
    assert found[0].frames == 2
    assert found[1].mean is None


def test_tests() -> None:
    exact = 2 * sum(comb(20, k) for k in range(15, 21)) / 2**20
    assert binomial_p(15, 20) == pytest.approx(exact)
    assert binomial_p(5, 20) == pytest.approx(exact)
    assert binomial_p(10, 20) == 1
    assert binomial_p(0, 0) == 1
    rng = np.random.default_rng(0)
    assert wilcoxon_p(rng.normal(0, 1, 200)) > 0.05
    assert wilcoxon_p(rng.normal(0.5, 1, 200)) < 1e-6
    assert wilcoxon_p(np.zeros(30)) == 1
    # 1 .. 20, the smallest three negative: W = 210 - 6, z = (204 - 105) / sqrt(717.5)
    signed = np.arange(1.0, 21.0) * np.where(np.arange(20) < 3, -1, 1)
    assert wilcoxon_p(signed) == pytest.approx(0.000219, abs=1e-5)


def test_ranks() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0])).tolist() == [2.5, 1, 2.5]
    assert rank_correlation(np.array([1.0, 2, 3, np.nan]), np.array([1.0, 4, 9, 0])) == pytest.approx(1)
    assert rank_correlation(np.ones(4), np.arange(4.0)) is None


def test_risk_coverage() -> None:
    error = np.array([0.0, 1.0, 2.0])
    assert risk_coverage_auc(-error, error) == pytest.approx((0 + 0.5 + 1) / 3)
    assert risk_coverage_auc(error, error) == pytest.approx((2 + 1.5 + 1) / 3)


def test_hits_are_targets_in_the_chosen_bin() -> None:
    tokenizer = ActionTokenizer(10, 2, ActionNormalizer("quantile", (0, 0), (0.5, 1)))  # bins of 0.1 and 0.2
    bins = np.array([[0, 1, 2, 3], [9, 8, 7, 6]])
    predicted = tokenizer.decode(bins).astype(float)
    target = predicted + np.array([0.04, 0.12])  # x in its bin, y in the next one
    target[1, 1] = [9, 9]  # beyond the bounds: the outermost bins
    known = {"action_tokenizer": json.dumps(tokenizer.to_dict())}
    assert token_hits(predictions(predicted, target, metadata=known)).tolist() == [[1, 0, 1, 0], [1, 0, 0, 0]]
    assert token_hits(predictions(predicted, target, metadata={**known, "decode": "expected"})) is None
    assert token_hits(predictions(predicted, target)) is None
