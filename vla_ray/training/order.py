"""Which samples make up which optimiser step: a function of (seed, epoch) alone, whatever the number of workers.

Samples lie in row groups of Parquet files, which are read whole. Groups are shuffled, some `window` of them together
form a stretch whose rows are shuffled among themselves: near samples in time are near on disk, yet batches are mixed.
With sampling weights each sub-dataset is such a stream of its own, and the weights decide whose turn it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vla_ray.errors import ConfigError, nearest

_VISITS = 1 << 20  # more epochs than anyone trains


class Group(NamedTuple):
    """A row group: the number of its file, its number in there, how many rows it has, whose it is."""

    file: int
    number: int
    rows: int
    dataset: str


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """The endless sequence of samples of a run, epoch after epoch.

    A *position* counts samples from the start of training; an *address* is (group, row, visit). The visit is the epoch,
    and another number each time that a sample comes again within one: each visit is augmented in its own way.
    """

    groups: tuple[Group, ...]
    seed: int
    window: int = 16
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        known = sorted({g.dataset for g in self.groups})
        for name in self.weights or ():
            if name not in known:
                raise ConfigError(
                    f"data.weights names {name!r}, which the dataset does not hold; it holds {', '.join(known)}."
                    f"{nearest(name, known)}"
                )

    @property
    def samples(self) -> int:
        """Of one epoch."""
        return sum(g.rows for g in self.groups)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Addresses [samples, 3] of an epoch. Without weights each sample comes once."""
        if self.weights is None:
            order = self._shuffled(range(len(self.groups)), self._generator(epoch))
            return self._with_visit(order, epoch)
        names = sorted(self.weights)
        share = np.array([self.weights[n] for n in names]) / sum(self.weights.values())
        turns = self._generator(epoch, 1).choice(len(names), self.samples, p=share)
        order = np.empty((self.samples, 3), np.int64)
        for number, name in enumerate(names):
            taken = turns == number
            order[taken] = self._stream(name, int(taken.sum()), epoch, self._generator(epoch, 2, number))
        return order

    def _stream(self, dataset: str, count: int, epoch: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """`count` samples of one sub-dataset, which starts over, in another order, when it is used up."""
        mine = [i for i, g in enumerate(self.groups) if g.dataset == dataset]
        parts = [np.empty((0, 3), np.int64)]
        while sum(map(len, parts)) < count:
            visit = epoch + (len(parts) - 1) * _VISITS
            parts.append(self._with_visit(self._shuffled(mine, generator), visit))
        return np.concatenate(parts)[:count]

    def _shuffled(self, groups: Sequence[int], generator: np.random.Generator) -> NDArray[np.int64]:
        """(group, row) of all rows of some groups."""
        chosen = generator.permutation(np.asarray(groups, np.int64))
        parts = []
        for start in range(0, len(chosen), self.window):
            rows = [
                np.stack([np.full(self.groups[g].rows, g), np.arange(self.groups[g].rows)], 1)
                for g in chosen[start : start + self.window]
            ]
            parts.append(generator.permutation(np.concatenate(rows)))
        return np.concatenate(parts)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *key))

    @staticmethod
    def _with_visit(order: NDArray[np.int64], visit: int) -> NDArray[np.int64]:
        return np.concatenate([order, np.full((len(order), 1), visit)], 1)


class Steps:
    """Addresses by optimiser step. Keeps the epochs it was last asked for: four million samples are 100 MB."""

    def __init__(self, order: SampleOrder, batch_size: int, accumulation: int, workers: int) -> None:
        self.order, self.batch_size, self.accumulation, self.workers = order, batch_size, accumulation, workers
        self._epochs: dict[int, NDArray[np.int64]] = {}

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.workers

    def total(self, num_epochs: float) -> int:
        """Optimiser steps of so many epochs, at least one."""
        return max(1, round(num_epochs * self.order.samples / self.global_batch))

    def addresses(self, step: int, rank: int) -> NDArray[np.int64]:
        """[accumulation, batch_size, 3] of one worker in one step. Workers of a step share its samples out."""
        first = step * self.global_batch
        whole = np.concatenate([self._at(p) for p in self._pieces(first, first + self.global_batch)])
        return whole.reshape(self.accumulation, self.workers, self.batch_size, 3)[:, rank]

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """A stretch of positions as (epoch, from, to)."""
        n = self.order.samples
        return [
            (epoch, max(start - epoch * n, 0), min(stop - epoch * n, n))
            for epoch in range(start // n, (stop - 1) // n + 1)
        ]

    def _at(self, piece: tuple[int, int, int]) -> NDArray[np.int64]:
        epoch, start, stop = piece
        if epoch not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            self._epochs[epoch] = self.order.epoch(epoch)
        return self._epochs[epoch][start:stop]
