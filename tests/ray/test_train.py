"""Training through Ray learns what the plain loop learns, says so, and passes on what its workers refuse.

Each fit starts processes for half a minute: the quick suite has one, which several tests look at.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import PaliGemmaForConditionalGeneration

from vla_ray.config import WandbConfig
from vla_ray.config.train import PolicyModelConfig, TrainConfig, TrainDataConfig, TrainingConfig
from vla_ray.data.prepared import PreparedDataset
from vla_ray.errors import ClusterError, ConfigError, DataError, ImageError, RunError, TrainingError
from vla_ray.models.paligemma.tokenizer_file import load_tokenizer
from vla_ray.pipelines import train as module
from vla_ray.storage.files import Location
from vla_ray.training.parallel import Workers
from vla_ray.training.session import local_stream, run_worker
from vla_ray.training.spec import TrainSpec, fit_tokenizer

pytestmark = pytest.mark.ray

STEPS = 6
OFTEN = {"logging_steps": 1, "save_steps": 2, "eval_steps": 3, "eval_samples": 8, "eval_decode": 4}


def configure(directory: Path, corridors: Path, **given: Any) -> TrainConfig:
    """Two workers, six steps of eight samples, unless said otherwise."""
    training = TrainingConfig(
        **{"batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-3} | OFTEN | given.pop("training", {})
    )
    usual: dict[str, Any] = {"run": "r", "model": PolicyModelConfig(name="tiny", device="cpu")}
    data_settings = TrainDataConfig(path=str(corridors), window=2, **given.pop("data", {}))
    return TrainConfig(output_dir=str(directory), data=data_settings, training=training, **usual | given)


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / which / "model.safetensors")


def log(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "logs/train.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def document(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def left_behind(run: Path) -> list[str]:
    return [str(p) for p in [*run.glob(".*"), *run.glob("lease*"), *run.glob("logs/ray"), *run.glob("logs/refusal*")]]


def starts(run: Path) -> int:
    """Training workers of a run that were started, replacements included."""
    lines = Path(os.environ["VLA_RAY_TEST_FAULTS"]).with_name("starts").read_text().splitlines()
    return sum(line.partition(" ")[2] == str(run) for line in lines)


@pytest.fixture(scope="module")
def trained(corridors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run `r`, with W&B offline; out.txt beside it is what the job said."""
    directory = tmp_path_factory.mktemp("trained")
    out = io.StringIO()
    with redirect_stdout(out):
        assert module.train(configure(directory, corridors, wandb=WandbConfig(mode="offline"))) == 0
    (directory / "out.txt").write_text(out.getvalue())
    return directory / "r"


# One fit, from several sides ------------------------------------------------------------------------------------


def test_a_fit_ends_with_all_that_it_promises(trained: Path) -> None:
    assert [line["step"] for line in log(trained, "train")] == [*range(1, STEPS + 1)]
    assert [line["step"] for line in log(trained, "validation")] == [3, 6]
    assert log(trained, "train")[-1]["loss"] < log(trained, "train")[0]["loss"]
    for which in ("last", "best_model"):
        model = PaliGemmaForConditionalGeneration.from_pretrained(trained / which)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert load_tokenizer(Location.of(trained / which / "tokenizers.pt")).num_steps == 8
    assert document(trained)["status"] == "finished"
    assert document(trained)["counts"] == {"steps": STEPS}
    assert left_behind(trained) == []
    said = (trained.parent / "out.txt").read_text()
    assert f"train r: {STEPS} steps" in said
    assert "standing still" in said


def test_wandb_offline_holds_curves_and_trajectories(trained: Path) -> None:
    (record,) = (trained / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for name in (b"train/loss", b"train/learning_rate", b"val/ade", b"val/language_use", b"trajectories"):
        assert name in content
    (first, _) = sorted((trained / "wandb").glob("offline-run-*/files/media/table/trajectories_*.table.json"))
    table = json.loads(first.read_text())
    assert table["columns"] == ["step", "sample_id", "instruction", "predicted", "target", "ade"]
    assert len(table["data"]) == 2, "the first worker's share of training.eval_decode"


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Iterator[Any]:
        raise AssertionError("this run must not need Ray")

    monkeypatch.setattr("vla_ray.cluster.connect", refuse)


@pytest.mark.usefixtures("no_ray")
def test_a_finished_run_is_not_done_again(
    trained: Path, corridors: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before = document(trained)
    # Other ways to split up the same global batch, and to write it down, are the same run.
    same = configure(trained.parent, corridors, workers=1, training={"batch_size": 8, "logging_steps": 7})
    assert module.train(same) == 0
    assert "run r is finished: nothing to do" in caplog.text
    assert capsys.readouterr().out == (trained.parent / "out.txt").read_text()
    assert document(trained) == before
    for changes, message in (
        ({"training": {"learning_rate": 1e-4}}, r"training.learning_rate: run has 0.001, asked 0.0001.*run=NAME"),
        ({"training": {"batch_size": 8}}, "global_batch: run has 8, asked 16"),
        ({"training": {"max_steps": 7}}, "training.max_steps: run has 6, asked 7"),
    ):
        with pytest.raises(RunError, match=message):
            module.train(configure(trained.parent, corridors, **changes))


@pytest.mark.usefixtures("no_ray")
def test_what_does_not_fit_is_refused_before_ray_and_before_anything_is_written(
    tmp_path: Path, corridors: Path
) -> None:
    for changes, kind, message in (
        ({"data": {"weights": ["corridor=1"]}}, ConfigError, "data.weights names 'corridor'.*Did you mean"),
        ({"data": {"val_split": "test"}}, DataError, "no samples of the split 'test'; it has train, val"),
        ({"data": {"train_split": "trian"}}, DataError, "no samples of the split 'trian'"),
    ):
        with pytest.raises(kind, match=message):
            module.train(configure(tmp_path, corridors, **changes))
        assert list(tmp_path.iterdir()) == []


# Against the plain loop -----------------------------------------------------------------------------------------


class BrokenRun:
    """A W&B whose service is down."""

    calls = 0

    def log(self, *_: Any, **__: Any) -> None:
        BrokenRun.calls += 1
        raise ConnectionError("the service is down")

    finish = log


@pytest.mark.slow
def test_the_same_again_whatever_wandb_does(
    trained: Path, corridors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two runs are one: the order of samples is a function of the seed."""
    monkeypatch.setattr("wandb.init", lambda **_: BrokenRun())
    assert module.train(configure(tmp_path, corridors, wandb=WandbConfig(mode="online"))) == 0
    assert BrokenRun.calls == 1, "it is left alone after a first failure"
    assert "W&B failed and is left alone from now on: the service is down" in caplog.text
    again = weights(tmp_path / "r")
    for name, value in weights(trained).items():
        assert torch.equal(again[name], value), name
    assert [line["loss"] for line in log(tmp_path / "r", "train")] == [line["loss"] for line in log(trained, "train")]


def test_ray_makes_the_batches_of_the_plain_loop(trained: Path, corridors: Path, tmp_path: Path) -> None:
    """Two Ray workers with four samples each against eight samples in this process."""
    config = configure(tmp_path, corridors, workers=1, training={"batch_size": 8})
    dataset = PreparedDataset.open(str(corridors))
    tokenizer = fit_tokenizer(config.action, dataset, "train", mirrored=config.augment.mirror > 0)
    run_worker(
        TrainSpec(config, str(tmp_path / "r"), str(trained / "initial"), dataset, tokenizer), Workers(), local_stream()
    )
    plain = weights(tmp_path / "r")
    for name, value in weights(trained).items():
        torch.testing.assert_close(plain[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# What workers refuse --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_out_of_memory_is_said_at_once_and_what_was_learnt_is_kept(
    corridors: Path, tmp_path: Path, faults: Callable[..., None], monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs/train.py", "workers=2"])
    faults(out_of_memory=4)
    config = configure(tmp_path, corridors)
    with pytest.raises(TrainingError) as refused:
        module.train(config)
    text = str(refused.value)
    assert text.startswith("out of memory with training.batch_size=4")
    assert "Halve training.batch_size" in text
    assert text.endswith(f"{tmp_path / 'r/last'} is kept; to go on: python jobs/train.py workers=2 run=r")
    assert "\n" not in text
    assert starts(tmp_path / "r") == 2, "each worker once: another try would end the same"
    assert document(tmp_path / "r")["status"] == "failed"
    assert document(tmp_path / "r")["counts"] == {"steps": 3}
    # With half the batch and twice the passes, as it says: the same run.
    faults()
    small = replace(config, training=replace(config.training, batch_size=2, gradient_accumulation_steps=2))
    assert module.train(small) == 0
    assert [line["step"] for line in log(tmp_path / "r", "train")] == [*range(1, STEPS + 1)]
    assert left_behind(tmp_path / "r") == []
    resumed = weights(tmp_path / "r")
    for name, value in weights(trained).items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_a_corrupt_picture_is_named(corridors: Path, tmp_path: Path, faults: Callable[..., None]) -> None:
    faults()
    shutil.copytree(corridors, tmp_path / "data")
    path = max((tmp_path / "data/samples/train").glob("*.parquet"))
    table = pq.read_table(path)
    pictures = [picture[:100] for picture in table["image"].to_pylist()]
    column = table.schema.get_field_index("image")
    table = table.set_column(column, table.schema.field(column), [pictures])
    pq.write_table(table, path, row_group_size=16)
    with pytest.raises(ImageError) as refused:
        module.train(configure(tmp_path, tmp_path / "data"))
    assert any(name in str(refused.value) for name in table["sample_id"].to_pylist())
    assert "\n" not in str(refused.value)
    assert starts(tmp_path / "r") == 2


@pytest.mark.slow
def test_a_bug_ends_after_the_allowed_restarts(corridors: Path, tmp_path: Path, faults: Callable[..., None]) -> None:
    faults(raise_train=[3, "a bug"])
    with pytest.raises(ClusterError, match=r"training stopped after 1 restarts \(.*a bug.*last is kept; to go on"):
        module.train(configure(tmp_path, corridors, max_failures=1))
    assert starts(tmp_path / "r") == 4


@pytest.mark.slow
def test_ctrl_c_stops_training_on_a_ray_that_outlives_it(
    corridors: Path, tmp_path: Path, faults: Callable[..., None]
) -> None:
    """As in a notebook, which starts Ray itself."""
    faults(delay_s=0.5)

    def interrupt() -> None:
        started = tmp_path / "r/logs/train.jsonl"
        while not started.exists() and not over.wait(0.1):
            pass
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    over = threading.Event()
    watcher = threading.Thread(target=interrupt)
    watcher.start()
    try:
        assert module.train(configure(tmp_path, corridors, training={"max_steps": 200})) == 130
    finally:
        over.set()
        watcher.join()
    assert document(tmp_path / "r")["status"] == "stopped"
    assert not list((tmp_path / "r").glob("lease*"))
    assert not [t for t in threading.enumerate() if t.name.startswith("fit") and t.is_alive()]
    assert len(log(tmp_path / "r", "train")) < 100
