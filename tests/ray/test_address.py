"""A job that joins a cluster which is there already, and leaves it running."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

pytestmark = pytest.mark.ray


def test_a_job_joins_a_running_cluster(repo: Path, tmp_path: Path, rows: Any) -> None:
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [
            sys.executable,
            "jobs/capture.py",
            f"cluster.address={address}",
            f"output_dir={tmp_path}",
            "run=r",
            "every=4",
            "batch_size=2",
        ],
        cwd=repo,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 replicas with 2 CPU threads each" in done.stderr, "planned for its four CPUs"
    assert [r["status"] for r in rows(tmp_path / "r")] == ["ok"] * 8
    assert ray.get(ray.remote(lambda: 7).remote()) == 7, "the cluster is not the job's to stop"
