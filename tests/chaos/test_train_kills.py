"""Training goes on from `last/`, whoever is killed and when, and learns what an undisturbed run learns."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

STEPS = 12
OFTEN = ("logging_steps=1", "save_steps=2", "eval_steps=5", "eval_samples=8", "eval_decode=4", "batch_size=4")


class Training:
    """`jobs/train.py` on one dataset; each run has a directory of its own."""

    def __init__(self, jobs: Any, data: Path) -> None:
        self.jobs, self.output = jobs, jobs.directory / "out"
        settings = (f"output_dir={self.output}", f"data.path={data}", "data.window=2", "model.device=cpu")
        self.arguments = (
            *settings,
            "training.learning_rate=1e-3",
            f"training.max_steps={STEPS}",
            *(f"training.{s}" for s in OFTEN),
        )

    def start(self, run: str, **faults: Any) -> Any:
        command = [sys.executable, "jobs/train.py", f"run={run}", *self.arguments]
        return self.jobs.start_command(command, **faults)

    def log(self, run: str) -> list[int]:
        """Steps in the log, in order."""
        try:
            lines = (self.output / run / "logs/train.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return [line["step"] for line in whole if line["kind"] == "train"]

    def status(self, run: str) -> str:
        return json.loads((self.output / run / "run.json").read_text())["status"]

    def verify(self, run: str, undisturbed: dict[str, torch.Tensor]) -> None:
        """The run is complete, its log has every step once, its weights are those, and nothing else is left."""
        directory = self.output / run
        assert self.status(run) == "finished"
        assert self.log(run) == [*range(1, STEPS + 1)]
        found = load_file(directory / "last/model.safetensors")
        assert found.keys() == undisturbed.keys()
        for name, value in undisturbed.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert (directory / "best_model/model.safetensors").exists()
        left = [*directory.glob(".*"), *directory.glob("lease*"), *directory.glob("logs/ray")]
        assert left == []


@pytest.fixture
def training(run: Any, corridors: Path) -> Training:
    return Training(run, corridors)


@pytest.fixture(scope="module")
def undisturbed(repo: Path, corridors: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of two workers' run, learnt in this process: tests/ray shows that Ray makes the same batches."""
    from vla_ray.config.train import PolicyModelConfig, TrainConfig, TrainDataConfig, TrainingConfig
    from vla_ray.data.prepared import PreparedDataset
    from vla_ray.models.paligemma.tiny import build_tiny
    from vla_ray.training.parallel import Workers
    from vla_ray.training.session import local_stream, run_worker
    from vla_ray.training.spec import TrainSpec, fit_tokenizer

    directory = tmp_path_factory.mktemp("undisturbed")
    settings = TrainingConfig(
        batch_size=8, max_steps=STEPS, learning_rate=1e-3, eval_steps=5, save_steps=STEPS, eval_samples=8, eval_decode=4
    )
    config = TrainConfig(
        output_dir=str(directory),
        workers=1,
        model=PolicyModelConfig(name="tiny"),
        data=TrainDataConfig(path=str(corridors), window=2),
        training=settings,
    )
    dataset = PreparedDataset.open(str(corridors))
    tokenizer = fit_tokenizer(config.action, dataset, "train", mirrored=config.augment.mirror > 0)
    base = build_tiny(directory / "initial", seed=0)
    run_worker(TrainSpec(config, str(directory), str(base), dataset, tokenizer), Workers(), local_stream())
    return load_file(directory / "last/model.safetensors")


def test_workers_die_in_the_middle_and_while_saving(training: Training, undisturbed: dict[str, torch.Tensor]) -> None:
    """One before a step of its own; the first one with `last/` moved away and the new one not yet in its place."""
    job = training.start("r", kill_once={"train": "1:6", "rename": ".last.new"})
    assert job.wait() == 0, job.err.read_text()
    assert sorted(p.name for p in training.jobs.faults.parent.glob("killed-*")) == ["killed-rename", "killed-train"]
    assert "Traceback" not in job.out.read_text()
    starts = training.jobs.faults.with_name("starts").read_text().splitlines()
    assert len(starts) == 6, "two workers, replaced twice"
    training.verify("r", undisturbed)


def test_more_deaths_than_allowed_end_the_run_which_can_be_resumed(
    training: Training, undisturbed: dict[str, torch.Tensor]
) -> None:
    training.arguments = (*training.arguments, "max_failures=0")
    job = training.start("r", kill_once={"train": "1:6"})
    assert job.wait() == 2, job.err.read_text()
    (line,) = [text for text in job.err.read_text().splitlines() if text.startswith("train: ")]
    assert "training stopped after 0 restarts" in line
    assert "to go on: python jobs/train.py" in line
    assert training.status("r") == "failed"
    job = training.start("r")
    assert job.wait() == 0, job.err.read_text()
    training.verify("r", undisturbed)


def test_a_refusal_is_one_line(training: Training) -> None:
    job = training.start("r", out_of_memory=4)
    assert job.wait() == 2, job.err.read_text()
    errors = job.err.read_text()
    assert "Traceback" not in errors
    (line,) = [text for text in errors.splitlines() if "out of memory" in text]
    assert line.startswith("train: out of memory with training.batch_size=4")
    assert training.jobs.faults.with_name("starts").read_text().count("\n") == 2, "nobody tries again"
    assert training.status("r") == "failed"
    assert (training.output / "r/last/training_state.pt").exists()


def test_a_killed_driver_is_replaced(training: Training, undisturbed: dict[str, torch.Tensor]) -> None:
    job = training.start("r", delay_s=0.5)
    job.until(lambda: len(training.log("r")) >= 5)
    job.signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert training.status("r") == "running"
    again = training.start("r")  # at once, while workers of the dead driver may still train
    assert again.wait() == 0, again.err.read_text()
    assert "Taking over" in again.err.read_text()
    end = time.monotonic() + 60
    while job.ray_processes() and time.monotonic() < end:
        time.sleep(0.2)
    assert job.ray_processes() == [], "a killed driver's local Ray ends by itself"
    training.verify("r", undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_says_how_to_go_on(
    training: Training, undisturbed: dict[str, torch.Tensor], number: int, code: int
) -> None:
    job = training.start("r", delay_s=0.5)
    job.until(lambda: len(training.log("r")) >= 3)
    job.signal(number, group=number == signal.SIGINT)  # as a terminal does it
    assert job.wait() == code, job.err.read_text()
    errors = job.err.read_text()
    assert "Traceback" not in errors
    assert training.status("r") == "stopped"
    assert list((training.output / "r").glob("lease*")) == []
    end = time.monotonic() + 60
    while job.ray_processes() and time.monotonic() < end:
        time.sleep(0.2)
    assert job.ray_processes() == []
    (command,) = (line.partition("to go on: ")[2] for line in errors.splitlines() if "to go on: " in line)
    program, *arguments = shlex.split(command)
    assert program == "python"
    again = training.jobs.start_command([sys.executable, *arguments])
    assert again.wait() == 0, again.err.read_text()
    training.verify("r", undisturbed)
