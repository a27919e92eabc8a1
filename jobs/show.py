"""Print what a payload, a run directory or a prepared dataset holds: python jobs/show.py path=outputs/demo."""

from vla_ray.command_line import run_job
from vla_ray.config import ShowConfig


def main(config: ShowConfig) -> int:
    from vla_ray.report.show import describe

    print(describe(config.path))
    return 0


if __name__ == "__main__":
    run_job(__file__, ShowConfig, main)
