"""One driver per run directory: `lease.json` says who holds it, and a second driver is refused.

A holder on this machine is judged by its process (a killed one is replaced at once, a stopped one is alive), a holder
elsewhere by its heartbeat. A driver that was silent for too long may lose the lease: `check()` then raises, and must be
called before anything that only the driver may do (folding the ledger, writing run.json).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType

import psutil

from vla_ray.errors import RunError, VlaRayError
from vla_ray.storage.files import write_json
from vla_ray.storage.location import Location, storage_errors

HEARTBEAT_S = 15.0
SILENT_S = 60.0  # a holder on another machine is believed dead after four missed heartbeats
LEASE_NAME = "lease.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a run. `host` tells machines, boots and containers apart; `process_start` tells reused pids apart."""

    token: str
    host: str
    pid: int
    process_start: float  # psutil create_time
    since: float  # unix time
    heartbeat: float  # unix time
    command: str

    def is_alive(self) -> bool:
        if self.host != this_host():
            return time.time() - self.heartbeat < SILENT_S
        try:
            process = psutil.Process(self.pid)
            # Two seconds: the clock from which start times are derived may be adjusted, a pid is not reused so soon.
            same = abs(process.create_time() - self.process_start) < 2
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).astimezone().isoformat(sep=" ", timespec="seconds")
        age = max(0, round(time.time() - self.heartbeat))
        name = self.host.partition("/")[0]
        return f"host {name}, pid {self.pid}, since {since}, last heartbeat {age} s ago, command: {self.command}"


class Lease:
    """The right to drive a run; a context manager that gives it back. `token` names this driver among all others."""

    def __init__(self, run_dir: Location, holder: Holder) -> None:
        self._run_dir = run_dir
        self._loc = run_dir / LEASE_NAME
        self._holder = holder
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_stopped, name="vla_ray-lease", daemon=True)

    @staticmethod
    def acquire(run_dir: Location, *, command: str) -> Lease:
        """Take the run, from a dead holder if need be. RunError if a living driver holds it."""
        now = time.time()
        started = psutil.Process().create_time()
        holder = Holder(secrets.token_hex(8), this_host(), os.getpid(), started, now, now, command)
        lease = Lease(run_dir, holder)
        run_dir.mkdir()
        with _one_at_a_time(run_dir):
            previous = _read(lease._loc)
            if previous is not None:
                if previous.is_alive():
                    raise RunError(_refusal(run_dir, previous))
                log.info("Taking over %s from a dead driver (%s).", run_dir, previous)
            write_json(lease._loc, asdict(holder))
            lease.check()  # an object store cannot lock: the last of several writers holds the run
        lease._thread.start()
        return lease

    @staticmethod
    def is_held_by(run_dir: Location, token: str) -> bool:
        """Whether the run's lease, as seen from here, is the one with this token; for workers, on whatever node."""
        holder = _read(run_dir / LEASE_NAME)
        return holder is not None and holder.token == token

    @property
    def token(self) -> str:
        return self._holder.token

    def check(self) -> None:
        """RunError if the run is no longer ours."""
        current = _read(self._loc)
        if current is None or current.token != self.token:
            by = f"taken over by another driver ({current})" if current else f"lost: {self._loc} is gone"
            raise RunError(
                f"Run {self._run_dir} was {by}, so this driver stops; finished frames are kept. "
                f"Let the other driver finish, or run the same command again once it has stopped."
            )

    def release(self) -> None:
        """Give the run back. Harmless if it is not ours any more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        current = _read(self._loc)
        if current is not None and current.token == self.token:
            self._loc.delete()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def beat(self) -> None:
        """Renew the heartbeat, unless the run is no longer ours (writing then would steal it back)."""
        self.check()
        self._holder = replace(self._holder, heartbeat=time.time())
        write_json(self._loc, asdict(self._holder))

    def _beat_until_stopped(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            try:
                self.beat()
            except RunError as error:
                log.error("%s", error)  # the driver's own check() stops the run
                return
            except VlaRayError as error:
                log.warning("The heartbeat of %s failed and is tried again: %s", self._run_dir, error)


def this_host() -> str:
    """`name/boot/pids`: a reboot and a container with its own process numbers each count as another machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    pids = Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    if boot.exists():
        parts.append(boot.read_text().strip())
    if pids.exists():
        parts.append(str(pids.stat().st_ino))
    return "/".join(parts)


def _read(loc: Location) -> Holder | None:
    data = loc.try_read_bytes()
    if data is None:
        return None
    try:
        return Holder(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise RunError(f"{loc} is damaged ({error}). If no other driver uses this run, delete that file.") from error


def _refusal(run_dir: Location, holder: Holder) -> str:
    message = f"Run {run_dir} is in use by another driver: {holder}. Wait for it, stop it, or give another run=NAME."
    if holder.host != this_host():
        message += f" If it is dead, the run is free {SILENT_S:.0f} s after its last heartbeat."
    return message


@contextmanager
def _one_at_a_time(run_dir: Location) -> Iterator[None]:
    """Two drivers that find the same dead holder must not both replace it. The kernel frees a dead owner's lock."""
    if not run_dir.is_local:
        yield
        return
    with storage_errors("open", run_dir):
        descriptor = os.open(run_dir.local_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"Another driver is just starting in {run_dir}. Try again or give another run=NAME."
            ) from error
        except OSError as error:
            log.debug("No lock on %s (%s): only the heartbeat guards the run.", run_dir, error)
        yield
    finally:
        os.close(descriptor)
