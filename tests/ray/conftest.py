"""One local Ray for all tests of this directory, and short ways to run a capture on it in this process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from vla_ray.config import CaptureConfig, ExplainConfig, ModelConfig
from vla_ray.schema import METRICS
from vla_ray.stages.decode import Decoder, DecodeWorker
from vla_ray.stages.work import Loaded, Replica, Summary, Worker, WorkItem
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import read_metrics

FAULTS = Path(__file__).resolve().parent.parent / "faults"


@pytest.fixture(scope="session", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Four logical CPUs; workers see tests/faults, which does nothing until a test writes faults."""
    temp = Path(f"/tmp/vr{os.getpid()}")  # Ray's sockets need a short path
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(FAULTS), os.environ.get("PYTHONPATH")])),
        "VLA_RAY_TEST_FAULTS": str(tmp_path_factory.mktemp("faults") / "faults.json"),
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import ray

        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=150 << 20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=str(temp),
        )
        yield
        ray.shutdown()
    shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture
def faults() -> Iterator[Callable[..., None]]:
    """Set what goes wrong from now on (see tests/faults/sitecustomize.py); nothing does after the test."""
    path = Path(os.environ["VLA_RAY_TEST_FAULTS"])

    def set_faults(**values: Any) -> None:
        path.write_text(json.dumps(values))

    yield set_faults
    for file in path.parent.iterdir():
        file.unlink()


@pytest.fixture(scope="session")
def golden_model(golden: Path) -> ModelConfig:
    """The golden checkpoint, in float32."""
    root = golden / "simlingo_a"
    return ModelConfig(
        config=str(root / "checkpoint_root/.hydra/config.yaml"),
        checkpoint=str(root / "checkpoint_root/checkpoints/epoch=013.ckpt/pytorch_model.pt"),
        variant_dir=str(root / "pretrained/InternVL2-tiny-a"),
        dtype="float32",
    )


@pytest.fixture(scope="session")
def tiny_model(repo: Path) -> ModelConfig:
    """The bundled driver."""
    return ModelConfig(checkpoint=str(repo / "checkpoints/simlingo-tiny/checkpoints/epoch=013.ckpt/pytorch_model.pt"))


@pytest.fixture(scope="session")
def demo_scene(repo: Path) -> str:
    """Eight frames 448 pixels wide."""
    return str(repo / "datasets/demo_drive/red_light")


@pytest.fixture(scope="session")
def configure(tiny_model: ModelConfig, demo_scene: str) -> Callable[..., CaptureConfig]:
    """A CaptureConfig with one replica, on the demo scene with the tiny driver unless said otherwise."""

    def make(output_dir: Path, **settings: Any) -> CaptureConfig:
        defaults: dict[str, Any] = {"scene_dir": demo_scene, "run": "r", "replicas": 1, "model": tiny_model}
        return CaptureConfig(output_dir=str(output_dir), **{**defaults, **settings})

    return make


@pytest.fixture(scope="session")
def explaining(tiny_model: ModelConfig, demo_scene: str) -> Callable[..., ExplainConfig]:
    """An ExplainConfig of run `r`, with one replica and without pictures unless said otherwise."""

    def make(output_dir: Path, **settings: Any) -> ExplainConfig:
        defaults: dict[str, Any] = {"scene_dir": demo_scene, "run": "r", "replicas": 1, "model": tiny_model}
        quick = {"overlays": False, "report": False}
        return ExplainConfig(output_dir=str(output_dir), **{**defaults, **quick, **settings})

    return make


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict[str, Any]]]:
    """Metrics rows of a run directory, sorted by frame and target."""
    return lambda run: read_metrics(Location.of(run)).to_pylist()


@pytest.fixture(scope="module")
def in_process() -> Callable[[], Any]:
    """`with in_process():` jobs run in this process, seconds faster: all of them but the transport by Ray."""
    from vla_ray.cluster import Cluster  # imports Ray, which must not see the environment before `cluster` has set it

    @contextmanager
    def connect(settings: Any) -> Iterator[Cluster]:
        yield Cluster(local=True, num_cpus=1, num_gpus=0, memory_bytes=16e9, largest_node_cpus=1)

    def run_items(
        items: Sequence[WorkItem],
        decoder: Decoder | None,
        make_replica: Callable[[], Replica],
        run_dir: Location,
        token: str,
        plan: Any,
        name: str,
        schema: pa.Schema = METRICS,
    ) -> Iterator[Summary]:
        worker = Worker(make_replica(), run_dir, token, schema)
        for item in items:
            if decoder is None:
                loaded = [Loaded(frame) for frame in item.frames]
            else:
                loaded = DecodeWorker(decoder, run_dir, token)(item)
            yield worker(item, loaded)

    @contextmanager
    def here() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vla_ray.pipelines.model_work.connect", connect)
            patch.setattr("vla_ray.pipelines.model_work.run_items", run_items)
            yield

    return here


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing may touch Ray."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this run must not need Ray")

    monkeypatch.setattr("vla_ray.pipelines.model_work.connect", refuse)
