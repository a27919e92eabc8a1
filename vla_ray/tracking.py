"""Weights & Biases behind a null object: callers never ask whether tracking is on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vla_ray.config import WandbConfig
from vla_ray.errors import ConfigError

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    def log(self, values: Mapping[str, Any]) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


class NullTracker:
    """Tracks nothing."""

    def log(self, values: Mapping[str, Any]) -> None:
        return

    def finish(self, summary: Mapping[str, Any]) -> None:
        return


class WandbTracker:
    """One W&B run per run directory: resuming continues it."""

    def __init__(self, settings: WandbConfig, run: str, config: Mapping[str, Any], directory: Path) -> None:
        import wandb  # a second to import, and most runs do without

        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=run,
                id=run,
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

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()


def make_tracker(settings: WandbConfig, run: str, config: Mapping[str, Any], directory: Path) -> Tracker:
    """A tracker for the mode asked for; `directory` is where W&B keeps its files."""
    return NullTracker() if settings.mode == "disabled" else WandbTracker(settings, run, config, directory)
