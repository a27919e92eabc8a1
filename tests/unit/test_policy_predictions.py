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

from vla_ray.data.cast.episodes import recording_of
from vla_ray.errors import DataError
from vla_ray.evaluation.policy.language import retrieval
from vla_ray.evaluation.policy.prediction_files import read_predictions
from vla_ray.evaluation.policy.predictions import Predictions, common_samples
from vla_ray.schema import PREDICTIONS, prediction_columns

H = 2
LEFT, AHEAD, RIGHT = ([1.0, y] * H for y in (1.0, 0.0, -1.0))


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
        base = {"frame_id": f"s{i}", "dataset": "d", "recording": f"r{i // 2}", "status": "ok", "scale_m": 0.5}
        base |= {"picture": f"p{i}"}
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
    assert p.missing_pictures() == (0, 0), "none is named"


def test_ours_has_more_beside_it(tmp_path: Path) -> None:
    written(tmp_path / "predictions.csv", csv_frame())
    write_parquet(tmp_path / "predictions.parquet", parquet_rows(shift=5e-5), median_step="0.9", decode="greedy")
    p = read_predictions(str(tmp_path))
    assert p.name == tmp_path.name
    assert p.groups == ("r0", "r0", "r1")
    assert p.dataset == ("d", "d", "d")
    assert p.picture_hash == ("p0", "p1", "p2")
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


@pytest.mark.parametrize(
    ("column", "value", "same"),
    [
        ("target_x_0", 3.0, False),
        ("target_x_0", "", False),
        ("target_x_1", "", True),  # of a step that the Parquet file says does not count
        ("target_x_1", 3.0, False),
        ("instruction", "turn right", False),
        ("instruction", " turn left", True),
    ],
)
def test_what_lies_beside_a_csv_has_its_targets_and_instructions(
    tmp_path: Path, column: str, value: object, same: bool
) -> None:
    frame = csv_frame().astype(object)
    frame.loc[1, column] = value
    if value == "":
        frame.loc[1, column.replace("x", "y")] = value
    path = written(tmp_path / "predictions.csv", frame)
    write_parquet(tmp_path / "predictions.parquet", parquet_rows())
    p = read_predictions(str(path))
    assert (p.probability is not None) == same
    if same:
        assert p.valid[1].tolist() == [True, False]


def test_the_median_is_of_a_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "predictions.parquet", parquet_rows(), median_step="0.9", median_split="train")
    p = read_predictions(str(tmp_path))
    assert (p.median_step, p.median_from) == (0.9, "the split train")


def test_one_sample_without_a_recording_stands_for_itself(tmp_path: Path) -> None:
    rows = parquet_rows()
    for row in rows:
        if row["frame_id"] == "s1":
            row |= {"recording": None, "dataset": None, "status": "failed", "predicted": None}
    write_parquet(tmp_path / "predictions.parquet", rows)
    assert read_predictions(str(tmp_path)).groups == ("r0", "s1", "r1")
    assert read_predictions(str(tmp_path)).take([1]).groups is None, "samples, then"


def test_one_drive_and_one_picture_in_two_sub_datasets(tmp_path: Path) -> None:
    """As CAST has them: the counterfactual set repeats pictures of the filtered one, in chunks of other names."""
    named = [
        ("cast_filtered_dataset", "recon/traj_003_chunk_0_start_0_end_17/traj_data.pkl", "a", "turn left", LEFT),
        ("cast_filtered_dataset", "recon/traj_003_chunk_1_start_17_end_34/traj_data.pkl", "b", "go on", AHEAD),
        ("cast_counterfactual_dataset", "x/traj_003_chunk_4_start_9_end_20/traj_data.pkl", "a", "turn right", RIGHT),
    ]
    rows = [
        {"frame_id": f"s{i}", "target": "given", "dataset": dataset, "recording": recording_of(path), "t": 0}
        | {"picture": picture, "instruction": text, "status": "ok", "predicted": LEFT, "actions": way}
        | {"valid": [True] * H}
        for i, (dataset, path, picture, text, way) in enumerate(named)
    ]
    write_parquet(tmp_path / "predictions.parquet", rows)
    p = read_predictions(str(tmp_path))
    assert p.recording == ("recon/traj_003", "recon/traj_003", "traj_003")
    assert p.groups == ("traj_003",) * 3, "one drive, whatever sub-dataset names it"
    np.testing.assert_array_equal(retrieval(p, p.predicted), [1, np.nan, 0])


def test_other_variants_are_added_sample_by_sample(tmp_path: Path) -> None:
    rows = parquet_rows()
    write_parquet(tmp_path / "own.parquet", [r for r in rows if r["target"] == "given" or r["frame_id"] == "s1"])
    for row in rows:
        row["predicted"] = [5.0] * 2 * H
    extra = {**rows[0], "target": "stop", "instruction": "stop"}
    write_parquet(tmp_path / "more.parquet", [*rows, extra])
    own, more = (read_predictions(str(tmp_path / f"{name}.parquet")) for name in ("own", "more"))
    stop = own.with_variants(more.take([2, 0])).variants["stop"]
    assert stop.instructions == ("stop", "stop", "stop")
    assert stop.predicted[:, 0, 0].tolist() == [5, 0, 5], "what the run itself predicted stays"
    assert (own.with_variants(own.take([1])).variants["stop"].predicted[1] == 0).all()


def test_what_is_not_a_whole_prediction_failed(tmp_path: Path) -> None:
    frame = csv_frame(5).astype(object)
    frame.loc[0, "pred_y_1"] = ""
    frame.loc[1, [f"pred_{a}_{k}" for a in "xy" for k in range(H)]] = "NaN"
    frame.loc[2, "target_x_1"] = ""
    frame.loc[3, "pred_x_0"] = "inf"
    frame.loc[4, "pred_x_0"] = "-1e300"
    p = read_predictions(str(written(tmp_path / "p.csv", frame)))
    assert p.predicted_ok.tolist() == [False, False, True, False, False]
    assert p.error == (None,) * 4 + ("a predicted number is beyond 1,000,000 units",)
    assert np.isnan(p.predicted[0]).all(), "what is left of it is no prediction"
    assert p.valid[2].tolist() == [True, False]
    assert p.scored.tolist() == [False, False, True, False, False]


def test_impossible_numbers_anywhere(tmp_path: Path) -> None:
    frame = csv_frame().astype(object)
    frame.loc[1, "target_y_1"] = "1e300"
    p = read_predictions(str(written(tmp_path / "p.csv", frame)))
    assert p.valid.tolist() == [[True, True], [True, False], [True, True]]
    rows = parquet_rows()
    rows[0]["predicted"] = [1e9] * 2 * H
    rows[1]["actions"] = [1e9] * 2 * H
    rows[2]["predicted"] = [1e9] * 2 * H  # a variant
    rows[3]["samples"] = [1e9] * 4 * H
    write_parquet(tmp_path / "p.parquet", rows, median_step="1e300")
    p = read_predictions(str(tmp_path / "p.parquet"))
    assert p.predicted_ok.tolist() == [False, True, True]
    assert p.error[0] is not None
    assert p.valid.any(1).tolist() == [True, False, True]
    assert np.isfinite(p.variants["stop"].predicted).all((1, 2)).tolist() == [False, False, True]
    assert p.samples is not None
    assert np.isnan(p.samples[2]).all()
    assert p.median_from == "the targets of this file"


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


def pictured(run: Path, paths: list[str]) -> Predictions:
    frame = csv_frame(len(paths))
    frame["image_path"] = paths
    return read_predictions(str(written(run / "predictions.csv", frame)))


def test_pictures_beside_the_file_or_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "images").mkdir(parents=True)
    Image.new("RGB", (4, 3), (255, 0, 0)).save(run / "images" / "0.jpg")
    (run / "images" / "3.jpg").write_bytes(b"no picture")
    inside = ["images/0.jpg", "./images/0.jpg", str(run / "images" / "0.jpg"), f"file://{run}/images/0.jpg"]
    moved = ["/another/machine/images/0.jpg", "s3://gone/0.jpg", "other/0.jpg"]  # found by their names
    p = pictured(run, [*inside, *moved, "images/2.jpg", "images/3.jpg", ""])
    for row in range(7):
        near = p.picture(row)
        assert near is not None, row
        assert near.shape == (3, 4, 3)
    assert [p.picture(row) for row in (7, 8, 9)] == [None, None, None], "gone, no picture, not named"
    assert p.missing_pictures() == (1, 0)


def test_pictures_elsewhere_are_not_followed(tmp_path: Path) -> None:
    """A CSV from elsewhere must not copy what its reader can see into a report."""
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (5, 3)).save(tmp_path / "far.png")
    paths = ["../far.png", "images/../../far.png", str(tmp_path / "far.png"), f"file://{tmp_path}/far.png"]
    paths += [f"{run}/../far.png", f"{run}x/far.png", "s3://no-such-bucket/far.png", "http://there/far.png"]
    p = pictured(run, paths)
    assert [p.place(row) for row in range(len(paths))] == [None] * len(paths)
    assert [p.picture(row) for row in range(len(paths))] == [None] * len(paths)
    assert p.missing_pictures() == (0, len(paths))


@pytest.mark.parametrize("path", ["x" * 5000 + ".jpg", "/" + "y" * 400 + ".jpg", "images/0.jpg/1.jpg"])
def test_a_place_that_cannot_be_looked_at_is_no_picture(tmp_path: Path, path: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(b"")
    p = pictured(tmp_path, [path])
    assert p.place(0) is None
    assert p.picture(0) is None
    assert sum(p.missing_pictures()) == 1


def test_common_samples(tmp_path: Path) -> None:
    a = read_predictions(str(written(tmp_path / "a.csv", csv_frame(3))))
    b = read_predictions(str(written(tmp_path / "b.csv", csv_frame(5).iloc[::-1].iloc[:4])))
    one, other = common_samples([a, b])
    assert one.sample_id == other.sample_id == ("s1", "s2")
    assert (one.predicted == other.predicted).all()
    with pytest.raises(DataError, match="no sample_id in common"):
        common_samples([a, b.take([0])])
