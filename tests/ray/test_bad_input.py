"""Bad frames and bad numbers: each a row with its reason, never a lost frame and never the end of the run."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla_ray.config import CaptureConfig, ModelConfig
from vla_ray.errors import StorageError
from vla_ray.pipelines.capture import capture
from vla_ray.report.show import describe
from vla_ray.storage import payload as payload_file
from vla_ray.storage.files import Location

pytestmark = pytest.mark.ray

Configure = Callable[..., CaptureConfig]
Rows = Callable[[Path], list[dict[str, Any]]]

FAILS = {
    "cut": ("ImageError", "cannot be decoded"),
    "empty": ("ImageError", "is empty (0 bytes)"),
    "letter": ("ImageError", "is not a PNG or JPEG image"),
    "far": ("NonFiniteTarget", "curv_energy is nan"),
}
HANDLED = ("cmyk", "deep", "grey", "palette", "plain", "speck", "turned")


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bad_scene(demo_scene: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven frames of all sorts, most of them the same picture."""
    scene = tmp_path_factory.mktemp("scenes") / "all_sorts"
    scene.mkdir()
    plain = Image.open(Path(demo_scene) / "images/frame_0000.png").convert("RGB")
    grey = np.asarray(plain.convert("L"))
    for name, content in {
        "plain": png(plain),
        "cut": png(plain)[:4000],
        "empty": b"",
        "letter": b"Dear reader,\nthis is no picture.\n",
        "deep": png(Image.fromarray(grey.astype(np.uint16) * 257)),
        "grey": png(Image.fromarray(grey)),
        "palette": png(plain.quantize(32)),
        "speck": png(Image.new("RGB", (1, 1), (90, 120, 60))),
        "far": png(plain),
    }.items():
        (scene / f"{name}.png").write_bytes(content)
    plain.convert("CMYK").save(scene / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    plain.transpose(Image.Transpose.ROTATE_90).save(scene / "turned.jpg", exif=exif, quality=95)
    # Target points that no float32 survives being squared: this frame's numbers end as NaN, its neighbours' must not.
    far = {"image": "far.png", "speed_mps": 3.0, "target_points": [[1e38, 1e38], [1e38, 1e38]], "question": None}
    (scene / "frames.jsonl").write_text(json.dumps(far) + "\n")
    return scene


@pytest.fixture(scope="module")
def bad_run(
    bad_scene: Path, configure: Configure, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[..., CaptureConfig]]:
    output_dir = tmp_path_factory.mktemp("bad")

    def again(**settings: Any) -> CaptureConfig:
        return configure(output_dir, scene_dir=str(bad_scene), batch_size=4, payload="full", **settings)

    assert capture(again()) == 1, "four of eleven failed"
    return output_dir / "r", again


def test_each_frame_has_one_row_with_its_reason(bad_run: Any, rows: Rows) -> None:
    run, _ = bad_run
    table = {r["tag"]: r for r in rows(run)}
    assert set(table) == {*FAILS, *HANDLED}
    for tag, (kind, reason) in FAILS.items():
        row = table[tag]
        assert row["status"] == "failed", tag
        assert row["error_type"] == kind
        assert reason in row["error"]
        assert "\n" not in row["error"]
        assert row["payload_path"] is None
        assert row["attempt"] == 1
        assert kind == "NonFiniteTarget" or f"/{tag}.png" in row["error"], "the file is named"
    for tag in HANDLED:
        row = table[tag]
        assert row["status"] in ("ok", "degenerate"), (tag, row["error"])
        assert np.isfinite([row["target_scalar"], row["route_end_x"], row["route_length"]]).all()
        content = payload_file.load(Location.of(run / row["payload_path"]))
        for entries in content["attention"].values():
            assert all(bool(entries[0][name].isfinite().all()) for name in ("attn", "grad"))


def test_handled_pictures_are_the_same_picture(bad_run: Any, rows: Rows) -> None:
    """What only differs in its encoding leads to nearly the same route; on its side it would not."""
    run, _ = bad_run
    table = {r["tag"]: r for r in rows(run)}
    content = payload_file.load(Location.of(run / table["turned"]["payload_path"]))
    assert (content["meta"]["original_width"], content["meta"]["original_height"]) == Image.open(
        table["plain"]["image_path"]
    ).size
    for tag in ("cmyk", "deep", "grey", "palette", "turned"):
        assert table[tag]["num_tiles"] == table["plain"]["num_tiles"]
    for tag in ("cmyk", "palette", "turned"):
        assert table[tag]["route_end_x"] == pytest.approx(table["plain"]["route_end_x"], rel=0.2), tag


def test_max_error_rate_decides_the_exit_code(bad_run: Any, no_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    _, again = bad_run
    assert capture(again()) == 1
    assert capture(again(max_error_rate=0.4)) == 0
    assert capture(again(max_error_rate=0.3)) == 1
    out = capsys.readouterr().out
    assert "7 ok" in out
    assert "4 failed" in out


def test_a_run_with_failures_is_shown(bad_run: Any) -> None:
    run, _ = bad_run
    text = describe(str(run))
    assert "3 ImageError, 1 NonFiniteTarget" in text
    assert "all_sorts/letter: ImageError" in text


def test_standing_still_is_degenerate(
    tmp_path: Path, configure: Configure, rows: Rows, tiny_model: ModelConfig
) -> None:
    """A value without a gradient has a payload and a row that says so; the other targets of the frame are as usual."""
    root, released = tmp_path / "checkpoint", Path(tiny_model.checkpoint)
    shutil.copytree(released.parents[2], root)
    path = root / released.relative_to(released.parents[2])
    state = torch.load(path, weights_only=True)
    state["adaptors.driving.speed_wps_head.2.weight"].zero_()
    torch.save(state, path)
    model = ModelConfig(checkpoint=str(path))
    metrics = ["curv_energy", "longitudinal_progress", "forward_speed"]
    assert capture(configure(tmp_path, limit=2, model=model, kinematic_metric=metrics)) == 0
    for row in rows(tmp_path / "r"):
        still = row["target"] != "curv_energy"
        assert row["status"] == ("degenerate" if still else "ok")
        assert (row["target_scalar"] == 0.0) == still
        assert row["error"] is None
        content = payload_file.load(Location.of(tmp_path / "r" / row["payload_path"]))
        assert content["meta"]["degenerate"] is still
        largest = max(float(r.abs().max()) for r in content["relevance"]["patches"].values())
        assert (largest == 0) == still


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "vla_ray_test", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_really_fills_up(
    small_disk: Path, configure: Configure, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(small_disk, payload="full", batch_size=1)
    with pytest.raises(StorageError, match=r"needs about .* MB more.*16.8 MB free.*payload=relevance"):
        capture(config)
    assert list(small_disk.iterdir()) == [], "refused before anything was written"
    # Somebody else fills the disk later.
    monkeypatch.setattr("vla_ray.pipelines.capture_work.free_bytes", lambda _: None)
    with pytest.raises(StorageError, match="no space left on device"):
        capture(config)
    run = small_disk / "r"
    done = rows(run)
    assert 1 <= len(done) < 8
    for row in done:
        payload_file.load(Location.of(run / row["payload_path"]))
    subprocess.run(["mount", "-o", "remount,size=128m", str(small_disk)], check=True)
    assert capture(config) == 0
    table = rows(run)
    assert [r["status"] for r in table] == ["ok"] * 8
    assert [r for r in table if r["tag"] in {d["tag"] for d in done}] == done
    assert not [*run.glob("ledger/*"), *run.glob("attempts/*"), *run.rglob(".*.tmp")]
