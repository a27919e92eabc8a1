"""Masks beside a scene's frames: label images that say which pixels truly matter, where somebody knows.

`<scene>/<subdir>/<stem>.png`, as `data.synthetic.write_scene` makes them (0 neither, then the names of MASKS). A
`truth.jsonl` beside the masks' directory may name each frame's cause, so that frames of the same cause can be compared.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vla_ray.data.scenes import FrameRef
from vla_ray.data.synthetic.render import MASKS
from vla_ray.errors import SceneError, VlaRayError
from vla_ray.storage.files import Location

MASKS_SUBDIR = "truth/masks"
TRUTH_TABLE = "truth.jsonl"


@dataclass(frozen=True, slots=True)
class MaskRef:
    """Where a frame's mask is, and what its cause is called ("" if nobody says)."""

    path: str
    cause: str = ""


def find_masks(frames: Sequence[FrameRef], subdir: str) -> dict[str, MaskRef]:
    """frame_id -> its mask, for the frames that have one. Scenes without the sub-directory have none."""
    known: dict[str, tuple[dict[str, str], dict[str, str]]] = {}  # image directory -> masks and causes by stem
    found = {}
    for frame in frames:
        directory = Location.of(frame.image).parent
        if str(directory) not in known:
            known[str(directory)] = _of_scene(directory, subdir)
        masks, causes = known[str(directory)]
        if frame.stem in masks:
            found[frame.frame_id] = MaskRef(masks[frame.stem], causes.get(frame.stem, ""))
    return found


def _of_scene(images: Location, subdir: str) -> tuple[dict[str, str], dict[str, str]]:
    """Images lie in the scene or one below it."""
    for root in (images, images.parent):
        directory = root
        for part in subdir.split("/"):
            directory = directory / part
        entries = [entry.name for entry in directory.list() if entry.name.endswith(".png")]
        if entries:
            return {name.removesuffix(".png"): str(directory / name) for name in entries}, _causes(directory.parent)
    return {}, {}


def _causes(directory: Location) -> dict[str, str]:
    text = (directory / TRUTH_TABLE).try_read_bytes()
    try:
        rows = [json.loads(line) for line in (text or b"").decode().splitlines() if line.strip()]
        return {row["image"].rsplit("/", 1)[-1].rpartition(".")[0]: str(row["cause"]) for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SceneError(
            f"{directory / TRUTH_TABLE}: {' '.join(str(error).split())}; expected lines with 'image' and 'cause'"
        ) from error


def read_labels(path: str) -> NDArray[np.uint8]:
    """A mask image's labels, uint8 [H, W].

    Raises:
        SceneError: it is missing, not an image, or has colours rather than labels.
    """
    try:
        with Image.open(io.BytesIO(Location.of(path).read_bytes())) as image:
            labels = np.asarray(image)
    except (VlaRayError, OSError) as e:
        raise SceneError(f"mask {path} cannot be read: {' '.join(str(e).split())[:150]}") from e
    if labels.ndim != 2:
        raise SceneError(
            f"mask {path} has {labels.shape[-1]} channels; a mask is a palette or grey image of labels: 0 neither, "
            + ", ".join(f"{i} {name}" for i, name in enumerate(MASKS, 1))
        )
    return labels
