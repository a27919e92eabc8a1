"""Capture attention and gradients of explained actions: python jobs/capture.py scene_dir=... run=NAME (--help)."""

from vla_ray.command_line import run_job
from vla_ray.config import CaptureConfig


def main(config: CaptureConfig) -> int:
    from vla_ray.pipelines.capture import capture  # Ray and torch take seconds to import; a typo should not

    return capture(config)


if __name__ == "__main__":
    run_job(__file__, CaptureConfig, main)
