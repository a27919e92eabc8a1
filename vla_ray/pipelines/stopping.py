"""How a driver is stopped by hand or by a scheduler, and the command that takes up its work."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """SIGTERM, treated like Ctrl-C."""

    @staticmethod
    def exit_code(interrupt: KeyboardInterrupt) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + (signal.SIGTERM if isinstance(interrupt, Stopped) else signal.SIGINT)


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """SIGTERM ends the work like Ctrl-C while inside."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    try:
        old = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: a notebook or a test, where signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def resume_command(names: Mapping[str, str], without: Collection[str] = ()) -> str:
    """The command of this process, with the settings that name its run and without those that must not be repeated."""
    argv = [a for a in sys.argv if a.partition("=")[0] not in {*names, *without}]
    return shlex.join(["python", *argv, *(f"{setting}={name}" for setting, name in names.items())])
