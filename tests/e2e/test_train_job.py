"""`jobs/train.py` as a user calls it: the plan, and mistakes in a line before Ray starts or anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this must be refused before Ray starts")

    monkeypatch.setattr("vla_ray.cluster.connect", refuse)


@pytest.fixture
def asked(corridors: Path, tmp_path: Path) -> list[str]:
    return [f"data.path={corridors}", f"output_dir={tmp_path / 'out'}", "run=r"]


MISTAKES = [
    ("model=paligemma-4b", ["model='paligemma-4b' is unknown", "paligemma-3b, paligemma-tiny"]),
    ("model.name=paligemma-4b", ["there is no model 'paligemma-4b'", "google/paligemma-3b-mix-224"]),
    ("model.name=/nonexistent", ["there is no model '/nonexistent'"]),
    ("model.name=jobs", ["no model"]),
    ("model.name=", ["model.name"]),
    ("action.vocab_size=2000", ["action.vocab_size=2000", "1024"]),
    ("action.num_steps=4", ["action.num_steps"]),
    ("data.path=/nonexistent", ["there is no dataset at /nonexistent", "jobs/prepare_cast.py"]),
    ("data.train_split=trian", ["no samples of the split 'trian'", "train, val"]),
    ("data.val_split=test", ["no samples of the split 'test'", "train, val"]),
    ("data.weights=[nonsense=1]", ["data.weights names 'nonsense'", "it holds"]),
    ("data.weights=[a=b]", ["data.weights", "positive number"]),
    ("training.freeze=[visoin]", ["training.freeze", "visoin", "Did you mean 'vision'"]),
    ("training.lerning_rate=1e-4", ["training.lerning_rate", "Did you mean 'training.learning_rate'"]),
    ("output_dir=s3://b/x", ["output_dir=s3://b/x", "Give a path"]),
    ("run=a/b", ["run='a/b'", "Use letters"]),
    ("workers=1000", ["workers=1000 do not fit on"]),
]


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(("override", "words"), MISTAKES)
def test_mistakes(here: Run, asked: list[str], tmp_path: Path, override: str, words: list[str]) -> None:
    line = here("train", *asked, override).refused("train")
    for word in words:
        assert word in line
    assert not list(tmp_path.iterdir()), "a refused job leaves nothing"


@pytest.mark.usefixtures("without_ray")
def test_models_that_are_no_paligemma(here: Run, asked: list[str], repo: Path, tmp_path: Path) -> None:
    (simlingo,) = {p.parent for p in (repo / "checkpoints/simlingo-tiny").rglob("config.json")}
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    for directory in (bert, simlingo):
        assert "not a PaliGemma" in here("train", *asked, f"model.name={directory}").refused("train")
    (bert / "config.json").write_text(json.dumps({"model_type": "paligemma"}))
    assert "tokenizer.json" in here("train", *asked, f"model.name={bert}").refused("train")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_ray")
def test_a_source_is_no_prepared_dataset(here: Run, asked: list[str], golden: Path, tmp_path: Path) -> None:
    source = golden / "cast_rlds"
    line = here("train", *asked, f"data.path={source}").refused("train")
    assert f"{source} is no prepared dataset" in line
    assert f"jobs/prepare_cast.py source={source}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_ray")
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpus_that_are_not_there(here: Run, asked: list[str], tmp_path: Path) -> None:
    line = here("train", *asked, "workers=8", "model.device=cuda").refused("train")
    assert "workers=8 need a GPU each, and the cluster has 0" in line
    assert "model.device=cpu" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_ray")
def test_the_bundled_dataset_is_not_made_for_a_run_that_is_refused(
    here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLA_RAY_ROOT", str(tmp_path))
    assert "there is no model" in here("train", "model.name=/nonexistent").refused("train")
    assert "Give a path" in here("train", "output_dir=s3://b/x").refused("train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_ray")
def test_a_dry_run_says_what_it_would_do(here: Run, asked: list[str], tmp_path: Path) -> None:
    ended = here("train", *asked, "dry_run=true", "training.batch_size=4", "training.max_steps=6")
    assert ended.code == 0
    assert f"dry run of {tmp_path / 'out/r'}" in ended.out
    for words in ("samples of", "6 steps of 8 samples: 4 x 1 accumulated x 2 workers", "M parameters learn", "GB a wo"):
        assert words in ended.out
    big = here("train", *asked, "dry_run=true", "model=paligemma-3b", "lora.enabled=true")
    assert big.code == 0, big.err
    assert "M parameters learn" in big.out
    assert "2,923." in big.out, "the released model has 2.9 B parameters"
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_process_of_its_own(process: Run, asked: list[str], tmp_path: Path) -> None:
    line = process("train", *asked, "model.name=/nonexistent").refused("train")
    assert "there is no model '/nonexistent'" in line
    assert not list(tmp_path.iterdir())
