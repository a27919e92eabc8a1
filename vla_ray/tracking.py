"""Weights & Biases behind a null object: callers never ask whether tracking is on, and it never stops their work."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from vla_ray.config import WandbConfig

logger = logging.getLogger(__name__)


class Tracker(AbstractContextManager["Tracker"]):
    """Tracks nothing; the base of what does. Leaving its context ends the tracking, also after an error."""

    def log(self, values: Mapping[str, Any]) -> None:
        """One point of the run's curves."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; one that is logged again replaces the earlier one and keeps its history."""

    def summarise(self, values: Mapping[str, Any]) -> None:
        """What the run came to."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class WandbTracker(Tracker):
    """One W&B run per run directory, known by `identity`: resuming continues it."""

    def __init__(
        self, settings: WandbConfig, run: str, identity: str, config: Mapping[str, Any], directory: Path
    ) -> None:
        import wandb  # a second to import, and most runs do without

        directory.mkdir(parents=True, exist_ok=True)
        self._failed = False
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=run,
            id=identity,
            resume="allow",
            mode=settings.mode,  # type: ignore[arg-type]
            config=dict(config),
            dir=str(directory),
            settings=wandb.Settings(silent=True),
        )

    def log(self, values: Mapping[str, Any]) -> None:
        self._tolerate(lambda: self._run.log(dict(values)))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        def send() -> None:
            import wandb

            cells: list[Any] = [[c if isinstance(c, (str, int, float)) else json.dumps(c) for c in row] for row in rows]
            self._run.log({name: wandb.Table(columns=list(columns), data=cells)})

        self._tolerate(send)

    def summarise(self, values: Mapping[str, Any]) -> None:
        self._tolerate(lambda: self._run.summary.update(dict(values)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tolerate(lambda: self._run.finish(exit_code=0 if kind is None else 1))

    def _tolerate(self, action: Callable[[], object]) -> None:
        """After a first failure nothing more is sent: a service that is down would cost a time-out each time."""
        if self._failed:
            return
        try:
            action()
        except Exception as e:  # whatever W&B raises, the run it watches is worth more
            self._failed = True
            logger.warning("W&B failed and is left alone from now on: %s", " ".join(str(e).split())[:200])


def make_tracker(settings: WandbConfig, run: str, identity: str, config: Mapping[str, Any], directory: Path) -> Tracker:
    """A tracker for the mode asked for; `directory` is where W&B keeps its files. One that cannot start is none."""
    if settings.mode == "disabled":
        return Tracker()
    try:
        return WandbTracker(settings, run, identity, config, directory)
    except Exception as e:  # no key, no network, refused, not installed
        logger.warning(
            "wandb.mode=%s does not work here (%s); going on without. Log in with `wandb login`, or use wandb=offline.",
            settings.mode,
            " ".join(str(e).split())[:200],
        )
        return Tracker()
