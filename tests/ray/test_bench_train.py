"""bench=train on a real Ray: a stream, and a job until its first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_ray.config import BenchmarkConfig
from vla_ray.evaluation.benchmarks import find_bench
from vla_ray.evaluation.benchmarks.train_cost import MADE, READY, STREAMED

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_the_bench_on_the_tiny_policy(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        result = find_bench("train")(BenchmarkConfig(bench="train", output_dir=str(tmp_path), rounds=1, steps=4))
    finally:
        torch.set_num_threads(threads)
    content: Any = json.loads(json.dumps(result.content))
    sides = content["sizes"]["tiny"]["sides"]
    assert list(sides) == [READY, MADE, STREAMED]
    assert sides[READY]["timing"]["wall"] == 1
    assert all(side["samples_per_s"] > 0 for side in sides.values())
    assert content["start_up"]["stream"]["tiny"] > 0
    assert content["start_up"]["job"] > 0
    assert " M parameters, 2 + 2 layers, pictures of" in result.text
