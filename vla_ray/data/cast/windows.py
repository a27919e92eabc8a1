"""Episodes to samples: the actions of the next steps, and the filters that a sample must pass.

Actions come from positions, never from the stored `action` (zeros in the published data). Only the pictures of samples
that pass every cheaper filter are decoded, to see whether they are placeholders; the sample keeps the encoded bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.cast.episodes import Episode
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.scales import group_of
from vla_ray.data.cast.shards import ReadOptions, Shard, Tally
from vla_ray.data.images import decode_rgb
from vla_ray.errors import ImageError

WHITE_MEAN = 250.0  # of 255; placeholders are 255 everywhere, a JPEG of one a little less

Actions: TypeAlias = NDArray[np.float64]


def action_windows(state: NDArray[np.float64], horizon: int, scale_m: float) -> tuple[Actions, NDArray[np.bool_]]:
    """For every step t the deltas [T, H, 2] of the next H steps, and which of them lie in the episode, [T, H].

    `d_k = R(yaw_t)^T (p[t+k+1] - p[t+k]) / scale_m`, x forward and y left in the robot frame of step t; the last
    position is repeated past the end, which gives zeros. (cast-vla, gnm_dataset_transform.)

    Args:
        state: [T, 3] x, y in metres, yaw in radians.
        scale_m: metres per unit.
    """
    steps = len(state)
    at = np.arange(steps)[:, None] + np.arange(horizon + 1)
    world = np.diff(state[np.minimum(at, steps - 1), :2], axis=1)
    cos, sin = np.cos(state[:, 2:]), np.sin(state[:, 2:])  # [T, 1]
    forward = cos * world[..., 0] + sin * world[..., 1]
    left = -sin * world[..., 0] + cos * world[..., 1]
    return np.stack([forward, left], axis=-1) / scale_m, at[:, 1:] < steps


def samples_of(
    episode: Episode, scale_m: float, record: int, shard: Shard, options: ReadOptions, tally: Tally
) -> Iterator[Sample]:
    """The samples of one episode, step by step; what is dropped is counted."""
    # A state that is not finite shows in the actions that it enters, and is filtered there.
    with np.errstate(invalid="ignore", over="ignore"):
        windows, valid = action_windows(episode.state, options.horizon, scale_m)
        actions = windows.astype(np.float32)
    recording = episode.recording or f"{shard.dataset}-{shard.split}-{shard.key}-{record:05d}"
    for t in range(0, len(episode.images), options.every):
        sample = Sample(
            sample_id=shard.sample_id(record, t),
            dataset=shard.dataset,
            split=options.split_of(group_of(recording), shard.split),
            recording=recording,
            t=t,
            image=episode.images[t],
            instruction=next(iter(episode.instructions[t]), ""),
            instructions=episode.instructions[t],
            actions=actions[t],
            valid=valid[t],
            scale_m=scale_m,
        )
        if accept(sample, options, tally):
            yield sample


def accept(sample: Sample, options: ReadOptions, tally: Tally) -> bool:
    """Whether a sample passes all filters, counted; the picture is decoded last, being the most work."""
    tally.steps += 1
    # A sample without any step of its own teaches nothing, whatever is kept; one without actions is not meant to.
    if len(sample.valid) and not (sample.valid.any() if options.padding == "keep" else sample.valid.all()):
        tally.padding += 1
    elif not sample.instructions:
        tally.no_language += 1
    elif not np.isfinite(sample.actions).all():
        tally.not_finite += 1
    else:
        try:
            pixels = decode_rgb(sample.image, f"{sample.sample_id}: the picture")
        except ImageError as error:
            tally.undecodable += 1
            tally.problem(str(error))
            return False
        if pixels.mean() > WHITE_MEAN:
            tally.white += 1
        else:
            tally.samples += 1
            return True
    return False
