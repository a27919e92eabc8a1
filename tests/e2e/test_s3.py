"""Scenes read from, and a run kept on, an object store: a real S3 server on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from vla_ray.storage import payload
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key-for-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-for-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="drives")
    yield client
    server.stop()


def run_job(repo: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "jobs/capture.py",
            "scene_dir=s3://drives/demo",
            "output_dir=s3://drives/runs",
            "run=r",
            *overrides,
        ],
        cwd=repo,
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        timeout=240,
    )


def test_capture_from_and_to_s3(repo: Path, s3: object) -> None:
    for path in sorted((repo / "datasets/demo_drive/red_light/images").glob("*.png"))[:3]:
        s3.upload_file(str(path), "drives", f"demo/red_light/images/{path.name}")  # type: ignore[attr-defined]
    done = run_job(repo, "limit=2")
    assert done.returncode == 0, done.stderr
    run = Location.of("s3://drives/runs/r")
    rows = read_metrics(run).to_pylist()
    assert [r["status"] for r in rows] == ["ok", "ok"]
    content = payload.load(run / rows[0]["payload_path"])
    assert content["image_path"].startswith("s3://drives/demo/red_light/images/")
    again = run_job(repo)  # one frame more
    assert again.returncode == 0, again.stderr
    assert read_metrics(run).num_rows == 3
    finished = run_job(repo)
    assert "nothing to do" in finished.stderr
    everything = b"".join((run / name).read_bytes() for name in ("run.json", "config.yaml"))
    assert b"secret-for-tests" not in everything
    assert b"key-for-tests" not in everything
