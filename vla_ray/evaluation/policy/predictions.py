"""Predictions as arrays, wherever they were written: a run, its predictions.csv or .parquet, or a CSV from elsewhere.

A row counts as a prediction only if all its numbers are there: anything else is a failed sample, marked NaN, and is
never scored as if it had been zeros. Row i of every array is sample i. The reading itself is in prediction_files.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.images import decode_rgb
from vla_ray.errors import DataError, ImageError, StorageError
from vla_ray.storage.location import Location

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Variant:
    """The same samples with other instructions.

    Attributes:
        instructions: one for each sample; None where this variant does not exist.
        predicted: [N, H, 2] units; NaN where it does not exist or failed.
    """

    instructions: tuple[str | None, ...]
    predicted: Floats


@dataclass(frozen=True, slots=True)
class Predictions:
    """Deltas in waypoint spacings, x forward and y left; metres are units * scale_m.

    Attributes:
        name: for tables: of the run, or of the file if it lies in none.
        location: of the file that was read.
        groups: what samples belong together: the recording; None if it is unknown.
        predicted: [N, H, 2]; a row of NaN where there is no (whole) prediction.
        target: [N, H, 2]; NaN where there is none, also at single steps.
        valid: [N, H]; False after the end of the episode and where there is no target.
        scale_m: [N] metres per unit; NaN if unknown.
        image_path: as written.
        error: what a failed sample says of itself.
        probability, entropy: [N, 2H] of the chosen bins, in the order x0 y0 x1 y1 ...; entropy in nats.
        samples: [N, K, H, 2], K sampled predictions.
        median_step: units, the step of the baseline that goes straight; 0 if nothing tells.
        median_from: where it is from.
        metadata: of the Parquet file: decode, num_bins, checkpoint, dataset ...
    """

    name: str
    location: Location
    sample_id: tuple[str, ...]
    instruction: tuple[str, ...]
    groups: tuple[str, ...] | None
    t: tuple[int | None, ...]
    predicted: Floats
    target: Floats
    valid: Bools
    scale_m: Floats
    image_path: tuple[str | None, ...]
    error: tuple[str | None, ...]
    median_step: float
    median_from: str
    probability: Floats | None = None
    entropy: Floats | None = None
    samples: Floats | None = None
    variants: Mapping[str, Variant] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def num_steps(self) -> int:
        """H."""
        return self.predicted.shape[1]

    @property
    def predicted_ok(self) -> Bools:
        """[N] whether there is a prediction."""
        return np.asarray(np.isfinite(self.predicted).all(axis=(1, 2)))

    @property
    def scored(self) -> Bools:
        """[N] whether there are a prediction and at least one step to hold it against."""
        return np.asarray(self.predicted_ok & self.valid.any(axis=1))

    def with_variants(self, other: Predictions) -> Predictions:
        """The same with the variants of another file, which may have some of the samples only."""
        place = {name: i for i, name in enumerate(other.sample_id)}
        rows = [place.get(name) for name in self.sample_id]
        known = np.array([i for i, row in enumerate(rows) if row is not None], int)
        found = {}
        for name, variant in other.variants.items():
            predicted = np.full_like(self.predicted, np.nan)
            predicted[known] = variant.predicted[[row for row in rows if row is not None]]
            texts = tuple(None if row is None else variant.instructions[row] for row in rows)
            found[name] = Variant(texts, predicted)
        return replace(self, variants={**self.variants, **found})

    def take(self, rows: Sequence[int] | NDArray[np.integer], name: str | None = None) -> Predictions:
        """Some samples, in this order."""
        index = np.asarray(rows, int)

        def some(values: Floats | None) -> Floats | None:
            return None if values is None else values[index]

        def pick(values: Sequence) -> tuple:
            return tuple(values[i] for i in index)

        return Predictions(
            self.name if name is None else name,
            self.location,
            pick(self.sample_id),
            pick(self.instruction),
            None if self.groups is None else pick(self.groups),
            pick(self.t),
            self.predicted[index],
            self.target[index],
            self.valid[index],
            self.scale_m[index],
            pick(self.image_path),
            pick(self.error),
            self.median_step,
            self.median_from,
            some(self.probability),
            some(self.entropy),
            some(self.samples),
            {k: Variant(pick(v.instructions), v.predicted[index]) for k, v in self.variants.items()},
            self.metadata,
        )

    def picture(self, row: int) -> NDArray[np.uint8] | None:
        """[height, width, 3] of a sample; None if there is none, or no longer, or it cannot be read."""
        for place in self._places(row):
            try:
                data = place.try_read_bytes()
                if data is not None:
                    return decode_rgb(data, str(place))
            except (StorageError, ImageError):
                continue
        return None

    def place(self, row: int) -> Location | None:
        """Of a sample's picture; None if there is none, or no longer."""
        return next((place for place in self._places(row) if place.exists()), None)

    def missing_pictures(self) -> int:
        """How many pictures are named and do not exist. Each directory is listed once."""
        names: dict[Location, set[str]] = {}
        missing = 0
        for row in range(len(self)):
            places = self._places(row)
            for place in places:
                if place.parent not in names:
                    names[place.parent] = _names(place.parent)
            missing += bool(places) and not any(place.name in names[place.parent] for place in places)
        return missing

    def _places(self, row: int) -> list[Location]:
        """Where a picture may be: relative to the file that names it, else the path as it stands."""
        path = self.image_path[row]
        places: list[Location] = []
        if not path:
            return places
        with suppress(StorageError):  # a path with `..` is only taken as it stands
            if "://" not in path and not path.startswith("/"):
                places.append(self.location.parent / path)
        with suppress(StorageError):
            places.append(Location.of(path))
        return places


def median_step(target: Floats, valid: Bools) -> float:
    """Median length of the valid deltas; 0 if there are none."""
    lengths = np.linalg.norm(target[valid], axis=-1)
    return float(np.median(lengths)) if lengths.size else 0.0


def common_samples(many: Sequence[Predictions]) -> list[Predictions]:
    """The samples that all of them have, in the order of the first. DataError if there are none, or other horizons."""
    first = many[0]
    for other in many[1:]:
        if other.num_steps != first.num_steps:
            raise DataError(
                f"{other.location} has {other.num_steps} steps and {first.location} has {first.num_steps}: "
                "predictions of different horizons cannot be compared. Predict both with the same action.num_steps."
            )
    rows = [{name: i for i, name in enumerate(p.sample_id)} for p in many]
    ids = [name for name in first.sample_id if all(name in r for r in rows)]
    if not ids:
        raise DataError(
            f"{' and '.join(str(p.location) for p in many)} have no sample_id in common. "
            "Compare predictions of the same split of the same dataset."
        )
    return [p.take([r[name] for name in ids]) for p, r in zip(many, rows, strict=True)]


def _names(directory: Location) -> set[str]:
    try:
        return {entry.name for entry in directory.list()}
    except StorageError:
        return set()
