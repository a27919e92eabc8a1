"""What things cost, measured so that numbers from a busy machine still mean something. Benches are found by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

from vla_ray.config import BenchmarkConfig
from vla_ray.errors import ConfigError, nearest


class Result(Protocol):
    """What a bench found."""

    @property
    def text(self) -> str:
        """For people: a table, and which targets were met."""

    @property
    def content(self) -> dict[str, object]:
        """The same for programs, of what JSON can hold."""


# Name -> the module whose `run` it is, imported when it is asked for: some need Ray, most need torch.
BENCHES = {
    "relevance": "vla_ray.evaluation.benchmarks.relevance",
    "train": "vla_ray.pipelines.bench_train",
    "infer": "vla_ray.pipelines.bench_infer",
}


def find_bench(name: str) -> Callable[[BenchmarkConfig], Result]:
    """A bench by name. ConfigError if there is none."""
    if name not in BENCHES:
        raise ConfigError(f"bench={name!r} is unknown; known: {', '.join(BENCHES)}.{nearest(name, BENCHES)}")
    found: Callable[[BenchmarkConfig], Result] = import_module(BENCHES[name]).run
    return found
