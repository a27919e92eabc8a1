"""Reads predictions: `predictions.csv` (the original's columns), `predictions.parquet`, or a run that holds them.

A CSV written by vla_ray has more beside it, in predictions.parquet, which is used if it has the same samples and
numbers. One from elsewhere stands for itself; what is wrong with it is one line that names file, column and row.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vla_ray.errors import DataError
from vla_ray.evaluation.policy.predictions import Bools, Floats, Predictions, Variant, median_step
from vla_ray.schema import GIVEN, OK, PREDICTIONS
from vla_ray.storage.location import Location

logger = logging.getLogger(__name__)

CSV_NAME, PARQUET_NAME = "predictions.csv", "predictions.parquet"
_REMEDY = "Give a predictions.csv or predictions.parquet of python jobs/infer.py, or its run directory."
_MAKE = "Write it again with python jobs/infer.py."
_MISSING = {"", "nan", "none", "null", "na", "n/a"}
LIMIT = 1e6  # units: a number beyond is no action, and squared or drawn to scale it breaks what is measured with it
_IMPOSSIBLE = f"a predicted number is beyond {LIMIT:,.0f} units"
_TOLERANCE = 1e-4  # between the CSV's numbers and the Parquet file's


def read_predictions(path: Location | str) -> Predictions:
    """The predictions in a CSV or Parquet file or in a run directory.

    Raises:
        DataError: not found, empty, not a table, columns missing, text among numbers, samples twice, odd steps.
    """
    place = path if isinstance(path, Location) else Location.of(path)
    if place.is_dir():
        found = [place / name for name in (CSV_NAME, PARQUET_NAME) if (place / name).exists()]
        if not found:
            raise DataError(
                f"{place} has no {CSV_NAME} and no {PARQUET_NAME}: an inference run writes them when it is finished. "
                "Run the same python jobs/infer.py again, or give another file as results=..."
            )
        place = found[0]
    elif not place.exists():
        raise DataError(f"there is no {place}. {_REMEDY}")
    if place.name.endswith(".parquet"):
        return _read_parquet(place)
    foreign = _read_csv(place)
    beside = place.parent / PARQUET_NAME
    if beside == place or not beside.exists():
        return foreign
    try:
        own = _read_parquet(beside, place)
    except DataError as error:
        logger.warning("%s is read alone, the file beside it cannot be: %s", place, error)
        return foreign
    if not _same(foreign, own):
        logger.warning("%s has other samples or numbers than %s, which is ignored", beside, place)
        return foreign
    return own


def _same(one: Predictions, other: Predictions) -> bool:
    """Whether a CSV says what the Parquet file beside it says: samples, instructions, predictions and targets."""
    rows = {name: i for i, name in enumerate(other.sample_id)}
    if set(one.sample_id) != set(rows) or one.num_steps != other.num_steps:
        return False
    aligned = other.take([rows[name] for name in one.sample_id])
    # A CSV may leave out the targets of steps that do not count.
    target = np.where(aligned.valid[..., None] | np.isfinite(one.target), aligned.target, np.nan)
    numbers = ((one.predicted, aligned.predicted), (one.target, target))
    return all(np.allclose(a, b, rtol=0, atol=_TOLERANCE, equal_nan=True) for a, b in numbers) and all(
        a.split() == b.split() for a, b in zip(one.instruction, aligned.instruction, strict=True)
    )


def _name(place: Location) -> str:
    own = place.name.rsplit(".", 1)[0]
    return place.parent.name if own == "predictions" else own


# CSV ------------------------------------------------------------------------------------------------------------


def _read_csv(place: Location) -> Predictions:
    data = place.read_bytes()
    if not data.strip():
        raise DataError(f"{place} is empty. {_REMEDY}")
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds binary data")
        frame = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, skipinitialspace=True)
        frame = frame.fillna("")  # a line that is too short has no text at all
    except (ValueError, csv.Error) as error:  # UnicodeDecodeError and pandas' ParserError are ValueErrors
        raise DataError(f"{place} is not a CSV file ({' '.join(str(error).split())}). {_REMEDY}") from error
    frame.columns = frame.columns.str.strip()
    steps = _csv_steps(place, list(frame.columns))
    if not len(frame):
        raise DataError(f"{place} has a header and no rows: nothing was predicted. {_REMEDY}")
    ids = tuple(frame["sample_id"])
    _refuse_twice(place, ids)
    predicted = _csv_numbers(place, frame, "pred", steps)
    impossible = _only_whole(predicted)
    target = np.full_like(predicted, np.nan)
    if "target_x_0" in frame:
        target = _csv_numbers(place, frame, "target", steps)
    target[~(np.abs(target) <= LIMIT).all(axis=-1)] = np.nan  # also where only x or y is written
    valid = np.asarray(np.isfinite(target).all(axis=-1))
    if "image_path" in frame:
        paths = frame["image_path"]
    else:
        paths = "images/" + frame["image_filename"] if "image_filename" in frame else pd.Series([""] * len(frame))
    return Predictions(
        name=_name(place),
        location=place,
        sample_id=ids,
        instruction=tuple(frame["instruction"]),
        dataset=(None,) * len(ids),
        recording=(None,) * len(ids),
        picture_hash=(None,) * len(ids),
        predicted=predicted,
        target=target,
        valid=valid,
        scale_m=np.full(len(ids), np.nan),
        image_path=tuple(path or None for path in paths),
        error=tuple(_IMPOSSIBLE if wrong else None for wrong in impossible),
        median_step=median_step(target, valid),
        median_from="the targets of this file",
    )


def _csv_steps(place: Location, columns: Sequence[str]) -> int:
    """H. DataError if columns are missing, or the steps of x and y, or of prediction and target, differ."""
    found: dict[str, set[int]] = {f"{kind}_{axis}": set() for kind in ("pred", "target") for axis in "xy"}
    for column in columns:
        if match := re.fullmatch(r"((?:pred|target)_[xy])_(\d+)", column):
            found[match[1]].add(int(match[2]))
    wanted = ["pred_x", "pred_y", *(["target_x", "target_y"] if found["target_x"] | found["target_y"] else [])]
    missing = [name for name in ("sample_id", "instruction") if name not in columns]
    missing += [f"{name}_0" for name in wanted if not found[name]]
    if missing:
        shown = ", ".join(columns[:8]) + (", ..." if len(columns) > 8 else "")
        raise DataError(
            f"{place} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} (it has {shown}). Needed: "
            "sample_id, instruction, pred_x_0, pred_y_0 and on for each step; target_x_0, target_y_0 ... for metrics."
        )
    steps = max(len(found[name]) for name in wanted)
    absent = [f"{name}_{k}" for name in wanted for k in range(steps) if k not in found[name]]
    if absent:
        counts = ", ".join(f"{len(found[name])} of {name}" for name in wanted)
        raise DataError(
            f"{place}: the number of steps is not the same everywhere ({counts}); {', '.join(absent[:4])} "
            f"{'is' if len(absent) == 1 else 'are'} missing. Number all from 0 without gaps. {_MAKE}"
        )
    return steps


def _csv_numbers(place: Location, frame: pd.DataFrame, kind: str, steps: int) -> Floats:
    """[N, H, 2]; NaN where nothing is written."""
    columns = [f"{kind}_{axis}_{k}" for k in range(steps) for axis in "xy"]
    numbers = np.empty((len(frame), len(columns)))
    for j, column in enumerate(columns):
        text = frame[column].str.strip()
        values = pd.to_numeric(text, errors="coerce").to_numpy(float)
        wrong = ~np.isfinite(values) & ~text.str.lower().isin(_MISSING).to_numpy()
        wrong &= ~text.str.lower().isin({"inf", "-inf", "infinity", "-infinity"}).to_numpy()
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{place}, row {row + 1}: {column} is {text.iloc[row][:40]!r}, not a number. "
                "Leave the fields of a failed prediction empty."
            )
        numbers[:, j] = values
    return numbers.reshape(len(frame), steps, 2)


def _only_whole(predicted: Floats) -> Bools:
    """Make rows NaN that are no predictions. [N] which of them only because a number is beyond LIMIT."""
    written = np.isfinite(predicted).all((1, 2))
    impossible = written & (np.abs(predicted) > LIMIT).any((1, 2))
    predicted[~written | impossible] = np.nan
    return np.asarray(impossible)


def _refuse_twice(place: Location, ids: Sequence[str]) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    first = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    raise DataError(
        f"{place} has {len(ids) - len(set(ids))} samples more than once, first {first!r}: which prediction counts is "
        "unknown. Keep one row for each sample_id."
    )


# Parquet --------------------------------------------------------------------------------------------------------

_NEEDED = ("frame_id", "target", "instruction", "predicted")


def _read_parquet(place: Location, shown_as: Location | None = None) -> Predictions:
    """Predictions of schema PREDICTIONS. `shown_as`: the file that paths of pictures are relative to."""
    data = place.read_bytes()
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names = file.schema_arrow.names
        missing = [name for name in _NEEDED if name not in names]
        if missing:
            raise DataError(
                f"{place} lacks the columns {', '.join(missing)} (it has {', '.join(names[:8])} ...). {_REMEDY}"
            )
        known = [name for name in PREDICTIONS.names if name in names]
        table = file.read(known).cast(pa.schema([PREDICTIONS.field(name) for name in known]))
        metadata = {k.decode(): v.decode(errors="replace") for k, v in (file.schema_arrow.metadata or {}).items()}
    except (pa.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{place} is not a Parquet file of predictions ({reason}). {_REMEDY}") from error
    rows: dict[str, list[Any]] = {
        name: table[name].to_pylist() if name in names else [None] * len(table) for name in PREDICTIONS.names
    }
    given = [i for i, target in enumerate(rows["target"]) if target == GIVEN]
    if not given:
        raise DataError(f"{place} has no rows with target={GIVEN!r}: nothing was predicted. {_REMEDY}")
    ids = tuple(rows["frame_id"][i] for i in given)
    _refuse_twice(place, ids)
    of = {name: [values[i] for i in given] for name, values in rows.items()}
    steps = _parquet_steps(place, rows, metadata)
    count = len(ids)
    predicted = _matrix(place, "predicted", of["predicted"], 2 * steps).reshape(count, steps, 2)
    failed = np.array([s is not None and s != OK for s in of["status"]])
    predicted[failed] = np.nan
    impossible = _only_whole(predicted)
    target = _matrix(place, "actions", of["actions"], 2 * steps).reshape(count, steps, 2)
    target[~(np.abs(target) <= LIMIT).all(axis=-1)] = np.nan
    valid = np.asarray(np.isfinite(target).all(axis=-1))
    valid &= _matrix(place, "valid", of["valid"], steps) != 0  # NaN where the file does not say
    number, source = _training_median(metadata), "the training data"
    if "median_split" in metadata:
        source = f"the split {metadata['median_split']}"
    if number is None:
        number, source = median_step(target, valid), "the targets of this file"
    return Predictions(
        name=_name(shown_as or place),
        location=shown_as or place,
        sample_id=ids,
        instruction=tuple(text or "" for text in of["instruction"]),
        dataset=tuple(of["dataset"]),
        recording=tuple(of["recording"]),
        picture_hash=tuple(of["picture"]),
        predicted=predicted,
        target=target,
        valid=valid,
        scale_m=np.array([np.nan if s is None else s for s in of["scale_m"]], float),
        image_path=tuple(of["image_path"]),
        error=tuple(_IMPOSSIBLE if wrong else text for wrong, text in zip(impossible, of["error"], strict=True)),
        median_step=number,
        median_from=source,
        probability=_optional(place, "probability", of["probability"], 2 * steps),
        entropy=_optional(place, "entropy", of["entropy"], 2 * steps),
        samples=_samples(place, of["samples"], steps),
        variants=_variants(place, rows, ids, steps),
        metadata=metadata,
    )


def _parquet_steps(place: Location, rows: dict[str, list[Any]], metadata: dict[str, str]) -> int:
    lengths = {len(v) for name in ("predicted", "actions") for v in rows[name] if v is not None}
    if not lengths and metadata.get("num_steps", "").isdigit():  # every sample failed, and there are no targets
        lengths = {2 * int(metadata["num_steps"])}
    if len(lengths) != 1 or (length := lengths.pop()) % 2 or not length:
        raise DataError(
            f"{place}: the number of steps is not the same everywhere (lists of {sorted(lengths) or 'no'} numbers in "
            f"predicted and actions; expected x0 y0 x1 y1 ... of one length). {_MAKE}"
        )
    return length // 2


def _matrix(place: Location, column: str, values: Sequence[list[float] | None], width: int) -> Floats:
    found = np.full((len(values), width), np.nan)
    for i, value in enumerate(values):
        if value is not None:
            if len(value) != width:
                raise DataError(f"{place}, row {i + 1}: {column} has {len(value)} numbers, expected {width}. {_MAKE}")
            found[i] = value
    return found


def _optional(place: Location, column: str, values: Sequence[list[float] | None], width: int) -> Floats | None:
    return None if all(v is None for v in values) else _matrix(place, column, values, width)


def _samples(place: Location, values: Sequence[list[float] | None], steps: int) -> Floats | None:
    longest = max((len(v) for v in values if v), default=0)
    if not longest:
        return None
    found = _matrix(place, "samples", [v or None for v in values], longest)
    return np.where(np.abs(found) <= LIMIT, found, np.nan).reshape(len(values), -1, steps, 2)


def _training_median(metadata: dict[str, str]) -> float | None:
    try:
        number = float(metadata["median_step"])
    except (KeyError, ValueError):
        return None
    return number if abs(number) <= LIMIT else None


def _variants(place: Location, rows: dict[str, list[Any]], ids: Sequence[str], steps: int) -> dict[str, Variant]:
    at = {name: i for i, name in enumerate(ids)}
    by_name: dict[str, list[int]] = {}
    for i, name in enumerate(rows["target"]):
        if name != GIVEN and rows["frame_id"][i] in at:
            by_name.setdefault(name, []).append(i)
    found = {}
    for name, where in by_name.items():
        instructions: list[str | None] = [None] * len(ids)
        predicted = np.full((len(ids), steps, 2), np.nan)
        numbers = _matrix(place, "predicted", [rows["predicted"][i] for i in where], 2 * steps)
        for i, values in zip(where, numbers.reshape(-1, steps, 2), strict=True):
            row = at[rows["frame_id"][i]]
            instructions[row] = rows["instruction"][i]
            if rows["status"][i] in (None, OK) and (np.abs(values) <= LIMIT).all():
                predicted[row] = values
        found[name] = Variant(tuple(instructions), predicted)
    return found
