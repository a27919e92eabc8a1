"""Measure the maps of a run: python jobs/faithfulness.py run=NAME (--help)."""

from vla_ray.command_line import run_job
from vla_ray.config import FaithfulnessConfig


def main(config: FaithfulnessConfig) -> int:
    from vla_ray.pipelines.faithfulness import faithfulness  # torch takes seconds to import; a typo should not

    return faithfulness(config)


if __name__ == "__main__":
    run_job(__file__, FaithfulnessConfig, main)
