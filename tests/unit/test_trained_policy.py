"""Finding a trained policy, and saying why something is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vla_ray.errors import CheckpointError
from vla_ray.models.paligemma.trained import find_checkpoint, identities, newest_tiny


def run(directory: Path, name: str, updated: str, model: str = "tiny", steps: int = 8, job: str = "train") -> Path:
    path = directory / name
    (path / "best_model").mkdir(parents=True)
    settings = {"job": job, "model.name": model, "action.num_steps": steps}
    (path / "run.json").write_text(json.dumps({"settings": settings, "updated": updated}))
    return path


def test_the_newest_trained_tiny_policy(tmp_path: Path, policy_dir: Path) -> None:
    assert newest_tiny(tmp_path / "none", 8) is None
    run(tmp_path, "z_older", "2026-01-01T00:00:00+00:00")
    newer = run(tmp_path, "a_newer", "2026-02-01T00:00:00+00:00")
    run(tmp_path, "large", "2026-03-01T00:00:00+00:00", model="google/paligemma-3b-mix-224")
    shutil.rmtree(run(tmp_path, "begun", "2026-04-01T00:00:00+00:00") / "best_model")
    (tmp_path / "README.md").write_text("no run")
    shutil.copytree(policy_dir, tmp_path / "paligemma-tiny")
    run(tmp_path, "four_steps", "2026-05-01T00:00:00+00:00", steps=4)
    assert newest_tiny(tmp_path, 8) == newer


def test_a_run_stands_for_its_best_checkpoint(tmp_path: Path, policy_dir: Path) -> None:
    shutil.copytree(policy_dir, tmp_path / "r" / "last")
    assert find_checkpoint(str(tmp_path / "r")) == tmp_path / "r" / "last"
    shutil.copytree(policy_dir, tmp_path / "r" / "best_model")
    assert find_checkpoint(str(tmp_path / "r")) == tmp_path / "r" / "best_model"
    assert find_checkpoint(str(policy_dir)) == policy_dir


def test_a_model_that_nobody_told_what_its_action_tokens_mean(tmp_path: Path, policy_dir: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(policy_dir, plain)
    (plain / "tokenizers.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no tokenizers\.pt, which says what its action tokens mean\. Fine-t"
    ):
        find_checkpoint(str(plain))
    assert find_checkpoint(str(plain), str(policy_dir / "tokenizers.pt")) == plain


def test_what_is_no_policy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no policy at"):
        find_checkpoint(str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="holds no model"):
        find_checkpoint(str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"google/paligemma-3b-mix-224 is no directory here\. Of the hub's models"
    ):
        find_checkpoint("google/paligemma-3b-mix-224")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="not a PaliGemma"):
        find_checkpoint(str(tmp_path))


def test_other_weights_are_another_policy(tmp_path: Path, policy_dir: Path) -> None:
    shutil.copytree(policy_dir, tmp_path / "p")
    before = identities(tmp_path / "p")
    assert set(before) == {"model.safetensors", "tokenizers.pt"}
    weights = tmp_path / "p" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    after = identities(tmp_path / "p")
    assert after["tokenizers.pt"] == before["tokenizers.pt"]
    assert after["model.safetensors"] != before["model.safetensors"]
