"""Predict actions for a dataset: python jobs/infer.py model.name=checkpoints/RUN source=datasets/NAME (--help)."""

from pathlib import Path

from vla_ray.command_line import run_job
from vla_ray.config import InferConfig


def main(config: InferConfig) -> int:
    from vla_ray.bundled import complete  # torch takes seconds to import; a typo should not
    from vla_ray.pipelines.infer import infer, remembered

    return infer(complete(Path(__file__).resolve().parent.parent, remembered(config)))


if __name__ == "__main__":
    run_job(__file__, InferConfig, main)
