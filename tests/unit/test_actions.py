"""Actions as tokens: bins, bounds, what is lost, and what tells one tokenizer from another."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from vla_ray.errors import ConfigError
from vla_ray.models.paligemma.actions import ActionNormalizer, ActionTokenizer

ACTIONS = np.random.default_rng(0).normal((1.0, 0.1), (0.4, 0.2), (500, 8, 2))


class Exact:
    """Statistics of an array, computed from all of it."""

    def __init__(self, actions: ArrayLike) -> None:
        self.xy = np.asarray(actions, float).reshape(-1, 2)

    @property
    def mean(self) -> NDArray[np.float64]:
        return self.xy.mean(axis=0)

    @property
    def std(self) -> NDArray[np.float64]:
        return self.xy.std(axis=0)

    def quantile(self, q: float) -> NDArray[np.float64]:
        return np.quantile(self.xy, q, axis=0)

    def clip_rate(self, low: ArrayLike, high: ArrayLike) -> NDArray[np.float64]:
        return ((self.xy < low) | (self.xy > high)).mean(axis=0)


def test_order_and_bins_by_hand() -> None:
    tokenizer = ActionTokenizer(num_bins=4, num_steps=2)
    # bins of [-1, 1]: [-1, -.5) [-.5, 0) [0, .5) [.5, 1]
    bins = tokenizer.encode([[-1.0, -0.5], [0.0, 1.0]])
    assert bins.tolist() == [0, 1, 2, 3]
    assert tokenizer.decode(bins).tolist() == [[-0.75, -0.25], [0.25, 0.75]]
    assert tokenizer.encode([[-9.0, 9.0], [-0.50001, 0.49999]]).tolist() == [0, 3, 0, 2]
    assert tokenizer.centers().tolist() == [[-0.75, -0.25, 0.25, 0.75]] * 2


@pytest.mark.parametrize("kind", ["quantile", "mean_std", "none"])
def test_every_bin_comes_back(kind: str) -> None:
    tokenizer = ActionTokenizer(256, 1, ActionNormalizer.from_statistics(Exact(ACTIONS), kind))
    assert tokenizer.bounds == ((-3, 3) if kind == "mean_std" else (-1, 1))
    bins = np.stack([np.arange(256), np.arange(256)[::-1]], axis=1)
    assert np.array_equal(tokenizer.encode(tokenizer.decode(bins)), bins)
    assert np.allclose(tokenizer.decode(bins)[:, 0, 0], tokenizer.centers()[0], atol=1e-6)


def test_quantile_bounds_lose_little() -> None:
    normalizer = ActionNormalizer.from_statistics(Exact(ACTIONS), "quantile")
    tokenizer = ActionTokenizer(256, 8, normalizer)
    low, high = tokenizer.limits()
    width = (high - low) / 256
    report = tokenizer.round_trip(ACTIONS)
    assert (np.array(report.max_error) <= width / 2 + 1e-6).all()
    assert (np.array(report.clip_rate) < 0.01).all()
    assert report.clip_rate == tuple(tokenizer.clip_rate(Exact(ACTIONS)))
    narrow = ActionTokenizer(256, 8)  # [-1, 1] units, as the original: half of all steps forward are cut
    assert narrow.clip_rate(ACTIONS)[0] > 0.4
    assert narrow.round_trip(ACTIONS).rmse > 10 * report.rmse


def test_mean_std_is_a_z_score() -> None:
    normalizer = ActionNormalizer.from_statistics(Exact(ACTIONS), "mean_std")
    z = normalizer.normalise(ACTIONS).reshape(-1, 2)
    assert np.allclose([z.mean(axis=0), z.std(axis=0)], [[0, 0], [1, 1]])
    assert np.allclose(normalizer.denormalise(normalizer.normalise(ACTIONS)), ACTIONS)


@pytest.mark.parametrize("kind", ["quantile", "mean_std"])
def test_a_constant_dimension(kind: str) -> None:
    flat = ACTIONS * (1, 0) + (0, 0.3)
    tokenizer = ActionTokenizer(256, 8, ActionNormalizer.from_statistics(Exact(flat), kind))
    decoded = tokenizer.decode(tokenizer.encode(flat))
    assert np.isfinite(decoded).all()
    assert np.abs(decoded[..., 1] - 0.3).max() < 0.02


def test_expected_bins_lie_between_centres() -> None:
    tokenizer = ActionTokenizer(4, 1)
    assert tokenizer.decode([[1.5, 2.0]]).tolist() == [[[0.0, 0.25]]]


@pytest.mark.parametrize("bins", [0, 1, 1025])
def test_bins_that_loc_does_not_offer(bins: int) -> None:
    with pytest.raises(ConfigError, match=r"action\.vocab_size=.* 1024"):
        ActionTokenizer(num_bins=bins)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="unknown; known: quantile, mean_std, none"):
        ActionNormalizer.from_statistics(Exact(ACTIONS), "minmax")
    with pytest.raises(ConfigError, match="action_bounds"):
        ActionTokenizer(bounds=(1.0, -1.0))
    with pytest.raises(ValueError, match="8, 2"):
        ActionTokenizer().encode(np.zeros((4, 7, 2)))


def test_fingerprint_knows_all_that_matters() -> None:
    a = ActionTokenizer()
    others = [
        ActionTokenizer(num_bins=255),
        ActionTokenizer(num_steps=7),
        ActionTokenizer(bounds=(-1, 1.5)),
        ActionTokenizer(normalizer=ActionNormalizer("quantile")),
        ActionTokenizer(normalizer=ActionNormalizer(scale=(1.0, 2.0))),
    ]
    assert len({a.fingerprint, *(o.fingerprint for o in others)}) == 6
    assert ActionTokenizer(bounds=(-1, 1), normalizer=ActionNormalizer(scale=(1, 1))).fingerprint == a.fingerprint
    assert ActionTokenizer.from_dict(others[4].to_dict()) == others[4]
