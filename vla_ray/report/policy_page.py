"""A report of what a policy predicted that opens from disk in any browser: index.html, pictures and data beside it.

Made of the same parts as the report of heat maps (page_parts.py, assets/): the index holds what the table of samples
shows, a sample's trajectories and maps lie in data/<n>.js and are loaded when it is looked at, so that ten thousand
samples open at once. Deltas stay in waypoint spacings, which the page says in its header. A failed sample has a reason
and no trajectory. index.html is written last and an older one is removed first: a report is whole or absent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.cast.trajectory import positions
from vla_ray.errors import ImageError, StorageError
from vla_ray.report.page_data import safe_json, scale_of
from vla_ray.report.page_parts import (
    CHUNK_CHARS,
    WRITERS,
    Figure,
    MapKey,
    MapValues,
    ShownMap,
    Table,
    chunk_script,
    common_index,
    figure_file,
    fill_template,
    map_entries,
    map_name,
    map_values,
    small_copy,
)
from vla_ray.schema import ACTION_UNITS
from vla_ray.storage.files import Location, write_atomic

__all__ = ["RIGHT", "WRONG", "Figure", "ShownMap", "ShownSample", "Table", "write_policy_page"]

logger = logging.getLogger(__name__)

Floats = NDArray[np.floating]

CHUNK_SAMPLES = 256  # a chunk of data ends here, or at CHUNK_CHARS
EXTENT_PERCENTILE = 95.0  # of the samples: how far the view from above reaches at least
RIGHT, WRONG = "right", "wrong"  # of turn_side: the side that the trajectory ends on
_NO_PICTURE = "none was kept"

# Metrics by name: what they are called, their unit, what they mean. Others are shown by their name.
COLUMNS: dict[str, tuple[str, str, str]] = {
    "ade": ("ADE", "units", "average displacement error: mean distance between positions"),
    "fde": ("FDE", "units", "final displacement error: distance between the last positions"),
    "ade_m": ("ADE", "m", "average displacement error in metres, where the scale is known"),
    "fde_m": ("FDE", "m", "final displacement error in metres, where the scale is known"),
    "min_ade": ("minADE", "units", "average displacement error of the best of the sampled predictions"),
    "heading_error": ("heading", "degrees", "between the directions of the end points, seen from the start"),
    "turn_side": ("side", "", "whether it ends on the right side; of targets that end clearly to a side"),
    "confidence": ("confidence", "", "geometric mean of the probabilities of the chosen bins"),
}
ERRORS = ("ade", "fde", "ade_m", "fde_m", "min_ade", "heading_error")  # that can be filtered by range


@dataclass(frozen=True, slots=True)
class ShownSample:
    """One sample as predicted. Deltas [H, 2] in waypoint spacings, x forward and y left.

    Attributes:
        number: its place in the run.
        kind: of the instruction, see data/cast/instructions.py.
        image: the original picture; None if there is none.
        predicted: None if there is no prediction: it failed, or was never made.
        target: NaN at steps that do not count; None if unknown.
        scale_m: metres per unit; None if unknown.
        status, error: of the run's row: ok | failed | skipped, and why as "ImageError: ...".
        metrics: of COLUMNS or others; None where one does not apply. `turn_side` is RIGHT or WRONG.
        probability: [H, 2] of the chosen bins.
        variants: other instructions and what was predicted for them.
        maps: relevance; of any targets and methods.
    """

    sample_id: str
    number: int
    instruction: str
    kind: str
    dataset: str
    recording: str
    image: Location | None
    predicted: Floats | None
    target: Floats | None
    scale_m: float | None
    status: str
    error: str | None = None
    metrics: Mapping[str, float | str | None] = field(default_factory=dict)
    probability: Floats | None = None
    variants: Mapping[str, Floats] = field(default_factory=dict)
    maps: Sequence[ShownMap] = ()


def write_policy_page(
    directory: Location,
    title: str,
    facts: Mapping[str, str],
    samples: Iterable[ShownSample],
    tables: Sequence[Table] = (),
    figures: Sequence[Figure] = (),
    methods: Mapping[str, str] | None = None,
    median_step: float | None = None,
) -> int:
    """Write a report and return its number of samples.

    A picture that cannot be read leaves its sample without one, with a warning.

    Args:
        directory: gets index.html, images/<place>.jpg, data/<n>.js and figures/<n>.png.
        facts: about the run, in the order to show.
        samples: consumed bit by bit; only CHUNK_SAMPLES of them are in memory.
        methods: of the maps: name to description in one line, in the order to show.
        median_step: units; of the baseline that goes straight, which is drawn beside the others. None: it is not.

    Raises:
        TargetError: a map is not finite, or a sample has two maps of one target and method.
        StorageError: `directory` cannot be written.
    """
    index_file = directory / "index.html"
    index_file.delete()
    book = _Book(directory)
    for batch in _batches(samples, CHUNK_SAMPLES):
        book.add(batch)
    if book.unread:
        logger.warning("%d pictures are missing in the report; the first: %s", len(book.unread), book.unread[0])
    for number, figure in enumerate(figures):
        write_atomic(directory / figure_file(number), figure.png)
    about = dict(methods or {})
    index = {
        **common_index(facts, tables, figures),
        **book.index(),
        "units": ACTION_UNITS,
        "methods": [[name, about.get(name, "")] for name in dict.fromkeys([*about, *(m for _, m in book.relevance)])],
        "straight": median_step,
    }
    write_atomic(index_file, fill_template("policy.html", title, index))
    return len(book.rows)


class _Book:
    """What index.html says about all samples, gathered while pictures and data are written."""

    def __init__(self, directory: Location) -> None:
        self.directory = directory
        self.rows: list[list[Any]] = []
        self.metrics: list[Mapping[str, float | str | None]] = []
        self.extents: list[tuple[float, float, float]] = []
        self.relevance: dict[MapKey, list[Floats]] = {}  # |values| of all maps, for their common scale
        self.unread: list[str] = []
        self.chunks = 0

    def index(self) -> dict[str, Any]:
        seen = {name for metrics in self.metrics for name, value in metrics.items() if _known(value)}
        names = [*(n for n in COLUMNS if n in seen), *sorted(seen - COLUMNS.keys())]
        far = np.percentile(self.extents, EXTENT_PERCENTILE, axis=0) if self.extents else np.zeros(3)
        return {
            "columns": [[name, *COLUMNS.get(name, (name, "", "")), name in ERRORS] for name in names],
            "samples": [[*r, [m.get(n) for n in names]] for r, m in zip(self.rows, self.metrics, strict=True)],
            "targets": list(dict.fromkeys(target for target, _ in self.relevance)),
            "scales": {map_name(key): scale_of(np.concatenate(v)) for key, v in self.relevance.items()},
            "range": far.tolist(),  # how far back, forward, and to either side, in units
        }

    def add(self, samples: Sequence[ShownSample]) -> None:
        first = len(self.rows)
        with ThreadPoolExecutor(WRITERS) as pool:
            pictures = list(pool.map(self._picture, range(first, first + len(samples)), samples))
        chunk: list[str] = []
        for sample, (size, missing) in zip(samples, pictures, strict=True):
            if missing is not None and sample.image is not None:
                self.unread.append(missing)
            if sum(map(len, chunk)) >= CHUNK_CHARS:
                self._write_chunk(chunk)
                chunk = []
            values = map_values(sample.sample_id, sample.maps)
            for key, grid in values.items():
                self.relevance.setdefault(key, []).append(np.abs(grid).ravel())
            geometry = sample.maps[0].map.geometry if sample.maps else None
            shape = size or (None if geometry is None else (geometry.width, geometry.height))
            self.rows.append(self._row(sample, shape, missing))
            self.metrics.append(sample.metrics)
            self.extents.append(_extent(sample))
            chunk.append(safe_json(_details(sample, values)))
        self._write_chunk(chunk)

    def _row(self, sample: ShownSample, size: tuple[int, int] | None, missing: str | None) -> list[Any]:
        return [
            sample.sample_id,
            sample.number,
            self.chunks,
            size,
            missing,
            sample.instruction,
            sample.kind,
            sample.dataset,
            sample.recording,
            sample.status,
            sample.error,
        ]

    def _picture(self, place: int, sample: ShownSample) -> tuple[tuple[int, int] | None, str | None]:
        """Write the small copy; (width, height) of the original, or why there is none."""
        if sample.image is None:
            return None, _NO_PICTURE
        try:
            content, size = small_copy(sample.image)
        except ImageError:  # says what the file begins with, which a report that is passed on must not
            return None, f"{sample.image} is not a sound PNG or JPEG image"
        except StorageError as error:
            return None, str(error)
        write_atomic(self.directory / f"images/{place:06d}.jpg", content)
        return size, None

    def _write_chunk(self, details: Sequence[str]) -> None:
        write_atomic(self.directory / f"data/{self.chunks}.js", chunk_script(self.chunks, details))
        self.chunks += 1


def _details(sample: ShownSample, values: MapValues) -> dict[str, Any]:
    """What data/<n>.js holds of a sample. Nothing of a map is cut: its scale is only known once all have been seen."""
    geometry = sample.maps[0].map.geometry if sample.maps else None
    return {
        "predicted": _points(sample.predicted),
        "target": _points(sample.target),
        "probability": _points(sample.probability),
        "scale_m": sample.scale_m,
        "variants": [[text, _points(deltas)] for text, deltas in sample.variants.items()],
        "kept": None if geometry is None else geometry.kept_height / geometry.height,
        "maps": map_entries(sample.maps, values, {key: float(np.abs(grid).max()) for key, grid in values.items()}),
    }


def _points(deltas: Floats | None) -> list[list[float]] | None:
    return None if deltas is None else np.asarray(deltas, np.float64).reshape(-1, 2).round(4).tolist()


def _extent(sample: ShownSample) -> tuple[float, float, float]:
    """How far back, forward, and to either side its own trajectories go, in units."""
    known = [positions(np.asarray(d, np.float64)) for d in (sample.predicted, sample.target) if d is not None]
    points = np.concatenate([np.zeros((1, 2)), *known])
    x, y = points[np.isfinite(points).all(1)].T
    return float(-x.min()), float(x.max()), float(np.abs(y).max())


def _known(value: float | str | None) -> bool:
    return isinstance(value, str) or (value is not None and bool(np.isfinite(value)))


def _batches(samples: Iterable[ShownSample], size: int) -> Iterator[list[ShownSample]]:
    rest = iter(samples)
    while batch := list(islice(rest, size)):
        yield batch
