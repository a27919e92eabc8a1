"""Turn CAST data into Parquet files to train on: python jobs/prepare_cast.py source=... name=NAME (--help)."""

from vla_ray.command_line import run_job
from vla_ray.config import PrepareConfig


def main(config: PrepareConfig) -> int:
    from vla_ray.pipelines.prepare_cast import prepare_cast  # pyarrow and others take a while; a typo should not

    return prepare_cast(config)


if __name__ == "__main__":
    run_job(__file__, PrepareConfig, main)
