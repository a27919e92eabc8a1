"""Reading a run's logs while it trains and afterwards: for the screen, for W&B, and for the last word."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vla_ray.tracking import Tracker
from vla_ray.training.checkpoints import RunFiles

logger = logging.getLogger(__name__)

_EXAMPLE_COLUMNS = ("step", "sample_id", "instruction", "predicted", "target", "ade")


class RunLog:
    """What workers wrote to `logs/`, each line told once, also if a resumed run cuts and repeats some."""

    def __init__(self, files: RunFiles) -> None:
        self.files = files
        self._seen: dict[Path, tuple[int, int]] = {}
        self._told = {_key(path, line) for path in (files.log, files.examples) for line in _lines(path)}

    @property
    def step(self) -> int:
        """Of the newest line."""
        return self._last_step(self.files.log)

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation whose weights are in `best_model/`."""
        lines = [line for line in _lines(self.files.log) if line["kind"] == "validation" and line["best"]]
        return lines[-1] if lines else None

    def follow(self, tracker: Tracker) -> None:
        """Tell what is new since the last call."""
        for line in self._new(self.files.log):
            logger.info("%s", _text(line))
            prefix = "val" if line["kind"] == "validation" else "train"
            numbers = {k: v for k, v in line.items() if k not in ("step", "total", "kind", "best")}
            tracker.log({**{f"{prefix}/{k}": v for k, v in numbers.items()}, "step": line["step"]})
        for line in self._new(self.files.examples):
            rows = [{"step": line["step"], **example} for example in line["examples"]]
            tracker.log_table("trajectories", _EXAMPLE_COLUMNS, [[r[c] for c in _EXAMPLE_COLUMNS] for r in rows])

    def conclusion(self) -> str:
        """What came of the run, in lines."""
        best, files = self.best, self.files
        lines = [f"train {files.directory.name}: {self.step} steps"]
        if best:
            lines += [
                f"  best       step {best['step']}: loss {best['loss']:.3f}, tokens {best['token_accuracy']:.1%} right",
                f"  ADE / FDE  {best['ade']:.2f} / {best['fde']:.2f} units"
                + (f", {best['ade_m']:.2f} / {best['fde_m']:.2f} m" if best["ade_m"] is not None else "")
                + f"; standing still {best['ade_still']:.2f}, straight on {best['ade_straight']:.2f} units",
                f"  language   ADE {best['ade_permuted']:.2f} with the instructions of others: "
                f"{best['language_use']:.0%} of that error is avoided by listening",
            ]
        lines += [f"  results    {files.directory}  (best_model/, last/, logs/)"]
        return "\n".join(lines) + "\n"

    def _new(self, path: Path) -> Iterator[dict[str, Any]]:
        """Lines that were not told. A log that has not changed is not read: this is asked twice a second."""
        state = (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else (0, 0)
        if self._seen.get(path) == state:
            return
        self._seen[path] = state
        for line in _lines(path):
            if _key(path, line) not in self._told:
                self._told.add(_key(path, line))
                yield line

    @staticmethod
    def _last_step(path: Path) -> int:
        return max((line["step"] for line in _lines(path)), default=0)


def _key(path: Path, line: dict[str, Any]) -> tuple[Path, str, int]:
    """Once a line is told it stays told, also if a resumed run cuts it and writes it again."""
    return path, line.get("kind", ""), line["step"]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines; the last may be under way."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _text(line: dict[str, Any]) -> str:
    at = f"step {line['step']} of {line['total']}"
    if line["kind"] == "validation":
        baselines = f"still {line['ade_still']:.2f}, straight {line['ade_straight']:.2f}"
        return (
            f"{at}: validation loss {line['loss']:.3f}, tokens {line['token_accuracy']:.1%}, ADE {line['ade']:.2f} "
            f"({baselines}), language use {line['language_use']:.0%}" + (", best so far" if line["best"] else "")
        )
    mfu = f", MFU {line['mfu']:.1%}" if "mfu" in line else ""
    return (
        f"{at}: loss {line['loss']:.3f}, lr {line['learning_rate']:.2g}, {line['samples_per_s']:.0f} samples/s, "
        f"{line['tokens_per_s']:.0f} tokens/s, {line['waiting']:.0%} waiting for data{mfu}"
    )
