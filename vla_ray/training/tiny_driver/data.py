"""Rendered frames for the tiny driver: pictures as tiles on disk, labels in memory, prompts and answers.

A frame is a function of its seed. Tiles come from the package's own `Tiler` and prompts from its own `Processor`, so
that what the model is trained on is what it will be given.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from vla_ray.data.synthetic import (
    CAUSES,
    COMMENTARY,
    Kind,
    Scene,
    advance,
    expert,
    render,
    sample_scene,
    target_points,
)
from vla_ray.data.tiles import TileGeometry
from vla_ray.models.simlingo.config import SimLingoConfig
from vla_ray.models.simlingo.processing import Points, Processor, Prompt, default_question, make_tiler

NUM_TILES = 2
ASK, ASK_PLAIN = "What should the ego do next?", "Predict the waypoints."
ANSWER = "Waypoints:"
PROMPTS = {  # name -> (target points in the prompt, commentary asked for)
    "command, commentary": (False, True),
    "command, waypoints only": (False, False),
    "target points, commentary": (True, True),
    "target points, waypoints only": (True, False),
}
# What a pre-trained vision tower would bring: what a patch shows, blind to who causes what (every car is a car).
CATEGORIES: tuple[tuple[Kind, ...], ...] = (
    (Kind.ROAD,),
    (Kind.MARKING, Kind.STOP_LINE),
    (Kind.LEAD_CAR, Kind.PARKED_CAR, Kind.ONCOMING_CAR),
    (Kind.RED_LIGHT,),
    (Kind.GREEN_LIGHT,),
    (Kind.LIGHT_POLE, Kind.POLE),
    (Kind.PEDESTRIAN, Kind.WALKER),
    (Kind.BILLBOARD,),
    (Kind.CLOUD,),
    (Kind.TREE,),
    (Kind.BUILDING,),
)
_SEEN_SHARE = 0.04  # of a patch's pixels
_CHUNK = 200


@dataclass(frozen=True, slots=True)
class Frames:
    """F frames. Tiles stay on disk (memory-mapped), the labels are small."""

    tiles: NDArray[np.uint8]  # [F, 2, S, S, 3]
    route: Tensor  # [F, 20, 2] m
    speed_waypoints: Tensor  # [F, 10, 2] m
    points: Tensor  # [F, 2, 2] m
    speed: Tensor  # [F] m/s
    cause: Tensor  # [F] index into CAUSES
    categories: Tensor  # [F, 2, patches, len(CATEGORIES)] bool

    def __len__(self) -> int:
        return len(self.speed)


def frame_scene(seed: int) -> Scene:
    """The scene of a frame; every fifth frame is a later moment of its world, so that drives look familiar."""
    scene = sample_scene(seed)
    for _ in range(seed // 5 % 10 if seed % 5 == 0 else 0):
        scene = advance(scene)
    return scene


def patch_categories(ids: NDArray[np.uint8], geometry: TileGeometry, patch: int) -> NDArray[np.bool_]:
    """Which CATEGORIES each ViT patch shows: [tiles, patches of a tile, len(CATEGORIES)]."""
    rows = (np.arange(geometry.canvas_height) + 0.5) * geometry.kept_height / geometry.canvas_height
    columns = (np.arange(geometry.canvas_width) + 0.5) * geometry.width / geometry.canvas_width
    canvas = ids[rows.astype(int)][:, columns.astype(int)]
    lookup = np.array([[kind in group for group in CATEGORIES] for kind in Kind])
    seen = []
    for left, top, right, bottom in geometry.boxes:
        tile = lookup[canvas[top:bottom, left:right]]
        n = (bottom - top) // patch
        share = tile.reshape(n, patch, n, patch, -1).mean((1, 3))
        seen.append(share.reshape(n * n, -1) > _SEEN_SHARE)
    return np.stack(seen)


_Row = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], float, int, NDArray[np.bool_]]


def _render_chunk(path: Path, first: int, seeds: Sequence[int], config: SimLingoConfig) -> list[_Row]:
    """Write the tiles of frames `first`.. to the file; return the labels (pictures would clog the pipe)."""
    tiles, tiler, rows = np.load(path, mmap_mode="r+"), make_tiler(config), []
    for k, seed in enumerate(seeds):
        scene = frame_scene(seed)
        rgb, ids = render(scene)
        tiles[first + k], geometry = tiler(rgb)
        plan = expert(scene)
        categories = patch_categories(ids, geometry, config.patch_size)
        cause = CAUSES.index(scene.cause)
        rows.append((plan.route, plan.speed_waypoints, target_points(scene), scene.speed, cause, categories))
    tiles.flush()
    return rows


def render_frames(seeds: Sequence[int], config: SimLingoConfig, path: Path, workers: int) -> Frames:
    """Render these frames; their tiles go to the new file `path` (170 kB a frame for 168 px tiles).

    Args:
        workers: processes; 0 renders in this one.
    """
    size = config.image_size
    open_memmap(path, "w+", np.uint8, (len(seeds), NUM_TILES, size, size, 3)).flush()
    parts = [(first, seeds[first : first + _CHUNK]) for first in range(0, len(seeds), _CHUNK)]
    if workers:
        # Not fork: torch's threads do not survive it.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(_render_chunk, path, first, part, config) for first, part in parts]
            rows = [row for job in jobs for row in job.result()]
    else:
        rows = [row for first, part in parts for row in _render_chunk(path, first, part, config)]
    route, waypoints, points, speed, cause, categories = zip(*rows, strict=True)
    return Frames(
        tiles=np.load(path, mmap_mode="r"),
        route=torch.from_numpy(np.stack(route)),
        speed_waypoints=torch.from_numpy(np.stack(waypoints)),
        points=torch.from_numpy(np.stack(points)),
        speed=torch.tensor(speed, dtype=torch.float32),
        cause=torch.tensor(cause),
        categories=torch.from_numpy(np.stack(categories)),
    )


def question(speed_mps: float, with_points: bool, comment: bool) -> str:
    """The question of a training frame: the ordinary one, or the one that asks for waypoints without commentary."""
    text = default_question(speed_mps, ((0.0, 0.0), (0.0, 0.0)) if with_points else None)
    return text if comment else text.replace(ASK, ASK_PLAIN)


def answer(cause: str, comment: bool) -> str:
    """What the model is to write, without the end-of-sequence token."""
    return f"{COMMENTARY[cause]} {ANSWER}" if comment else ANSWER


def prompt(processor: Processor, speed_mps: float, points: Tensor | None, comment: bool) -> Prompt:
    """The prompt of one frame; `points` [2, 2] metres, or None for the command prompt."""
    pair: Points | None = None
    if points is not None:
        (x0, y0), (x1, y1) = points.tolist()
        pair = ((x0, y0), (x1, y1))
    return processor.prompt(NUM_TILES, speed_mps, pair, question(speed_mps, points is not None, comment))
