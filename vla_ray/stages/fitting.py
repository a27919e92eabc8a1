"""What every replica does about its process and its GPU: threads, memory, batches that do not fit, a GPU that fails."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from vla_ray.stages.work import Loaded, Row

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Fitting:
    """A replica whose batches are halved when they do not fit. See stages/work.py for the protocol it serves."""

    def __init__(self) -> None:
        self.max_batch: int | None = None  # learnt when a batch did not fit

    @abstractmethod
    def attempt(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        """Rows of one batch of decoded frames, results written."""

    def process(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        """Rows of all frames and targets. A batch too large for the GPU's memory is halved, for good, until it fits."""
        size = self.max_batch or len(frames)
        if len(frames) > size:
            parts = [frames[i : i + size] for i in range(0, len(frames), size)]
            return [row for part in parts for row in self.process(part, targets)]
        try:
            with ends_with_its_gpu():
                return self.attempt(frames, targets)
        except torch.cuda.OutOfMemoryError:
            if len(frames) == 1:
                raise
        torch.cuda.empty_cache()  # outside the handler, where the exception no longer holds the tensors
        self.max_batch = (len(frames) + 1) // 2
        logger.warning("%d frames do not fit into GPU memory; from now on %d at a time", len(frames), self.max_batch)
        return self.process(frames, targets)


@contextmanager
def ends_with_its_gpu() -> Iterator[None]:
    """End the process when its GPU has failed (too little memory is no failure).

    After an illegal access or a hardware fault every later call would fail, frame after frame.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except torch.AcceleratorError:
        logger.exception("the GPU failed; ending this process, its batch is tried again by a new one")
        os._exit(1)


def set_up_process(device: str, threads: int | None, gpu_share: float) -> None:
    """Settings of torch for this process, before a model is loaded.

    Args:
        threads: None leaves torch's choice.
        gpu_share: the part of the GPU's memory that may be used.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is the parity mode; convolutions would round to 10 bits
    if device == "cuda" and gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(gpu_share)
