"""The capture job: scenes -> manifest -> what is missing -> replicas -> ledger -> metrics.

Checks come in the order of their cost: settings, scenes, the finished run's small file (no Ray, no model), the
checkpoint's header, the disk, and only then Ray.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vla_ray.config import CaptureConfig, ModelConfig
from vla_ray.data.scenes import discover
from vla_ray.errors import CheckpointError, ConfigError
from vla_ray.explain.methods import METHODS, Method, folds_of, parse_methods
from vla_ray.pipelines.driver import Driver, Job, select
from vla_ray.storage.files import Location
from vla_ray.storage.run import file_identity
from vla_ray.targets import parse_targets


def capture(config: CaptureConfig) -> int:
    """Run or resume a capture; returns the exit code (0 fine, 1 too many failed frames, 130 or 143 stopped)."""
    targets = parse_targets(
        config.explain_mode, config.kinematic_metric, config.text_token_strategy, config.text_token_index
    )
    methods = storable_methods(config)
    found = discover(config.scene_dir, config.image_subdir, config.speed_subdir, config.default_speed_mps)
    driver = Driver(
        Job(
            name="capture",
            output_dir=config.output_dir,
            run=config.run or time.strftime("capture_%y%m%d_%H%M%S"),
            frames=select(found, config.every, config.limit),
            targets=[t.name for t in targets],
            mode=config.explain_mode,
            settings=_result_settings(config, methods),
            checkpoints=checkpoint_identities(config.model),
            config_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)),
            max_error_rate=config.max_error_rate,
            retry_failed=config.retry_failed,
            wandb=config.wandb,
        )
    )
    if driver.is_finished:
        return driver.report_finished()
    from vla_ray.pipelines.capture_work import CaptureWork

    work = CaptureWork(config, targets, methods)
    if config.dry_run:
        return driver.report_dry_run(work.facts(driver.location, len(driver.job.frames)))
    work.check_disk(driver.location, len(driver.job.frames))
    return driver.execute(work)


def storable_methods(config: CaptureConfig) -> tuple[Method, ...]:
    """The methods that relevance payloads shall hold.

    Raises:
        ConfigError: one of them cannot be stored as relevance of tokens and patches.
    """
    methods = parse_methods(config.methods)
    others = [m.name for m in methods if m.kind != "fold"]
    if others and config.payload == "relevance":
        known = ", ".join(m.name for m in METHODS.values() if m.kind == "fold")
        raise ConfigError(
            f"methods={','.join(others)} cannot be stored in a relevance payload (known: {known}). "
            "Give them to jobs/explain.py, which computes them from frames."
        )
    return methods


def _result_settings(config: CaptureConfig, methods: Sequence[Method]) -> dict[str, object]:
    """What changes results. Frames and targets are not among them: a run may grow by either."""
    return {
        "explain_mode": config.explain_mode,
        "payload": config.payload,
        "payload_dtype": config.payload_dtype,
        "folds": list(folds_of(methods)) if config.payload == "relevance" else None,
        "spline": dataclasses.asdict(config.spline) if config.spline.enabled else None,
        "image_subdir": config.image_subdir,
        "speed_subdir": config.speed_subdir,
        "default_speed_mps": config.default_speed_mps,
        "model.dtype": config.model.dtype,
        "model.max_new_tokens": config.model.max_new_tokens,
    }


def checkpoint_identities(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """What tells this model's files from others. CheckpointError if one cannot be read."""
    return {
        "model.checkpoint": _identity("model.checkpoint", model.checkpoint),
        "model.config": _identity("model.config", str(model.config)),
    }


def _identity(setting: str, path: str) -> dict[str, Any]:
    if "://" in path:
        raise CheckpointError(
            f"{setting}={path} is not local. Copy it to a disk that every worker sees and give its path."
        )
    if Path(path).is_dir():
        raise CheckpointError(
            f"{setting}={path} is a directory. Give the file inside it (pytorch_model.pt, config.yaml)."
        )
    if not Path(path).exists():
        raise CheckpointError(
            f"{setting}={path} does not exist. checkpoints/README.md says how to get the released model."
        )
    return file_identity(Location.of(path))
