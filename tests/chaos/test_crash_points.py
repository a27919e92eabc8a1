"""A driver that dies at any single change of the file system loses nothing and repeats nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


def test_a_driver_may_die_before_any_change_of_the_file_system(tmp_path: Path) -> None:
    program = Path(__file__).with_name("crash_points.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["problems"] == []
    assert result["points"]["retry=False"] > 60, "fewer points than a run has changes: the hook sees too little"
    assert result["points"]["retry=True"] > 30
