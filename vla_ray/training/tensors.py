"""A batch on the device that trains."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_ray.training.batches import MicroBatch


def inputs(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """What an ActionPolicy is called with. Pixels travel as bytes; the policy normalises them."""
    arrays = {"pixels": batch.pixels, "ids": batch.ids, "mask": batch.mask, "types": batch.types}
    # A copy: what arrives from a data worker is read-only memory of the object store.
    return {name: torch.tensor(array).to(device, non_blocking=True) for name, array in arrays.items()}
