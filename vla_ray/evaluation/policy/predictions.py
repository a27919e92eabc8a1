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

from vla_ray.data.cast.scales import group_of
from vla_ray.data.images import decode_rgb
from vla_ray.errors import DataError, ImageError, StorageError
from vla_ray.storage.location import Location

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

PICTURES = "images"  # the directory beside a file in which its pictures may lie


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
        dataset, recording: of each sample; None if unknown.
        picture_hash: samples with the same one see the same picture; None if unknown.
        predicted: [N, H, 2]; a row of NaN where there is no (whole) prediction.
        target: [N, H, 2]; NaN where there is none, also at single steps.
        valid: [N, H]; False after the end of the episode and where there is no target.
        scale_m: [N] metres per unit; NaN if unknown.
        image_path: as written; only followed to what lies beside the file.
        error: what a failed sample says of itself.
        probability, entropy: [N, 2H] of the chosen bins, in the order x0 y0 x1 y1 ...; entropy in nats.
        samples: [N, K, H, 2], K sampled predictions.
        median_step: units, the step of the baseline that goes straight; 0 if nothing tells.
        median_from: whose median it is.
        metadata: of the Parquet file: decode, num_bins, checkpoint, dataset ...
    """

    name: str
    location: Location
    sample_id: tuple[str, ...]
    instruction: tuple[str, ...]
    dataset: tuple[str | None, ...]
    recording: tuple[str | None, ...]
    picture_hash: tuple[str | None, ...]
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
    def groups(self) -> tuple[str, ...] | None:
        """What belongs together: the drive, whatever sub-dataset names it; None if no sample knows its own.

        A sample without a recording stands for itself.
        """
        if not any(self.recording):
            return None
        return tuple(group_of(r) if r else name for r, name in zip(self.recording, self.sample_id, strict=True))

    @property
    def predicted_ok(self) -> Bools:
        """[N] whether there is a prediction."""
        return np.asarray(np.isfinite(self.predicted).all(axis=(1, 2)))

    @property
    def scored(self) -> Bools:
        """[N] whether there are a prediction and at least one step to hold it against."""
        return np.asarray(self.predicted_ok & self.valid.any(axis=1))

    def with_variants(self, other: Predictions) -> Predictions:
        """The same with the variants of another file, which may have some of the samples only.

        Sample by sample: what was already predicted for a variant stays.
        """
        place = {name: i for i, name in enumerate(other.sample_id)}
        rows = [place.get(name) for name in self.sample_id]
        known = np.array([i for i, row in enumerate(rows) if row is not None], int)
        found = {}
        for name, variant in other.variants.items():
            predicted = np.full_like(self.predicted, np.nan)
            predicted[known] = variant.predicted[[row for row in rows if row is not None]]
            texts = [None if row is None else variant.instructions[row] for row in rows]
            if (own := self.variants.get(name)) is not None:
                kept = np.isfinite(own.predicted).all(axis=(1, 2)) | np.array([text is None for text in texts])
                predicted[kept] = own.predicted[kept]
                texts = [own.instructions[i] if kept[i] else text for i, text in enumerate(texts)]
            found[name] = Variant(tuple(texts), predicted)
        return replace(self, variants={**self.variants, **found})

    def take(self, rows: Sequence[int] | NDArray[np.integer], name: str | None = None) -> Predictions:
        """Some samples, in this order."""
        index = np.asarray(rows, int)

        def some(values: Floats | None) -> Floats | None:
            return None if values is None else values[index]

        def pick(values: Sequence) -> tuple:
            return tuple(values[i] for i in index)

        return replace(
            self,
            name=self.name if name is None else name,
            sample_id=pick(self.sample_id),
            instruction=pick(self.instruction),
            dataset=pick(self.dataset),
            recording=pick(self.recording),
            picture_hash=pick(self.picture_hash),
            predicted=self.predicted[index],
            target=self.target[index],
            valid=self.valid[index],
            scale_m=self.scale_m[index],
            image_path=pick(self.image_path),
            error=pick(self.error),
            probability=some(self.probability),
            entropy=some(self.entropy),
            samples=some(self.samples),
            variants={k: Variant(pick(v.instructions), v.predicted[index]) for k, v in self.variants.items()},
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
        """Of a sample's picture; None if there is none, or no longer, or it cannot be looked at."""
        for place in self._places(row):
            with suppress(StorageError):
                if place.exists():
                    return place
        return None

    def missing_pictures(self) -> tuple[int, int]:
        """How many named pictures do not exist beside the file, and how many others lie elsewhere: see _places.

        Each directory is listed once.
        """
        names: dict[Location, set[str]] = {}
        missing = elsewhere = 0
        for row, path in enumerate(self.image_path):
            places = self._places(row)
            for place in places:
                if place.parent not in names:
                    names[place.parent] = _names(place.parent)
            if path and not any(place.name in names[place.parent] for place in places):
                inside = _below(self.location.parent, path) is not None
                missing, elsewhere = missing + inside, elsewhere + (not inside)
        return missing, elsewhere

    def _places(self, row: int) -> list[Location]:
        """Where a picture may be: in the directory of the file that names it, or by its name in PICTURES there.

        No path is followed to anywhere else: whoever wrote the file could have any picture that the reader of a report
        has access to copied into it.
        """
        path, home = self.image_path[row] or "", self.location.parent
        parts = (_below(home, path), f"{PICTURES}/{path.rpartition('/')[2]}")
        places: list[Location] = []
        for part in dict.fromkeys(parts):
            with suppress(StorageError):
                if path and part is not None:
                    places.append(home / part)
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


def _below(home: Location, path: str) -> str | None:
    """A relative path, or one that begins with this directory, from there; None if it leads anywhere else."""
    rest = (path.removeprefix("file://") if home.is_local else path).removeprefix(f"{str(home).rstrip('/')}/")
    names = [name for name in rest.split("/") if name not in ("", ".")]
    return None if rest.startswith("/") or "://" in rest or ".." in names else "/".join(names)


def _names(directory: Location) -> set[str]:
    try:
        return {entry.name for entry in directory.list()}
    except StorageError:
        return set()
