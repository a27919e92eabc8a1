"""Reading, decoding and tiling the pictures of a work item. CPU only; a frame that fails carries its reason along."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from vla_ray.data.images import decode_rgb
from vla_ray.data.scenes import FrameRef
from vla_ray.data.tiles import TileGeometry, Tiler
from vla_ray.stages.work import Loaded, WorkFrame, WorkItem
from vla_ray.storage.attempts import DECODE, WHOLE_ATTEMPTS, Attempts
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import fragment_name


class Decoder:
    """Work item -> its frames as uint8 tiles."""

    def __init__(self, tiler: Tiler) -> None:
        self.tiler = tiler

    def __call__(self, item: WorkItem) -> list[Loaded]:
        return [self.load(frame) for frame in item.frames]

    def describe(self, frame: WorkFrame) -> dict[str, Any]:
        """What is known of a frame without decoding its picture, for the row of one that kills its process."""
        return {}

    def load(self, frame: WorkFrame) -> Loaded:
        """One frame, decoded or with the reason why not."""
        start = time.perf_counter()
        try:
            assert isinstance(frame.ref, FrameRef)
            rgb = decode_rgb(Location.of(frame.ref.image).read_bytes(), frame.ref.image)
            tiles, geometry = self.tiler(rgb)
        except Exception as e:  # whatever a damaged file provokes is that frame's failure, not the run's
            reason = " ".join(str(e).split())[:500]
            return Loaded(frame, error_type=type(e).__name__, error=reason, decode_s=time.perf_counter() - start)
        return Loaded(frame, tiles, geometry, decode_s=time.perf_counter() - start)


class DecodeWorker:
    """Decodes items by the attempts protocol (storage/attempts.py): a picture that kills its process fails alone.

    Args:
        run_dir, token: see stages/work.py.
    """

    def __init__(self, decoder: Decoder, run_dir: Location, token: str) -> None:
        self.decoder, self.attempts = decoder, Attempts(run_dir, token)

    def __call__(self, item: WorkItem) -> list[Loaded]:
        mark = f"{fragment_name(item.keys)}{DECODE}"
        ids = [frame.ref.frame_id for frame in item.frames]
        attempt = self.attempts.begin(mark, ids, solo=False, prior=0)
        loaded = self.decoder(item) if attempt <= WHOLE_ATTEMPTS else [self._alone(frame) for frame in item.frames]
        self.attempts.finish(mark)
        return loaded

    def _alone(self, frame: WorkFrame) -> Loaded:
        frame_id = frame.ref.frame_id
        mark = f"{fragment_name([(frame_id, 'image')])}{DECODE}"
        if self.attempts.died_alone(frame_id):
            reason = "the process ended each time this image was decoded"
            loaded = Loaded(frame, error_type="WorkerDied", error=reason, columns=self.decoder.describe(frame))
        else:
            self.attempts.begin(mark, [frame_id], solo=True, prior=0)
            loaded = self.decoder.load(frame)
        self.attempts.finish(mark)
        return loaded


def pack(loaded: list[Loaded], tile_size: int) -> tuple[str, np.ndarray]:
    """Decoded frames as (JSON, one uint8 array of all tiles): two columns that Arrow ships without pickling."""
    notes = [
        {
            "geometry": None if x.geometry is None else x.geometry.to_dict(),
            "error_type": x.error_type,
            "error": x.error,
            "decode_s": x.decode_s,
            "columns": dict(x.columns),
            "stops": x.stops,
        }
        for x in loaded
    ]
    tiles = [x.tiles for x in loaded if x.tiles is not None]
    empty = np.zeros((0, tile_size, tile_size, 3), np.uint8)
    return json.dumps(notes), np.concatenate(tiles) if tiles else empty


def unpack(item: WorkItem, notes: str, tiles: np.ndarray) -> list[Loaded]:
    """The inverse of `pack`."""
    loaded, position = [], 0
    for frame, note in zip(item.frames, json.loads(notes), strict=True):
        rest = {name: note[name] for name in ("decode_s", "columns", "stops")}
        if note["geometry"] is None:
            loaded.append(Loaded(frame, error_type=note["error_type"], error=note["error"], **rest))
            continue
        geometry = TileGeometry.from_dict(note["geometry"])
        mine = tiles[position : position + geometry.num_tiles]
        position += geometry.num_tiles
        loaded.append(Loaded(frame, mine, geometry, **rest))
    return loaded
