"""What people type: overrides without quoting, mistakes with a hint, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vla_ray.command_line import load_config, quote, run_job
from vla_ray.config import CaptureConfig, WandbConfig
from vla_ray.config.train import TrainConfig
from vla_ray.errors import ConfigError, RunError


def load(repo: Path, *argv: str) -> CaptureConfig:
    return load_config(repo, "capture", CaptureConfig, list(argv))


def test_defaults_run_on_bundled_inputs(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLA_RAY_ROOT", raising=False)
    config = load(repo)
    assert config.scene_dir == [str(repo / "datasets/demo_drive")]
    assert config.output_dir == str(repo / "outputs")
    assert config.model.checkpoint.startswith(str(repo / "checkpoints/simlingo-tiny"))
    assert (config.explain_mode, config.kinematic_metric) == ("action", "curv_energy")


@pytest.mark.parametrize(
    "path",
    [
        "/a/epoch=013.ckpt/pytorch_model.pt",
        "/a b/(1) [x], {y}.pt",
        "/it's/q\"uote.pt",
        "/a/*/b?.pt",
        "/true",
        "/1e3",
        "s3://b/k=v",
    ],
)
def test_paths_are_taken_as_typed(repo: Path, path: str) -> None:
    assert load(repo, f"scene_dir={path}").scene_dir == [path]


def test_lists(repo: Path) -> None:
    config = load(repo, "scene_dir=[/a=b, /c d]", "kinematic_metric=[curv_energy,acc_energy]")
    assert config.scene_dir == ["/a=b", "/c d"]
    assert config.kinematic_metric == ["curv_energy", "acc_energy"]


def test_literals_keep_their_type(repo: Path) -> None:
    config = load(repo, "limit=3", "replicas=null", "dry_run=true", "max_error_rate=1e-2", "run=12")
    assert (config.limit, config.replicas, config.dry_run, config.max_error_rate) == (3, None, True, 0.01)
    assert config.run == "12"
    assert quote("null") == "null"
    assert quote("nullify") == "'nullify'"


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("kinematic_metrc=x", "Did you mean 'kinematic_metric'"),
        ("+batchsize=1", "Did you mean 'batch_size'"),
        ("++model.chekpoint=/x", "Did you mean 'model.checkpoint'"),
        ("checkpoint=/x", "Did you mean 'model.checkpoint'"),
        ("model=simlngo", "known: simlingo, simlingo-tiny. Did you mean 'simlingo'"),
        ("limit=abc", "limit: Value 'abc'"),
        ("limit=0", "at least 1"),
        ("model.dtype=fp16", "Did you mean 'float16'"),
        ("payload=ful", "Did you mean 'full'"),
        ("max_error_rate=2", "between 0 and 1"),
        ("scene_dir=", "scene_dir is empty"),
        ("limit", "write key=value"),
    ],
)
def test_mistakes_are_one_line_with_a_hint(repo: Path, arg: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        load(repo, arg)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("arg", "mode"),
    [
        ("wandb=true", "online"),
        ("wandb=True", "online"),
        ("wandb=false", "disabled"),
        ("wandb=offline", "offline"),
        ("wandb.mode=offline", "offline"),
    ],
)
def test_wandb_may_be_switched_as_a_whole(repo: Path, arg: str, mode: str) -> None:
    assert load(repo, arg, "wandb.project=mine").wandb == WandbConfig(mode=mode, project="mine")
    assert load_config(repo, "train", TrainConfig, [arg]).wandb.mode == mode


def test_another_word_for_wandb_is_refused(repo: Path) -> None:
    with pytest.raises(ConfigError, match="wandb='maybe' is unknown; known: true, false, online, offline"):
        load(repo, "wandb=maybe")


def test_checkpoint_brings_its_own_config(repo: Path) -> None:
    config = load(repo, "model.checkpoint=/x/checkpoints/epoch=013.ckpt/pytorch_model.pt")
    assert config.model.config == "/x/.hydra/config.yaml"


def test_relative_paths_start_at_the_root(repo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLA_RAY_ROOT", str(tmp_path))
    assert load(repo, "output_dir=out").output_dir == str(tmp_path / "out")
    assert load(repo).output_dir == str(tmp_path / "outputs")
    monkeypatch.delenv("VLA_RAY_ROOT")
    monkeypatch.chdir(tmp_path)
    assert load(repo, "output_dir=../out").output_dir == str(tmp_path.parent / "out")


def test_exit_codes(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = str(repo / "jobs/capture.py")

    def refuse(_: CaptureConfig) -> int:
        raise RunError("held by another driver")

    def stop(_: CaptureConfig) -> int:
        raise KeyboardInterrupt

    for job, code, message in ((refuse, 2, "capture: held by another driver\n"), (stop, 130, "capture: interrupted\n")):
        with pytest.raises(SystemExit) as e:
            run_job(script, CaptureConfig, job, [])
        assert e.value.code == code
        assert capsys.readouterr().err == message
    with pytest.raises(SystemExit) as e:
        run_job(script, CaptureConfig, lambda _: 1, [])
    assert e.value.code == 1
    with pytest.raises(ZeroDivisionError):  # a bug shows its stack
        run_job(script, CaptureConfig, lambda _: 1 // 0, [])


def test_help_lists_every_setting(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        run_job(str(repo / "jobs/capture.py"), CaptureConfig, lambda _: 1, ["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for key in ("scene_dir", "model.checkpoint", "spline.num_samples", "wandb.mode", "max_error_rate"):
        assert f"  {key} " in text


def test_none_is_a_word_where_a_text_is_meant(repo: Path) -> None:
    config = load_config(repo, "train", TrainConfig, ["action.normalizer=none", "run=none", "training.max_steps=none"])
    assert config.action.normalizer == "none"
    assert config.run is None
    assert config.training.max_steps is None
