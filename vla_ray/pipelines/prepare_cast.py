"""The prepare_cast job: a source's shards -> what is not done yet -> Parquet files -> dataset.json.

State lies in the dataset's directory: `shards/<shard>.json` says that a shard is done, of which content and under which
options. A run that was stopped, however, does what is left; a finished one is recognised without Ray.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vla_ray.config import PrepareConfig, resolve_path
from vla_ray.config.prepare import SYNTHETIC
from vla_ray.data.cast.hub import download, is_hub_id
from vla_ray.data.cast.shards import REQUIRED, ReadOptions, Shard
from vla_ray.data.cast.source import find_shards, read_shard
from vla_ray.data.prepared import DOCUMENT
from vla_ray.errors import ClusterError, ConfigError, DataError, RunError, VlaRayError
from vla_ray.pipelines.stopping import Stopped, resume_command, sigterm_stops
from vla_ray.progress import Progress
from vla_ray.report.dataset_table import dataset_table
from vla_ray.stages.dataset_document import build_document, totals
from vla_ray.stages.prepare import ShardPreparer, ShardRecord, WrittenFile, record_location
from vla_ray.storage.attempts import forget
from vla_ray.storage.files import Location, clean_temp, read_json, write_json
from vla_ray.storage.lease import LEASE_NAME, Lease
from vla_ray.storage.run import RunDirectory, manifest_fingerprint

logger = logging.getLogger(__name__)

_OWN = {"samples", "shards", "attempts", "run.json", "config.yaml", DOCUMENT, LEASE_NAME}
_READERS = 16  # threads that read small files


def prepare_cast(config: PrepareConfig) -> int:
    """Make or complete a dataset; the exit code is 0, 1 with too many corrupt records, 130 or 143 when stopped.

    Raises:
        DataError: the source cannot be read, or no sample of it is left.
        RunError: another driver is at it, or the dataset was begun with other settings.
    """
    preparation = Preparation(config)
    if preparation.is_known_finished():
        return preparation.report_finished()
    return preparation.execute()


@dataclass(frozen=True, slots=True)
class _Source:
    """`given`: what run.json names; `is_hub`: it must be downloaded."""

    given: str
    is_hub: bool


class Preparation:
    """One run of the job. Making it refuses other settings but writes nothing."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self.source = _source(config.source)
        self.name = config.name or default_name(config.source)
        self.options = ReadOptions(
            horizon=config.action.num_steps,
            every=config.every,
            padding=config.padding,
            crc=config.crc,
            split_by=config.split_by,
            val_share=config.val_share,
            scale_m=config.data.scales,
            targets=config.targets,
        )
        self.run = RunDirectory.open(
            config.output_dir,
            self.name,
            settings=self._settings(),
            config_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)),
            command=shlex.join(["python", *sys.argv]),
            overrides=sys.argv[1:],
            setting="name",
        )
        self.location = self.run.location
        _refuse_foreign(self.location, self.source)
        self.preparer = ShardPreparer(self.location, self.options, config.row_group, read_shard)
        self._shards: list[Shard] | None = None

    @property
    def shards(self) -> list[Shard]:
        """Of the source, which is downloaded first if it is on the hub."""
        if self._shards is None:
            self._shards = self._find()
        return self._shards

    def is_known_finished(self) -> bool:
        """Whether nothing is to do. A dataset from the hub is taken to be what it was: asking takes a network."""
        if self.run.is_new or self.run.document["status"] != "finished":
            return False
        if not self.source.is_hub and not self.run.is_finished(self._manifest()):
            return False
        document = read_json(self.location / DOCUMENT)
        return document is not None and _all_there(self.location, [(f["path"], f["bytes"]) for f in document["files"]])

    def report_finished(self) -> int:
        """Say what there is."""
        logger.info("dataset %s is finished: nothing to do", self.name)
        return self._conclude(json.loads((self.location / DOCUMENT).read_bytes()), None)

    def execute(self) -> int:
        """Do what is left, and return the exit code."""
        shards = self.shards  # whatever cannot be read is refused before anything is written
        existed = self.location.exists()
        try:
            return self._drive(shards)
        except DataError:
            if not existed and self.location.is_local:
                _remove_empty(self.location.local_path)
            raise

    def _drive(self, shards: Sequence[Shard]) -> int:
        was_empty = not self.location.list()
        with Lease.acquire(self.location, command=shlex.join(["python", *sys.argv])) as lease:
            self.run.start({"manifest": self._manifest(), "shards": len(shards)})
            (self.location / DOCUMENT).delete()  # until it is true again
            forget(self.location)  # starts under an earlier driver, whose own end may have been theirs
            records: dict[str, ShardRecord] = {}
            try:
                return self._execute(lease, records)
            except KeyboardInterrupt as e:
                self._end(lease, "stopped", records)
                logger.warning("stopped; to go on: %s", self.resume_command)
                return Stopped.exit_code(e)
            except RunError:  # taken over by another driver
                raise
            except DataError:  # these settings cannot work: others must be free to try
                self._end(lease, "failed", records)
                self._release_settings(lease, with_files=was_empty)
                raise
            except VlaRayError as e:
                self._end(lease, "failed", records)
                if not records:
                    raise
                raise type(e)(f"{e} {len(records):,} shards are kept; to go on: {self.resume_command}") from e
            except BaseException:
                self._end(lease, "failed", records)
                raise

    def _execute(self, lease: Lease, records: dict[str, ShardRecord]) -> int:
        with sigterm_stops():
            records |= self._done()
            todo = [shard for shard in self.shards if shard.name not in records]
            progress = Progress(len(todo), "shards") if todo else None
            if progress:
                logger.info("%s: %d shards to do, %d done before", self.location, len(todo), len(records))
                samples = 0
                with closing(progress), closing(self._work(todo, lease.token)) as work:
                    for record in work:
                        lease.check()
                        records[record.shard.name] = record
                        samples += record.tally.samples
                        progress.unit = f"shards ({samples:,} samples)"
                        progress.add(1, 0)
            lease.check()
            return self._finish([records[shard.name] for shard in self.shards if shard.name in records], progress)

    def _work(self, todo: Sequence[Shard], token: str) -> Generator[ShardRecord, None, None]:
        # Ray takes seconds to import, and what is set in the first of these before that must come first.
        from vla_ray.cluster import connect
        from vla_ray.pipelines.prepare_shards import prepare_shards

        with connect(self.config.cluster):
            yield from prepare_shards(todo, self.preparer, token)

    def _done(self) -> dict[str, ShardRecord]:
        """Records of this very content and these options whose files are all there."""
        with ThreadPoolExecutor(_READERS) as threads:
            found = list(
                threads.map(lambda s: ShardRecord.read(self.location, s, self.preparer.fingerprint), self.shards)
            )
        sizes = _sizes(self.location)
        return {
            record.shard.name: record
            for record in found
            if record is not None and all(sizes.get(file.path) == file.bytes for file in record.files)
        }

    def _finish(self, records: list[ShardRecord], progress: Progress | None) -> int:
        if len(records) != len(self.shards):  # an engine that ends without a word would otherwise pass for success
            missing = len(self.shards) - len(records)
            raise ClusterError(f"{missing} of {len(self.shards)} shards are missing although the work ended.")
        document = build_document(records, self.source.given, self.options)
        if not document["files"]:
            raise DataError(_nothing_left(document))
        self._clean_up([file for record in records for file in record.files])
        write_json(self.location / DOCUMENT, document)
        first = document["problems"][0] if document["problems"] else None
        self.run.update(status="finished", counts=totals(document), first_failure=first)
        return self._conclude(document, progress)

    def _clean_up(self, files: Sequence[WrittenFile]) -> None:
        """Delete what does not belong to the dataset: files of a source that has changed, of killed writers."""
        named = {file.path for file in files}
        for path in _sizes(self.location):
            if path not in named and path.endswith(".parquet"):
                (self.location / path).delete()
        records = {record_location(self.location, shard).name for shard in self.shards}
        for entry in (self.location / "shards").list():
            if entry.name.endswith(".json") and entry.name not in records:
                (self.location / "shards" / entry.name).delete()
        forget(self.location)
        if self.location.is_local:
            samples = (f"samples/{entry.name}" for entry in (self.location / "samples").list())
            for part in ("shards", "attempts", *samples):
                clean_temp(self.location / part)
            clean_temp(self.location)

    def _conclude(self, document: dict[str, Any], progress: Progress | None) -> int:
        counts = totals(document)
        took = f" in {progress.seconds:.0f} s" if progress else ""
        lines = [
            f"prepared {self.name}: {counts['samples']:,} samples of {counts['episodes']:,} episodes{took}",
            "",
            *dataset_table(document),
            "",
            f"  dataset  {self.location}",
            self._next_step(document),
            f"  look     {shlex.join(['python', 'jobs/show.py', f'path={self.location}'])}",
        ]
        sys.stdout.write("\n".join(lines) + "\n")
        for what, bad, of in (
            ("records", counts["corrupt"], counts["episodes"] + counts["corrupt"]),
            ("pictures", counts["undecodable"], counts["steps"]),
        ):
            if of and bad / of > self.config.max_error_rate:
                limit = 100 * self.config.max_error_rate
                logger.error("%.1f %% of the %s are corrupt, max_error_rate is %.1f %%", 100 * bad / of, what, limit)
                return 1
        return 0

    def _next_step(self, document: dict[str, Any]) -> str:
        if any(statistics["count"] for statistics in document["statistics"].values()):
            return f"  train    {shlex.join(['python', 'jobs/train.py', f'data.path={self.location}'])}"
        return f"  predict  {shlex.join(['python', 'jobs/infer.py', f'source={self.location}'])}"

    def _end(self, lease: Lease, status: str, records: dict[str, ShardRecord]) -> None:
        """Leave a run that can be resumed, as far as the storage still works."""
        with suppress(VlaRayError):
            lease.check()
            samples = sum(record.tally.samples for record in records.values())
            self.run.update(status=status, counts={"shards": len(records), "samples": samples})

    def _release_settings(self, lease: Lease, with_files: bool) -> None:
        """Forget the settings, not the shards: each of them knows under which options it was made.

        Args:
            with_files: if no shard is done, delete all that this run has written.
        """
        with suppress(VlaRayError):
            lease.check()
            (self.location / "run.json").delete()
            if with_files and not any(entry.name.endswith(".json") for entry in (self.location / "shards").list()):
                self._clean_up([])
                (self.location / "config.yaml").delete()

    def _find(self) -> list[Shard]:
        if self.source.given == SYNTHETIC:
            from vla_ray.data import corridors

            return corridors.shards(train=self.config.pictures, val=self.config.val_pictures)
        path = self.source.given
        if self.source.is_hub:
            path = str(download(self.source.given, Path(self.config.data.cache_dir)))
        return find_shards(path, Path(self.config.data.cache_dir), self.options.targets)

    def _manifest(self) -> str:
        return manifest_fingerprint((shard.to_dict() for shard in self.shards), ())

    def _settings(self) -> dict[str, Any]:
        """What changes the dataset."""
        settings = {"job": "prepare_cast", "source": self.source.given, "row_group": self.config.row_group}
        settings |= {
            "action.num_steps": self.options.horizon,
            "every": self.options.every,
            "padding": self.options.padding,
            "crc": self.options.crc,
            "split_by": self.options.split_by,
            "data.scale_m": list(self.config.data.scale_m),
        }
        if self.options.split_by == "recording":
            settings["val_share"] = self.options.val_share
        if self.options.targets != REQUIRED:
            settings["targets"] = self.options.targets
        if self.source.given == SYNTHETIC:
            settings |= {"pictures": self.config.pictures, "val_pictures": self.config.val_pictures}
        return settings

    @property
    def resume_command(self) -> str:
        return resume_command({"name": self.name})


def default_name(source: str) -> str:
    """Of the dataset made of a source: corridors for the synthetic one, else the last part of its path."""
    if source == SYNTHETIC:
        return "corridors"
    last = resolve_path(source).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", re.sub(r"\.(tar\.gz|tgz|tar|parquet|jsonl)$", "", last)).lstrip(".")


def _source(source: str) -> _Source:
    if source == SYNTHETIC:
        return _Source(source, is_hub=False)
    path = Location.of(resolve_path(source))
    if is_hub_id(source) and not path.exists():
        return _Source(source, is_hub=True)
    return _Source(str(path), is_hub=False)


def _refuse_foreign(location: Location, source: _Source) -> None:
    """ConfigError rather than files among those of somebody else, the source's above all."""
    if not source.is_hub and f"{location}/".startswith(f"{source.given.rstrip('/')}/"):
        raise ConfigError(
            f"the dataset would go to {location}, into its own source {source.given}. Give another output_dir or name."
        )
    strange = sorted({entry.name for entry in location.list() if not entry.name.startswith(".")} - _OWN)
    if strange:
        raise ConfigError(
            f"{location} holds {strange[0]}{' and more' if len(strange) > 1 else ''}, so it is no prepared dataset. "
            "Give another name=NAME."
        )


def _sizes(location: Location) -> dict[str, int]:
    """Path relative to the dataset -> size of every file of samples."""
    samples = location / "samples"
    return {
        f"samples/{split.name}/{entry.name}": entry.size
        for split in samples.list()
        if split.is_dir
        for entry in (samples / split.name).list()
    }


def _remove_empty(directory: Path) -> None:
    """Remove a directory and those below it, as far as they hold no files."""
    for path, _, _ in os.walk(directory, topdown=False):
        with suppress(OSError):
            Path(path).rmdir()


def _all_there(location: Location, files: Sequence[tuple[str, int]]) -> bool:
    sizes = _sizes(location)
    return all(sizes.get(path) == size for path, size in files)


def _nothing_left(document: dict[str, Any]) -> str:
    counts = totals(document)
    reasons = {
        "white": "white placeholder pictures",
        "padding": "windows past their episode's end (padding=keep keeps them, a smaller action.num_steps needs fewer)",
        "no_language": "without an instruction",
        "not_finite": "with actions that are not finite",
        "undecodable": "pictures that cannot be read",
    }
    parts = [f"{counts[name]:,} {reason}" for name, reason in reasons.items() if counts[name]]
    dropped = "; ".join(parts) or "none was dropped"
    corrupt = f", {counts['corrupt']:,} records corrupt" if counts["corrupt"] else ""
    first = f" The first problem: {document['problems'][0]}." if document["problems"] else ""
    return (
        f"no sample is left of {document['source']}: {counts['episodes']:,} episodes, {counts['steps']:,} steps"
        f"{corrupt}; dropped: {dropped}.{first} Change these settings, or give another source."
    )
