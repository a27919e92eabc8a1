"""Hiding parts of what the model sees, and asking it again: the ground under every perturbation measure.

Cells are hidden in pixel space, where their content is replaced by a baseline picture: the frame itself, blurred as
one picture (so that no seam appears between tiles), or its mean colour. The thumbnail loses the same part of the
scene as the tiles. Perturbed pictures exist a batch at a time; masks are small and may all exist at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from vla_ray.data.tiles import TileGeometry
from vla_ray.explain.question import Answer, Ask
from vla_ray.targets import Spline
from vla_ray.targets.spline import resample_route

ByteArray = NDArray[np.uint8]

# Metres of mean trajectory displacement below which a change of the picture counts as no visual effect.
NO_EFFECT_M = 0.1
BATCH = 64
_BLUR_SHARE = 1 / 16  # of a tile's side: 28 px at 448, two patches of 14 px
_EVEN = Spline(enabled=True)  # no smoothing, the same number of points, evenly spaced in arc length


@dataclass(frozen=True, slots=True)
class Probe:
    """One frame that can be asked about with cells hidden.

    Attributes:
        ask: the frame as a function of its pixels (explain/question.py).
        pixels_T3SS, baseline_T3SS: its tiles and what hidden cells show instead, normalised, on the model's device.
        geometry: how the tiles lie on the canvas.
        batch: pictures per forward pass.
    """

    ask: Ask
    pixels_T3SS: Tensor
    baseline_T3SS: Tensor
    geometry: TileGeometry
    batch: int = BATCH

    def __call__(self, masks_NRC: Tensor) -> Answer:
        """Answers to the picture with these cells hidden, one for each mask; see `hide`."""
        chunks = masks_NRC.split(self.batch)
        return ask_in_batches(self.ask, (hide(self.pixels_T3SS, self.baseline_T3SS, m, self.geometry) for m in chunks))


def ask_in_batches(ask: Ask, batches: Iterable[Tensor]) -> Answer:
    """Answers to many pictures without a graph, on the CPU in float64.

    Args:
        batches: tensors [n, T, 3, S, S]; a generator is read one batch at a time, so that only one exists.
    """
    with torch.no_grad():
        answers = [ask(batch) for batch in batches]
    parts = ([getattr(a, name) for a in answers] for name in ("route", "speed", "scalar"))
    return Answer(*(torch.cat([p.detach().cpu().double() for p in part]) for part in parts))


def hide(pixels_T3SS: Tensor, baseline_T3SS: Tensor, masks_NRC: Tensor, geometry: TileGeometry) -> Tensor:
    """Pictures [n, T, 3, S, S] in which the masked cells of the canvas show the baseline.

    Args:
        masks_NRC: [n, rows, columns] over the whole canvas, bool, or the baseline's share in [0, 1]; any grid. A pixel
            belongs to the cell that holds its centre; a thumbnail's pixel to the cell that it shows.
    """
    masks = masks_NRC.to(pixels_T3SS)
    rows, columns = masks.shape[1:]
    side, device = pixels_T3SS.shape[-1], masks.device
    shares = []
    for left, top, right, bottom in geometry.boxes:
        row = _cells(top, bottom, side, geometry.canvas_height, rows, device)
        column = _cells(left, right, side, geometry.canvas_width, columns, device)
        shares.append(masks[:, row[:, None], column[None, :]])
    share = torch.stack(shares, 1)[:, :, None]
    return pixels_T3SS * (1 - share) + baseline_T3SS * share


def _cells(start: int, stop: int, side: int, extent: int, count: int, device: torch.device) -> Tensor:
    """Which of `count` cells along `extent` pixels each of the `side` pixels of a tile from `start` to `stop` shows."""
    centres = start + (torch.arange(side, dtype=torch.float64) + 0.5) * ((stop - start) / side)
    return (centres * (count / extent)).long().clamp_max(count - 1).to(device)


def canvas_grid(geometry: TileGeometry, per_tile: int) -> tuple[int, int]:
    """Rows and columns of the canvas when a tile has `per_tile` cells a side (its patches, or image tokens)."""
    side = tile_side(geometry)
    return geometry.canvas_height // side * per_tile, geometry.canvas_width // side * per_tile


def tile_side(geometry: TileGeometry) -> int:
    """Pixels along a tile; the first box is never the thumbnail's."""
    left, _, right, _ = geometry.boxes[0]
    return right - left


def blurred(tiles_TSS3: ByteArray, geometry: TileGeometry, sigma: float | None = None) -> ByteArray:
    """The frame's tiles after a Gaussian blur of the whole canvas, uint8 [T, S, S, 3].

    Args:
        sigma: in canvas pixels; a sixteenth of a tile's side by default. The thumbnail, which shows the canvas smaller,
            is blurred by as much of the scene.
    """
    side = tile_side(geometry)
    sigma = side * _BLUR_SHARE if sigma is None else sigma
    tiles = cut(_blur(canvas(tiles_TSS3, geometry), (sigma, sigma)), geometry)
    if geometry.thumbnail:
        scale = sigma * side / geometry.canvas_width, sigma * side / geometry.canvas_height
        tiles = np.concatenate([tiles, _blur(tiles_TSS3[-1], scale)[None]])
    return tiles


def mean_colour(tiles_TSS3: ByteArray, geometry: TileGeometry) -> ByteArray:
    """Tiles that show nothing but the frame's mean colour, uint8 [T, S, S, 3]."""
    mean = canvas(tiles_TSS3, geometry).mean((0, 1)).round().astype(np.uint8)
    return np.broadcast_to(mean, tiles_TSS3.shape).copy()


def canvas(tiles_TSS3: ByteArray, geometry: TileGeometry) -> ByteArray:
    """The tiles, the thumbnail left out, put together again: uint8 [canvas height, canvas width, 3]."""
    whole = np.zeros((geometry.canvas_height, geometry.canvas_width, 3), np.uint8)
    for tile, (left, top, right, bottom) in zip(tiles_TSS3, _canvas_boxes(geometry), strict=False):
        whole[top:bottom, left:right] = tile
    return whole


def cut(canvas_HW3: ByteArray, geometry: TileGeometry) -> ByteArray:
    """A canvas cut into its tiles, without a thumbnail: the inverse of `canvas`."""
    boxes = _canvas_boxes(geometry)
    return np.stack([canvas_HW3[top:bottom, left:right] for left, top, right, bottom in boxes])


def _canvas_boxes(geometry: TileGeometry) -> tuple[tuple[int, int, int, int], ...]:
    return geometry.boxes[:-1] if geometry.thumbnail else geometry.boxes


def _blur(picture_HW3: ByteArray, sigma_xy: tuple[float, float]) -> ByteArray:
    return np.asarray(Image.fromarray(picture_HW3).filter(ImageFilter.GaussianBlur(sigma_xy)))


def squared_distances(answer: Answer, reference: Answer, head: str | None) -> Tensor:
    """Squared distance (m^2) of every trajectory point to the reference's, [n, points].

    Args:
        reference: one answer, or one for each of the n.
        head: which trajectory the explained target reads (`Answer.trajectory`). Routes are compared at equal shares of
            their arc length, because the spacing of their points says nothing about the road.
    """
    moved, kept = answer.trajectory(head), reference.trajectory(head)
    if head == "route":
        moved, kept = resample_route(moved, _EVEN), resample_route(kept, _EVEN)
    return (moved - kept).square().sum(-1)


def displacement(answer: Answer, reference: Answer, head: str | None) -> Tensor:
    """Mean distance (m) between the points of two trajectories, [n]; arguments as for `squared_distances`."""
    return squared_distances(answer, reference, head).sqrt().mean(-1)
