"""Fine-tune a PaliGemma policy: python jobs/train.py data.path=datasets/NAME model=paligemma-3b (--help)."""

from dataclasses import replace
from pathlib import Path

from vla_ray.command_line import run_job
from vla_ray.config import TrainConfig


def main(config: TrainConfig) -> int:
    from vla_ray.pipelines.train import check_settings, train

    if config.data.path is None:
        from vla_ray.bundled import bundled_dataset

        check_settings(config)  # before a dataset is made for it
        path = bundled_dataset(Path(__file__).resolve().parent.parent)
        config = replace(config, data=replace(config.data, path=path))
    return train(config)


if __name__ == "__main__":
    run_job(__file__, TrainConfig, main)
