"""Peak memory of a piece of work, measured in a process of its own: resident memory hardly ever shrinks.

Not `ru_maxrss`: a child begins with its parent's peak. Linux keeps a mark per process that can be set back.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path


def peak_bytes(prepare: Callable[..., Callable[[], object]], *args: object) -> int | None:
    """How far resident memory rises above what it is once the work is prepared, on its first run; None off Linux.

    Args:
        prepare: importable; `prepare(*args)` loads what is needed and gives the work.
    """
    if sys.platform != "linux":
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_measure, prepare, args).result()


def _measure(prepare: Callable[..., Callable[[], object]], args: tuple[object, ...]) -> int:
    run = prepare(*args)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
