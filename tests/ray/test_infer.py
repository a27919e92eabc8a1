"""Inference runs: resumed, grown, refused; and what they leave on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_ray.config import InferConfig
from vla_ray.config.infer import TrainedModelConfig
from vla_ray.config.prepare import SourceDataConfig
from vla_ray.data.prepared import PreparedDataset, samples
from vla_ray.errors import DataError, RunError
from vla_ray.evaluation.policy.prediction_files import read_predictions
from vla_ray.pipelines import driver
from vla_ray.pipelines.infer import infer, remembered
from vla_ray.storage.files import Location

pytestmark = pytest.mark.ray

Asking = Callable[..., InferConfig]


@pytest.fixture
def asking(tmp_path: Path, corridors: Path, policy_dir: Path) -> Asking:
    """An InferConfig of run `r` over 20 samples."""

    def make(**settings: Any) -> InferConfig:
        model = TrainedModelConfig(name=str(policy_dir), device="cpu")
        defaults = {"source": str(corridors), "run": "r", "limit": 20, "batch_size": 4, "model": model}
        return InferConfig(output_dir=str(tmp_path), **{**defaults, **settings})

    return make


def document(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def test_an_interrupted_run_ends_with_the_same_tables(
    tmp_path: Path, asking: Asking, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = driver.Progress.add

    def interrupted(self: driver.Progress, done: int, failed: int) -> None:
        add(self, done, failed)
        if self.done >= 8:
            raise KeyboardInterrupt

    with in_process():
        assert infer(asking(run="whole")) == 0
        with monkeypatch.context() as patch:
            patch.setattr(driver.Progress, "add", interrupted)
            assert infer(asking()) == 130
        assert document(tmp_path / "r")["status"] == "stopped"
        assert not (tmp_path / "r/predictions.csv").exists()
        images = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "r/images").iterdir()}
        assert len(images) >= 8
        assert infer(asking()) == 0
    left, right = (tmp_path / name / "predictions.csv" for name in ("whole", "r"))
    assert left.read_bytes() == right.read_bytes()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "r/images").iterdir()}
    assert kept.items() >= images.items()
    assert sorted(kept) == sorted(pd.read_csv(right)["image_filename"])
    assert not list((tmp_path / "r").glob("ledger/*"))
    assert not list((tmp_path / "r").glob("attempts/*"))


def test_a_finished_run_needs_nothing_and_restores_its_tables(
    tmp_path: Path, asking: Asking, in_process: Any, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_process():
        assert infer(asking()) == 0
    table = (tmp_path / "r/predictions.csv").read_bytes()
    (tmp_path / "r/predictions.csv").unlink()
    capsys.readouterr()
    assert infer(asking()) == 0
    assert (tmp_path / "r/predictions.csv").read_bytes() == table
    assert "infer r: 20 rows (20 ok)" in capsys.readouterr().out


def test_a_run_grows_by_samples_and_by_instructions(tmp_path: Path, asking: Asking, in_process: Any) -> None:
    with in_process():
        assert infer(asking(limit=8)) == 0
        few = pd.read_csv(tmp_path / "r/predictions.csv").drop(columns=["overall_mse", "overall_mae", "overall_rmse"])
        assert infer(asking(limit=20, instructions=["turn left", "opposite"])) == 0
    frame = pd.read_csv(tmp_path / "r/predictions.csv")
    assert len(frame) == 20
    same = [c for c in few.columns if not c.startswith("overall")]
    pd.testing.assert_frame_equal(frame[same].head(8), few[same])
    table = pq.read_table(tmp_path / "r/predictions.parquet").to_pandas()
    assert table.groupby("target").size().to_dict() == {"given": 20, "opposite": 20, "turn left": 20}
    assert table["number"].is_monotonic_increasing
    assert set(table.loc[table["target"] == "opposite", "status"]) <= {"ok", "skipped"}


def test_other_settings_are_another_run(asking: Asking, in_process: Any, tmp_path: Path, policy_dir: Path) -> None:
    with in_process():
        assert infer(asking(limit=4)) == 0
    with pytest.raises(RunError, match=r'decode: run has "greedy", asked "expected".*another run=NAME'):
        infer(asking(limit=4, decode="expected"))
    other = tmp_path / "other"
    shutil.copytree(policy_dir, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(RunError, match=r"file of model/model\.safetensors"):
        infer(asking(limit=4, model=TrainedModelConfig(name=str(other))))


def test_another_seed_is_another_run(asking: Asking, in_process: Any) -> None:
    with in_process():
        assert infer(asking(limit=4, instructions="permuted")) == 0
    with pytest.raises(RunError, match="seed: run has 0, asked 7"):
        infer(asking(limit=4, instructions="permuted", seed=7))


def test_a_run_of_another_kind_is_left_alone(tmp_path: Path, asking: Asking, in_process: Any) -> None:
    with in_process():
        assert infer(asking(limit=4)) == 0
    config = tmp_path / "r/config.yaml"
    config.write_text(config.read_text() + "\nnonsense: [")
    with pytest.raises(RunError, match=r"config\.yaml cannot be read .* another run=NAME"):
        remembered(asking())
    run = json.loads((tmp_path / "r/run.json").read_text())
    (tmp_path / "r/run.json").write_text(json.dumps({**run, "settings": {"job": "capture"}}))
    with pytest.raises(RunError, match="is a run of capture, not of infer"):
        remembered(asking())


def test_a_resumed_run_keeps_its_policy_and_its_source(tmp_path: Path, asking: Asking, in_process: Any) -> None:
    first = asking(limit=4)
    with in_process():
        assert infer(first) == 0
    again = remembered(asking(limit=4, source=None, model=TrainedModelConfig(name="tiny")))
    assert (again.model.name, again.source) == (first.model.name, first.source)
    assert remembered(asking(run="new", source=None)).source is None


def test_a_broken_picture_is_a_marked_row(tmp_path: Path, corridors: Path, asking: Asking, in_process: Any) -> None:
    copy = tmp_path / "d"
    shutil.copytree(corridors, copy)
    file = next(f for f in PreparedDataset.open(str(copy)).files if f.split == "val")
    table = pq.read_table(copy / file.path)
    images = table["image"].to_pylist()
    images[2] = images[2][:40]
    place = table.schema.get_field_index("image")
    table = table.set_column(place, table.schema.field("image"), pa.array(images, pa.binary()))
    pq.write_table(table, copy / file.path, row_group_size=file.row_groups[0])
    with in_process():
        assert infer(asking(source=str(copy), max_error_rate=0.01)) == 1
    frame = pd.read_csv(tmp_path / "r/predictions.csv")
    assert frame["pred_x_0"].isna().tolist() == [i == 2 for i in range(20)]
    rows = pq.read_table(tmp_path / "r/predictions.parquet").to_pylist()
    assert (rows[2]["status"], rows[2]["error_type"]) == ("failed", "ImageError")
    assert rows[2]["image_path"] is None


def test_logs_of_a_robot_have_no_targets(
    tmp_path: Path, corridors: Path, asking: Asking, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures and instructions alone, in a table that nobody has prepared."""
    dataset = PreparedDataset.open(str(corridors))
    file = next(f for f in dataset.files if f.split == "val")
    lines = []
    for i, sample in enumerate(list(samples(dataset.read_group(file, 0)))[:5]):
        (tmp_path / f"{i}.png").write_bytes(sample.image)
        lines.append(json.dumps({"image_path": f"{i}.png", "instruction": sample.instruction}))
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines))
    monkeypatch.setattr("vla_ray.cluster.connect", lambda settings: nullcontext())
    monkeypatch.setattr(
        "vla_ray.pipelines.prepare_shards.prepare_shards", lambda todo, preparer, token: map(preparer, todo)
    )
    with in_process():
        assert infer(asking(source=str(log), data=SourceDataConfig(cache_dir=str(tmp_path / "cache")))) == 0
    frame = pd.read_csv(tmp_path / "r/predictions.csv")
    assert len(frame) == 5
    empty = [c for c in frame.columns if c.startswith(("target_", "overall_"))]
    assert len(empty) == 1 + 16 + 4
    assert frame[empty].isna().all(axis=None)
    assert not frame.drop(columns=empty).isna().any(axis=None)
    rows = pq.read_table(tmp_path / "r/predictions.parquet").to_pylist()
    assert [(row["actions"], row["valid"], row["status"]) for row in rows] == [(None, None, "ok")] * 5
    assert len(read_predictions(Location.of(tmp_path / "r/predictions.parquet")).sample_id) == 5


def test_another_horizon_is_refused(tmp_path: Path, corridors: Path, asking: Asking) -> None:
    copy = tmp_path / "d"
    shutil.copytree(corridors, copy)
    content = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**content, "horizon": 4}))
    with pytest.raises(DataError, match=r"has actions of 4 steps, the policy predicts 8\. Prepare its source again"):
        infer(asking(source=str(copy)))
