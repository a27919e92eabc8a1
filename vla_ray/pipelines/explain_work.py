"""The explain job's work: maps by replicas on Ray, with the model where one is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from functools import partial

from vla_ray.config import ExplainConfig
from vla_ray.explain.methods import Method
from vla_ray.pipelines.captured import Captured
from vla_ray.pipelines.driver import Todo
from vla_ray.pipelines.model_work import ModelWork, run_without_model
from vla_ray.stages.explain import ExplainSpec, OnlineExplainer, PayloadExplainer
from vla_ray.stages.fitting import DTYPES
from vla_ray.stages.payloads import estimate_bytes
from vla_ray.stages.pixel_maps import PixelOptions
from vla_ray.stages.replica import ModelSpec
from vla_ray.stages.work import Summary
from vla_ray.targets import Spline, Target


class ExplainWork:
    """Called with what is to do, yields summaries. CheckpointError: the model does not fit its configuration."""

    def __init__(
        self, config: ExplainConfig, targets: Sequence[Target], methods: Sequence[Method], captured: Captured | None
    ) -> None:
        self.config, self.targets, self.methods, self.captured = config, tuple(targets), tuple(methods), captured
        self.work: ModelWork | None = None
        if captured is None:
            self.work = ModelWork(config)
        elif any(m.needs_pixels for m in methods):
            self.work = ModelWork(config, captured.model_on(config.model.device))

    @property
    def source(self) -> str:
        """For a dry run: where maps come from."""
        if self.captured is None:
            return f"source: online, {self.config.model.checkpoint}"
        return f"source: payload={self.captured.payload} of {self.captured.location}"

    def __call__(self, todo: Todo) -> Generator[Summary, None, None]:
        spline = self.captured.spline if self.captured else self.config.spline
        spec = ExplainSpec(
            run_dir=todo.location,
            targets=self.targets,
            methods=self.methods,
            spline=Spline(**dataclasses.asdict(spline)),
            strength=self.config.strength,
            pixels=PixelOptions(self.config.ig_steps, self.config.iss_samples, self.config.seed),
            capture=self.captured.location if self.captured else None,
        )
        if self.work is None:
            return run_without_model(
                todo, self.config.cluster, self.config, "MapMaker", partial(PayloadExplainer, spec)
            )
        replica = OnlineExplainer if self.captured is None else PayloadExplainer

        def make_replica(model: ModelSpec) -> partial[OnlineExplainer] | partial[PayloadExplainer]:
            return partial(replica, spec, model)

        return self.work.run(todo, "SimLingoExplain", self._frame_bytes, make_replica)

    def _frame_bytes(self, dtype: str) -> float:
        assert self.work is not None
        return 0.5 * estimate_bytes("full", self.work.model, DTYPES[dtype])
