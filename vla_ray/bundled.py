"""What jobs run on when nothing is named: the bundled scenes, explained by the bundled driver; rendered corridors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vla_ray.command_line import load_config
from vla_ray.config import ExplainConfig, PrepareConfig
from vla_ray.errors import RunError
from vla_ray.storage.files import Location, read_json

RUN = "bundled"


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
