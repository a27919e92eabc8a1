"""Inference under fire: an actor, a decoder and the driver die, and the tables are those of an undisturbed run."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from vla_ray.data.prepared import PreparedDataset
from vla_ray.data.sample_refs import SampleRef, sample_refs
from vla_ray.schema import PREDICTIONS
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import read_metrics

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.ray]

SAMPLES, VARIANTS = 60, ("given", "turn left")


@pytest.fixture(scope="module")
def refs(corridors: Path) -> list[SampleRef]:
    return sample_refs(PreparedDataset.open(str(corridors)), "val", limit=SAMPLES)


def start(run: Any, corridors: Path, policy: Path, name: str, *overrides: str, **faults: Any) -> Any:
    settings = (
        f"source={corridors}",
        f"model.name={policy}",
        f"output_dir={run.directory / 'out'}",
        f"run={name}",
        f"limit={SAMPLES}",
        "instructions=[turn left]",
        "batch_size=4",
        "replicas=2",
    )
    return run.start_command([sys.executable, "jobs/infer.py", *settings, *overrides], **faults)


def keys(path: Path) -> list[tuple[str, str]]:
    table = read_metrics(Location.of(path), ["frame_id", "target"], PREDICTIONS)
    return list(zip(table["frame_id"].to_pylist(), table["target"].to_pylist(), strict=True))


def test_nothing_is_lost_or_repeated(run: Any, corridors: Path, policy_dir: Path, refs: list[SampleRef]) -> None:
    poison = refs[30].frame_id
    points = {"decode": 5, "process": 12, "processed": 25, "committed": 45}
    faults = {"kill_once": {point: refs[i].frame_id for point, i in points.items()}, "kill_always": [poison]}
    job = start(run, corridors, policy_dir, "r", delay_s=0.3, **faults)
    run.path = run.directory / "out" / "r"
    job.until(lambda: run.committed() >= 4)
    job.signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert 8 <= len(keys(run.path)) < 2 * SAMPLES
    assert not (run.path / "predictions.csv").exists()
    again = start(run, corridors, policy_dir, "r", "max_error_rate=0.1", **faults)
    assert again.wait() == 0, again.err.read_text()
    assert {p.name for p in run.faults.parent.glob("killed-*")} == {f"killed-{point}" for point in points}
    assert sorted(keys(run.path)) == sorted((ref.frame_id, v) for ref in refs for v in VARIANTS)
    assert json.loads((run.path / "run.json").read_text())["counts"]["failed"] == len(VARIANTS)

    healed = start(run, corridors, policy_dir, "r", "retry_failed=true")
    assert healed.wait() == 0, healed.err.read_text()
    calm = start(run, corridors, policy_dir, "calm")
    assert calm.wait() == 0, calm.err.read_text()
    out = run.directory / "out"
    left, right = (pq.read_table(out / name / "predictions.parquet").to_pylist() for name in ("r", "calm"))
    for a, b in zip(left, right, strict=True):
        assert (a["frame_id"], a["target"], a["image_path"]) == (b["frame_id"], b["target"], b["image_path"])
        assert a["predicted"] == pytest.approx(b["predicted"], abs=1e-4)
    assert sorted(p.name for p in (out / "r/images").iterdir()) == sorted(ref.image_filename for ref in refs)
    assert [*run.path.glob("ledger/*"), *run.path.glob("attempts/*"), *run.path.rglob(".*")] == []
