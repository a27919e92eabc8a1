"""Synthetic frames as a scene directory: what the jobs read, and beside it what is true.

<directory>/images/<stem>.png        the pictures
<directory>/frames.jsonl             one line per frame: image, speed_mps, target_points, question, camera
<directory>/truth/masks/<stem>.png   palette image: 0 neither, 1 cause, 2 markings, 3 distractor (see `causal_mask`)
<directory>/truth/truth.jsonl        one line per frame: seed, cause, commentary, the expert's plan, the camera
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vla_ray.data.camera import Camera
from vla_ray.data.synthetic.render import CAMERA_HEIGHT_M, FOV_DEG, MASKS, causal_mask, render
from vla_ray.data.synthetic.sampling import sample_scene
from vla_ray.data.synthetic.world import (
    FloatArray,
    Scene,
    cause_distance,
    commentary,
    effect,
    expert,
    target_points,
)
from vla_ray.errors import SceneError

_PALETTE = ((0, 0, 0), (220, 40, 40), (240, 200, 60), (70, 110, 200))  # neither, then MASKS


@dataclass(frozen=True, slots=True)
class Truth:
    """What is known about one written frame. `effect_m`: how far the cause moves the mean speed waypoint."""

    cause: str
    commentary: str
    cause_distance_m: float | None
    effect_m: float
    route: FloatArray
    speed_waypoints: FloatArray
    masks: dict[str, NDArray[np.bool_]]  # by the names in MASKS, each [H, W] of the picture


def write_scene(
    directory: str | Path,
    scenes: Iterable[Scene | int],
    width: int = 448,
    with_target_points: bool = True,
    question: str | None = None,
) -> Path:
    """Write frames and their truth; equal arguments give equal bytes.

    Args:
        scenes: moments (as from `drive`), or seeds of independent frames.
        with_target_points: whether frames carry target points; without them the prompt says to follow the road, and the
            route must be read from the picture.
        question: asked instead of the default one, in every frame; `{speed}` stands for the speed in m/s.

    Returns:
        The scene directory.
    """
    root = Path(directory)
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "truth" / "masks").mkdir(parents=True, exist_ok=True)
    frames, truths = [], []
    for index, item in enumerate(scenes):
        scene = sample_scene(item) if isinstance(item, int) else item
        stem = f"frame_{index:04d}"
        rgb, ids = render(scene, width)
        Image.fromarray(rgb).save(root / "images" / f"{stem}.png", optimize=True)
        _write_mask(root / "truth" / "masks" / f"{stem}.png", scene, ids)
        points = target_points(scene) if with_target_points else None
        frames.append(
            {
                "image": f"images/{stem}.png",
                "speed_mps": round(scene.speed, 2),
                "target_points": None if points is None else _rounded(points),
                "question": question and question.replace("{speed}", f"{scene.speed:.1f}"),
                "camera": camera(scene).to_dict(),
            }
        )
        truths.append({"image": f"images/{stem}.png", **_truth(scene)})
    (root / "frames.jsonl").write_text("".join(json.dumps(f) + "\n" for f in frames))
    (root / "truth" / "truth.jsonl").write_text("".join(json.dumps(t) + "\n" for t in truths))
    return root


def read_truth(directory: str | Path) -> dict[str, Truth]:
    """The truth of a scene written by `write_scene`: frame stem -> Truth.

    Raises:
        SceneError: the scene carries no truth.
    """
    root = Path(directory)
    table = root / "truth" / "truth.jsonl"
    if not table.is_file():
        raise SceneError(f"{root} has no truth/truth.jsonl: only scenes written by write_scene know what is true.")
    found = {}
    for row in map(json.loads, table.read_text().splitlines()):
        stem = Path(row["image"]).stem
        labels = np.asarray(Image.open(root / "truth" / "masks" / f"{stem}.png"))
        found[stem] = Truth(
            cause=row["cause"],
            commentary=row["commentary"],
            cause_distance_m=row["cause_distance_m"],
            effect_m=row["effect_m"],
            route=np.array(row["route"], np.float32),
            speed_waypoints=np.array(row["speed_waypoints"], np.float32),
            masks={name: labels == value for value, name in enumerate(MASKS, start=1)},
        )
    return found


def camera(scene: Scene) -> Camera:
    """The camera that `render` draws with. Nine digits: 1e-9 rad are less than a millionth of a pixel."""
    return Camera(FOV_DEG, CAMERA_HEIGHT_M, behind_m=0.0, pitch_rad=round(scene.look.pitch, 9))


def _truth(scene: Scene) -> dict[str, object]:
    plan, distance = expert(scene), cause_distance(scene)
    return {
        "seed": scene.seed,
        "cause": scene.cause,
        "commentary": commentary(scene),
        "cause_distance_m": None if distance is None else round(distance, 3),
        "effect_m": round(effect(scene), 4),
        "curvature": scene.kappa,
        "route": _rounded(plan.route),
        "speed_waypoints": _rounded(plan.speed_waypoints),
        "camera": {"fov_deg": FOV_DEG, "height_m": CAMERA_HEIGHT_M, "pitch_rad": scene.look.pitch},
    }


def _rounded(points: FloatArray) -> list[list[float]]:
    return [[round(float(v), 4) for v in p] for p in points]


def _write_mask(path: Path, scene: Scene, ids: NDArray[np.uint8]) -> None:
    labels = np.zeros(ids.shape, np.uint8)
    for value, name in enumerate(MASKS, start=1):
        labels[causal_mask(scene, ids, name)] = value
    image = Image.fromarray(labels, mode="P")
    image.putpalette([channel for color in _PALETTE for channel in color])
    image.save(path, optimize=True)
