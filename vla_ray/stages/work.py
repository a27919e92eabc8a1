"""The unit of work and the protocol around it: every (frame, target) exactly once, whatever dies.

A `WorkItem` is one batch, made by the driver, so its composition never depends on how Ray cuts blocks. A replica
 1. counts the attempt durably, before it starts (storage/attempts.py);
 2. writes heavy results, each whole or absent;
 3. commits the batch's rows as one ledger fragment named by the hash of their keys;
 4. forgets the attempt.
Dying anywhere leaves either no fragment (the batch is done again, over the same file names) or a fragment that the
next attempt finds. From the third attempt on frames go one by one, and one that killed its process again is a failed
row. What a replica does is behind `Replica`; capture and inference share everything here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

from vla_ray.data.sample_refs import SampleRef
from vla_ray.data.scenes import FrameRef
from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import StorageError
from vla_ray.schema import METRICS
from vla_ray.storage.attempts import NO_PRIOR, WHOLE_ATTEMPTS, Attempts, Prior
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import commit, fragment_name, read_fragment

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Ref: TypeAlias = FrameRef | SampleRef  # what a run goes over: frames of scenes, or samples of a dataset


@dataclass(frozen=True, slots=True)
class WorkFrame:
    """A frame (or sample), the directory its payloads go to (relative to the run), what earlier drivers saw of it."""

    ref: Ref
    directory: str
    prior: Prior = NO_PRIOR


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Frames that are processed together, all for the same targets."""

    frames: tuple[WorkFrame, ...]
    targets: tuple[str, ...]

    @property
    def keys(self) -> list[tuple[str, str]]:
        return [(f.ref.frame_id, target) for f in self.frames for target in self.targets]

    def to_json(self) -> str:
        frames = [
            {"ref": f.ref.to_dict(), "directory": f.directory, "prior": [f.prior.starts, f.prior.solo]}
            for f in self.frames
        ]
        kind = "sample" if isinstance(self.frames[0].ref, SampleRef) else "frame"
        return json.dumps({"kind": kind, "targets": self.targets, "frames": frames})

    @classmethod
    def from_json(cls, text: str) -> WorkItem:
        raw = json.loads(text)
        read = SampleRef.from_dict if raw["kind"] == "sample" else FrameRef.from_dict
        frames = (WorkFrame(read(f["ref"]), f["directory"], Prior(*f["prior"])) for f in raw["frames"])
        return cls(tuple(frames), tuple(raw["targets"]))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A frame after decoding: tiles [T, S, S, 3] uint8 and their geometry, or the error that failed it.

    Attributes:
        columns: what its row will say of a sample, as read with it; JSON values.
        stops: the error is the storage's, not the frame's: no row is kept, and the run stops.
    """

    frame: WorkFrame
    tiles: np.ndarray | None = None
    geometry: TileGeometry | None = None
    error_type: str | None = None
    error: str | None = None
    decode_s: float = 0.0
    columns: Mapping[str, Any] = field(default_factory=dict)
    stops: bool = False

    @property
    def ref(self) -> FrameRef:
        """Of a frame of a scene."""
        assert isinstance(self.frame.ref, FrameRef)
        return self.frame.ref

    @property
    def sample(self) -> SampleRef:
        """Of a sample of a dataset."""
        assert isinstance(self.frame.ref, SampleRef)
        return self.frame.ref


@dataclass(frozen=True, slots=True)
class Summary:
    """What the driver hears of an item: the fragments to fold and its counts; rows stay on disk."""

    fragments: tuple[str, ...]
    statuses: dict[str, int]


class Replica(Protocol):
    """A loaded model."""

    def process(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        """Rows of frames that were decoded, in any order. Raises StorageError when results cannot be kept."""

    def failed(self, frame: Loaded, target: str, error_type: str, error: str) -> Row:
        """The row of a frame that cannot be processed."""


class Worker:
    """Runs items through a replica by the protocol of this module.

    Args:
        run_dir: the run's directory.
        token: of the driver's lease; attempts are counted per driver.
        schema: of the rows.
    """

    def __init__(self, replica: Replica, run_dir: Location, token: str, schema: pa.Schema = METRICS) -> None:
        self.replica, self.run_dir, self.schema = replica, run_dir, schema
        self.attempts = Attempts(run_dir, token)

    def __call__(self, item: WorkItem, loaded: Sequence[Loaded]) -> Summary:
        batch_id = fragment_name(item.keys)
        rows = read_fragment(self.run_dir, batch_id, self.schema)
        if rows is not None:  # a death between commit and report: nothing to do again
            self.attempts.finish(batch_id)
            return _summary([batch_id], rows)
        ids = [f.ref.frame_id for f in item.frames]
        prior = max(f.prior.starts for f in item.frames)
        attempt = self.attempts.begin(batch_id, ids, solo=False, prior=prior)
        if attempt > WHOLE_ATTEMPTS:
            return self._one_by_one(item, loaded, batch_id, attempt)
        rows = self._process(loaded, item.targets)
        self._commit(rows, attempt)
        self.attempts.finish(batch_id)
        return _summary([batch_id], rows)

    def _one_by_one(self, item: WorkItem, loaded: Sequence[Loaded], batch_id: str, attempt: int) -> Summary:
        logger.warning("attempt %d of a batch that ended %d processes: frame by frame", attempt, attempt - 1)
        fragments, everything = [], []
        for frame in loaded:
            frame_id = frame.frame.ref.frame_id
            solo_id = fragment_name([(frame_id, target) for target in item.targets])
            # A batch of one has the batch's own name; its solo starts need one of their own.
            mark = f"{solo_id}-solo"
            rows = read_fragment(self.run_dir, solo_id, self.schema)
            if rows is None:
                if self.attempts.died_alone(frame_id, frame.frame.prior):
                    reason = f"the process ended each time this frame ran, last time alone ({attempt - 1} attempts)"
                    rows = [self.replica.failed(frame, target, "WorkerDied", reason) for target in item.targets]
                else:
                    self.attempts.begin(mark, [frame_id], solo=True, prior=0)
                    rows = self._process([frame], item.targets)
                self._commit(rows, attempt)
            self.attempts.finish(mark)
            fragments.append(solo_id)
            everything += rows
        self.attempts.finish(batch_id)
        return _summary(fragments, everything)

    def _process(self, loaded: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        """Rows of every frame: undecodable ones fail, a batch that raises is tried frame by frame."""
        for x in loaded:
            if x.stops:
                raise StorageError(x.error or "the storage failed")
        rows = [
            self.replica.failed(x, target, x.error_type, x.error or "")
            for x in loaded
            if x.error_type is not None
            for target in targets
        ]
        good = [x for x in loaded if x.error_type is None]
        if not good:
            return rows
        try:
            return rows + self.replica.process(good, targets)
        except StorageError:
            raise  # not the frame's fault, and no row could be kept either: the run stops and can be resumed
        except Exception as e:
            if len(good) == 1:
                logger.warning("%s failed: %s: %s", good[0].frame.ref.frame_id, type(e).__name__, e)
                reason = " ".join(str(e).split())[:500] or type(e).__name__
                return rows + [self.replica.failed(good[0], target, type(e).__name__, reason) for target in targets]
            logger.warning("a batch of %d failed (%s); trying its frames one by one", len(good), type(e).__name__)
        return rows + [row for x in good for row in self._process([x], targets)]

    def _commit(self, rows: list[Row], attempt: int) -> None:
        for row in rows:
            row["attempt"] = attempt
        commit(self.run_dir, rows, self.schema)


def _summary(fragments: list[str], rows: list[Row]) -> Summary:
    statuses: dict[str, int] = {}
    for row in rows:
        statuses[row["status"]] = statuses.get(row["status"], 0) + 1
    return Summary(tuple(fragments), statuses)
