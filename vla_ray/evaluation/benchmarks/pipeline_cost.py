"""What the engine costs beside a bare loop of the same replica over the same items: samples per second of both.

Both sides read, decode, keep the pictures, predict and commit rows. The loop does one after the other; the engine
(pipelines/engine.py) reads in other processes and counts every attempt durably. The start of Ray and of replicas is in
neither. The loop runs before and after each stretch of the engine, whose ratio is to the mean of the two.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

from vla_ray.data.prepared import PreparedDataset
from vla_ray.data.sample_refs import sample_refs
from vla_ray.evaluation.benchmarks.table import Goal, aligned, goal_lines
from vla_ray.schema import GIVEN, PREDICTIONS
from vla_ray.stages.decode_samples import IMAGES, SampleDecoder
from vla_ray.stages.infer import InferSpec, PredictReplica
from vla_ray.stages.policy import PolicySpec
from vla_ray.stages.work import Summary, WorkFrame, WorkItem
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import commit

GOAL = 0.95
JUDGED = ("mid",)  # whatever stands around a smaller policy takes longer than the policy itself
WARM = 2  # batches of a stretch that are not counted: with them the replica and the workers have come up

# The pipeline under test, on a cluster that is up: items, decoder, what makes a replica, the run -> summaries.
Engine: TypeAlias = Callable[
    [Sequence[WorkItem], SampleDecoder, Callable[[], PredictReplica], Location], Iterator[Summary]
]


@dataclass(frozen=True, slots=True)
class Stretch:
    """What both sides do in each round.

    Attributes:
        scratch: an existing directory; every stretch writes a run of its own there.
        batch: samples of an item.
        items: of a stretch, WARM of them not counted; the dataset's training split has as many.
    """

    policy: PolicySpec
    dataset: PreparedDataset
    scratch: Path
    batch: int
    items: int

    @property
    def work(self) -> list[WorkItem]:
        refs = sample_refs(self.dataset, "train", limit=self.batch * self.items)
        frames = [WorkFrame(ref, IMAGES) for ref in refs]
        return [WorkItem(tuple(frames[i : i + self.batch]), (GIVEN,)) for i in range(0, len(frames), self.batch)]


@dataclass(frozen=True, slots=True)
class PipelineCost:
    """One model. Samples per second of every stretch; `ratios` are engine / loop."""

    name: str
    description: str
    batch: int
    loop: Sequence[float]
    engine: Sequence[float]
    ratios: Sequence[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def goals(self) -> tuple[Goal, ...]:
        if self.name not in JUDGED:
            return ()
        return (Goal("Ray pipeline / bare loop, samples/s", self.ratio, GOAL, at_least=True),)

    @property
    def lines(self) -> list[str]:
        loop, engine = (f"{statistics.median(rates):,.1f}" for rates in (self.loop, self.engine))
        spread = f"{min(self.ratios):.2f}..{max(self.ratios):.2f}"
        rows = [
            ("", "batch", "samples/s", "ratio", "least..most"),
            ("bare loop of the replica", str(self.batch), loop, "1.00x", "-"),
            ("Ray pipeline, steady state", str(self.batch), engine, f"{self.ratio:.2f}x", spread),
        ]
        lines = [f"{self.name}: {self.description}", *aligned(rows)]
        return [*lines, "", *goal_lines(self.goals)] if self.goals else lines

    @property
    def content(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "goals": [goal.to_dict() for goal in self.goals]}


def measure_pipeline(name: str, stretch: Stretch, engine: Engine, rounds: int) -> PipelineCost:
    """Both sides in turns."""
    items = stretch.work
    replica = PredictReplica(InferSpec(), stretch.policy)
    loops, engines, ratios = [_loop(stretch, replica, items, "loop-0")], [], []
    for k in range(1, rounds + 1):
        engines.append(_engine(stretch, replica, engine, items, f"engine-{k}"))
        loops.append(_loop(stretch, replica, items, f"loop-{k}"))
        ratios.append(engines[-1] / statistics.mean(loops[-2:]))
    parameters = sum(p.numel() for p in replica.policy.parameters()) / 1e6
    threads = stretch.policy.threads
    where = f"{threads} thread{'' if threads == 1 else 's'}" if stretch.policy.device == "cpu" else "GPU"
    description = f"{parameters:,.1f} M random parameters, one replica on {where}"
    return PipelineCost(name, description, stretch.batch, loops, engines, ratios)


def _loop(stretch: Stretch, replica: PredictReplica, items: Sequence[WorkItem], run: str) -> float:
    """Samples per second."""
    place = Location.of(stretch.scratch / run)
    decoder = SampleDecoder(replica.processor.image_size, place)

    def done() -> Iterator[int]:
        for item in items:
            commit(place, replica.process(decoder(item), item.targets), PREDICTIONS)
            yield len(item.keys)

    return _rate(done())


def _engine(stretch: Stretch, replica: PredictReplica, engine: Engine, items: Sequence[WorkItem], run: str) -> float:
    place = Location.of(stretch.scratch / run)
    decoder = SampleDecoder(replica.processor.image_size, place)
    summaries = engine(items, decoder, partial(PredictReplica, InferSpec(), stretch.policy), place)
    return _rate(sum(summary.statuses.values()) for summary in summaries)


def _rate(done: Iterator[int]) -> float:
    """Samples per second from the end of the WARM-th batch on."""
    samples, began = 0, 0.0
    for k, count in enumerate(done, 1):
        if k > WARM:
            samples += count
        elif k == WARM:
            began = perf_counter()
    return samples / (perf_counter() - began)
