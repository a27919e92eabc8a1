"""Every expected mistake is one line on stderr that says what to do, exit code 2, before Ray starts."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def tiny(repo: Path) -> Path:
    return repo / "checkpoints/simlingo-tiny"


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny driver to be damaged; its pytorch_model.pt."""
    shutil.copytree(tiny, tmp_path / "copy")
    return tmp_path / "copy/checkpoints/epoch=013.ckpt/pytorch_model.pt"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("kinematic_metrc=curv_energy", ["kinematic_metrc", "Did you mean 'kinematic_metric'"]),
        ("+kinematic_metrc=curv_energy", ["kinematic_metrc", "Did you mean 'kinematic_metric'"]),
        ("++model.chekpoint=x", ["model.chekpoint", "Did you mean 'model.checkpoint'"]),
        ("kinematic_metric=curv_enrgy", ["curv_enrgy", "known: curv_energy", "Did you mean 'curv_energy'"]),
        ("kinematic_metric=[curv_energy,speed]", ["'speed'", "forward_speed"]),
        ("explain_mode=words", ["explain_mode", "words", "action", "text"]),
        ("payload=ful", ["payload='ful'", "Did you mean 'full'"]),
        ("model=simlingo-tinny", ["simlingo-tinny", "Did you mean 'simlingo-tiny'"]),
        ("limit=many", ["limit", "many"]),
        ("limit=0", ["limit=0", "at least 1"]),
        ("max_error_rate=5", ["max_error_rate=5", "between 0 and 1"]),
        ("limit", ["limit", "key=value"]),
        ("run=a/b", ["run='a/b'", "Use letters"]),
        ("scene_dir=/nowhere/at/all", ["/nowhere/at/all", "does not exist"]),
        ("scene_dir=/nowhere/*", ["/nowhere/*", "matches no directory"]),
        ("scene_dir=jobs/capture.py", ["jobs/capture.py", "is a file"]),
        ("output_dir=jobs/capture.py/x", ["jobs/capture.py/x", "file stands where a directory"]),
        ("model.checkpoint=/nowhere/pytorch_model.pt", ["/nowhere/pytorch_model.pt", "does not exist"]),
        ("model.checkpoint=jobs/capture.py", [".hydra/config.yaml", "does not exist"]),
        ("model.config=/nowhere/config.yaml", ["/nowhere/config.yaml", "does not exist"]),
        ("model.config=jobs/capture.py", ["jobs/capture.py", "model.config"]),
        ("model.variant_dir=/nowhere", ["model.variant_dir", "/nowhere"]),
        ("wandb.mode=onlin", ["wandb.mode", "Did you mean 'online'"]),
    ],
)
def test_mistakes_in_a_setting(here: Run, tmp_path: Path, override: str, words: list[str]) -> None:
    arguments = [] if override.startswith("output_dir=") else [f"output_dir={tmp_path / 'out'}"]
    line = here("capture", *arguments, override).refused("capture")
    for word in words:
        assert word in line
    assert not list(tmp_path.glob("out/*")), "a refused job leaves nothing"


def test_scenes_that_are_none(here: Run, tmp_path: Path) -> None:
    def refusal(scene: Path) -> str:
        return here("capture", f"scene_dir={scene}", f"output_dir={tmp_path / 'out'}").refused("capture")

    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"no frames found in {empty}" in refusal(empty)
    bad = tmp_path / "bad"
    (bad / "images").mkdir(parents=True)
    (bad / "images/f0.png").touch()
    for table, word in (
        ("{not json", "line 1"),
        ('{"image": "images/f0.png", "speed_mps": "fast"}', "speed_mps"),
        ('{"image": "images/f9.png", "speed_mps": 1.0}', "does not exist"),
    ):
        (bad / "frames.jsonl").write_text(table + "\n")
        line = refusal(bad)
        assert "frames.jsonl" in line
        assert word in line
    (bad / "frames.jsonl").unlink()
    (bad / "images/f0.jpg").touch()
    assert "have the stem 'f0'" in refusal(bad)
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_do_not_fit(here: Run, copied: Path, tmp_path: Path) -> None:
    state = torch.load(copied, weights_only=True)

    def refusal(changed: Any) -> str:
        torch.save(changed, copied)
        return here("capture", f"model.checkpoint={copied}", f"output_dir={tmp_path / 'out'}").refused("capture")

    name = "adaptors.driving.route_head.2.weight"
    line = refusal({**state, name: torch.zeros(3, 5)})
    assert name in line
    assert "(3, 5)" in line
    assert "expected (256, 512)" in line
    line = refusal({k: v for k, v in state.items() if k != name} | {"adaptors.driving.rout_head.2.weight": state[name]})
    assert "1 missing" in line
    assert name in line
    assert "1 unexpected" in line
    assert "adaptors.driving.rout_head.2.weight" in line
    assert "does not map names to tensors" in refusal([1, 2])
    whole = copied.read_bytes()
    copied.write_bytes(whole[: len(whole) // 2])
    line = here("capture", f"model.checkpoint={copied}", f"output_dir={tmp_path / 'out'}").refused("capture")
    assert "partial download" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("job", "override", "words"),
    [
        ("explain", "methods=relevanci", ["unknown method 'relevanci'", "Did you mean 'relevancy'"]),
        ("explain", "methods=[]", ["methods is empty", "relevancy"]),
        ("explain", "methods=[relevancy,original_raw]", ["original_raw", "payload=full"]),
        ("explain", "source=payload", ["source='payload'", "Did you mean 'payloads'"]),
        ("explain", "source=payloads", ["source=payloads", "no capture at", "source=online"]),
        ("explain", "maps=a/b", ["maps='a/b'", "Use letters"]),
        ("explain", "kinematic_metric=curv_enrgy", ["curv_enrgy", "Did you mean 'curv_energy'"]),
        ("explain", "strength=0", ["strength=0", "positive"]),
        ("explain", "ig_steps=0", ["ig_steps=0", "at least 1"]),
        ("explain", "iss_samples=3", ["iss_samples=3", "at least 32"]),
        ("explain", "scene_dir=/nowhere/at/all", ["/nowhere/at/all", "does not exist"]),
        ("explain", "model.checkpoint=/nowhere/pytorch_model.pt", ["/nowhere/pytorch_model.pt", "does not exist"]),
        ("faithfulness", "run=nobody", ["nobody/maps holds no maps", "jobs/explain.py run=nobody"]),
        ("faithfulness", "num_random=0", ["num_random=0", "at least 1"]),
        ("faithfulness", "randomize=1", ["randomize", "Did you mean 'randomise'"]),
        ("report", "run=nobody", ["nobody/maps holds no maps", "jobs/explain.py run=nobody"]),
    ],
)
def test_mistakes_about_maps(here: Run, tmp_path: Path, job: str, override: str, words: list[str]) -> None:
    arguments = [f"output_dir={tmp_path / 'out'}", *([] if override.startswith("run=") else ["run=r"])]
    line = here(job, *arguments, override).refused(job)
    for word in words:
        assert word in line
    assert not list(tmp_path.glob("out/*")), "a refused job leaves nothing"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "vla_ray_test", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disks_that_are_too_small_or_read_only(here: Run, small_disk: Path) -> None:
    line = here("capture", f"output_dir={small_disk}", "payload=full").refused("capture")
    assert "needs about 0.2 GB more" in line
    assert "1.0 MB free" in line
    assert "payload=relevance" in line
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = here("capture", f"output_dir={small_disk}/new", "run=r", "limit=1").refused("capture")
    assert "read-only" in line
    assert "choose another directory" in line


def test_a_run_of_other_settings(here: Run, tmp_path: Path) -> None:
    arguments = (f"output_dir={tmp_path}", "run=r")
    dry = here("capture", *arguments, "dry_run=true")
    assert dry.code == 0
    assert "32 frames in 4 scenes" in dry.out
    assert "32 are to do" in dry.out
    assert not (tmp_path / "r").exists(), "a dry run writes nothing"


def test_as_a_process(process: Run, tmp_path: Path) -> None:
    line = process("capture", "scene_dirr=x", f"output_dir={tmp_path}").refused("capture")
    assert "Did you mean 'scene_dir'" in line
    line = process("capture", "cluster.address=127.0.0.1:1", f"output_dir={tmp_path}", "run=r", "limit=1").refused(
        "capture"
    )
    assert "127.0.0.1:1" in line
    assert "ray start --head" in line
    assert json.loads((tmp_path / "r/run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "r/lease.json").exists()


def test_show_refuses_what_it_does_not_know(here: Run, tmp_path: Path) -> None:
    assert "there is nothing at" in here("show", f"path={tmp_path / 'nothing'}").refused("show")
    assert "there is nothing at" in here("show", f"path={tmp_path / 'nothing.pt'}").refused("show").replace(
        "Cannot find", "there is nothing at"
    )
    assert "is no run directory" in here("show", f"path={tmp_path}").refused("show")
    (tmp_path / "x.pt").write_bytes(b"no payload")
    assert "is damaged or no payload" in here("show", f"path={tmp_path / 'x.pt'}").refused("show")
    (tmp_path / "x.parquet").write_bytes(b"no table")
    assert "x.parquet" in here("show", f"path={tmp_path / 'x.parquet'}").refused("show")
