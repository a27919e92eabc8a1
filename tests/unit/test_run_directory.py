"""Run directories: creating, resuming, refusing, and recognising a finished one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from vla_ray.errors import RunError, StorageError
from vla_ray.storage import run as run_module
from vla_ray.storage.files import Location
from vla_ray.storage.run import RunDirectory, file_identity, git_state, manifest_fingerprint, versions

SETTINGS = {"payload": "full", "strength": 0.3, "kinematic_metric": ["curv_energy"], "limit": None}
FINGERPRINT = {"manifest": "abc", "frames": 2, "targets": ["curv_energy"]}


def open_run(root: Path | str, run: str = "night", **more: Any) -> RunDirectory:
    arguments: dict[str, Any] = {
        "settings": SETTINGS,
        "config_yaml": "payload: full\n",
        "command": "capture.py",
        **more,
    }
    return RunDirectory.open(root, run, **arguments)


def on_disk(run: RunDirectory) -> dict[str, Any]:
    return json.loads((run.location / "run.json").read_bytes())


def test_opening_writes_nothing_and_starting_explains_the_run(tmp_path: Path) -> None:
    run = open_run(tmp_path / "out", overrides=["payload=full"])
    assert run.is_new
    assert not run.is_finished("abc")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="not a run yet"):
        run.update(status="finished")

    run.start(FINGERPRINT)
    document = on_disk(run)
    assert document == run.document
    assert set(document) == set(run_module._FIELDS)
    assert (document["status"], document["command"], document["overrides"]) == (
        "running",
        "capture.py",
        ["payload=full"],
    )
    assert document["settings"] == SETTINGS
    assert document["fingerprint"] == FINGERPRINT
    assert set(document["versions"]) == {"python", "torch", "transformers", "ray", "numpy", "pyarrow", "vla_ray"}
    assert datetime.fromisoformat(document["created"]).tzinfo is not None
    assert datetime.strptime(document["stamp"], "%y%m%d_%H%M")
    assert (run.location / "config.yaml").read_bytes() == b"payload: full\n"
    assert str(run.location) == f"{tmp_path}/out/night"


def test_resuming_keeps_what_was_fixed_and_records_the_new_start(tmp_path: Path) -> None:
    first = open_run(tmp_path)
    first.start(FINGERPRINT)
    scene_dir = first.scene_dir("town", "action")
    first.update(status="stopped", counts={"ok": 1}, stamp="200101_0000")

    second = open_run(tmp_path, command="capture.py replicas=2", config_yaml="replicas: 2\n")
    assert not second.is_new
    second.start({**FINGERPRINT, "frames": 3})
    document = on_disk(second)
    assert (document["status"], document["counts"], second.stamp) == ("running", {"ok": 1}, "200101_0000")
    assert document["fingerprint"]["frames"] == 3
    assert [s["command"] for s in document["earlier_starts"]] == ["capture.py"]
    assert document["command"] == "capture.py replicas=2"
    assert second.scene_dir("town", "action") == scene_dir


def test_other_settings_are_refused_and_each_difference_is_shown(tmp_path: Path) -> None:
    open_run(tmp_path).start(FINGERPRINT)
    changed = {"payload": "reduced", "strength": 0.3, "kinematic_metric": ("curv_energy",), "seed": 1}
    with pytest.raises(RunError) as error:
        open_run(tmp_path, settings=changed)
    assert str(error.value) == (
        f"Run {tmp_path}/night was started with other settings: limit: run has null, asked (not set); "
        'payload: run has "full", asked "reduced"; seed: run has (not set), asked 1. '
        "Give another run=NAME, or the run's own values to resume it."
    )
    open_run(tmp_path, run="other", settings=changed)


def test_a_changed_checkpoint_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"a" * 100_000)

    def identity() -> dict[str, Any]:
        return {"model.checkpoint": file_identity(Location.of(weights))}

    before = identity()
    assert before["model.checkpoint"]["size"] == 100_000
    open_run(tmp_path, checkpoints=before).start(FINGERPRINT)
    open_run(tmp_path, checkpoints=identity())

    mtime = weights.stat().st_mtime_ns
    os.utime(weights, ns=(mtime + 10**9, mtime + 10**9))
    open_run(tmp_path, checkpoints=identity())  # a fresh clone has other times; the content counts
    for content in (b"a" * 99_999 + b"b", b"a" * 99_999):
        weights.write_bytes(content)
        with pytest.raises(RunError, match=r"file of model\.checkpoint: run has"):
            open_run(tmp_path, checkpoints=identity())
    with pytest.raises(StorageError, match="Cannot find"):
        file_identity(Location.of(tmp_path / "none.pt"))


def test_a_large_checkpoint_is_known_by_size_time_and_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vla_ray.storage.run._SMALL_BYTES", 10)
    weights = tmp_path / "model.pt"
    seen = []
    for content, time in ((b"a" * 100, 1), (b"b" * 100, 1), (b"a" * 99, 1), (b"a" * 100, 2), (b"a" * 100, 1)):
        weights.write_bytes(content)
        os.utime(weights, ns=(time * 10**9, time * 10**9))
        seen.append(file_identity(Location.of(weights)))
    assert seen[0] == seen[4]
    assert all(other != seen[0] for other in seen[1:4])


def test_an_automatic_setting_stays_what_it_was(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.start(FINGERPRINT)
    run.pin("model.dtype", "float32")
    again = open_run(tmp_path)
    again.start(FINGERPRINT)
    again.pin("model.dtype", "float32")
    with pytest.raises(RunError, match=r"started with model\.dtype=float32, here it would be bfloat16"):
        again.pin("model.dtype", "bfloat16")


def test_start_compares_again_under_the_lease(tmp_path: Path) -> None:
    late = open_run(tmp_path, settings={**SETTINGS, "payload": "reduced"})
    open_run(tmp_path).start(FINGERPRINT)
    with pytest.raises(RunError, match="other settings"):
        late.start(FINGERPRINT)


def test_a_finished_run_is_recognised_from_one_file(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.start(FINGERPRINT)
    assert not run.is_finished("abc")
    run.update(status="finished")
    run.location.local_path.joinpath("config.yaml").unlink()
    again = open_run(tmp_path)
    assert again.is_finished("abc")
    assert not again.is_finished("more frames")


def test_update_keeps_the_rest_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.start(FINGERPRINT)
    before = on_disk(run)
    run.update(counts={"ok": 2})
    after = on_disk(run)
    assert {**after, "updated": ""} == {**before, "counts": {"ok": 2}, "updated": ""}
    for wrong in ({"state": "finished"}, {"status": "done"}):
        with pytest.raises(ValueError, match=r"run\.json holds no"):
            run.update(**wrong)


def test_scene_directories_have_a_stamp_and_avoid_what_is_there(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.start(FINGERPRINT)
    run.update(stamp="260101_0930")
    (run.location / "a_action_260101_0930").mkdir()
    (run.location.local_path / "a_action_260101_0930_1").touch()
    dirs = run.scene_dirs(["a", "b"], "action")
    assert {scene: loc.name for scene, loc in dirs.items()} == {
        "a": "a_action_260101_0930_2",
        "b": "b_action_260101_0930",
    }
    dirs["b"].mkdir()  # what workers make later does not change it
    resumed = open_run(tmp_path)
    assert resumed.scene_dirs(["b", "a"], "action") == dirs
    assert resumed.scene_dir("b", "text").name == "b_text_260101_0930"
    assert on_disk(run)["scene_dirs"]["b/action"] == "b_action_260101_0930"


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "a\n", "name\u00e9"])
def test_run_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="is no name for a run"):
        open_run(tmp_path, run=name)
    open_run(tmp_path, run="Good-name_1.2")


@pytest.mark.parametrize(
    "root", ["/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_12ab/outputs", "/x/_ray_pkg_12ab"]
)
def test_a_ray_jobs_working_copy_is_refused(root: str) -> None:
    with pytest.raises(RunError, match=r"vanishes with the cluster\. .*VLA_RAY_ROOT"):
        open_run(root)


def test_a_file_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "night").mkdir()
    (tmp_path / "night" / "run.json").write_text("[]")
    with pytest.raises(RunError, match="not written by this version"):
        open_run(tmp_path)
    (tmp_path / "night" / "run.json").write_text("{")
    with pytest.raises(StorageError, match="not valid JSON"):
        open_run(tmp_path)


def test_a_place_that_cannot_hold_a_run() -> None:
    with pytest.raises(StorageError, match=r"Cannot read /dev/null/out/night/run\.json: not a directory"):
        open_run("/dev/null/out")


def test_manifest_fingerprint_depends_on_frames_order_and_targets() -> None:
    one, two = {"frame_id": "s/1", "speed_mps": 1.0}, {"frame_id": "s/2", "speed_mps": 1.0}
    base = manifest_fingerprint([one, two], ["a"])
    assert base == manifest_fingerprint(iter([dict(reversed(one.items())), two]), ("a",))
    faster = {**two, "speed_mps": 2.0}
    others = [([two, one], ["a"]), ([one], ["a"]), ([one, two], ["a", "b"]), ([one, faster], ["a"])]
    assert len({base, *(manifest_fingerprint(*other) for other in others)}) == 5


def test_versions_import_nothing() -> None:
    code = (
        "import sys; from vla_ray.storage.run import versions; assert versions()['ray'];"
        "sys.exit(bool({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert versions()["python"] == f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_git_state_is_that_of_our_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "vla_ray").mkdir()
    source = tmp_path / "vla_ray" / "__init__.py"
    source.write_text("")
    monkeypatch.setattr(run_module.vla_ray, "__file__", str(source))
    assert git_state() is None
    git("init")
    assert git_state() is None  # nothing committed
    git("add", ".")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert git_state() == {"commit": commit, "dirty": False}
    source.write_text("changed")
    assert git_state() == {"commit": commit, "dirty": True}
    # An installed package inside somebody's repository is not that repository's code.
    installed = tmp_path / "venv" / "vla_ray" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(run_module.vla_ray, "__file__", str(installed))
    assert git_state() is None
    monkeypatch.setenv("PATH", "")
    assert git_state() is None
