"""Settings of jobs/evaluate.py: which predictions, and what beside their errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vla_ray.config.knobs import at_least, knob, resolve_path
from vla_ray.config.shared import ClusterConfig, WandbConfig
from vla_ray.errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure predictions: errors with intervals beside baselines, by instruction, calibration, figures, a report.

    Writes evaluation/ and report/index.html beside the predictions. Several predictions are compared, pairwise on
    the samples that they share; that goes to evaluation/ beside the first.
    """

    results: Any = knob(
        None,
        "predictions.csv or .parquet, a run of jobs/infer.py, a glob, or a list; null: the newest run, or a new one",
    )
    counterfactual: bool = knob(False, "ask the policy other instructions for the same pictures: does it follow them?")
    counterfactual_samples: int = knob(200, "for this many samples, spread evenly")
    report: bool = knob(True, "write report/index.html")
    output_dir: str = knob("", "where runs are kept; local or s3://")
    cluster: ClusterConfig = knob(ClusterConfig, "Ray, for counterfactual=true")
    wandb: WandbConfig = knob(WandbConfig, "Weights & Biases: the tables and the means")

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "outputs"))
        at_least("counterfactual_samples", self.counterfactual_samples, 1)
        if self.results is not None:
            given = [self.results] if isinstance(self.results, str) else list(self.results)
            paths = tuple(resolve_path(str(item)) for item in given if str(item).strip())
            if not paths:
                raise ConfigError(
                    "results is empty; give a predictions.csv, a run of jobs/infer.py, or a list of these."
                )
            object.__setattr__(self, "results", paths)
