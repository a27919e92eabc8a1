"""The capture job: scenes -> manifest -> what is missing -> replicas -> ledger -> metrics.

Checks come in the order of their cost: settings, scenes, the finished run's small file (no Ray, no model), the
checkpoint's header, the disk, and only then Ray.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Generator, Sequence
from functools import partial

from omegaconf import OmegaConf

from vla_ray.config import CaptureConfig, ModelConfig
from vla_ray.data.scenes import discover
from vla_ray.errors import StorageError
from vla_ray.pipelines.driver import Driver, Job, Todo, select
from vla_ray.stages.work import Summary
from vla_ray.storage.files import Location, free_bytes
from vla_ray.storage.run import file_identity
from vla_ray.targets import Spline, Target, parse_targets

logger = logging.getLogger(__name__)


def capture(config: CaptureConfig) -> int:
    """Run or resume a capture; returns the exit code (0 fine, 1 too many failed frames, 130 or 143 stopped)."""
    targets = parse_targets(
        config.explain_mode, config.kinematic_metric, config.text_token_strategy, config.text_token_index
    )
    found = discover(config.scene_dir, config.image_subdir, config.speed_subdir, config.default_speed_mps)
    driver = Driver(
        Job(
            name="capture",
            output_dir=config.output_dir,
            run=config.run or time.strftime("capture_%y%m%d_%H%M%S"),
            frames=select(found, config.every, config.limit),
            targets=[t.name for t in targets],
            mode=config.explain_mode,
            settings=_result_settings(config),
            checkpoints={
                "model.checkpoint": file_identity(Location.of(config.model.checkpoint)),
                "model.config": file_identity(Location.of(str(config.model.config))),
            },
            config_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)),
            max_error_rate=config.max_error_rate,
            retry_failed=config.retry_failed,
            wandb=config.wandb,
        )
    )
    if driver.is_finished:
        return driver.report_finished()
    work = CaptureWork(config, targets)
    if config.dry_run:
        return driver.report_dry_run(work.facts(len(driver.job.frames)))
    work.check_disk(driver.location, len(driver.job.frames))
    return driver.execute(work)


def _result_settings(config: CaptureConfig) -> dict[str, object]:
    """What changes results. Frames and targets are not among them: a run may grow by either."""
    return {
        "explain_mode": config.explain_mode,
        "payload": config.payload,
        "payload_dtype": config.payload_dtype,
        "spline": dataclasses.asdict(config.spline) if config.spline.enabled else None,
        "image_subdir": config.image_subdir,
        "speed_subdir": config.speed_subdir,
        "default_speed_mps": config.default_speed_mps,
        "model.dtype": config.model.dtype,
        "model.max_new_tokens": config.model.max_new_tokens,
    }


class CaptureWork:
    """Turns what is left into summaries: plans the replicas and runs the engine.

    Constructing it checks the checkpoint against its configuration.

    Raises:
        CheckpointError: they do not fit each other.
    """

    def __init__(self, config: CaptureConfig, targets: Sequence[Target]) -> None:
        from vla_ray.models.simlingo.checkpoint import read_state, verify
        from vla_ray.models.simlingo.config import read_config
        from vla_ray.models.simlingo.processing import load_processor

        self.config, self.targets = config, tuple(targets)
        self.spline = Spline(**dataclasses.asdict(config.spline))
        model: ModelConfig = config.model
        shapes = {name: tuple(tensor.shape) for name, tensor in read_state(model.checkpoint).items()}
        self.model = read_config(str(model.config), model.variant_dir, shapes)
        self.parameters = verify(self.model, shapes, model.checkpoint)
        load_processor(self.model)  # a tokenizer that does not fit should not wait for Ray to say so

    def __call__(self, todo: Todo) -> Generator[Summary, None, None]:
        from vla_ray.cluster import connect
        from vla_ray.models.simlingo.processing import Tiler
        from vla_ray.pipelines.engine import run_items
        from vla_ray.pipelines.resources import make_plan
        from vla_ray.stages.capture import CaptureReplica, CaptureSpec
        from vla_ray.stages.decode import Decoder

        config = self.config
        with connect(config.cluster) as cluster:
            device = config.model.device
            if device == "auto":
                device = "cuda" if cluster.num_gpus >= 1 else "cpu"
            dtype = self._dtype(device)
            plan = make_plan(
                cluster,
                device,
                config.replicas,
                config.batch_size,
                model_bytes=self.parameters * _bytes(dtype),
                frame_bytes=self._frame_bytes(dtype),
            )
            spec = CaptureSpec(
                run_dir=str(todo.location),
                model=self.model,
                checkpoint=config.model.checkpoint,
                device=device,
                dtype=dtype,
                payload=config.payload,
                payload_dtype=dtype if config.payload_dtype == "auto" else config.payload_dtype,
                targets=self.targets,
                several_targets=todo.several_targets,
                spline=self.spline,
                max_new_tokens=config.model.max_new_tokens,
                threads=plan.threads,
            )
            logger.info("%s (%s)", plan, dtype)
            yield from run_items(
                todo.items(plan.batch_size),
                Decoder(Tiler.of(self.model)),
                partial(CaptureReplica, spec),
                todo.location,
                todo.token,
                plan,
                "SimLingoCapture",
            )

    def facts(self, num_frames: int) -> list[str]:
        """For a dry run: model and size."""
        size = self._payload_bytes() * num_frames * len(self.targets)
        return [
            f"model: {self.config.model.checkpoint} ({self.parameters / 1e6:,.1f} M parameters)",
            f"payload={self.config.payload}: about {self._payload_bytes() / 1e6:,.1f} MB per frame and target, "
            f"{size / 1e9:,.2f} GB in all",
        ]

    def check_disk(self, location: Location, num_frames: int) -> None:
        """Refuse a run that the disk cannot hold, counting frames that are done already as done."""
        free = free_bytes(location)
        written = sum(e.size or 0 for d in location.list() if d.is_dir for e in (location / d.name).list())
        needed = self._payload_bytes() * num_frames * len(self.targets) - written
        if free is not None and needed > free:
            raise StorageError(
                f"payload={self.config.payload} of {num_frames:,} frames needs about {needed / 1e9:,.1f} GB more, "
                f"{location} has {free / 1e9:,.1f} GB free. Use payload=reduced, limit=N, every=N or another disk."
            )

    def _payload_bytes(self) -> int:
        from vla_ray.stages.payloads import DTYPES, estimate_bytes

        name = self.config.payload_dtype
        if name == "auto":
            name = self._dtype("cuda" if self.config.model.device == "cuda" else "cpu")
        return estimate_bytes(self.config.payload, self.model, DTYPES[name])

    def _frame_bytes(self, dtype: str) -> float:
        from vla_ray.stages.payloads import DTYPES, estimate_bytes

        # Probabilities and gradients as in a full payload, and as much again in scores and other activations.
        return 2.0 * estimate_bytes("full", self.model, DTYPES[dtype])

    def _dtype(self, device: str) -> str:
        if self.config.model.dtype != "auto":
            return self.config.model.dtype
        return "bfloat16" if device == "cuda" else "float32"


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
