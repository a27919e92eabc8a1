"""What jobs run on when nothing is named: bundled scenes, explained by the bundled driver; corridors, and a policy."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from vla_ray.command_line import load_config
from vla_ray.config import ExplainConfig, InferConfig, PrepareConfig
from vla_ray.config.train import TINY, ActionConfig
from vla_ray.errors import RunError
from vla_ray.storage.files import Location, read_json

logger = logging.getLogger(__name__)

RUN, PREDICTIONS = "bundled", "bundled_predictions"


def bundled_run(root: Path, output_dir: str) -> str:
    """The name of a run with maps of the bundled scenes, which are made now unless they are there.

    Args:
        root: of the repository.
    """
    document = read_json(Location.of(output_dir) / RUN / "maps" / "run.json") or {}
    if document.get("status") != "finished":
        from vla_ray.pipelines.explain import explain

        asked = [f"run={RUN}", f"output_dir={output_dir}", "kinematic_metric=longitudinal_progress", "report=false"]
        code = explain(load_config(root, "explain", ExplainConfig, asked))
        if code:
            raise RunError(f"the bundled scenes could not be explained (exit code {code}); the lines above say why.")
    return RUN


def bundled_dataset(root: Path) -> str:
    """The directory of the prepared corridors, which are rendered now unless they are there.

    Args:
        root: of the repository.
    """
    from vla_ray.data.prepared import DOCUMENT
    from vla_ray.pipelines.prepare_cast import prepare_cast

    config = load_config(root, "prepare_cast", PrepareConfig, [])
    location = Location.of(config.output_dir) / "corridors"
    if not (location / DOCUMENT).exists():
        code = prepare_cast(replace(config, name="corridors"))
        if code:
            raise RunError(f"the bundled corridors could not be prepared (exit code {code}); the lines above say why.")
    return str(location)


def bundled_policy(root: Path, runs: str) -> str:
    """The newest tiny policy that was trained here, else the bundled one; which one is logged.

    Args:
        root: of the repository.
        runs: where jobs/train.py keeps its runs.
    """
    from vla_ray.models.paligemma.trained import newest_tiny

    trained = newest_tiny(runs, ActionConfig().num_steps)
    found = trained or root / "checkpoints" / "paligemma-tiny"
    logger.info("%s: %s", "the newest trained tiny policy" if trained else "the bundled policy", found)
    return str(found)


def bundled_predictions(root: Path, output_dir: str) -> str:
    """The newest finished run of inference below a directory; one on the bundled corridors is made if there is none.

    Args:
        root: of the repository.
    """
    from vla_ray.pipelines.evaluate import newest_predictions
    from vla_ray.pipelines.infer import infer, remembered

    known = newest_predictions(output_dir)
    if known is not None:
        logger.info("the newest predictions: %s", known)
        return known
    config = remembered(load_config(root, "infer", InferConfig, [f"run={PREDICTIONS}", f"output_dir={output_dir}"]))
    code = infer(complete(root, config))
    if code:
        raise RunError(f"the bundled corridors could not be predicted (exit code {code}); the lines above say why.")
    return f"{output_dir}/{PREDICTIONS}"


def complete(root: Path, config: InferConfig) -> InferConfig:
    """With the bundled policy and dataset where none is named.

    Args:
        root: of the repository.
    """
    name = bundled_policy(root, config.checkpoints_dir) if config.model.name == TINY else config.model.name
    return config.named(name, config.source or bundled_dataset(root))
