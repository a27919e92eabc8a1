"""The corridors as a source like any other: shards, and samples from a shard.

Two sub-datasets, as in CAST: `corridors` has one natural instruction per picture, `corridors_counterfactual` the same
pictures with all other instructions. Nothing is on a disk: a shard is a range of seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from vla_ray.config.knobs import at_least
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.shards import SYNTHETIC, ReadOptions, Shard, Tally
from vla_ray.data.corridors.expert import SCALE_M
from vla_ray.data.corridors.scene import scene
from vla_ray.errors import DataError

VERSION = "1"  # changes whenever a seed gives another picture, instruction or action
NATURAL, COUNTERFACTUAL = DATASETS = ("corridors", "corridors_counterfactual")
SHARD_SCENES = 250
FIRST_SEED = {"train": 0, "val": 1_000_000}  # so many pictures are the most that a split can have


def shards(train: int = 3000, val: int = 200) -> list[Shard]:
    """Both sub-datasets, split into ranges of at most SHARD_SCENES pictures.

    Args:
        train, val: number of pictures; every picture is in both sub-datasets.
    """
    found = []
    for dataset in DATASETS:
        for split, count in (("train", train), ("val", val)):
            at_least(f"{split} pictures", count, 1)
            if count > FIRST_SEED["val"]:
                raise DataError(f"{count:,} {split} pictures asked for; there are at most {FIRST_SEED['val']:,}.")
            bounds = [*range(0, count, SHARD_SCENES), count]
            for first, end in pairwise(bounds):
                low, high = FIRST_SEED[split] + first, FIRST_SEED[split] + end
                name = f"{dataset}-{split}-{low:07d}-{high:07d}"
                found.append(Shard(dataset, split, name, SYNTHETIC, f"seeds:{low}-{high}", f"corridors {VERSION}"))
    return found


def read(shard: Shard, options: ReadOptions, tally: Tally) -> Iterator[Sample]:
    """The samples of a shard, always in the same order.

    A scene is an episode of one step, so nothing is ever padded, and `options.every` skips nothing. Every instruction
    of a picture has the same `recording` and the same t = 0; ids end in the place of the task among the scene's.
    """
    low, high = _seeds(shard)
    for seed in range(low, high):
        place = scene(seed, options.horizon)
        split = options.split_of(place.name, shard.split)
        image, valid = place.png(), np.ones(options.horizon, bool)
        tally.episodes += 1
        for k, task in enumerate(place.tasks):
            if (k == place.natural) != (shard.dataset == NATURAL):
                continue
            tally.steps += 1
            tally.samples += 1
            yield Sample(
                sample_id=shard.sample_id(place.name, k),
                dataset=shard.dataset,
                split=split,
                recording=place.name,
                t=0,
                image=image,
                instruction=task.instructions[0],
                instructions=task.instructions,
                actions=task.actions,
                valid=valid,
                scale_m=SCALE_M,
            )


def _seeds(shard: Shard) -> tuple[int, int]:
    kind, _, bounds = shard.path.partition(":")
    low, _, high = bounds.partition("-")
    if kind != "seeds" or not (low.isdigit() and high.isdigit()):
        raise DataError(f"shard {shard.name} has the path {shard.path!r}; corridors need seeds:<first>-<end>.")
    return int(low), int(high)
