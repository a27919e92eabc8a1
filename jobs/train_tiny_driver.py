"""Train the tiny driver on synthetic scenes and measure it: python jobs/train_tiny_driver.py (15 minutes)."""

from vla_ray.command_line import run_job
from vla_ray.config import TinyDriverConfig


def main(config: TinyDriverConfig) -> int:
    from vla_ray.training.tiny_driver.recipe import CHECKPOINT_PATH, Recipe, train
    from vla_ray.training.tiny_driver.report import score_table

    recipe = Recipe(
        frames=config.frames,
        held_out=config.held_out,
        steps=config.steps,
        vision_steps=config.steps // 4,
        warmup_steps=min(200, config.steps // 4),
        seed=config.seed,
        threads=config.threads,
    )
    result = train(config.output_dir, recipe)
    print(score_table(result["scores"]))
    print(f"run it: python jobs/capture.py model.checkpoint={config.output_dir}/{CHECKPOINT_PATH}")
    return 0


if __name__ == "__main__":
    run_job(__file__, TinyDriverConfig, main)
