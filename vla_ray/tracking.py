"""Weights & Biases behind a null object: callers never ask whether tracking is on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from vla_ray.config import WandbConfig
from vla_ray.errors import ConfigError

logger = logging.getLogger(__name__)


class Tracker(AbstractContextManager["Tracker"]):
    """Tracks nothing; the base of what does. Leaving its context ends the tracking, also after an error."""

    def log(self, values: Mapping[str, Any]) -> None:
        """One point of the run's curves."""

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
        try:
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
        except Exception as e:  # no key, no network, refused: the job would otherwise die at its end
            raise ConfigError(
                f"wandb.mode={settings.mode} does not work here ({' '.join(str(e).split())[:160]}). "
                "Log in with `wandb login`, or use wandb.mode=offline."
            ) from e

    def log(self, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values))

    def summarise(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)


def make_tracker(settings: WandbConfig, run: str, identity: str, config: Mapping[str, Any], directory: Path) -> Tracker:
    """A tracker for the mode asked for; `directory` is where W&B keeps its files."""
    if settings.mode == "disabled":
        return Tracker()
    return WandbTracker(settings, run, identity, config, directory)
