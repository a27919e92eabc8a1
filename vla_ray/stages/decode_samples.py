"""Reading the samples of a work item: their pictures as the policy sees them, and what their rows will say.

The picture is also kept, as the JPEG that tables and reports show, before any row refers to it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image

from vla_ray.data.images import decode_rgb
from vla_ray.data.prepared import read_group
from vla_ray.data.sample_refs import SampleRef
from vla_ray.data.tiles import Tiler
from vla_ray.errors import StorageError
from vla_ray.stages.decode import Decoder
from vla_ray.stages.work import Loaded, WorkFrame, WorkItem
from vla_ray.storage.files import Location, write_atomic

IMAGES = "images"
_COLUMNS = ("dataset", "split", "recording", "t", "instruction", "actions", "valid", "scale_m")
_JPEG_QUALITY = 95
_THREADS = 8  # pictures under way: keeping one waits for the disk most of the time
_JPEG = b"\xff\xd8"


class SampleDecoder(Decoder):
    """Work item -> its samples as one squeezed tile each, [1, S, S, 3].

    Args:
        image_size: S.
        keep: the run whose images/ gets the pictures; None keeps none.
    """

    def __init__(self, image_size: int, keep: Location | None) -> None:
        super().__init__(Tiler(image_size, max_tiles=1, cut_bottom=False, use_thumbnail=False))
        self.keep = keep

    def __call__(self, item: WorkItem) -> list[Loaded]:
        groups: dict[tuple[str, int], list[dict[str, Any]] | Exception] = {}

        def load(frame: WorkFrame) -> Loaded:
            ref = _sample(frame)
            start = time.perf_counter()
            rows = groups[ref.path, ref.group]
            if isinstance(rows, Exception):
                return _failed(frame, rows, start, {})
            return self._decoded(frame, rows[ref.row], start)

        for frame in item.frames:
            ref = _sample(frame)
            if (ref.path, ref.group) not in groups:
                groups[ref.path, ref.group] = _rows(ref)
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(load, item.frames))

    def load(self, frame: WorkFrame) -> Loaded:
        """One sample, decoded or with the reason why not."""
        start, ref = time.perf_counter(), _sample(frame)
        rows = _rows(ref)
        if isinstance(rows, Exception):
            return _failed(frame, rows, start, {})
        return self._decoded(frame, rows[ref.row], start)

    def _decoded(self, frame: WorkFrame, row: Mapping[str, Any], start: float) -> Loaded:
        ref = _sample(frame)
        columns = _about(row)
        try:
            if row["sample_id"] != ref.frame_id:
                raise ValueError(f"{ref.path} holds {row['sample_id']!r} in its place: the dataset was made again")
            rgb = decode_rgb(row["image"], ref.frame_id)
            tiles, geometry = self.tiler(rgb)
        except Exception as e:  # whatever a damaged picture provokes is that sample's failure, not the run's
            return _failed(frame, e, start, columns)
        if self.keep is not None:
            path = f"{IMAGES}/{ref.image_filename}"
            place = self.keep / path
            try:
                if not place.exists():  # kept by an earlier variant or attempt; the name says which sample it is
                    write_atomic(place, row["image"] if row["image"].startswith(_JPEG) else _jpeg(rgb))
            except StorageError as e:  # the run's failure, not the sample's
                return replace(_failed(frame, e, start, columns), stops=True)
            columns["image_path"] = path
        return Loaded(frame, tiles, geometry, decode_s=time.perf_counter() - start, columns=columns)

    def describe(self, frame: WorkFrame) -> dict[str, Any]:
        ref = _sample(frame)
        rows = _rows(ref)
        return {} if isinstance(rows, Exception) else _about(rows[ref.row])


def _about(row: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a sample's row that need no look at its picture."""
    return {**{name: row[name] for name in _COLUMNS}, "picture": blake2b(row["image"], digest_size=8).hexdigest()}


def _rows(ref: SampleRef) -> list[dict[str, Any]] | Exception:
    try:
        return read_group(Location.of(ref.path), ref.group, ["sample_id", "image", *_COLUMNS]).to_pylist()
    except Exception as e:
        return e


def _failed(frame: WorkFrame, error: Exception, start: float, columns: Mapping[str, Any]) -> Loaded:
    reason = " ".join(str(error).split())[:500]
    seconds = time.perf_counter() - start
    return Loaded(frame, error_type=type(error).__name__, error=reason, decode_s=seconds, columns=columns)


def _sample(frame: WorkFrame) -> SampleRef:
    assert isinstance(frame.ref, SampleRef)
    return frame.ref


def _jpeg(rgb: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()
