"""Reading predictions: ours with what lies beside them, other people's, and everything that can be wrong with a CSV."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vla_ray.errors import DataError
from vla_ray.evaluation.policy.prediction_files import read_predictions
from vla_ray.evaluation.policy.predictions import common_samples
from vla_ray.schema import PREDICTIONS, prediction_columns

H = 2


def csv_frame(count: int = 3) -> pd.DataFrame:
    rows = []
    for i in range(count):
        row: dict[str, Any] = dict.fromkeys(prediction_columns(H), "")
        row |= {"sample_id": f"s{i}", "instruction": "turn left", "image_path": f"images/{i}.jpg"}
        for k in range(H):
            row |= {f"pred_x_{k}": 1.0, f"pred_y_{k}": 0.25 * i, f"target_x_{k}": 1.0, f"target_y_{k}": 0.5}
        rows.append(row)
    return pd.DataFrame(rows)


def parquet_rows(count: int = 3, shift: float = 0.0) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        base = {"frame_id": f"s{i}", "dataset": "d", "recording": f"r{i // 2}", "t": 0, "status": "ok", "scale_m": 0.5}
        given = [1.0, 0.25 * i + shift] * H
        rows.append(
            base
            | {"target": "given", "instruction": "turn left", "predicted": given, "actions": [1.0, 0.5] * H}
            | {"valid": [True, i != 1], "probability": [0.5] * 2 * H, "samples": given + given}
        )
        if i:
            rows.append(base | {"target": "stop", "instruction": "stop", "predicted": [0.0] * 2 * H})
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]], **metadata: str) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTIONS).replace_schema_metadata(metadata), path)


def written(path: Path, frame: pd.DataFrame) -> Path:
    frame.to_csv(path, index=False)
    return path


def test_a_csv_from_elsewhere(tmp_path: Path) -> None:
    frame = csv_frame()[
        ["instruction", "sample_id", *[c for c in csv_frame() if c[:4] in ("pred", "targ") and c[-1].isdigit()]]
    ]
    p = read_predictions(str(written(tmp_path / "theirs.csv", frame)))
    assert (p.name, len(p), p.num_steps) == ("theirs", 3, 2)
    assert p.predicted[2].tolist() == [[1.0, 0.5], [1.0, 0.5]]
    assert p.target[0].tolist() == [[1.0, 0.5], [1.0, 0.5]]
    assert p.valid.all()
    assert p.groups is None
    assert p.median_step == pytest.approx(np.hypot(1, 0.5))
    assert p.median_from == "the targets of this file"
    assert p.picture(0) is None
    assert p.missing_pictures() == 0, "none is named"


def test_ours_has_more_beside_it(tmp_path: Path) -> None:
    written(tmp_path / "predictions.csv", csv_frame())
    write_parquet(tmp_path / "predictions.parquet", parquet_rows(shift=5e-5), median_step="0.9", decode="greedy")
    p = read_predictions(str(tmp_path))
    assert p.name == tmp_path.name
    assert p.groups == ("d/r0", "d/r0", "d/r1")
    assert (p.median_step, p.median_from) == (0.9, "the training data")
    assert p.valid.tolist() == [[True, True], [True, False], [True, True]]
    assert p.scale_m.tolist() == [0.5] * 3
    assert p.samples is not None
    assert p.samples.shape == (3, 2, H, 2)
    assert list(p.variants) == ["stop"]
    assert p.variants["stop"].instructions == (None, "stop", "stop")
    assert np.isnan(p.variants["stop"].predicted[0]).all()
    assert (p.variants["stop"].predicted[1] == 0).all()


def test_a_parquet_file_of_other_numbers_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "predictions.csv", csv_frame())
    write_parquet(tmp_path / "predictions.parquet", parquet_rows(shift=0.01))
    with caplog.at_level(logging.WARNING):
        p = read_predictions(str(path))
    assert p.probability is None
    assert "which is ignored" in caplog.text


def test_what_is_not_a_whole_prediction_failed(tmp_path: Path) -> None:
    frame = csv_frame(5).astype(object)
    frame.loc[0, "pred_y_1"] = ""
    frame.loc[1, [f"pred_{a}_{k}" for a in "xy" for k in range(H)]] = "NaN"
    frame.loc[2, "target_x_1"] = ""
    frame.loc[3, "pred_x_0"] = "inf"
    p = read_predictions(str(written(tmp_path / "p.csv", frame)))
    assert p.predicted_ok.tolist() == [False, False, True, False, True]
    assert np.isnan(p.predicted[0]).all(), "what is left of it is no prediction"
    assert p.valid[2].tolist() == [True, False]
    assert p.scored.tolist() == [False, False, True, False, True]


def test_logs_of_a_deployment_have_no_targets(tmp_path: Path) -> None:
    frame = csv_frame()
    frame[[c for c in frame if c.startswith("target_")]] = ""
    p = read_predictions(str(written(tmp_path / "p.csv", frame)))
    assert p.predicted_ok.all()
    assert not p.scored.any()
    assert p.median_step == 0


def change(frame: pd.DataFrame, what: str) -> pd.DataFrame:
    if what == "text":
        frame = frame.astype(object)
        frame.loc[1, "pred_x_1"] = "fast"
    if what == "twice":
        frame.loc[2, "sample_id"] = "s0"
    drop = {
        "id": ["sample_id"],
        "columns": ["pred_x_0", "pred_x_1", "instruction"],
        "one step": ["pred_y_1"],
        "target steps": ["target_x_1", "target_y_1"],
    }
    return frame.drop(columns=drop.get(what, []))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("text", r"row 2: pred_x_1 is 'fast', not a number"),
        ("twice", r"1 samples more than once, first 's0'"),
        ("id", r"lacks the column sample_id \(it has image_filename"),
        ("columns", r"lacks the columns instruction, pred_x_0 .*Needed: sample_id, instruction, pred_x_0"),
        ("one step", r"number of steps is not the same everywhere \(2 of pred_x, 1 of pred_y.*pred_y_1 is missing"),
        ("target steps", r"1 of target_x, 1 of target_y\); target_x_1, target_y_1 are missing"),
    ],
)
def test_a_wrong_csv_is_one_line(tmp_path: Path, what: str, message: str) -> None:
    path = written(tmp_path / "predictions.csv", change(csv_frame(), what))
    with pytest.raises(DataError, match=message) as caught:
        read_predictions(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is not a CSV file"),
        (b"hello", "lacks the columns sample_id, instruction, pred_x_0, pred_y_0"),
        (b"sample_id,instruction,pred_x_0,pred_y_0\n", "a header and no rows"),
        (b'a,b\n1,2\n1,"2\n3,4,5\n', "is not a CSV file"),
    ],
)
def test_what_is_no_table(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "predictions.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_predictions(str(tmp_path / "predictions.csv"))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no"):
        read_predictions(str(tmp_path / "no.csv"))
    with pytest.raises(DataError, match=r"has no predictions\.csv and no predictions\.parquet"):
        read_predictions(str(tmp_path))


def test_wrong_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="is not a Parquet file of predictions"):
        read_predictions(str(path))
    rows = parquet_rows()
    write_parquet(path, rows + rows[:1])
    with pytest.raises(DataError, match="more than once, first 's0'"):
        read_predictions(str(path))
    rows[0]["predicted"] = [1.0] * 6
    write_parquet(path, rows)
    with pytest.raises(DataError, match=r"number of steps is not the same everywhere \(lists of \[4, 6\]"):
        read_predictions(str(path))
    pq.write_table(pa.table({"frame_id": ["a"]}), path)
    with pytest.raises(DataError, match="lacks the columns target, instruction, predicted"):
        read_predictions(str(path))
    pq.write_table(pa.table({"frame_id": ["a"], "target": ["given"], "instruction": ["b"], "predicted": ["c"]}), path)
    with pytest.raises(DataError, match="is not a Parquet file of predictions"):
        read_predictions(str(path))
    rows = parquet_rows()
    rows[0]["valid"] = [True]
    write_parquet(path, rows)
    with pytest.raises(DataError, match="row 1: valid has 1 numbers, expected 2"):
        read_predictions(str(path))
    write_parquet(path, [])
    with pytest.raises(DataError, match="nothing was predicted"):
        read_predictions(str(path))


def test_pictures_beside_the_file_elsewhere_or_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "images").mkdir(parents=True)
    Image.new("RGB", (4, 3), (255, 0, 0)).save(run / "images" / "0.jpg")
    Image.new("RGB", (5, 3)).save(tmp_path / "far.png")
    frame = csv_frame(4)
    frame.loc[1, "image_path"] = str(tmp_path / "far.png")
    (run / "images" / "3.jpg").write_bytes(b"no picture")
    p = read_predictions(str(written(run / "predictions.csv", frame)))
    near, far = p.picture(0), p.picture(1)
    assert near is not None
    assert near.shape == (3, 4, 3)
    assert far is not None
    assert far.shape == (3, 5, 3)
    assert p.picture(2) is None
    assert p.picture(3) is None, "there, but no picture"
    assert p.missing_pictures() == 1


def test_common_samples(tmp_path: Path) -> None:
    a = read_predictions(str(written(tmp_path / "a.csv", csv_frame(3))))
    b = read_predictions(str(written(tmp_path / "b.csv", csv_frame(5).iloc[::-1].iloc[:4])))
    one, other = common_samples([a, b])
    assert one.sample_id == other.sample_id == ("s1", "s2")
    assert (one.predicted == other.predicted).all()
    with pytest.raises(DataError, match="no sample_id in common"):
        common_samples([a, b.take([0])])
