"""Statistics of actions, collected in pieces, against numpy on all of them at once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vla_ray.data.cast.statistics import GRID, QUANTILES, ActionStatistics

HALF_STEP = 0.5 / GRID + 1e-9


def collected(*pieces: np.ndarray) -> ActionStatistics:
    statistics = ActionStatistics()
    for piece in pieces:
        statistics.add(piece)
    return statistics


@pytest.fixture(scope="module")
def actions() -> np.ndarray:
    """Like CAST: forward about 1, sideways about 0, some stops."""
    rng = np.random.default_rng(0)
    actions = np.stack([rng.normal(1.0, 0.4, 40_000), rng.laplace(0.0, 0.2, 40_000)], axis=-1)
    actions[:3000] = 0
    return rng.permutation(actions).astype(np.float32).reshape(5000, 8, 2)


def test_equal_to_numpy(actions: np.ndarray) -> None:
    statistics = collected(*np.array_split(actions, 7))
    flat = actions.reshape(-1, 2).astype(np.float64)
    assert statistics.count == 40_000
    np.testing.assert_allclose(statistics.mean, flat.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, flat.std(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(statistics.minimum, flat.min(axis=0))
    np.testing.assert_array_equal(statistics.maximum, flat.max(axis=0))
    for q in (0.0, *QUANTILES, 1.0):
        expected = np.quantile(flat, q, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(statistics.quantile(q), expected, rtol=0, atol=HALF_STEP)
    steps = np.linalg.norm(flat, axis=1)
    assert statistics.median_step == pytest.approx(np.quantile(steps, 0.5, method="inverted_cdf"), abs=HALF_STEP)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), ((0.2, -0.1), (1.5, 0.3)), (-30.0, 30.0)])
def test_clip_rates(actions: np.ndarray, low: object, high: object) -> None:
    flat = actions.reshape(-1, 2)
    expected = ((flat < np.asarray(low)) | (flat > np.asarray(high))).mean(axis=0)
    np.testing.assert_allclose(collected(actions).clip_rate(low, high), expected, atol=5e-3)


def test_a_large_mean_does_not_swallow_a_small_spread() -> None:
    rng = np.random.default_rng(1)
    values = 1e7 + rng.normal(0, 1e-3, (10_000, 2))
    statistics = collected(*np.array_split(values, 100))
    np.testing.assert_allclose(statistics.std, values.std(axis=0), rtol=1e-6)


def test_the_order_of_pieces_does_not_matter(actions: np.ndarray) -> None:
    first, second, third = (collected(piece) for piece in np.array_split(actions, 3))
    one, other = ActionStatistics(), ActionStatistics()
    for piece in (first, second, third):
        one.merge(piece)
    for piece in (third, ActionStatistics(), first, second):
        other.merge(piece)
    assert one.count == other.count == 40_000
    np.testing.assert_allclose(one.std, other.std, rtol=1e-12)
    assert one.to_dict()["histograms"] == other.to_dict()["histograms"]


def test_whole_numbers_and_bounds_are_exact() -> None:
    """Stops are exactly 0, and 1.0 is not clipped by a bound of 1."""
    statistics = collected(np.array([[0.0, 0.0]] * 5 + [[1.0, -1.0]] * 6))
    assert statistics.quantile(0.25).tolist() == [0.0, -1.0]
    assert statistics.quantile(0.75).tolist() == [1.0, 0.0]
    assert statistics.clip_rate(-1, 1).tolist() == [0.0, 0.0]
    assert statistics.clip_rate(0.5, 0.99) == pytest.approx([1.0, 1.0])


def test_beyond_the_grid() -> None:
    statistics = collected(np.stack([np.linspace(-100, 100, 2001), np.full(2001, 7.3)], axis=-1))
    assert statistics.quantile(0.05)[0] == pytest.approx(-90, abs=0.5)
    assert statistics.quantile(0.95)[0] == pytest.approx(90, abs=0.5)
    assert statistics.quantile(0.5)[0] == pytest.approx(0, abs=0.1)
    assert statistics.clip_rate(-20, 20)[0] == pytest.approx(0.8, abs=2e-3)
    assert statistics.quantile(0.5)[1] == pytest.approx(7.3, abs=HALF_STEP), "a constant"
    assert statistics.std[1] == pytest.approx(0, abs=1e-12)


def test_json_keeps_everything(actions: np.ndarray) -> None:
    statistics = collected(actions)
    again = ActionStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert again.to_dict() == statistics.to_dict()
    assert again.summary() == statistics.summary()
    empty = ActionStatistics.from_dict(json.loads(json.dumps(ActionStatistics().to_dict())))
    assert empty.summary() == {"count": 0}
    with pytest.raises(ValueError, match="grid"):
        ActionStatistics.from_dict({**statistics.to_dict(), "grid": [10, 20]})


def test_nothing_has_no_statistics() -> None:
    empty = collected(np.zeros((0, 8, 2)))
    for ask in (lambda: empty.mean, lambda: empty.quantile(0.5), lambda: empty.clip_rate(-1, 1)):
        with pytest.raises(ValueError, match="no actions"):
            ask()


def test_with_mirror_is_that_of_both() -> None:
    actions = np.random.default_rng(0).normal(0.5, 0.3, (500, 2)).round(2)
    both, mirrored = ActionStatistics(), ActionStatistics()
    mirrored.add(actions)
    both.add(np.concatenate([actions, actions * [1, -1]]))
    found = mirrored.with_mirror()
    assert found.count == both.count
    for name in ("mean", "std", "minimum", "maximum"):
        np.testing.assert_allclose(getattr(found, name), getattr(both, name), atol=1e-12)
    for q in (0.005, 0.3, 0.5, 0.9):
        np.testing.assert_allclose(found.quantile(q), both.quantile(q))
    assert mirrored.mean[1] == pytest.approx(actions[:, 1].mean()), "the original stays"
