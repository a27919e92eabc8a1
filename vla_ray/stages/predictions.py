"""An inference run's rows as the files that people open: predictions.csv and predictions.parquet.

Both are in the order of the dataset and are written anew from the rows each time a run ends, so they say the same
whatever was killed on the way. The CSV has exactly the columns of the original inference script; a sample without a
prediction has empty cells there, never zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla_ray.schema import GIVEN, PREDICTIONS, prediction_columns
from vla_ray.storage.files import Location, write_atomic
from vla_ray.storage.ledger import read_metrics

CSV, PARQUET = "predictions.csv", "predictions.parquet"
THRESHOLD = 0.1  # units; of overall_success_rate, as in the original script
_DIGITS = 6  # of float32 numbers: more would be noise


@dataclass(frozen=True, slots=True)
class Overall:
    """Of all steps with a prediction and a target, NaN without any; `samples` is how many have such steps."""

    samples: int
    mse: float
    mae: float
    rmse: float
    success_rate: float


def write_predictions(run: Location, num_steps: int, metadata: Mapping[str, str]) -> Overall:
    """Write both files of a run from its rows.

    Args:
        metadata: of predictions.parquet, see the schema.
    """
    table = read_metrics(run, schema=PREDICTIONS).sort_by([("number", "ascending"), ("target", "ascending")])
    extra = {name.encode(): value.encode() for name, value in metadata.items()}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **extra})
    write_atomic(run / PARQUET, lambda file: pq.write_table(table, file, compression="zstd"))
    given = table.filter(pc.equal(table["target"], GIVEN))
    predicted, target = (_steps(given[name], num_steps) for name in ("predicted", "actions"))
    target[~_valid(given["valid"], num_steps)] = np.nan  # after the end of an episode nothing is right or wrong
    overall = _overall(predicted, target)
    frame = _frame(given, predicted, target, overall)
    write_atomic(run / CSV, lambda file: frame.to_csv(file, index=False, lineterminator="\n"))
    return overall


def _steps(column: pa.ChunkedArray, num_steps: int) -> NDArray[np.float64]:
    """[N, H, 2]; NaN for a missing list."""
    empty = [np.nan] * (2 * num_steps)
    rows = [empty if row is None else row for row in column.to_pylist()]
    return np.asarray(rows, np.float64).reshape(-1, num_steps, 2)


def _valid(column: pa.ChunkedArray, num_steps: int) -> NDArray[np.bool_]:
    """[N, H]; all steps of a sample that says nothing of them."""
    every = [True] * num_steps
    return np.asarray([row or every for row in column.to_pylist()], np.bool_).reshape(-1, num_steps)


def _overall(predicted: NDArray[np.float64], target: NDArray[np.float64]) -> Overall:
    known = np.isfinite(predicted).all(-1) & np.isfinite(target).all(-1)  # [N, H]
    if not known.any():
        return Overall(0, *[float("nan")] * 4)
    error = predicted[known] - target[known]
    mse = float(np.square(error).mean())
    hit = np.linalg.norm(error, axis=-1) < THRESHOLD
    samples = int(known.any(-1).sum())
    return Overall(samples, mse, float(np.abs(error).mean()), float(np.sqrt(mse)), float(hit.mean()))


def _frame(
    given: pa.Table, predicted: NDArray[np.float64], target: NDArray[np.float64], overall: Overall
) -> pd.DataFrame:
    paths = given["image_path"].to_pylist()
    columns: dict[str, Any] = {
        "sample_id": given["frame_id"].to_pylist(),
        "image_filename": [path and path.rpartition("/")[2] for path in paths],
        "image_path": paths,
        "instruction": given["instruction"].to_pylist(),
        "predicted_actions": _lists(predicted),
        "target_actions": _lists(target),
    }
    steps = predicted.shape[1]
    for k in range(steps):
        for kind, values in (("pred", predicted), ("target", target)):
            for d, axis in enumerate("xy"):
                columns[f"{kind}_{axis}_{k}"] = values[:, k, d].round(_DIGITS)
    for name in ("mse", "mae", "rmse", "success_rate"):
        columns[f"overall_{name}"] = getattr(overall, name)
    frame = pd.DataFrame(columns, index=range(given.num_rows))
    return frame[prediction_columns(steps)]


def _lists(values: NDArray[np.float64]) -> list[str | None]:
    """Each sample's numbers as the original script wrote them, a list in brackets; None where one is missing."""
    flat = values.reshape(len(values), -1).round(_DIGITS)
    return [None if np.isnan(row).any() else str(row.tolist()) for row in flat]
