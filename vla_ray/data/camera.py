"""The camera that took a frame, for drawing what a model predicts into its picture. No model reads it.

A pinhole looking along the vehicle's x axis, `behind_m` behind the vehicle's origin and `height_m` above the ground.
SimLingo's own camera is the default: 110 degrees, 1.5 m behind, 2 m high (its project_points).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

NEAREST_M = 0.5  # what is nearer to the camera than this, or behind it, is not in the picture


@dataclass(frozen=True, slots=True)
class Camera:
    """Horizontal field of view in degrees, position in metres, pitch in radians (positive: the horizon moves down)."""

    fov_deg: float = 110.0
    height_m: float = 2.0
    behind_m: float = 1.5
    pitch_rad: float = 0.0

    def project(self, points: ArrayLike, width: int, height: int) -> NDArray[np.float64]:
        """Ground points [..., 2] (m, x forward, y right) to pixels [..., 2] (u right, v down) of the whole picture.

        NaN for points that are not in front of the camera; others may lie outside the picture.
        """
        p = np.asarray(points, np.float64)
        focal = width / (2 * np.tan(np.radians(self.fov_deg / 2)))
        depth = p[..., 0] + self.behind_m
        depth = np.where(depth >= NEAREST_M, depth, np.nan)
        u = width / 2 + focal * p[..., 1] / depth
        v = height / 2 + focal * (self.pitch_rad + self.height_m / depth)
        return np.stack([u, v], -1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SIMLINGO_CAMERA = Camera()
