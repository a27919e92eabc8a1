"""Fixtures shared by every test: where the golden data lies, and a machine without network or W&B."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("VLA_RAY_SHARED", REPO.parent / "shared"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference data made with the original code. Optional: tests that need it are skipped, visibly, without it."""
    path = SHARED / "golden"
    if not path.is_dir():
        pytest.skip(f"no golden data at {path} (set VLA_RAY_SHARED)")
    return path
