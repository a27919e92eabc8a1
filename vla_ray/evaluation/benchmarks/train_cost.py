"""What bench=train found, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from vla_ray.evaluation.benchmarks.interleaved import Timing
from vla_ray.evaluation.benchmarks.table import Goal, aligned, goal_lines
from vla_ray.evaluation.benchmarks.training_memory import Budget, budget_lines

READY = "ready in memory"
MADE = "made in the training process"
STREAMED = "streamed by Ray Data"
LIMIT = 1.05


@dataclass(frozen=True, slots=True)
class Measured:
    """One source. Per second of the timed stretches; `waiting` is the share of them spent on getting batches."""

    timing: Timing
    step_s: float
    samples_per_s: float
    tokens_per_s: float
    waiting: float
    first_batch_s: float


@dataclass(frozen=True, slots=True)
class OfSize:
    """All sources on one model."""

    name: str
    description: str
    steps: int
    judged: bool
    sides: Mapping[str, Measured]

    @property
    def goals(self) -> tuple[Goal, ...]:
        if not self.judged:
            return ()
        streamed = self.sides[STREAMED].timing
        return (
            Goal(f"{STREAMED} / {READY}, clock", streamed.wall, LIMIT),
            Goal(f"{STREAMED} / {READY}, CPU of the training process", streamed.cpu, LIMIT),
        )

    @property
    def lines(self) -> list[str]:
        head = ("batches", "clock", "least..most", "CPU", "a step", "samples/s", "tokens/s", "waiting")
        rows = [
            (
                name,
                f"{x.timing.wall:.3f}x",
                "-" if name == READY else f"{x.timing.wall_range[0]:.3f}..{x.timing.wall_range[1]:.3f}",
                f"{x.timing.cpu:.3f}x",
                f"{1000 * x.step_s:,.0f} ms",
                f"{x.samples_per_s:,.1f}",
                f"{x.tokens_per_s:,.0f}",
                f"{x.waiting:.1%}",
            )
            for name, x in self.sides.items()
        ]
        made = self.sides[MADE].waiting * self.sides[MADE].step_s
        share = made / self.sides[STREAMED].step_s
        lines = [
            f"{self.name}: {self.description}; stretches of {self.steps} steps",
            *aligned([head, *rows]),
            f"making a batch takes {1000 * made:,.0f} ms, {share:.0%} of a streamed step",
        ]
        return [*lines, "", *goal_lines(self.goals)] if self.goals else lines


@dataclass(frozen=True, slots=True)
class StartUp:
    """What comes once, before the steps that the ratios are of. Seconds.

    Attributes:
        ray: a Ray of one's own, until connected.
        stream: from asking for a stream until its first batch, by size.
        job: from `fit` with two workers until their first optimiser step is logged, of the smallest size.
    """

    ray: float
    stream: Mapping[str, float]
    job: float

    @property
    def line(self) -> str:
        streams = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.stream.items())
        return (
            f"start-up, not in the ratios: Ray {self.ray:.1f} s; a stream until its first batch {streams}; Ray Train "
            f"with 2 workers of the tiny model until their first step {self.job:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class TrainCost:
    """The result of the bench."""

    context: Mapping[str, str]
    sizes: Sequence[OfSize]
    start_up: StartUp
    budgets: Sequence[Budget]

    @property
    def text(self) -> str:
        return "\n".join(
            [
                "training steps by where batches come from (ratios to batches ready in memory; medians over rounds)",
                ", ".join(f"{key} {value}" for key, value in self.context.items()),
                "CPU: seconds of the training process alone; waiting: share of the clock until the next batch is there",
                *(line for size in self.sizes for line in ("", *size.lines)),
                "",
                self.start_up.line,
                "",
                *budget_lines(self.budgets),
            ]
        )

    @property
    def content(self) -> dict[str, object]:
        return {
            "bench": "train",
            "context": dict(self.context),
            "sizes": {
                size.name: {
                    "description": size.description,
                    "steps": size.steps,
                    "sides": {name: asdict(side) for name, side in size.sides.items()},
                    "goals": [goal.to_dict() for goal in size.goals],
                }
                for size in self.sizes
            },
            "start_up": asdict(self.start_up),
            "memory": [asdict(budget) for budget in self.budgets],
        }
