"""Measure predictions, or compare several: python jobs/evaluate.py results=outputs/RUN/predictions.csv (--help)."""

from dataclasses import replace
from pathlib import Path

from vla_ray.command_line import run_job
from vla_ray.config import EvaluateConfig


def main(config: EvaluateConfig) -> int:
    from vla_ray.pipelines.evaluate import evaluate  # pandas and matplotlib take seconds; a typo should not

    if config.results is None:
        from vla_ray.bundled import bundled_predictions

        root = Path(__file__).resolve().parent.parent
        config = replace(config, results=bundled_predictions(root, config.output_dir))
    return evaluate(config)


if __name__ == "__main__":
    run_job(__file__, EvaluateConfig, main)
