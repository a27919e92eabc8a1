"""One record of an RLDS shard as an episode: still encoded pictures, exact states, and what was said at each step.

Pictures stay bytes because only few of them become samples of a given epoch; `features.decode_fields` decodes all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.cast.example import Values
from vla_ray.data.cast.features import EPISODE_ID, FACTORS, FILE_PATH, IMAGE, LANGUAGE, STATE, Feature
from vla_ray.data.cast.scales import drive_of, robot_of, source_of
from vla_ray.errors import DataError

KEYS = (IMAGE, STATE, LANGUAGE, FILE_PATH, EPISODE_ID, *FACTORS)

_CHUNK = re.compile(r"_chunk_\d+.*$")


@dataclass(frozen=True, slots=True)
class Episode:
    """T steps of one robot.

    Attributes:
        images: T encoded pictures.
        state: float64 [T, 3]: x, y in metres and yaw in radians, in the frame of the robot's odometry.
        instructions: for each step the distinct variants that are not empty; the same tuple where they do not change.
        recording: what chunks, versions and counterfactuals of one drive share; None if the record does not say.
        source: the set that the recording came from, e.g. recon; empty if the record does not say.
        scale_m: metres per unit as the record says; None if it does not.
    """

    images: Sequence[bytes]
    state: NDArray[np.float64]
    instructions: Sequence[tuple[str, ...]]
    recording: str | None
    source: str
    scale_m: float | None


def recording_of(path: str) -> str:
    """`.../lcbc_filtered_dataset_v2/traj_003_chunk_0_start_0_end_17` -> `traj_003`: v1 and v2 hold the same.

    A known robot's directory stays before it, `recon/traj_003`, as robots' drives may have one name. No other one does:
    versions and selections of one set lie in directories of many names.
    """
    name, source = _CHUNK.sub("", drive_of(path).name), robot_of(path)
    return f"{source}/{name}" if source else name


def read_episode(values: Mapping[str, Values], features: Mapping[str, Feature]) -> Episode:
    """The episode in a parsed record.

    Raises:
        DataError: it lacks what every episode has, or its lists do not fit together.
    """
    images, state, language = (values.get(key) for key in (IMAGE, STATE, LANGUAGE))
    if not (isinstance(images, list) and isinstance(state, np.ndarray) and isinstance(language, list)):
        lacking = [key for key in (IMAGE, STATE, LANGUAGE) if key not in values]
        raise DataError(f"lacks {', '.join(lacking)}" if lacking else "has values of another type than declared")
    steps, variants = len(images), features[LANGUAGE].size
    if steps == 0 or state.size != 3 * steps or len(language) != variants * steps:
        raise DataError(
            f"does not fit together: {steps} pictures, {state.size} numbers of state (3 a step) and "
            f"{len(language)} instructions ({variants} a step)"
        )
    path = text_of(values.get(FILE_PATH))
    named = path or text_of(values.get(EPISODE_ID))
    return Episode(
        images=images,
        # Differences of stored float32 positions are taken in float64: rounding them once more would add up.
        state=state.astype(np.float64).reshape(steps, 3),
        instructions=_instructions(language, variants),
        recording=recording_of(named) if named else None,
        source=source_of(path),
        scale_m=_scale(values),
    )


def _instructions(language: Sequence[bytes], variants: int) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    before: Sequence[bytes] | None = None
    for at in range(0, len(language), variants):
        raw = language[at : at + variants]
        found.append(found[-1] if raw == before else distinct(text.decode("utf-8", "replace") for text in raw))
        before = raw
    return found


def distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """The different texts in their order, whitespace collapsed, those without words left out."""
    collapsed = (" ".join(text.split()) for text in texts)
    return tuple(dict.fromkeys(text for text in collapsed if has_words(text)))


def has_words(text: str) -> bool:
    """Whether anything is left where angle brackets count as white space, as they do for every policy: without them
    `<image>` in a text could become a token of the model."""
    return bool(text.replace("<", " ").replace(">", " ").strip())


def text_of(values: Values | None) -> str:
    """The one text of a feature. Integers (episode_id of the older builders) say nothing outside their shard."""
    return values[0].decode("utf-8", "replace") if isinstance(values, list) and values else ""


def _scale(values: Mapping[str, Values]) -> float | None:
    for key in FACTORS:
        factor = values.get(key)
        if isinstance(factor, np.ndarray) and factor.size:
            metres = float(factor[0])
            if not (math.isfinite(metres) and metres > 0):
                raise DataError(f"has {key}={metres:g}; it must be a number of metres > 0")
            return metres
    return None
