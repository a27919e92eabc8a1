"""Render synthetic driving scenes with known causes: python jobs/make_scenes.py scenes=2 frames=50 output_dir=DIR."""

from pathlib import Path

from vla_ray.command_line import run_job
from vla_ray.config import ScenesConfig


def main(config: ScenesConfig) -> int:
    from vla_ray.data.synthetic import decisive_scenes, drive, write_demo, write_scene

    root = Path(config.output_dir)
    if config.demo:
        written = write_demo(root)
    else:
        seeds = range(config.seed, config.seed + config.scenes)
        if config.decisive:
            moments = [[scene] for scene in decisive_scenes(config.seed, config.scenes, config.cause)]
        else:
            moments = [drive(seed, config.frames, config.cause) for seed in seeds]
        written = [
            write_scene(
                root / f"scene_{seed:04d}", scenes, with_target_points=config.target_points, question=config.question
            )
            for seed, scenes in zip(seeds, moments, strict=True)
        ]
    print(f"wrote {len(written)} scenes to {root}")
    print(f"run on them: python jobs/capture.py scene_dir={root}")
    return 0


if __name__ == "__main__":
    run_job(__file__, ScenesConfig, main)
