"""OKLab (Ottosson 2020), in which equal distances look equal: what signed maps are coloured with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_TO_LMS = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.707614701],
    ]
)


def oklab_to_srgb(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., 3] lightness, a, b to sRGB in 0..1; what no screen can show is clipped."""
    linear = np.clip((lab @ _TO_LMS.T) ** 3 @ _TO_RGB.T, 0, 1)
    return np.asarray(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))
