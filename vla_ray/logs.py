"""One look of log lines, in drivers and in workers."""

from __future__ import annotations

import logging
import os


def setup_logging() -> None:
    """Timestamps on stderr; VLA_RAY_LOG=DEBUG shows more."""
    level = os.environ.get("VLA_RAY_LOG", "INFO").upper()
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for noisy in ("httpx", "urllib3", "fsspec", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
