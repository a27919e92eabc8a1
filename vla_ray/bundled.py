"""What a job that reads results runs on when no run is named: the bundled scenes, explained by the bundled driver."""

from __future__ import annotations

from pathlib import Path

from vla_ray.command_line import load_config
from vla_ray.config import ExplainConfig
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
