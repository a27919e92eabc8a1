"""What makes drawn actions repeatable: noise that belongs to a sample, not to its place in a batch. Numpy alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def gumbel_noise(
    sample_ids: Sequence[str], seed: int, draws: int, num_tokens: int, num_bins: int
) -> NDArray[np.float32]:
    """Standard Gumbel noise [B, N, T, K] for `decode`.

    That of a draw and a step depends on the seed, the sample's id and the two numbers alone: neither on who else is in
    the batch, nor on how many draws there are.
    """
    made = [_generator(seed, name).gumbel(size=(draws, num_tokens, num_bins)) for name in sample_ids]
    return np.stack(made).astype(np.float32)


def _generator(seed: int, sample_id: str) -> np.random.Generator:
    name = hashlib.blake2b(sample_id.encode(), digest_size=8).digest()
    return np.random.default_rng((seed, int.from_bytes(name)))
