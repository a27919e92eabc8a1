"""The bundled demo: four short drives, each with another reason for what the ego does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vla_ray.data.synthetic.sampling import drive
from vla_ray.data.synthetic.write import write_scene


@dataclass(frozen=True, slots=True)
class DemoDrive:
    """A drive and how it is asked about. Seeds are below those of the tiny driver's training."""

    name: str
    seed: int
    cause: str
    curve: bool
    with_target_points: bool


DEMO_DRIVES = (
    DemoDrive("red_light", 7245, "red_light", curve=False, with_target_points=False),
    DemoDrive("lead_car", 7105, "lead_car", curve=False, with_target_points=True),
    DemoDrive("pedestrian", 7000, "pedestrian", curve=False, with_target_points=True),
    # Without target points the bend must be read from the picture.
    DemoDrive("curve", 7034, "clear", curve=True, with_target_points=False),
)


def write_demo(root: str | Path, num_frames: int = 8, width: int = 448) -> list[Path]:
    """Write the demo's scenes as children of `root`; returns their directories."""
    return [
        write_scene(Path(root) / d.name, drive(d.seed, num_frames, d.cause, d.curve), width, d.with_target_points)
        for d in DEMO_DRIVES
    ]
