"""The poison-frame protocol: a batch that kills its process is counted before it starts, so it cannot do so for ever.

A worker leaves a marker, `attempts/<batch>.<n>.<driver token>.json`, before each start and removes it after its commit.
A marker that is still there when the batch is started again tells of a process that died:

1. Attempts 1 and 2 (`WHOLE_ATTEMPTS`) run the batch whole.
2. From attempt 3 on it runs frame by frame. Each frame has a solo start of its own (`begin(..., solo=True)` under the
   hash of its own keys) and is committed on its own before the next one.
3. Before each solo start ask `died_alone()`. If it says yes, the frame becomes a failed row with `error_type`
   `WorkerDied` and is not started. Every committed frame, failed or not, is followed by `finish()`.

A driver's own death leaves markers as well, and no frame is to blame for it. So markers of this driver are proof, while
those of earlier drivers only count: at its start a driver turns them into one `Prior` per frame (`consolidate()`), and
a solo start needs a second one to condemn its frame. A driver that is stopped cleanly removes its markers
(`clear_in_flight()`). Once a frame is committed its prior is irrelevant.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vla_ray.storage.files import Location, clean_temp, create_exclusive, read_json, write_json

WHOLE_ATTEMPTS = 2
DECODE = "-decode"  # in the id of a decode start: these count under their own driver only
_PRIOR_NAME = "prior.json"


@dataclass(frozen=True, slots=True)
class Prior:
    """How often earlier drivers left a frame unfinished: starts of any kind, and those of it alone."""

    starts: int = 0
    solo: int = 0


NO_PRIOR = Prior()


class Attempts:
    """A worker's side of the protocol. Plain and picklable: workers of one driver share its token, not an object."""

    def __init__(self, run_dir: Location, driver_token: str) -> None:
        self._directory = run_dir / "attempts"
        self._token = driver_token

    def begin(self, batch_id: str, frame_ids: Sequence[str], *, solo: bool, prior: int) -> int:
        """Count a start durably, before anything of it runs, and return the number of this attempt (1 = the first).

        Args:
            batch_id: `ledger.fragment_name` of the keys to be committed.
            prior: starts under earlier drivers, for a batch the largest `Prior.starts` of its frames.
        """
        content = {"frames": list(frame_ids), "solo": solo, "host": socket.gethostname(), "pid": os.getpid()}
        data = json.dumps(content).encode()
        number = 1
        while not create_exclusive(self._marker(batch_id, number), data):
            number += 1
        return prior + number

    def finish(self, batch_id: str) -> None:
        """The batch is committed: forget this driver's starts of it."""
        number = 1
        while self._marker(batch_id, number).exists():
            number += 1
        for done in range(number - 1, 0, -1):  # from the last: a crash in between leaves no gap in the numbers
            self._marker(batch_id, done).delete()

    def died_alone(self, frame_id: str, prior: Prior = NO_PRIOR) -> bool:
        """Whether this frame kills its process: the verdict `WorkerDied`.

        One unfinished solo start under this driver is proof, as the driver lives. An earlier one may have been the
        driver's own end: it takes two.
        """
        own = [m for name, m in _markers(self._directory, self._token) if m["solo"] and frame_id in m["frames"]]
        return bool(own) or prior.solo >= 2

    def _marker(self, batch_id: str, number: int) -> Location:
        return self._directory / f"{batch_id}.{number}.{self._token}.json"


def consolidate(run_dir: Location) -> dict[str, Prior]:
    """Turn the markers of earlier drivers into priors, by frame id. For a driver that holds the lease, at its start.

    A crash at any point counts nothing twice: `prior.json` names the markers that it has absorbed until they are gone.
    """
    directory = run_dir / "attempts"
    clean_temp(directory)
    document = read_json(directory / _PRIOR_NAME) or {"frames": {}, "absorbed": []}
    priors = {frame: Prior(*counts) for frame, counts in document["frames"].items()}
    markers = list(_markers(directory))
    for name, marker in markers:
        if name not in document["absorbed"] and DECODE not in name:
            for frame in marker["frames"]:
                old = priors.get(frame, NO_PRIOR)
                priors[frame] = Prior(old.starts + 1, old.solo + bool(marker["solo"]))
    if markers:
        counts = {frame: [prior.starts, prior.solo] for frame, prior in priors.items()}
        write_json(directory / _PRIOR_NAME, {"frames": counts, "absorbed": [name for name, _ in markers]})
        for name, _ in markers:
            (directory / name).delete()
    return priors


def clear_in_flight(run_dir: Location, driver_token: str) -> None:
    """Remove this driver's markers at a clean stop: what it interrupted itself is no evidence against any frame."""
    directory = run_dir / "attempts"
    for name, _ in _markers(directory, driver_token):
        (directory / name).delete()


def forget(run_dir: Location) -> None:
    """Drop all evidence, for `retry_failed=true`: a condemned frame would otherwise fail again unstarted."""
    directory = run_dir / "attempts"
    for name, _ in _markers(directory):
        (directory / name).delete()
    (directory / _PRIOR_NAME).delete()


def _markers(directory: Location, driver_token: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, content) of every marker, of one driver or of all."""
    for entry in directory.list():
        parts = entry.name.split(".")
        if len(parts) != 4 or parts[3] != "json" or driver_token not in (None, parts[2]):
            continue
        content = read_json(directory / entry.name)
        if content is not None:  # finished since the listing
            yield entry.name, content
