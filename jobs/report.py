"""Overlays and report/index.html of a run that has maps: python jobs/report.py run=NAME (--help)."""

from pathlib import Path

from vla_ray.bundled import bundled_run
from vla_ray.command_line import run_job
from vla_ray.config import ReportConfig


def main(config: ReportConfig) -> int:
    from vla_ray.report.build import build_report
    from vla_ray.storage.files import Location

    run = config.run or bundled_run(Path(__file__).resolve().parent.parent, config.output_dir)
    built = build_report(Location.of(config.output_dir) / run, config.maps, config.overlays, scores=config.scores)
    print(f"report of {built.frames:,} frames, {built.overlays:,} overlays\n  look     {built.page}")
    return 0


if __name__ == "__main__":
    run_job(__file__, ReportConfig, main)
