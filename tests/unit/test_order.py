"""Sample order: a function of seed and epoch, whatever the number of workers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vla_ray.errors import ConfigError
from vla_ray.training.order import Group, SampleOrder, Steps

GROUPS = tuple(Group(i // 4, i % 4, 5 + i % 3, "big" if i < 16 else "small") for i in range(20))


def order(**changes) -> SampleOrder:
    return SampleOrder(**{"groups": GROUPS, "seed": 7, "window": 3, **changes})


def pairs(addresses) -> list[tuple[int, int]]:
    return [tuple(a) for a in np.asarray(addresses).reshape(-1, 3)[:, :2].tolist()]


def test_an_epoch_holds_every_sample_once() -> None:
    every = [(g, row) for g, group in enumerate(GROUPS) for row in range(group.rows)]
    assert sorted(pairs(order().epoch(0))) == every
    assert order().samples == len(every)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert pairs(order().epoch(3)) == pairs(order().epoch(3))
    assert pairs(order().epoch(3)) != pairs(order().epoch(4))
    assert pairs(order().epoch(3)) != pairs(order(seed=8).epoch(3))


def test_rows_of_a_window_are_mixed() -> None:
    first = pairs(order().epoch(0))[:12]
    assert len({g for g, _ in first}) > 1
    assert [r for _, r in first] != sorted(r for _, r in first)


def test_few_groups_are_open_at_a_time() -> None:
    """A reader keeps `window` groups in memory, not the dataset."""
    at: dict[int, list[int]] = {}
    for position, (group, _) in enumerate(pairs(order().epoch(0))):
        at.setdefault(group, []).append(position)
    assert max(max(p) - min(p) for p in at.values()) < 3 * max(g.rows for g in GROUPS)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_share_the_same_global_batches(workers: int) -> None:
    alone = Steps(order(), 8, 1, 1)
    shared = Steps(order(), 8 // workers, 1, workers)
    for step in range(40):  # several epochs, batches across their border
        together = [a for rank in range(workers) for a in pairs(shared.addresses(step, rank))]
        assert sorted(together) == sorted(pairs(alone.addresses(step, 0)))


def test_accumulation_splits_the_same_batch() -> None:
    whole, parts = Steps(order(), 8, 1, 1), Steps(order(), 2, 4, 1)
    assert pairs(whole.addresses(5, 0)) == pairs(parts.addresses(5, 0))
    assert parts.addresses(5, 0).shape == (4, 2, 3)


def test_consecutive_steps_cover_epochs_exactly() -> None:
    steps = Steps(order(), 4, 1, 1)
    n = order().samples
    rows = np.concatenate([steps.addresses(s, 0).reshape(-1, 3) for s in range(-(-n // 2))])[: 2 * n]
    for epoch in (0, 1):
        assert sorted(pairs(rows[rows[:, 2] == epoch])) == sorted(pairs(order().epoch(epoch)))
    assert list(rows[:, 2]) == sorted(rows[:, 2])


def test_total_steps() -> None:
    assert Steps(order(), 4, 2, 2).total(3) == round(3 * order().samples / 16)
    assert Steps(order(), 1000, 1, 1).total(0.1) == 1


def test_weights_decide_the_shares() -> None:
    weighted = order(weights={"big": 1.0, "small": 3.0})
    rows = np.concatenate([weighted.epoch(e) for e in range(20)])
    assert len(weighted.epoch(0)) == weighted.samples
    share = np.mean([GROUPS[g].dataset == "small" for g, _ in pairs(rows)])
    assert share == pytest.approx(0.75, abs=0.03)
    # The small one starts over when it is used up, and no sample is preferred meanwhile.
    counts = Counter(p for p in pairs(weighted.epoch(0)) if GROUPS[p[0]].dataset == "small")
    assert max(counts.values()) - min(counts.values()) <= 1
    assert max(counts.values()) > 1


def test_a_sample_that_comes_again_is_another_visit() -> None:
    """Else it would be augmented in the same way each time."""
    addresses = [tuple(a) for a in order(weights={"big": 1.0, "small": 9.0}).epoch(2).tolist()]
    assert len(set(addresses)) == len(addresses)
    assert len({a[:2] for a in addresses}) < len(addresses)


def test_an_unknown_sub_dataset_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'smal', which the dataset does not hold.*Did you mean 'small'"):
        order(weights={"smal": 1.0})
