"""Predictions of a policy in words: how many, how far from the right way, how long one took."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla_ray.data.cast.trajectory import displacement, positions, still, straight
from vla_ray.evaluation.policy.predictions import median_step
from vla_ray.schema import FAILED, GIVEN, OK, SKIPPED
from vla_ray.stages.predictions import CSV, PARQUET
from vla_ray.storage.files import Location
from vla_ray.storage.location import storage_errors

Floats = NDArray[np.float64]

_OFTEN = 90  # percentile shown beside the median
_NEEDED = ("frame_id", "target", "status", "instruction", "image_path", "predicted", "actions", "valid", "predict_s")


def holds_predictions(names: Sequence[str]) -> bool:
    """Whether a table with these columns is of schema PREDICTIONS, this version's or an older one's."""
    return set(_NEEDED) <= set(names)


def describe_predictions(table: pa.Table, name: str, trained_step: float | None = None) -> Iterator[str]:
    """Lines about rows of schema PREDICTIONS.

    Args:
        trained_step: median length of a training delta, units; without it that of the rows' own targets is used.
    """
    counts = Counter(table["status"].to_pylist())
    yield f"{name}: {table.num_rows:,} rows, " + ", ".join(f"{n:,} {status}" for status, n in sorted(counts.items()))
    yield f"  {'instruction':24s} {'rows':>7s} {OK:>7s} {FAILED:>7s} {SKIPPED:>7s}"
    variants = table["target"].to_pylist()
    by_variant = Counter(zip(variants, table["status"].to_pylist(), strict=True))
    for variant in sorted(set(variants), key=lambda v: (v != GIVEN, v)):
        numbers = [by_variant[variant, status] for status in (OK, FAILED, SKIPPED)]
        yield f"  {variant:24s} " + " ".join(f"{n:7,}" for n in (sum(numbers), *numbers))
    given = table.filter(pc.and_(pc.equal(table["target"], GIVEN), pc.equal(table["status"], OK)))
    yield from _errors(given, trained_step)
    seconds = [(what, pc.drop_null(table[column])) for what, column in (("predict", "predict_s"), ("read", "decode_s"))]
    parts = [
        f"{1000 * pc.quantile(values, 0.5)[0].as_py():,.1f} ms to {what}" for what, values in seconds if len(values)
    ]
    if parts:
        yield f"  a sample took {', '.join(parts)} (medians)"
    if given.num_rows:
        yield from _example(given.slice(0, 1).to_pylist()[0])


def trained_step(location: Location) -> float | None:
    """What the metadata of a predictions.parquet say of the data that the policy has learnt from; None if nothing."""
    if not location.exists():
        return None
    with storage_errors("read", location), location.open_input() as source:
        metadata: Mapping[bytes, bytes] = pq.read_schema(source).metadata or {}
    return float(metadata[b"median_step"]) if b"median_step" in metadata else None


def next_steps(location: Location) -> Iterator[str]:
    """What to do with a finished run, or with its table."""
    results = location if location.name == PARQUET else location / CSV
    if results.exists():
        run = location.parent if location.name == PARQUET else location
        yield ""
        yield f"measure it: {shlex.join(['python', 'jobs/evaluate.py', f'results={results}'])}"
        if (run / "run.json").exists():
            asked = shlex.join(["python", "jobs/evaluate.py", f"results={run / CSV}", "counterfactual=true"])
            yield f"does it listen: {asked}"


def _errors(given: pa.Table, step: float | None) -> Iterator[str]:
    if not given.num_rows:
        return
    known = given.filter(pc.is_valid(given["actions"]))
    if not known.num_rows:
        yield "  no targets: these samples have no actions of their own"
        return
    predicted, target = (_deltas(known[name]) for name in ("predicted", "actions"))
    valid = np.array(known["valid"].to_pylist(), np.bool_)
    step = median_step(target, valid) if step is None else step
    yield f"  {f'ADE of {known.num_rows:,} samples, units':36s} {'median':>8s} {f'{_OFTEN} %':>8s}"
    for name, way in (
        ("the policy", predicted),
        ("standing still", still(target)),
        (f"straight on at {step:.2f}", straight(target, step)),
    ):
        ade = np.nanmean(np.where(valid, displacement(way, target), np.nan), axis=-1)
        yield f"    {name:34s} {np.median(ade):8.3f} {np.percentile(ade, _OFTEN):8.3f}"


def _example(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"  e.g. {row['frame_id']}" + (f"  {row['image_path']}" if row["image_path"] else "")
    right = f"; truly {_end(row['actions'])}" if row["actions"] else ""
    yield f"    {row['instruction']!r}: ends {_end(row['predicted'])}{right} (units)"


def _end(deltas: Sequence[float]) -> str:
    x, y = positions(np.asarray(deltas).reshape(-1, 2))[-1]
    return f"{x:.2f} ahead, {abs(y):.2f} to the {'left' if y >= 0 else 'right'}"


def _deltas(column: pa.ChunkedArray) -> Floats:
    """[N, H, 2]."""
    return np.array(column.to_pylist(), np.float64).reshape(len(column), -1, 2)
