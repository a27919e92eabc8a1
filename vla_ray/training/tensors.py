"""A batch on the device that trains."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_ray.training.batches import MicroBatch


class Inputs(TypedDict):
    """See ActionPolicy.forward."""

    pixels: Tensor
    ids: Tensor
    mask: Tensor
    types: Tensor


def inputs(batch: MicroBatch, device: torch.device) -> Inputs:
    """What an ActionPolicy is called with. Pixels travel as bytes; the policy normalises them."""

    def tensor(array: NDArray[Any]) -> Tensor:  # a copy: what arrives from a data worker is read-only memory
        return torch.tensor(array).to(device, non_blocking=True)

    return Inputs(
        pixels=tensor(batch.pixels), ids=tensor(batch.ids), mask=tensor(batch.mask), types=tensor(batch.types)
    )
