"""Decoding by the attempts protocol: a picture that kills its process fails alone, and is no evidence afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_ray.data.scenes import FrameRef
from vla_ray.data.tiles import Tiler
from vla_ray.stages.decode import Decoder, DecodeWorker
from vla_ray.stages.work import Loaded, WorkFrame, WorkItem
from vla_ray.storage.attempts import consolidate
from vla_ray.storage.files import Location

TILER = Tiler(32, 2, cut_bottom=True, use_thumbnail=False)


class Death(BaseException):
    """Stands for SIGKILL."""


class DeadlyDecoder(Decoder):
    def load(self, frame: WorkFrame) -> Loaded:
        if frame.ref.stem == "deadly":
            raise Death
        return super().load(frame)


def make_item(tmp_path: Path, *stems: str) -> WorkItem:
    frames = []
    for stem in stems:
        path = tmp_path / f"{stem}.png"
        if not path.exists():
            Image.fromarray(np.full((20, 40, 3), 9, np.uint8)).save(path)
        frames.append(WorkFrame(FrameRef(f"s/{stem}", "s", stem, str(path), 0.0), "out"))
    return WorkItem(tuple(frames), ("curv_energy",))


def test_reasons_travel_with_the_frame(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("not a picture\n")
    item = make_item(tmp_path, "good", "broken", "gone")
    (tmp_path / "gone.png").unlink()
    good, broken, gone = Decoder(TILER)(item)
    assert good.tiles is not None
    assert good.tiles.shape == (2, 32, 32, 3)
    assert good.geometry is not None
    assert (broken.error_type, broken.tiles) == ("ImageError", None)
    assert gone.error_type == "StorageError"
    assert all("\n" not in (x.error or "") for x in (broken, gone))


def test_a_surprise_of_the_decoder_fails_the_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def surprise(*_: object) -> None:
        raise ZeroDivisionError("inside a codec")

    monkeypatch.setattr("vla_ray.stages.decode.decode_rgb", surprise)
    (loaded,) = Decoder(TILER)(make_item(tmp_path, "a"))
    assert (loaded.error_type, loaded.error) == ("ZeroDivisionError", "inside a codec")


def test_a_picture_that_kills_its_process_fails_alone(tmp_path: Path) -> None:
    run = Location.of(tmp_path / "run")
    item = make_item(tmp_path, "a", "deadly", "c")
    for _ in range(3):
        with pytest.raises(Death):
            DecodeWorker(DeadlyDecoder(TILER), run, "driver")(item)
    assert consolidate_counts(tmp_path, run) == {}, "deaths of decoders do not count against the model's batches"
    loaded = DecodeWorker(DeadlyDecoder(TILER), run, "driver")(item)
    assert [x.error_type for x in loaded] == [None, "WorkerDied", None]
    assert [e.name for e in (run / "attempts").list()] == []


def consolidate_counts(tmp_path: Path, run: Location) -> dict[str, object]:
    """What the next driver would hold against the frames, asked of a copy."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run.local_path, copy)
    return dict(consolidate(Location.of(copy)))
