"""Kill a driver at its n-th change of the file system, for every n, and run it again: prints what was wrong, as JSON.

A program of its own, so that forking is safe: `python crash_points.py DIRECTORY`. Every run is a fork of this process,
with a loop instead of Ray: two batches of two frames each write a file per frame, commit their rows and are folded.
Three rounds: a new run, one killed twice, and one that does its failed rows again.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_ray.data.scenes import FrameRef
from vla_ray.data.tiles import TileGeometry
from vla_ray.pipelines import driver as driver_module
from vla_ray.pipelines.driver import Driver, Job, Todo
from vla_ray.schema import OK
from vla_ray.stages.work import Loaded, Row, Summary, Worker
from vla_ray.storage.files import Location, write_atomic
from vla_ray.storage.ledger import read_metrics

FRAMES = [FrameRef(f"s/f{i}", "s", f"f{i}", f"/images/f{i}.png", 1.0) for i in range(4)]
CHANGES = ("os.rename", "os.remove", "os.link", "os.mkdir", "test.fsync", "test.delete")
TWICE = 40  # pairs of crash points, chosen at random


class Replica:
    """Writes one small file per frame; frame 1 fails while there is a file named `bad` beside the run."""

    def __init__(self, run_dir: Location) -> None:
        self.run_dir = run_dir

    def process(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        rows = []
        for frame in frames:
            if frame.frame.ref == FRAMES[1] and (self.run_dir.parent / "bad").exists():
                rows.append(self.failed(frame, targets[0], "ValueError", "bad frame"))
                continue
            path = f"{frame.frame.directory}/{frame.frame.ref.stem}.pt"
            write_atomic(self.run_dir / path, f"payload of {frame.frame.ref.frame_id}".encode())
            about = {"image_path": frame.frame.ref.image, "input_speed_mps": frame.frame.ref.speed_mps}
            key = {"frame_id": frame.frame.ref.frame_id, "target": targets[0]}
            rows.append({**key, **about, "status": OK, "payload_path": path})
        return rows

    def failed(self, frame: Loaded, target: str, error_type: str, error: str) -> Row:
        about = {"image_path": frame.frame.ref.image, "input_speed_mps": frame.frame.ref.speed_mps}
        key = {"frame_id": frame.frame.ref.frame_id, "target": target}
        return {**key, **about, "status": "failed", "error_type": error_type, "error": error}


def work(todo: Todo) -> Generator[Summary, None, None]:
    worker, tile = Worker(Replica(todo.location), todo.location, todo.token), np.zeros((1, 4, 4, 3), np.uint8)
    for item in todo.items(2):
        yield worker(item, [Loaded(f, tile, TileGeometry(8, 8, 8, 4, 4, ((0, 0, 4, 4),), False)) for f in item.frames])


def drive(directory: Path, retry: bool) -> int:
    settings, limits = ({"payload": "full"}, {}, "payload: full\n"), (1.0, retry)
    driver = Driver(Job("capture", str(directory), "r", FRAMES, ["a"], "action", *settings, *limits))
    return driver.report_finished() if driver.is_finished else driver.execute(work)


def kill_before(change: int, directory: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that ends the process before its n-th change below the directory; fsync stands for a torn write."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        creates = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if (creates or event in CHANGES) and (event == "test.fsync" or str(arguments[0]).startswith(str(directory))):
            seen += 1
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def forked(directory: Path, change: int = 0, retry: bool = False) -> int | None:
    """Exit code of a driver in a process of its own; None if it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            if change:
                sys.addaudithook(kill_before(change, directory))
            code = drive(directory, retry)
        except BaseException as e:
            sys.stderr.write(f"{directory.name}: {type(e).__name__}: {e}\n")
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def wrong(directory: Path) -> list[str]:
    """What is not as a finished run must be."""
    run, found = directory / "r", []
    rows = read_metrics(Location.of(run)).to_pylist()
    parts = sum(len(read_metrics_part(p)) for p in run.glob("metrics/*.parquet"))
    if [r["frame_id"] for r in rows] != [f.frame_id for f in FRAMES] or parts != len(rows):
        found.append(f"rows {[r['frame_id'] for r in rows]}, {parts} on disk")
    for row in rows:
        if row["status"] != OK or (run / row["payload_path"]).read_text() != f"payload of {row['frame_id']}":
            found.append(f"row {row}")
    # A dead driver's lease is nothing: it may stay behind if only its own removal was missing.
    left = [*run.rglob(".*"), *run.glob("ledger/*"), *run.glob("attempts/*")]
    if left:
        found.append(f"left behind: {[str(p.relative_to(run)) for p in left]}")
    document = json.loads((run / "run.json").read_text())
    if document["status"] != "finished" or document["counts"]["ok"] != len(FRAMES):
        found.append(f"run.json: {document['status']} {document['counts']}")
    return found


def read_metrics_part(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["frame_id"])["frame_id"].to_pylist()


def try_at(directory: Path, changes: Sequence[int], retry: bool = False) -> tuple[bool, list[str]]:
    """Kill at each of these in turn, then run undisturbed. Whether the last kill happened, and what was wrong.

    With `retry`, all this happens to a finished run with a failed row, which is to be done again.
    """
    directory.mkdir()
    if retry:
        (directory / "bad").touch()
        assert forked(directory) == 0
        (directory / "bad").unlink()
    killed = [forked(directory, change, retry) is None for change in changes]
    codes = [forked(directory, 0, retry), forked(directory)]  # the second one finds a finished run
    problems = wrong(directory) if codes == [0, 0] else [f"exit codes {codes}"]
    return killed[-1], [f"killed before change {changes}, retry={retry}: {p}" for p in problems]


def main(root: Path) -> dict[str, Any]:
    driver_module.FOLD_ROWS = 2
    fsync, delete = os.fsync, Location.delete
    os.fsync = lambda descriptor: (sys.audit("test.fsync", descriptor), fsync(descriptor))[1]  # type: ignore[assignment]
    Location.delete = lambda self: (sys.audit("test.delete", self.path), delete(self))[1]  # type: ignore[method-assign]
    problems: list[str] = []
    points = {}
    for retry in (False, True):
        count, happened = 0, True
        while happened:
            count += 1
            happened, found = try_at(root / f"{retry}-{count}", [count], retry)
            problems += found
        points[f"retry={retry}"] = count - 1
    chance = random.Random(0)
    for i in range(TWICE):
        pair = [chance.randrange(1, points["retry=False"]) for _ in range(2)]
        problems += try_at(root / f"twice-{i}", pair)[1]
    return {"points": points, "problems": problems}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()):  # what the drivers say
        outcome = main(Path(sys.argv[1]))
    sys.stdout.write(json.dumps(outcome))
