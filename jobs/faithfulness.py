"""Measure the maps of a run: python jobs/faithfulness.py run=NAME (--help)."""

from dataclasses import replace
from pathlib import Path

from vla_ray.bundled import bundled_run
from vla_ray.command_line import run_job
from vla_ray.config import FaithfulnessConfig


def main(config: FaithfulnessConfig) -> int:
    from vla_ray.pipelines.faithfulness import faithfulness  # torch takes seconds to import; a typo should not

    run = config.run or bundled_run(Path(__file__).resolve().parent.parent, config.output_dir)
    return faithfulness(replace(config, run=run))


if __name__ == "__main__":
    run_job(__file__, FaithfulnessConfig, main)
