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


@pytest.fixture(scope="session")
def policy_dir() -> Path:
    """The bundled policy: a trained tiny PaliGemma with its tokenizers.pt."""
    return REPO / "checkpoints" / "paligemma-tiny"


@pytest.fixture(scope="session")
def corridors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of rendered corridors: 24 pictures to train on, 8 to validate on, all their instructions."""
    from vla_ray.data import corridors as rendered
    from vla_ray.data.cast.shards import ReadOptions
    from vla_ray.stages.dataset_document import build_document
    from vla_ray.stages.prepare import ShardPreparer
    from vla_ray.storage.files import Location, write_json

    directory = Location.of(tmp_path_factory.mktemp("corridors"))
    options = ReadOptions()
    preparer = ShardPreparer(directory, options, row_group=16, read=rendered.read)
    records = [preparer(shard) for shard in rendered.shards(train=24, val=8)]
    write_json(directory / "dataset.json", build_document(records, "synthetic", options))
    return directory.local_path
