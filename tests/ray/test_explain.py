"""placeholder"""
from __future__ import annotations
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
import numpy as np
import pytest
from PIL import Image
from vla_ray.explain.methods import METHODS
from vla_ray.pipelines.capture import capture
from vla_ray.pipelines.explain import explain
pytestmark = pytest.mark.ray

FOLDS = tuple(m.name for m in METHODS.values() if m.kind == "fold")

def test_x(tmp_path, configure, explaining, in_process, demo_scene):
    t=time.time()
    with in_process():
        for level in ("full","reduced","relevance"):
            assert capture(configure(tmp_path, run=level, limit=3, payload=level, batch_size=3, methods=FOLDS, kinematic_metric=["longitudinal_progress","curv_energy"]))==0; print("capture", time.time()-t)
            assert explain(explaining(tmp_path, run=level, methods=FOLDS, report=True, overlays=True))==0; print("explain", time.time()-t)
        assert explain(explaining(tmp_path, run="online",limit=3, methods=[*FOLDS,"gradient_x_input"],kinematic_metric=["longitudinal_progress","curv_energy"]))==0; print("explain", time.time()-t)
