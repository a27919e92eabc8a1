"""Capture, maps, faithfulness and report in one go: python jobs/pipeline.py scene_dir=... run=NAME (--help)."""

from vla_ray.command_line import run_job
from vla_ray.config import PipelineConfig


def main(config: PipelineConfig) -> int:
    from vla_ray.pipelines.pipeline import pipeline  # Ray and torch take seconds to import; a typo should not

    return pipeline(config)


if __name__ == "__main__":
    run_job(__file__, PipelineConfig, main)
