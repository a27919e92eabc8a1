"""`features.json` of a TFDS directory: which keys its records have, and how the flat lists in them are shaped.

Both generations of the CAST builders are read (ten-string and scalar language, 128 and 64 pixels, with and without
episode_id); keys that no sample needs (language_embedding, discount ...) cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.cast.example import Values
from vla_ray.data.images import decode_rgb
from vla_ray.errors import DataError

IMAGE = "steps/observation/image"
STATE = "steps/observation/state"
LANGUAGE = "steps/language_instruction"
FILE_PATH = "episode_metadata/file_path"
EPISODE_ID = "episode_metadata/episode_id"
# The second spelling occurs in published files.
FACTORS = ("episode_metadata/normalization_factor", "episode_metadata/normalization_fctor")


@dataclass(frozen=True, slots=True)
class Feature:
    """How one key is stored: per step (a leading axis T in the flat list) or once per episode."""

    kind: str  # image | tensor | text | the name of another TFDS class
    shape: tuple[int, ...]
    dtype: str  # as declared; float64 is stored as float32, bool and all integers as int64
    per_step: bool
    encoding: str = "none"

    @property
    def size(self) -> int:
        """Values per step, or per episode."""
        return 1 if self.kind == "image" else int(np.prod(self.shape, dtype=np.int64))


def parse_features(text: bytes, name: str) -> dict[str, Feature]:
    """Flat specs by key, e.g. `steps/observation/state`.

    Raises:
        DataError: `name` is not a features.json, or its records are not episodes with pictures, states and language.
    """
    try:
        features = dict(_walk(json.loads(text), "", False))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name} is not a features.json as TFDS writes it ({error!r}); fetch it again") from error
    needed = {
        IMAGE: lambda f: f.kind == "image",
        STATE: lambda f: f.kind == "tensor" and f.shape == (3,) and f.dtype.startswith("float"),
        LANGUAGE: lambda f: f.kind == "text" or (f.kind == "tensor" and f.dtype == "string"),
    }
    lacking = [key for key, fits in needed.items() if key not in features or not fits(features[key])]
    lacking += [f"{key} unencoded" for key in (STATE, LANGUAGE) if key in features and features[key].encoding != "none"]
    if lacking:
        seen = ", ".join(f"{key} ({f.kind} {f.dtype} {list(f.shape)})" for key, f in features.items()) or "nothing"
        raise DataError(
            f"{name} does not describe CAST episodes: it lacks {', '.join(lacking)} (an image, a state of 3 floats "
            f"x, y, yaw, and text, each per step); it has {seen}"
        )
    return features


def decode_fields(values: Mapping[str, Values], features: Mapping[str, Feature]) -> dict[str, NDArray[Any]]:
    """A whole record as TFDS decodes it.

    Pictures are uint8 [T, h, w, 3], numbers have their declared dtype, bytes are objects. Keys that the record lacks
    are left out. Readers of samples do not need this: it decodes every picture.
    """
    return {key: _decode(key, values[key], feature) for key, feature in features.items() if key in values}


def _decode(key: str, values: Values, feature: Feature) -> NDArray[Any]:
    if feature.kind == "image":
        pictures = np.stack([decode_rgb(data, f"{key}[{i}]") for i, data in enumerate(values)])
        return pictures if feature.per_step else pictures[0]
    array = np.array(values, dtype=object if isinstance(values, list) else np.dtype(feature.dtype))
    return array.reshape((-1, *feature.shape) if feature.per_step else feature.shape)


def _walk(node: dict[str, Any], path: str, per_step: bool) -> Iterator[tuple[str, Feature]]:
    if "featuresDict" in node:
        for key, below in node["featuresDict"]["features"].items():
            yield from _walk(below, f"{path}/{key}" if path else key, per_step)
    elif "sequence" in node:
        yield from _walk(node["sequence"]["feature"], path, True)
    elif "image" in node:
        yield path, Feature("image", _dimensions(node["image"]), node["image"].get("dtype", "uint8"), per_step)
    elif "tensor" in node:
        tensor = node["tensor"]
        shape, encoding = _dimensions(tensor), tensor.get("encoding", "none")
        yield path, Feature("tensor", shape, tensor["dtype"], per_step, encoding)
    elif "text" in node:
        yield path, Feature("text", (), "string", per_step)
    else:
        yield path, Feature(node["pythonClassName"].rsplit(".", 1)[-1], (), "unknown", per_step)


def _dimensions(node: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in node["shape"].get("dimensions", []))
