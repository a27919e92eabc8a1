"""The capture job: scenes -> manifest -> what is missing -> replicas -> ledger -> metrics.

Checks come in the order of their cost: settings, scenes, the finished run's small file (no Ray, no model), the
checkpoint's header, the disk, and only then Ray.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vla_ray.config import CaptureConfig
from vla_ray.data.scenes import discover
from vla_ray.errors import CheckpointError
from vla_ray.pipelines.driver import Driver, Job, select
from vla_ray.storage.files import Location
from vla_ray.storage.run import file_identity
from vla_ray.targets import parse_targets


def capture(config: CaptureConfig) -> int:
    """Run or resume a capture; returns the exit code (0 fine, 1 too many failed frames, 130 or 143 stopped)."""
    targets = parse_targets(
        config.explain_mode, config.kinematic_metric, config.text_token_strategy, config.text_token_index
    )
    found = discover(config.scene_dir, config.image_subdir, config.speed_subdir, config.default_speed_mps)
    driver = Driver(
        Job(
            name="capture",
            output_dir=config.output_dir,
            run=config.run or time.strftime("capture_%y%m%d_%H%M%S"),
            frames=select(found, config.every, config.limit),
            targets=[t.name for t in targets],
            mode=config.explain_mode,
            settings=_result_settings(config),
            checkpoints={
                "model.checkpoint": _identity("model.checkpoint", config.model.checkpoint),
                "model.config": _identity("model.config", str(config.model.config)),
            },
            config_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)),
            max_error_rate=config.max_error_rate,
            retry_failed=config.retry_failed,
            wandb=config.wandb,
        )
    )
    if driver.is_finished:
        return driver.report_finished()
    from vla_ray.pipelines.capture_work import CaptureWork

    work = CaptureWork(config, targets)
    if config.dry_run:
        return driver.report_dry_run(work.facts(driver.location, len(driver.job.frames)))
    work.check_disk(driver.location, len(driver.job.frames))
    return driver.execute(work)


def _result_settings(config: CaptureConfig) -> dict[str, object]:
    """What changes results. Frames and targets are not among them: a run may grow by either."""
    return {
        "explain_mode": config.explain_mode,
        "payload": config.payload,
        "payload_dtype": config.payload_dtype,
        "spline": dataclasses.asdict(config.spline) if config.spline.enabled else None,
        "image_subdir": config.image_subdir,
        "speed_subdir": config.speed_subdir,
        "default_speed_mps": config.default_speed_mps,
        "model.dtype": config.model.dtype,
        "model.max_new_tokens": config.model.max_new_tokens,
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
