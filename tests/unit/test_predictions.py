"""predictions.csv has the original script's columns, and says nothing where nothing was predicted."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from vla_ray.schema import FAILED, GIVEN, OK, PREDICTIONS, SKIPPED
from vla_ray.stages.predictions import write_predictions
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import Ledger, commit

# As the original inference script writes them: names, and in this order.
ORIGINAL = [
    *("sample_id", "image_filename", "image_path", "instruction", "predicted_actions", "target_actions"),
    *(f"{kind}_{axis}_{k}" for k in range(8) for kind in ("pred", "target") for axis in "xy"),
    *("overall_mse", "overall_mae", "overall_rmse", "overall_success_rate"),
]


def row(number: int, variant: str = GIVEN, **columns: Any) -> dict[str, Any]:
    steps = np.arange(16, dtype=np.float32) / 16 + number
    return {
        "frame_id": f"d/val/s:{9 - number}/0000",  # not in the order of the dataset
        "target": variant,
        "number": number,
        "instruction": f"do {number}",
        "image_path": f"images/sample_{number:06d}_x.jpg",
        "status": OK,
        "predicted": steps.tolist(),
        "actions": (steps + 0.25).tolist(),
        **columns,
    }


def written(path: Path, rows: list[dict[str, Any]]) -> tuple[pd.DataFrame, Any]:
    run = Location.of(path)
    commit(run, rows, PREDICTIONS)
    Ledger(run, PREDICTIONS).load()
    write_predictions(run, 8, {"decode": "greedy", "num_steps": "8"})
    return pd.read_csv(path / "predictions.csv"), pq.read_table(path / "predictions.parquet")


def test_the_original_columns_in_the_order_of_the_dataset(tmp_path: Path) -> None:
    frame, table = written(tmp_path, [row(2), row(0), row(1), row(1, "stop", actions=None)])
    assert list(frame.columns) == ORIGINAL
    assert frame["instruction"].tolist() == ["do 0", "do 1", "do 2"]
    assert frame["image_filename"][1] == "sample_000001_x.jpg"
    assert frame["pred_y_7"].tolist() == pytest.approx([15 / 16, 1 + 15 / 16, 2 + 15 / 16])
    assert frame["target_x_3"][0] == pytest.approx(6 / 16 + 0.25)
    assert ast.literal_eval(frame["predicted_actions"][2])[1] == pytest.approx(2 + 1 / 16)
    for name, value in {"mse": 0.0625, "mae": 0.25, "rmse": 0.25, "success_rate": 0.0}.items():
        assert frame[f"overall_{name}"].tolist() == pytest.approx([value] * 3)
    assert table["number"].to_pylist() == [0, 1, 1, 2]
    assert table["target"].to_pylist() == [GIVEN, GIVEN, "stop", GIVEN]
    metadata = table.schema.metadata
    assert metadata[b"units"].startswith(b"waypoint spacings")
    assert metadata[b"decode"] == b"greedy"


def test_a_failed_sample_has_empty_cells_and_counts_nowhere(tmp_path: Path) -> None:
    lost = row(1, status=FAILED, error_type="ImageError", predicted=None, image_path=None)
    frame, _ = written(tmp_path, [row(0), lost, row(2, "opposite", status=SKIPPED, predicted=None)])
    assert len(frame) == 2
    assert frame.loc[1, [c for c in ORIGINAL if c.startswith("pred")]].isna().all()
    assert frame.loc[1, "target_x_0"] == pytest.approx(1.25)
    assert frame["overall_mae"].tolist() == pytest.approx([0.25, 0.25])


def test_a_log_without_right_answers(tmp_path: Path) -> None:
    frame, _ = written(tmp_path, [row(0, actions=None), row(1, actions=None)])
    assert frame["pred_x_0"].notna().all()
    assert frame[[c for c in ORIGINAL if c.startswith(("target", "overall"))]].isna().all(axis=None)


def test_steps_after_the_end_of_an_episode_are_nobodys_fault(tmp_path: Path) -> None:
    """Padded with zeros in the dataset; empty in the CSV, and in none of its numbers."""
    padded = row(0)
    padded |= {"valid": [True] * 5 + [False] * 3, "actions": [*padded["actions"][:10], *[0.0] * 6]}
    frame, table = written(tmp_path, [padded, row(1)])
    assert frame.loc[0, ["target_x_4", "target_y_4"]].notna().all()
    assert frame.loc[0, [f"target_{axis}_{k}" for axis in "xy" for k in (5, 6, 7)]].isna().all()
    assert frame["target_actions"].isna().tolist() == [True, False]
    assert frame["overall_mae"].tolist() == pytest.approx([0.25, 0.25])
    assert table["actions"][0].as_py()[10:] == [0.0] * 6
