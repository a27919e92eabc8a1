"""Does the action depend on the picture at all? To be asked before a map is shown.

Policies are known to act nearly unchanged on pictures that show nothing. Named perturbations of the whole picture are
answered by metres of displacement; where none of them moves the trajectory there is nothing for a map to explain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import TargetError
from vla_ray.explain.perturb import (
    NO_EFFECT_M,
    ByteArray,
    ask_in_batches,
    blurred,
    canvas,
    cut,
    displacement,
    mean_colour,
    tile_side,
)
from vla_ray.explain.question import Answer, Ask

PERTURBATIONS = ("blank", "blur", "shuffled", "mirrored", "swapped")
_PATCHES_PER_TILE = 8


def perturbed_tiles(
    tiles_TSS3: ByteArray, geometry: TileGeometry, other_TSS3: ByteArray | None = None, seed: int = 0
) -> dict[str, ByteArray]:
    """The frame's tiles, changed as a whole: name in PERTURBATIONS -> uint8 [T, S, S, 3].

    * `blank`: the mean colour; `blur`: 1/16 of a tile's side; nothing (sharp) left to see.
    * `shuffled`: the canvas cut into 8 x 8 squares a tile, permuted at random: everything there, nowhere in place.
    * `mirrored`: left is right.
    * `swapped`: `other_TSS3`, the tiles of another frame; left out without one.

    Raises:
        TargetError: the other frame has other tiles.
    """
    whole = canvas(tiles_TSS3, geometry)
    changed = {
        "blank": mean_colour(tiles_TSS3, geometry),
        "blur": blurred(tiles_TSS3, geometry),
        "shuffled": _tiles(_shuffled(whole, geometry, seed), geometry),
        "mirrored": _tiles(np.ascontiguousarray(whole[:, ::-1]), geometry),
    }
    if other_TSS3 is not None:
        if other_TSS3.shape != tiles_TSS3.shape:
            raise TargetError(
                f"a frame of tiles {list(tiles_TSS3.shape)} cannot be swapped for one of {list(other_TSS3.shape)}; "
                "take a frame of the same size."
            )
        changed["swapped"] = other_TSS3
    return changed


def _tiles(whole: ByteArray, geometry: TileGeometry) -> ByteArray:
    tiles = cut(whole, geometry)
    if not geometry.thumbnail:
        return tiles
    side = tile_side(geometry)
    small = Image.fromarray(whole).resize((side, side), Image.Resampling.BICUBIC)
    return np.concatenate([tiles, np.asarray(small)[None]])


def _shuffled(whole: ByteArray, geometry: TileGeometry, seed: int) -> ByteArray:
    size = tile_side(geometry) // _PATCHES_PER_TILE
    rows, columns = (extent // size for extent in whole.shape[:2])
    out = whole.copy()  # what a side that is no multiple of the squares leaves over stays
    inner = whole[: rows * size, : columns * size].reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    mixed = np.random.default_rng(seed).permutation(inner.reshape(-1, size, size, 3)).reshape(inner.shape)
    out[: rows * size, : columns * size] = mixed.swapaxes(1, 2).reshape(rows * size, columns * size, 3)
    return out


@dataclass(frozen=True, slots=True)
class Moved:
    """What one perturbation does: metres of mean displacement of route and speed waypoints, change of the scalar."""

    route_m: float
    speed_m: float
    scalar_change: float

    def of(self, head: str | None) -> float:
        """Metres of the trajectory that a target of this head reads."""
        return self.route_m if head == "route" else self.speed_m


def dependence(ask: Ask, pixels_T3SS: Tensor, perturbed: Mapping[str, Tensor]) -> dict[str, Moved]:
    """How far each perturbed picture moves the trajectory, by the names given.

    Args:
        ask: with the text held fixed, or written anew for every picture: two calls compare the two.
        perturbed: name -> [T, 3, S, S], normalised like the frame's own `pixels_T3SS`.
    """
    answer = ask_in_batches(ask, [torch.stack([pixels_T3SS, *perturbed.values()])])
    first = Answer(answer.route[:1], answer.speed[:1], answer.scalar[:1])
    route, speed = (displacement(answer, first, head).tolist() for head in ("route", "speed"))
    change = (answer.scalar - answer.scalar[0]).tolist()
    return {name: Moved(route[i], speed[i], change[i]) for i, name in enumerate(perturbed, start=1)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Attributes:
    depends: whether some perturbation moves the trajectory by the threshold or more.
    largest_m: the largest displacement, and `by` which perturbation.
    """

    depends: bool
    largest_m: float
    by: str
    threshold_m: float

    def __str__(self) -> str:
        if self.depends:
            return f"the action depends on the picture: {self.by} moves it {self.largest_m:.2f} m"
        return (
            f"the action does not depend on the picture: no perturbation moves it {self.threshold_m:g} m "
            f"(at most {self.largest_m:.2f} m, by {self.by}); a map would explain nothing"
        )


def depends_on_image(moved: Mapping[str, Moved], head: str | None, threshold_m: float = NO_EFFECT_M) -> Verdict:
    """Whether the trajectory that the target reads depends on the picture.

    One perturbation that moves it is enough: on a clear road a blank picture looks clear as well, another frame's
    need not. The threshold is that below which deletion curves exclude a frame.
    """
    by = max(moved, key=lambda name: moved[name].of(head))
    largest = moved[by].of(head)
    return Verdict(largest >= threshold_m, largest, by, threshold_m)
