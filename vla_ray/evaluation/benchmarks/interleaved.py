"""Timing several sides against a plain one, so that what else the machine does cancels out.

All run in one process, the plain side before and after every other one. A side's ratio is to the mean of its two
neighbours, and the median over rounds is what counts. CPU seconds stand beside the clock's: they do not grow while
another process has the core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Side:
    """One thing to measure.

    Attributes:
        run: what is timed; its result is dropped within the time.
        prepare: called before every run, outside of the time.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians over rounds, and the least and the largest of the ratios. Seconds; ratios are to the plain side."""

    wall_s: float
    cpu_s: float
    wall: float
    cpu: float
    wall_range: tuple[float, float]
    cpu_range: tuple[float, float]


def interleave(plain: Side, others: Sequence[Side], rounds: int) -> dict[str, Timing]:
    """Name -> timing of every side, the plain one (of ratio 1) included. Warm the sides up before."""
    plains = [_seconds(plain)]
    runs: dict[str, list[tuple[float, float]]] = {side.name: [] for side in others}
    ratios: dict[str, list[tuple[float, float]]] = {side.name: [] for side in others}
    for _ in range(rounds):
        for side in others:
            taken = _seconds(side)
            plains.append(_seconds(plain))
            around = [(before + after) / 2 for before, after in zip(plains[-2], plains[-1], strict=True)]
            runs[side.name].append(taken)
            ratios[side.name].append((taken[0] / around[0], taken[1] / around[1]))
    return {
        plain.name: _timing(plains, [(1.0, 1.0)]),
        **{side.name: _timing(runs[side.name], ratios[side.name]) for side in others},
    }


def _seconds(side: Side) -> tuple[float, float]:
    """Of the clock and of the CPU, all threads together."""
    side.prepare()
    wall, cpu = time.perf_counter(), time.process_time()
    side.run()
    return time.perf_counter() - wall, time.process_time() - cpu


def _timing(runs: Sequence[tuple[float, float]], ratios: Sequence[tuple[float, float]]) -> Timing:
    (wall_s, cpu_s), (wall, cpu) = ((statistics.median(v) for v in zip(*x, strict=True)) for x in (runs, ratios))
    wall_range, cpu_range = ((min(v), max(v)) for v in zip(*ratios, strict=True))
    return Timing(wall_s, cpu_s, wall, cpu, wall_range, cpu_range)
