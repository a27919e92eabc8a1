"""Progress that reads well on a terminal and in a log file: count, rate, failures, time left."""

from __future__ import annotations

import logging
import sys
import time

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0


class Progress:
    """Counts rows done in this run; on a terminal one line that is rewritten, elsewhere a log line now and then.

    Args:
        total: rows to do.
        unit: what they are called.
    """

    def __init__(self, total: int, unit: str = "frames") -> None:
        self.total, self.unit, self.done, self.failed = total, unit, 0, 0
        self._start = self._shown = time.monotonic()
        self._first: float | None = None
        self._terminal = sys.stderr.isatty()

    def add(self, done: int, failed: int) -> None:
        self.done += done
        self.failed += failed
        now = time.monotonic()
        if self._first is None:
            # The rate starts here: until now Ray and the models were starting.
            self._first, self._done_at_first = now, self.done
        if self._terminal:
            sys.stderr.write(f"\r{self}\x1b[K")
            sys.stderr.flush()
        elif now - self._shown >= LOG_EVERY_S:
            logger.info("%s", self)
            self._shown = now

    def close(self) -> None:
        if self._terminal and self.done:
            sys.stderr.write(f"\r{self}\x1b[K\n")
        elif self.done:
            logger.info("%s", self)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __str__(self) -> str:
        share = self.done / self.total if self.total else 1.0
        bar = ("#" * int(24 * share)).ljust(24, ".")
        text = f"[{bar}] {self.done:,}/{self.total:,} {self.unit}"
        if self._first is not None and self.done > self._done_at_first:
            rate = (self.done - self._done_at_first) / (time.monotonic() - self._first)
            text += f"  {rate:.1f}/s"
            if self.done < self.total:
                text += f"  {_clock((self.total - self.done) / rate)} left"
        return text + (f"  {self.failed:,} failed" if self.failed else "")


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
