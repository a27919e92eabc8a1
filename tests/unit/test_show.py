"""What `jobs/show.py` says about payloads, tables, runs, datasets, and nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vla_ray.data import corridors
from vla_ray.data.cast.shards import ReadOptions
from vla_ray.data.prepared import PreparedDataset
from vla_ray.errors import DataError, StorageError
from vla_ray.report.show import describe
from vla_ray.report.show_dataset import pick
from vla_ray.schema import PREDICTIONS
from vla_ray.stages.dataset_document import build_document
from vla_ray.stages.predictions import write_predictions
from vla_ray.stages.prepare import ShardPreparer
from vla_ray.storage import payload
from vla_ray.storage.files import Location, write_json
from vla_ray.storage.ledger import Ledger, commit
from vla_ray.storage.run import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = RunDirectory.open(tmp_path, "drive", settings={"job": "capture"}, config_yaml="", command="python x")
    directory.start({"manifest": "m", "frames": 3, "targets": ["acc_energy"]})
    rows = [
        {"frame_id": f"s/{i}", "target": "acc_energy", "status": "ok", "target_scalar": float(i), "text": "Keep going."}
        for i in range(3)
    ]
    rows.append(
        {"frame_id": "s/3", "target": "acc_energy", "status": "failed", "error_type": "ImageError", "error": "cut"}
    )
    commit(directory.location, rows)
    return tmp_path / "drive"


def test_a_run_while_it_goes_on_and_folded(run: Path) -> None:
    before = describe(str(run))
    Ledger(Location.of(run)).load()
    after = describe(str(run))
    for text in (before, after):
        assert "run drive: running (capture" in text
        assert "4 rows, 1 failed, 3 ok" in text
        assert "s/3: ImageError: cut" in text
        assert "3 x 'Keep going.'" in text
        (line,) = (x for x in text.splitlines() if x.startswith("  acc_energy"))
        assert line.split() == ["acc_energy", "4", "1", "0", "0", "1", "2"], (
            "rows, failed, degenerate, min, median, max"
        )


def test_a_table(run: Path) -> None:
    Ledger(Location.of(run)).load()
    assert "4 rows, 1 failed, 3 ok" in describe(str(run / "metrics" / "part-000000.parquet"))


def test_a_payload(tmp_path: Path) -> None:
    content = {
        "tag": "a",
        "image_path": "/a.png",
        "input_speed_mps": 3.0,
        "mode": "action",
        "target_scalar": 0.5,
        "target_info": {"head": "route"},
        "outputs": {
            "pred_route": torch.tensor([[[1.0, 0.0], [2.0, 0.0]]]),
            "pred_speed_wps": torch.tensor([[[1.0, 0.0], [4.0, 4.0]]]),
            "language": ["Stop."],
        },
        "meta": {
            "frame_id": "s/a",
            "target": "curv_energy",
            "degenerate": True,
            "original_width": 20,
            "original_height": 10,
            "num_patch_views": 2,
            "num_image_tokens_per_patch": 9,
            "spans": {"prompt": [0, 5]},
        },
        "attention": {"vision_block_0": [{"attn": torch.zeros(2, 4, 3, 3), "shape": [2, 4, 3, 3]}]},
    }
    payload.save(Location.of(tmp_path / "a.pt"), content)
    text = describe(str(tmp_path / "a.pt"))
    for part in ("s/a", "curv_energy = 0.5", "no map", "5.00 m long", "prompt 0..4", "attn float32[2, 4, 3, 3]"):
        assert part in text


def test_a_folder_of_runs_and_nothing(run: Path, tmp_path: Path) -> None:
    assert f"holds 1 runs: drive\nlook at one: python jobs/show.py path={run}" in describe(str(tmp_path))
    with pytest.raises(StorageError, match="there is nothing at"):
        describe(str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no run directory"):
        describe(str(run / "ledger"))


def test_a_relevance_payload(tmp_path: Path) -> None:
    content = {
        "tag": "a",
        "image_path": "/a.png",
        "input_speed_mps": 3.0,
        "mode": "text",
        "target_scalar": 0.5,
        "target_info": {"token_string": "Stop"},
        "outputs": {
            "pred_route": torch.zeros(1, 20, 2),
            "pred_speed_wps": torch.zeros(1, 10, 2),
            "language": ["Stop."],
        },
        "meta": {
            "target": "text_max",
            "original_width": 20,
            "original_height": 10,
            "num_patch_views": 1,
            "num_image_tokens_per_patch": 9,
            "spans": {"image": [1, 3]},
        },
        "relevance": {
            "language": {"positive": torch.tensor([1.0, 2.0, 1.0, 0.0])},
            "patches": {"positive": torch.zeros(1, 36)},
        },
    }
    payload.save(Location.of(tmp_path / "a.pt"), content)
    text = describe(str(tmp_path / "a.pt"))
    assert "relevance  positive: language float32[4], patches float32[1, 36], 75% on image tokens" in text
    assert "blocks" not in text


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A prepared dataset of corridors, without the driver."""
    options, directory = ReadOptions(), tmp_path / "corridors"
    preparer = ShardPreparer(Location.of(directory), options, row_group=8, read=corridors.read)
    records = [preparer(shard) for shard in corridors.shards(train=20, val=4)]
    write_json(Location.of(directory / "dataset.json"), build_document(records, "synthetic", options))
    return directory


def test_a_dataset(dataset: Path) -> None:
    text = describe(str(dataset))
    train, val = (sum(len(corridors.scene(first + k).tasks) for k in range(n)) for first, n in ((0, 20), (10**6, 4)))
    assert text.startswith(f"dataset corridors: {train} train, {val} val samples of synthetic")
    (counts,) = (x.split() for x in text.splitlines() if x.startswith("  corridors ") and " train " in x)
    assert counts[:5] == ["corridors", "train", "20", "20", "20"], "episodes, steps, samples"
    assert "median step" in text
    assert text.endswith(f"contact sheet of 22 samples: {dataset / 'contact_sheet.png'}")
    with Image.open(dataset / "contact_sheet.png") as sheet:
        assert sheet.width > 1000


def test_samples_on_the_sheet_are_of_all_kinds(dataset: Path) -> None:
    picked = pick(PreparedDataset.open(str(dataset)))
    kinds = Counter((s.dataset, s.split) for s in picked)
    assert kinds == {
        ("corridors", "train"): 6,
        ("corridors", "val"): 4,  # all there are
        ("corridors_counterfactual", "train"): 6,
        ("corridors_counterfactual", "val"): 6,
    }
    assert len({s.sample_id for s in picked}) == len(picked)
    train = [s.recording for s in picked if (s.dataset, s.split) == ("corridors", "train")]
    assert (train[0], train[-1]) == ("scene_000000", "scene_000019"), "from the first to the last"


def test_a_table_of_samples(dataset: Path) -> None:
    (file,) = (dataset / "samples" / "val").glob("corridors-*.parquet")
    text = describe(str(file))
    assert f"{file}: 4 samples in 1 row groups" in text
    assert "actions (list" in text
    sheet = file.with_name(f"{file.stem}.contact_sheet.png")
    assert text.endswith(f"contact sheet of 4 samples: {sheet}")
    assert sheet.stat().st_size > 1000


def test_a_dataset_where_nothing_can_be_written(dataset: Path) -> None:
    (dataset / "contact_sheet.png").mkdir()
    text = describe(str(dataset))
    assert "median step" in text
    assert "no contact sheet: Cannot write" in text


@pytest.mark.parametrize(
    "name",
    [
        "CAST_dataset/cast_filtered_dataset/1.0.0/features.json",
        "1.0.0/cast-train.tfrecord-00000-of-00001",
        "cast_filtered_dataset.tar.gz",
        "train.jsonl",
    ],
)
def test_data_that_no_dataset_is_made_of_yet(tmp_path: Path, name: str) -> None:
    file = tmp_path / "raw" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"Make one of it: python jobs/prepare_cast.py source=.*/raw name=NAME"):
        describe(str(tmp_path / "raw"))


def test_tables_of_a_run_are_no_source(run: Path) -> None:
    Ledger(Location.of(run)).load()
    assert list((run / "metrics").glob("*.parquet"))
    with pytest.raises(StorageError, match="no run directory"):
        describe(str(run / "metrics"))


def test_a_dataset_whose_preparation_failed(dataset: Path) -> None:
    (dataset / "dataset.json").unlink()
    (dataset / "config.yaml").write_text("")
    with pytest.raises(DataError, match=r"its preparation failed.*jobs/prepare_cast.py source=\.\.\. name=corridors"):
        describe(str(dataset))


def prediction(number: int, target: str = "given", status: str = "ok", **columns: Any) -> dict[str, Any]:
    """Half as long as it should be; without targets if `actions` is None."""
    row = {"frame_id": f"walks/{number}", "number": number, "target": target, "status": status, "instruction": "go on"}
    known = {"actions": [1.0, 0.0] * 8, "valid": [True] * 8} | columns
    if status == "ok":
        return {**row, "predicted": [0.5, 0.0] * 8, "predict_s": 0.002, "decode_s": 0.001, **known}
    error = {"error_type": "ImageError", "error": "cut"} if status == "failed" else {}
    return {**row, **known, **error}


def predicted(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """A finished inference run."""
    run = RunDirectory.open(tmp_path, "walk", settings={"job": "infer"}, config_yaml="", command="python x")
    run.start({"manifest": "m"})
    commit(run.location, rows, PREDICTIONS)
    Ledger(run.location, PREDICTIONS).load()
    write_predictions(run.location, 8, {"median_step": "1"})
    return tmp_path / "walk"


def test_an_inference_run_and_its_tables(tmp_path: Path) -> None:
    rows = [prediction(i) for i in range(3)]
    rows.append(prediction(3, status="failed", actions=None, valid=None))
    rows += [prediction(i, "opposite", "ok" if i else "skipped") for i in range(4)]
    run = predicted(tmp_path, rows)
    for path in (run, run / "predictions.parquet", run / "metrics/part-000000.parquet"):
        text = describe(str(path))
        lines = [line.split() for line in text.splitlines()]
        assert "8 rows, 1 failed, 6 ok, 1 skipped" in text
        assert ["given", "4", "3", "1", "0"] in lines
        assert ["opposite", "4", "3", "0", "1"] in lines
        assert "ADE of 3 samples, units" in text, "only to its own instruction does a sample know the answer"
        assert ["the", "policy", "2.250", "2.250"] in lines, "half a unit more a step: 4.5 steps on average"
        assert ["standing", "still", "4.500", "4.500"] in lines
        assert ["straight", "on", "at", "1.00", "0.000", "0.000"] in lines
        assert "2.0 ms to predict, 1.0 ms to read" in text
        assert "walks/3: ImageError: cut" in text
        assert "'go on': ends 4.00 ahead, 0.00 to the left; truly 8.00 ahead" in text
        if path.name != "part-000000.parquet":
            assert f"python jobs/evaluate.py results={run}/predictions." in text
    assert "counterfactual=true" in describe(str(run))
    (run / "predictions.csv").unlink()
    assert "evaluate" not in describe(str(run)), "not before it is finished"


def test_predictions_of_logs_and_of_padded_samples(tmp_path: Path) -> None:
    logs = predicted(tmp_path / "logs", [prediction(0, actions=None, valid=None)])
    text = describe(str(logs))
    assert "no targets" in text
    assert "ADE" not in text
    assert "truly" not in text
    short = predicted(tmp_path / "short", [prediction(0, valid=[True] * 2 + [False] * 6)])
    assert "the policy                            0.750" in describe(str(short)), "after the end there is no error"
    none = predicted(tmp_path / "none", [prediction(0, status="failed", actions=None, valid=None)])
    text = describe(str(none))
    assert "1 rows, 1 failed" in text
    assert "no targets" not in text


def test_an_unfinished_dataset(dataset: Path) -> None:
    (dataset / "dataset.json").unlink()
    settings = {"job": "prepare_cast", "source": "synthetic"}
    run = RunDirectory.open(dataset.parent, "corridors", settings=settings, config_yaml="", command="python again")
    run.start({"manifest": "m"})
    with pytest.raises(DataError, match=r"not finished .*python again"):
        describe(str(dataset))
