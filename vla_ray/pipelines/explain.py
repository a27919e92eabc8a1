"""The explain job: maps from a capture's payloads, or online from frames, then pictures and the report.

Maps are a run of their own inside the run they explain, `<output_dir>/<run>/maps/`: resumed, leased and counted like
any other.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from vla_ray.config import ExplainConfig
from vla_ray.data.scenes import FrameRef, discover
from vla_ray.errors import ConfigError, RunError
from vla_ray.explain.chain import STRENGTH
from vla_ray.explain.methods import Method, parse_methods
from vla_ray.pipelines.capture import checkpoint_identities
from vla_ray.pipelines.captured import Captured, read_captured
from vla_ray.pipelines.driver import Driver, Job, select
from vla_ray.report.build import Built, build_report
from vla_ray.storage.files import Location
from vla_ray.storage.run import check_name
from vla_ray.targets import Target, acting_direction, parse_targets

logger = logging.getLogger(__name__)


def explain(config: ExplainConfig) -> int:
    """Make or resume maps; returns the exit code (0 fine, 1 too many failed frames, 130 or 143 stopped)."""
    methods = parse_methods(config.methods)
    run = config.run or time.strftime("explain_%y%m%d_%H%M%S")
    check_name(run)
    location = Location.of(config.output_dir) / run
    captured = None if config.source == "online" else read_captured(location)
    if captured is None and config.source == "payloads":
        raise RunError(f"source=payloads: there is no capture at {location}. Capture first, or use source=online.")
    if captured is not None:
        names = ", ".join(t.name for t in captured.targets)
        logger.info("from the payloads of %s, with its frames, model and targets: %s", captured.location, names)
        check_level(captured, methods, config.strength)
        job = _job_of_payloads(config, captured, methods)
        targets: Sequence[Target] = captured.targets
    else:
        targets = parse_targets(
            config.explain_mode, config.kinematic_metric, config.text_token_strategy, config.text_token_index
        )
        logger.info("online: frames of %s, model %s", ", ".join(config.scene_dir), config.model.checkpoint)
        job = _job_online(config, location, targets, methods)
    driver = Driver(job)
    code = _execute(driver, config, targets, methods, captured)
    if code in (0, 1) and not config.dry_run and (config.report or config.overlays):
        _look(build_report(location, config.maps, config.overlays, config.report))
    return code


def _look(built: Built) -> None:
    """Say where the pictures are."""
    if built.overlays:
        sys.stdout.write(f"  overlays {built.overlays:,} pictures in overlays/\n")
    if built.page:
        sys.stdout.write(f"  report   {built.page}  (open it in a browser)\n")


def check_level(captured: Captured, methods: Sequence[Method], strength: float) -> None:
    """Refuse what the payloads do not hold.

    Raises:
        ConfigError: names the method or the strength, and the payload level it needs.
    """
    have = captured.payload
    original = [m.name for m in methods if m.kind == "original"]
    if original and have != "full":
        raise ConfigError(
            f"{', '.join(original)} need every head's attention: payload=full. {captured.location} holds "
            f"payload={have}; capture it under another run=NAME with payload=full."
        )
    stored = set(captured.document["settings"].get("folds") or ())
    if have == "relevance":
        # Which direction acts may depend on the value's sign.
        directions = {acting_direction(t.name, sign) for t in captured.targets for sign in (1.0, -1.0)}
        missing = [m.name for m in methods if m.kind == "fold" and not {m.fold_for(d) for d in directions} <= stored]
        if missing:
            raise ConfigError(
                f"{', '.join(missing)}: not in the relevance payloads of {captured.location} (they hold "
                f"{', '.join(sorted(stored))}). Use source=online, or capture with methods={','.join(missing)} or "
                "payload=reduced under another run=NAME."
            )
        if strength != STRENGTH and any(m.kind == "fold" for m in methods):
            raise ConfigError(
                f"strength={strength:g} cannot be applied to the relevance payloads of {captured.location}, which were "
                f"folded with {STRENGTH:g}. Use source=online, or capture with payload=reduced under another run=NAME."
            )


def _job_of_payloads(config: ExplainConfig, captured: Captured, methods: Sequence[Method]) -> Job:
    return _job(
        config,
        captured.location,
        select(captured.frames, config.every, config.limit),
        captured.targets,
        {"source": "payloads", "capture": captured.identity, **_options(config, methods)},
        captured.document["checkpoints"],
    )


def _job_online(config: ExplainConfig, location: Location, targets: Sequence[Target], methods: Sequence[Method]) -> Job:
    original = [m.name for m in methods if m.kind == "original"]
    if original:
        raise ConfigError(
            f"{', '.join(original)} need stored attention: capture with payload=full first, then explain that run."
        )
    found = discover(config.scene_dir, config.image_subdir, config.speed_subdir, config.default_speed_mps)
    settings = {
        "source": "online",
        "spline": dataclasses.asdict(config.spline) if config.spline.enabled else None,
        "model.dtype": config.model.dtype,
        "model.max_new_tokens": config.model.max_new_tokens,
        **_options(config, methods),
    }
    frames = select(found, config.every, config.limit)
    return _job(config, location, frames, targets, settings, checkpoint_identities(config.model))


def _options(config: ExplainConfig, methods: Sequence[Method]) -> dict[str, Any]:
    """Options that change maps, as far as these methods read them."""
    names, kinds = {m.name for m in methods}, {m.kind for m in methods}
    return {
        "methods": [m.name for m in methods],
        "strength": config.strength if "fold" in kinds else None,
        "ig_steps": config.ig_steps if "integrated_gradients" in names else None,
        "iss_samples": config.iss_samples if "iss" in names else None,
        "seed": config.seed if "perturbation" in kinds else None,
    }


def _job(
    config: ExplainConfig,
    location: Location,
    frames: Sequence[FrameRef],
    targets: Sequence[Target],
    settings: dict[str, Any],
    checkpoints: dict[str, dict[str, Any]],
) -> Job:
    return Job(
        name="explain",
        output_dir=str(location),
        run=config.maps,
        names={"run": location.name, "maps": config.maps},
        frames=frames,
        targets=[t.name for t in targets],
        mode=targets[0].mode,
        settings=settings,
        checkpoints=checkpoints,
        config_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)),
        max_error_rate=config.max_error_rate,
        retry_failed=config.retry_failed,
        wandb=config.wandb,
    )


def _execute(
    driver: Driver,
    config: ExplainConfig,
    targets: Sequence[Target],
    methods: Sequence[Method],
    captured: Captured | None,
) -> int:
    if driver.is_finished:
        return driver.report_finished()
    from vla_ray.pipelines.explain_work import ExplainWork

    work = ExplainWork(config, targets, methods, captured)
    if config.dry_run:
        return driver.report_dry_run([f"methods: {', '.join(m.name for m in methods)}", work.source])
    return driver.execute(work)
