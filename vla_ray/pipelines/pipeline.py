"""Capture, maps, faithfulness, report, one after the other on one Ray; each stage resumes by itself."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from vla_ray.cluster import kept_connection
from vla_ray.config import CaptureConfig, ExplainConfig, FaithfulnessConfig, PipelineConfig
from vla_ray.errors import ConfigError
from vla_ray.explain.chain import STRENGTH
from vla_ray.explain.methods import DEFAULT_METHOD, Method, parse_methods
from vla_ray.pipelines.capture import capture
from vla_ray.pipelines.explain import explain
from vla_ray.pipelines.faithfulness import faithfulness

logger = logging.getLogger(__name__)

Stage = TypeVar("Stage", CaptureConfig, ExplainConfig, FaithfulnessConfig)


def pipeline(config: PipelineConfig) -> int:
    """Run or resume all stages; returns the first exit code that is not 0, without starting what follows."""
    methods = parse_methods(config.methods)
    names = [m.name for m in methods]
    if DEFAULT_METHOD not in names:
        raise ConfigError(
            f"methods={','.join(names)}: {DEFAULT_METHOD} must be among them, baselines are made from it."
        )
    stored = [m.name for m in methods if m.kind == "fold"]
    run = config.run or time.strftime("pipeline_%y%m%d_%H%M%S")
    _check(config, methods)
    # All settings are checked before anything runs. A capture has chosen its frames: they are not thinned out again.
    captured = _stage(CaptureConfig, config, run=run, methods=stored)
    own = {"run": run, "source": "payloads", "methods": names, "every": 1, "limit": None}
    # The last stage writes the report, with everything in it.
    explained = _stage(ExplainConfig, config, **own, report=config.measure == 0)
    measured = None if config.measure == 0 else _stage(FaithfulnessConfig, config, run=run, frames=config.measure)
    with kept_connection():
        logger.info("capture")
        code = capture(captured)
        if code or config.dry_run:
            return code
        logger.info("maps")
        code = explain(explained)
        if code or measured is None:
            return code
        logger.info("faithfulness")
        return faithfulness(measured)


def _check(config: PipelineConfig, methods: Sequence[Method]) -> None:
    """Refuse before the capture what would be refused after it."""
    originals = [m.name for m in methods if m.kind == "original"]
    if originals and config.payload != "full":
        raise ConfigError(f"{', '.join(originals)} need every head's attention: use payload=full.")
    if config.payload == "relevance" and config.strength != STRENGTH:
        raise ConfigError(
            f"strength={config.strength:g} needs payload=reduced or full: relevance payloads have {STRENGTH:g}."
        )


def _stage(schema: type[Stage], config: PipelineConfig, **own: Any) -> Stage:
    """A stage's settings: those of the same name here, and its own."""
    names = {f.name for f in dataclasses.fields(schema)}
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
    return schema(**{**shared, **own})
