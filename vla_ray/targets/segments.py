"""Steps between neighbouring trajectory points, safe to normalise and to differentiate even where the car stands."""

from __future__ import annotations

import torch
from torch import Tensor

# Metres. Below it a segment has no meaningful heading: 1 cm in 0.25 s is 0.04 m/s, a standing car.
MIN_SEGMENT = 1e-2


def segments(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Displacements, lengths and shortness of the N-1 segments of points [B, N, 2] (metres).

    A segment shorter than MIN_SEGMENT is given as the constant (MIN_SEGMENT, 0), for the caller to mask or to accept.

    Returns:
        Displacements [B, N-1, 2], their lengths [B, N-1] (never below MIN_SEGMENT), which were short [B, N-1] (bool).
    """
    steps = points.diff(dim=1)
    # Written so that a NaN is "not short" and reaches the result.
    short = (steps.detach() ** 2).sum(-1) < MIN_SEGMENT**2
    # The replacement comes before sqrt and atan2, whose gradients at 0 are infinite: masking afterwards is 0 * inf.
    steps = torch.where(short[..., None], steps.new_tensor([MIN_SEGMENT, 0.0]), steps)
    return steps, (steps**2).sum(-1).sqrt(), short
