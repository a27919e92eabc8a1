"""What a driver does around a batch of work, whatever the work is: resume, lease, ledger, progress, clean stop.

A workload gives a manifest, its settings, and a function that turns what is left to do into summaries. Everything
that must be right once (each key exactly once, a refused second driver, a stop that can be resumed) is here.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from vla_ray.config import WandbConfig
from vla_ray.data.scenes import FrameRef
from vla_ray.errors import ClusterError, RunError, VlaRayError
from vla_ray.pipelines.stopping import Stopped, resume_command, sigterm_stops
from vla_ray.progress import Progress
from vla_ray.schema import FAILED, METRICS
from vla_ray.stages.work import Ref, Summary, WorkFrame, WorkItem
from vla_ray.storage.attempts import NO_PRIOR, Prior, clear_in_flight, consolidate, forget
from vla_ray.storage.files import Location, clean_temp
from vla_ray.storage.lease import Lease
from vla_ray.storage.ledger import FRAME_AND_TARGET, Ledger, read_metrics
from vla_ray.storage.run import RunDirectory, manifest_fingerprint
from vla_ray.tracking import make_tracker

logger = logging.getLogger(__name__)

FOLD_ROWS, FOLD_SECONDS = 5000, 60.0  # how much may wait in the ledger: rows, and time


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a workload.

    Attributes:
        name: of the workload, e.g. capture.
        settings: every key that changes results (see RunDirectory.open).
        checkpoints: `file_identity` of the files that results depend on.
        mode: part of the output directories' names.
        schema: of the rows.
        key: what the two parts of a row's key are called.
        directory: of all heavy results, relative to the run; empty: the run itself; None: one for each scene.
        names: setting -> value of what names the run on the command line, its own name last; empty: run=<run>.
    """

    name: str
    output_dir: str
    run: str
    frames: Sequence[Ref]
    targets: Sequence[str]
    mode: str
    settings: dict[str, Any]
    checkpoints: dict[str, dict[str, Any]]
    config_yaml: str
    max_error_rate: float = 0.05
    retry_failed: bool = False
    wandb: WandbConfig = field(default_factory=WandbConfig)
    schema: pa.Schema = METRICS
    key: tuple[str, str] = ("frame", "target")
    directory: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        """What a message tells the user to change for a run of another name."""
        return [*self.names][-1] if self.names else "run"


@dataclass(frozen=True, slots=True)
class Todo:
    """What is left of a run when it starts or resumes."""

    location: Location
    token: str
    frames: tuple[tuple[WorkFrame, tuple[str, ...]], ...]  # each with the targets it still lacks
    several_targets: bool  # in the whole run, earlier drivers' included: files need the target in their names
    pin: Callable[[str, str], None]  # RunDirectory.pin: fixes what an `auto` setting turned out to be
    schema: pa.Schema = METRICS

    @property
    def rows(self) -> int:
        return sum(len(targets) for _, targets in self.frames)

    def items(self, batch_size: int) -> list[WorkItem]:
        """Batches of frames that lack the same targets, in the manifest's order."""
        groups: dict[tuple[str, ...], list[WorkFrame]] = {}
        for frame, targets in self.frames:
            groups.setdefault(targets, []).append(frame)
        return [
            WorkItem(tuple(frames[i : i + batch_size]), targets)
            for targets, frames in groups.items()
            for i in range(0, len(frames), batch_size)
        ]


R = TypeVar("R")
Work = Callable[[Todo], Generator[Summary, None, None]]


def select(frames: Sequence[FrameRef], every: int, limit: int | None) -> list[FrameRef]:
    """Every n-th frame of each scene, then the first `limit` of all."""
    positions: dict[str, int] = {}
    chosen = []
    for frame in frames:
        position = positions.get(frame.scene, 0)
        positions[frame.scene] = position + 1
        if position % every == 0:
            chosen.append(frame)
    return chosen[:limit]


def spread(frames: Sequence[R], count: int) -> list[R]:
    """This many frames, evenly over the run: the middle one of each of `count` equal parts."""
    count = min(count, len(frames))
    return [frames[(2 * i + 1) * len(frames) // (2 * count)] for i in range(count)]


class Driver:
    """Runs one Job; see the module docstring. Opening it refuses other settings but writes nothing."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.run = RunDirectory.open(
            job.output_dir,
            job.run,
            settings={"job": job.name, **job.settings},
            checkpoints=job.checkpoints,
            config_yaml=job.config_yaml,
            command=shlex.join(["python", *sys.argv]),
            overrides=sys.argv[1:],
            setting=job.setting,
        )
        self.manifest = manifest_fingerprint((f.to_dict() for f in job.frames), job.targets)

    @property
    def location(self) -> Location:
        return self.run.location

    @property
    def is_finished(self) -> bool:
        """Known from run.json alone: neither Ray nor a model is needed to say so."""
        if not self.run.is_finished(self.manifest):
            return False
        return not (self.job.retry_failed and self.run.document["counts"].get(FAILED))

    def report_finished(self) -> int:
        """Say that there is nothing to do; the exit code is that of the run's error budget."""
        logger.info("run %s is finished: nothing to do", self.job.run)
        return self._conclude(self.run.document["counts"], self.run.document["first_failure"])

    def report_dry_run(self, facts: Sequence[str]) -> int:
        """Say what would be done. Reads the ledger, writes nothing."""
        table = read_metrics(self.location, [*FRAME_AND_TARGET, "status"], self.job.schema)
        if self.job.retry_failed:
            table = table.filter(pc.not_equal(table["status"], FAILED))
        done = set(zip(*(table[name].to_pylist() for name in FRAME_AND_TARGET), strict=True))
        rows = [(f.frame_id, t) for f in self.job.frames for t in self.job.targets]
        left = sum(key not in done for key in rows)
        scenes = len({f.scene for f in self.job.frames})
        unit, target = self.job.key
        kind = "scenes" if unit == "frame" else "sub-datasets"
        lines = [
            f"dry run of {self.location}",
            f"  {len(self.job.frames):,} {unit}s in {scenes:,} {kind}, {target}s: {', '.join(self.job.targets)}",
            f"  {len(rows) - left:,} rows are done, {left:,} are to do",
            *(f"  {fact}" for fact in facts),
        ]
        sys.stdout.write("\n".join(lines) + "\n")
        return 0

    def execute(self, work: Work) -> int:
        """Do what is left and return the exit code.

        Raises:
            RunError: another driver holds the run.
            VlaRayError: the work cannot go on (disk full, cluster gone ...); what was done stays done.
        """
        with Lease.acquire(self.location, command=shlex.join(["python", *sys.argv])) as lease:
            self._check_inputs()
            self.run.start(
                {"manifest": self.manifest, "frames": len(self.job.frames), "targets": list(self.job.targets)}
            )
            try:
                return self._execute(work, lease)
            except KeyboardInterrupt as e:
                self._end(lease, "stopped", blameless=True)
                logger.warning("stopped; to go on: %s", self.resume_command)
                return Stopped.exit_code(e)
            except RunError:  # taken over by another driver, or an `auto` that is another one here
                self._end(lease, "failed", blameless=True)
                raise
            except VlaRayError as e:
                # A frame that takes its whole node down ends the job as a ClusterError: that is evidence.
                self._end(lease, "failed", blameless=not isinstance(e, ClusterError))
                kept = sum(self.run.document["counts"].values())
                if not kept:
                    raise
                raise type(e)(f"{e} {kept:,} rows are kept; to go on: {self.resume_command}") from e
            except BaseException:
                self._end(lease, "failed")
                raise

    def _check_inputs(self) -> None:
        """Refuse to add rows to those of other inputs under the same frame ids; a dataset's identity says it all."""
        frames = {f.frame_id: f for f in self.job.frames if isinstance(f, FrameRef)}
        if self.run.is_new or not frames:
            return
        table = read_metrics(self.location, ["frame_id", "image_path", "input_speed_mps"])
        for frame_id, image, speed in zip(*(column.to_pylist() for column in table.columns), strict=True):
            frame = frames.get(frame_id)
            if frame is not None and (image, speed) != (frame.image, frame.speed_mps):
                raise RunError(
                    f"run {self.location} holds {frame_id} computed from {image} at {speed} m/s, which is now "
                    f"{frame.image} at {frame.speed_mps} m/s. Give another {self.job.setting}=NAME for the new inputs."
                )

    def _execute(self, work: Work, lease: Lease) -> int:
        ledger = Ledger(self.location, self.job.schema).load()
        if self.job.retry_failed:
            forget(self.location)  # what condemned a frame then must not do so again
            logger.info("%d failed rows will be done again", ledger.drop_failed())
        todo = self._todo(ledger, lease, consolidate(self.location))
        if not todo.frames:
            return self._finish(ledger, None)
        done = len(self.job.frames) * len(self.job.targets) - todo.rows
        logger.info("%s: %d rows to do, %d done before", self.location, todo.rows, done)
        identity = hashlib.sha256(f"{self.location} {self.run.document['created']}".encode()).hexdigest()[:16]
        tracker = make_tracker(
            self.job.wandb,
            self.job.run,
            identity,
            {**self.job.settings, "targets": list(self.job.targets)},
            self._local_files(),
        )
        progress = Progress(todo.rows, f"{self.job.key[0]}s" if len(self.job.targets) == 1 else "rows")
        waiting: list[str] = []
        folded, folded_rows = time.monotonic(), 0
        with tracker:
            with sigterm_stops(), closing(progress), closing(work(todo)) as summaries:
                for summary in summaries:
                    waiting += summary.fragments
                    progress.add(sum(summary.statuses.values()), summary.statuses.get(FAILED, 0))
                    if progress.done - folded_rows >= FOLD_ROWS or time.monotonic() - folded >= FOLD_SECONDS:
                        lease.check()
                        ledger.fold(waiting)
                        self.run.update(counts=dict(ledger.counts))
                        tracker.log({"rows": progress.done, "failed": progress.failed, "seconds": progress.seconds})
                        waiting, folded, folded_rows = [], time.monotonic(), progress.done
            lease.check()
            code = self._finish(ledger, progress)
            tracker.summarise({**ledger.counts, "seconds": progress.seconds, "exit_code": code})
        return code

    def _todo(self, ledger: Ledger, lease: Lease, priors: dict[str, Prior]) -> Todo:
        directories = self._directories()
        frames = []
        for ref in self.job.frames:
            missing = tuple(t for t in self.job.targets if (ref.frame_id, t) not in ledger.done)
            if missing:
                prior = priors.get(ref.frame_id, NO_PRIOR)
                frames.append((WorkFrame(ref, self._name(directories[ref.scene]), prior), missing))
        self._clean_temp([*{frame.ref.scene: directories[frame.ref.scene] for frame, _ in frames}.values()])
        targets = {target for _, target in ledger.done} | set(self.job.targets)
        return Todo(self.location, lease.token, tuple(frames), len(targets) > 1, self.run.pin, self.job.schema)

    def _directories(self) -> dict[str, Location]:
        """Where each scene's heavy results go."""
        scenes = dict.fromkeys(f.scene for f in self.job.frames)
        if self.job.directory is not None:
            place = self.location / self.job.directory if self.job.directory else self.location
            return dict.fromkeys(scenes, place)
        return self.run.scene_dirs(scenes, self.job.mode)

    def _name(self, directory: Location) -> str:
        return directory.name if self.job.directory is None else self.job.directory

    def _clean_temp(self, directories: Iterable[Location]) -> None:
        """Remove what killed writers left half written; an object store shows nothing half written."""
        if self.location.is_local:
            for directory in {str(d): d for d in directories}.values():
                clean_temp(directory)

    def _finish(self, ledger: Ledger, progress: Progress | None) -> int:
        ledger.fold(None)
        keys = {(f.frame_id, t) for f in self.job.frames for t in self.job.targets}
        missing = len(keys - ledger.done)
        if missing:  # an engine that ends without a word would otherwise pass for success
            raise ClusterError(f"{missing} of {len(keys)} rows are missing although the work ended without an error.")
        directories = self._directories()
        own = (self.location, self.location / "ledger", self.location / "attempts")
        self._clean_temp([*own, *directories.values()])
        forget(self.location)  # every frame is committed: no evidence is needed any more
        reason = str(ledger.first_failure) if ledger.first_failure else None
        self.run.update(status="finished", counts=dict(ledger.counts), first_failure=reason)
        return self._conclude(dict(ledger.counts), reason, progress)

    def _conclude(self, counts: dict[str, int], first_failure: str | None, progress: Progress | None = None) -> int:
        total = sum(counts.values())
        failed = counts.get(FAILED, 0)
        took = f" in {progress.seconds:.0f} s" if progress else ""
        parts = ", ".join(f"{n:,} {status}" for status, n in sorted(counts.items()) if n)
        lines = [
            f"{self.job.name} {self.job.run}: {total:,} rows{took} ({parts})",
            f"  results  {self.location}",
            f"  metrics  {self.location / 'metrics'}  (Parquet, one row per {' and '.join(self.job.key)})",
            f"  look     {shlex.join(['python', 'jobs/show.py', f'path={self.location}'])}",
        ]
        rate = failed / total if total else 0.0
        if failed:
            first = f"; the first: {first_failure}" if first_failure else ""
            lines.append(f"  failed   {failed:,} rows{first} (again: the same command with retry_failed=true)")
        sys.stdout.write("\n".join(lines) + "\n")
        if rate > self.job.max_error_rate:
            logger.error(
                "%.1f %% of the rows failed, max_error_rate is %.1f %%", 100 * rate, 100 * self.job.max_error_rate
            )
            return 1
        return 0

    def _end(self, lease: Lease, status: str, blameless: bool = False) -> None:
        """Leave a run that can be resumed, as far as the storage still works.

        Args:
            blameless: no frame is to blame (a full disk, Ctrl-C): what was under way is not held against it.
        """
        with suppress(VlaRayError):
            lease.check()  # a run that another driver has taken over is not ours to write to
            if blameless:
                clear_in_flight(self.location, lease.token)
            ledger = Ledger(self.location, self.job.schema).load()
            self.run.update(status=status, counts=dict(ledger.counts))

    def _local_files(self) -> Path:
        return self.location.local_path if self.location.is_local else Path.cwd()

    @property
    def resume_command(self) -> str:
        """The command of this run, with its name."""
        # Without retry_failed: what failed before is to be done already, what failed since is not.
        names = self.job.names or {"run": self.job.run}
        return resume_command(names, without=("retry_failed",))
