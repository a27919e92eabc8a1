"""Occlusion and the interventional score on models whose truth can be written down."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import ConfigError
from vla_ray.explain.perturb import Probe
from vla_ray.explain.question import Answer
from vla_ray.explain.references import Interventional, iss, occlusion

SIDE, ROWS, COLUMNS = 8, 4, 8
GEOMETRY = TileGeometry(8, 16, 8, 8, 16, ((0, 0, 8, 8), (8, 0, 16, 8)), thumbnail=False)


def linear(coefficients: np.ndarray, batch: int = 64) -> Probe:
    """Trajectories move sideways by the sum of coefficient x cell mean, which is 1 where shown and 0 where hidden."""
    weights = torch.from_numpy(coefficients).double()
    cell = SIDE * 2 // coefficients.shape[1]

    def ask(pixels: Tensor) -> Answer:
        whole = torch.cat([pixels[:, 0, 0], pixels[:, 1, 0]], -1).double()
        cells = torch.nn.functional.avg_pool2d(whole[:, None], cell)[:, 0]
        y = (cells * weights).sum((1, 2))
        sideways = torch.stack([torch.zeros_like(y), y], -1)[:, None]
        ahead = torch.stack([torch.arange(20.0), torch.zeros(20)], -1).double()
        return Answer(ahead + sideways, ahead[:10] + sideways, y)

    return Probe(ask, torch.ones(2, 3, SIDE, SIDE), torch.zeros(2, 3, SIDE, SIDE), GEOMETRY, batch)


def coefficients(rows: int = ROWS, columns: int = COLUMNS, signed: bool = True) -> np.ndarray:
    values = np.random.default_rng(1).normal(size=(rows, columns))
    return values if signed else np.abs(values)


def test_one_cell_windows_give_the_coefficients() -> None:
    truth = coefficients()
    for head in ("route", "speed"):
        found = occlusion(linear(truth), head, (ROWS, COLUMNS), window=1)
        np.testing.assert_allclose(found.displacement, np.abs(truth), atol=1e-3 if head == "route" else 1e-6)
        np.testing.assert_allclose(found.drop, truth, atol=1e-6)
        assert found.forwards == 33


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (3, 2), (4, 3)])
def test_a_cell_is_the_mean_over_the_windows_that_cover_it(window: int, stride: int) -> None:
    truth = coefficients()
    sums, count = np.zeros_like(truth), np.zeros_like(truth)
    tops = sorted({*range(0, ROWS - window + 1, stride), ROWS - window})
    lefts = sorted({*range(0, COLUMNS - window + 1, stride), COLUMNS - window})
    for t in tops:
        for f in lefts:
            sums[t : t + window, f : f + window] += truth[t : t + window, f : f + window].sum()
            count[t : t + window, f : f + window] += 1
    assert count.min() > 0
    found = occlusion(linear(truth), "speed", (ROWS, COLUMNS), window, stride)
    np.testing.assert_allclose(found.drop, sums / count, atol=1e-5)
    assert found.forwards == len(tops) * len(lefts) + 1


@pytest.mark.parametrize(("window", "stride"), [(0, 1), (2, 3), (5, 1), (2, 0)])
def test_windows_that_do_not_fit_are_refused(window: int, stride: int) -> None:
    with pytest.raises(ConfigError, match="stride <= window"):
        occlusion(linear(coefficients()), "speed", (ROWS, COLUMNS), window, stride)


def scores(effect: str, seed: int, truth: np.ndarray) -> Interventional:
    """Exactly 512 samples."""
    return iss(
        linear(truth, 256), "speed", (4, 8), effect=effect, reliable=1.0, min_samples=512, max_samples=512, seed=seed
    )


@pytest.mark.parametrize("effect", ["scalar", "trajectory"])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_interventional_score_is_unbiased_and_its_error_honest(effect: str, share: float) -> None:
    """Hidden cells M move y by sum c M: |change| has the contrast c, its square c^2 + 2 c p sum of the others."""
    truth = coefficients(2, 4, signed=False)  # the grid of 2 x 2 patches on 4 x 8
    expected = truth if effect == "scalar" else truth**2 + 2 * share * truth * (truth.sum() - truth)
    z = []
    for seed in range(40):
        found = iss(
            linear(truth, 512),
            "speed",
            (4, 8),
            2,
            share,
            effect,
            reliable=1.0,
            min_samples=512,
            max_samples=512,
            seed=seed,
        )
        assert found.scores.shape == (2, 4)
        assert found.forwards == 513
        z.append((found.scores - expected) / found.errors)
    z = np.array(z)
    # Unbiased: 40 independent means of z vanish. Honest: z has deviation 1.
    assert np.abs(z.mean(0)).max() < 4 / 40**0.5
    assert 0.85 < z.std() < 1.15


def test_equal_seeds_give_equal_scores_whatever_the_batch() -> None:
    truth = coefficients(2, 4)
    a, b, c = scores("scalar", 0, truth), scores("scalar", 0, truth), scores("scalar", 1, truth)
    assert np.array_equal(a.scores, b.scores)
    assert not np.array_equal(a.scores, c.scores)


def test_it_stops_when_the_scores_are_reliable_or_at_the_limit() -> None:
    steep = 2.0 ** -np.arange(8).reshape(2, 4)
    sure = iss(linear(steep), "speed", (4, 8), effect="scalar", min_samples=128, max_samples=2000)
    assert sure.settled
    assert sure.forwards < 2001
    assert sure.reliability is not None
    assert sure.reliability > 0.9
    flat = np.ones((2, 4))  # equal coefficients: every difference between cells is noise
    never = iss(linear(flat), "speed", (4, 8), effect="scalar", reliable=0.99, min_samples=128, max_samples=300)
    assert not never.settled
    assert never.forwards == 301


def test_one_cell_among_many_settles_although_the_others_rank_by_chance() -> None:
    one = 0.001 * np.random.default_rng(0).normal(size=(4, 8))
    one[1, 5] = 1
    found = iss(linear(one, 256), "speed", (4, 8), cell=1, effect="trajectory", max_samples=2000)
    assert found.settled
    assert np.unravel_index(found.scores.argmax(), (4, 8)) == (1, 5)
    assert found.rank_agreement is not None
    assert found.rank_agreement < 0.9


def test_a_model_that_ignores_the_picture_has_zero_scores_at_once() -> None:
    found = iss(linear(np.zeros((2, 4))), "speed", (4, 8), max_samples=2000)
    assert found.settled
    assert found.reliability is None
    assert found.rank_agreement is None
    assert found.forwards == 257
    assert not found.scores.any()
    assert not found.errors.any()
    still = occlusion(linear(np.zeros((4, 8))), "speed", (4, 8))
    assert not still.displacement.any()
    assert not still.drop.any()


def test_iss_refuses_settings_that_cannot_work() -> None:
    probe = linear(coefficients())
    with pytest.raises(ConfigError, match="do not divide"):
        iss(probe, "speed", (4, 8), cell=3)
    with pytest.raises(ConfigError, match="a share nearer"):
        iss(probe, "speed", (4, 8), hidden_share=0.999)
    with pytest.raises(ConfigError, match="known: trajectory, scalar"):
        iss(probe, "speed", (4, 8), effect="text")  # type: ignore[arg-type]
