"""How a benchmark speaks to people: aligned columns, the machine it ran on, and goals that were met or not."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vla_ray.storage.run import versions


@dataclass(frozen=True, slots=True)
class Goal:
    """A number that should not be larger (or smaller) than a limit."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_dict(self) -> dict[str, object]:
        sign = ">=" if self.at_least else "<="
        return {"name": self.name, "value": self.value, "goal": f"{sign} {self.limit:g}", "met": self.met}


def goal_lines(goals: Sequence[Goal]) -> list[str]:
    """A line per goal: its value, its limit, and whether it was met."""
    rows = [
        (g.name, _number(g.value), f"{'>=' if g.at_least else '<='} {_number(g.limit)}", "met" if g.met else "NOT MET")
        for g in goals
    ]
    return aligned([("goal", "measured", "wanted", ""), *rows])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def context(threads: int, rounds: int) -> dict[str, str]:
    """What a reader must know of the machine: numbers from another one are not these."""
    return {
        "CPU": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "load": f"{os.getloadavg()[0]:.1f}",
        "rounds": str(rounds),
        **{
            name: version
            for name, version in versions().items()
            if name in ("python", "vla_ray", "torch", "transformers")
        },
    }


def cpu_name() -> str:
    """As the kernel knows it, on Linux; elsewhere what Python says."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
