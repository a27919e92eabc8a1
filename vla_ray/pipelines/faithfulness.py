"""The faithfulness job: measure a run's maps, then tables, a figure, and what is in doubt.

A run of its own inside the run it measures, `<output_dir>/<run>/faithfulness/`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Sequence
from functools import partial

import numpy as np
import pyarrow.compute as pc
from omegaconf import OmegaConf

from vla_ray.config import FaithfulnessConfig
from vla_ray.data.masks import MaskRef, find_masks
from vla_ray.data.scenes import FrameRef
from vla_ray.errors import ConfigError, RunError
from vla_ray.evaluation.faithfulness import summarise, write_summary
from vla_ray.explain.faithfulness.baselines import mean_map
from vla_ray.pipelines.captured import Captured, read_captured
from vla_ray.pipelines.driver import Driver, Job, Todo, spread
from vla_ray.report.build import build_report
from vla_ray.schema import MAPS, OK
from vla_ray.stages.faithfulness import Companion, FaithfulnessReplica, FaithfulnessSpec
from vla_ray.stages.fitting import DTYPES
from vla_ray.stages.maps import evidence_of
from vla_ray.stages.payloads import estimate_bytes
from vla_ray.stages.replica import ModelSpec
from vla_ray.stages.work import Summary
from vla_ray.storage.files import Location
from vla_ray.storage.fragments import read_rows
from vla_ray.storage.ledger import read_metrics
from vla_ray.targets import Spline

logger = logging.getLogger(__name__)


def faithfulness(config: FaithfulnessConfig) -> int:
    """Measure or resume; returns the exit code (0 fine, 1 too many failed frames, 130 or 143 stopped)."""
    if config.run is None:
        raise ConfigError("run is empty; give the name of a run that has maps")
    location = Location.of(config.output_dir) / config.run
    maps = location / config.maps
    explained = read_captured(maps, "explain")
    if explained is None:
        raise RunError(f"{maps} holds no maps. Make them first: python jobs/explain.py run={location.name}")
    methods = explained.document["settings"]["methods"]
    if config.reference not in methods:
        raise ConfigError(
            f"reference={config.reference} is not among the maps of {maps} ({', '.join(methods)}). Choose one of these."
        )
    # A capture knows its model; maps made online are their own, whatever else was captured under this name.
    online = explained.document["settings"]["source"] == "online"
    model = explained if online else read_captured(location)
    if model is None:
        raise RunError(
            f"{maps} was made from the capture at {location}, which is gone. Make both anew, or put it back."
        )
    frames = spread(explained.frames, len(explained.frames) if config.frames is None else config.frames)
    driver = Driver(_job(config, location, frames, explained))
    if driver.is_finished:
        code = driver.report_finished()
    else:
        work = FaithfulnessWork(config, maps, frames, explained, model)
        if config.dry_run:
            return driver.report_dry_run([f"methods: {', '.join(methods)}"])
        code = driver.execute(work)
    if code in (0, 1) and not config.dry_run:
        summary = summarise(driver.location, maps)
        write_summary(driver.location, summary)
        for warning in summary.warnings:
            logger.warning("%s", warning)
        sys.stdout.write(summary.text + f"\n  tables   {driver.location / 'table.md'}\n")
        if config.report:
            built = build_report(location, config.maps, overlays=False, scores=config.scores)
            sys.stdout.write(f"  report   {built.page}  (open it in a browser)\n")
    return code


def _job(config: FaithfulnessConfig, location: Location, frames: Sequence[FrameRef], explained: Captured) -> Job:
    return Job(
        name="faithfulness",
        output_dir=str(location),
        run=config.scores,
        names={"run": location.name, "scores": config.scores},
        frames=frames,
        targets=[t.name for t in explained.targets],
        mode=explained.targets[0].mode,
        settings={
            "maps": explained.identity,
            "reference": config.reference,
            "masks_subdir": config.masks_subdir,
            "num_random": config.num_random,
            "regenerate": config.regenerate,
            "randomise": config.randomise,
            "seed": config.seed,
        },
        checkpoints=explained.document["checkpoints"],
        config_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)),
        max_error_rate=config.max_error_rate,
        retry_failed=config.retry_failed,
        wandb=config.wandb,
    )


class FaithfulnessWork:
    """Called with what is to do, yields summaries."""

    def __init__(
        self,
        config: FaithfulnessConfig,
        maps: Location,
        frames: Sequence[FrameRef],
        explained: Captured,
        model: Captured,
    ) -> None:
        from vla_ray.pipelines.model_work import ModelWork  # transformers: only when there is work

        self.config, self.maps, self.frames, self.explained, self.model = config, maps, frames, explained, model
        self.work = ModelWork(config, model.model_on(config.model.device))

    def __call__(self, todo: Todo) -> Generator[Summary, None, None]:
        config = self.config
        masks = find_masks(self.frames, config.masks_subdir)
        spec = FaithfulnessSpec(
            run_dir=todo.location,
            maps=self.maps,
            targets=self.explained.targets,
            spline=Spline(**vars(self.model.spline)),
            reference=config.reference,
            priors=priors(self.maps, config.reference),
            masks={frame_id: mask.path for frame_id, mask in masks.items()},
            companions=companions(self.frames, masks),
            regenerate=frozenset(f.frame_id for f in spread(self.frames, config.regenerate)),
            randomise=frozenset(f.frame_id for f in spread(self.frames, config.randomise)),
            num_random=config.num_random,
            seed=config.seed,
        )

        def make_replica(model: ModelSpec) -> partial[FaithfulnessReplica]:
            return partial(FaithfulnessReplica, spec, model)

        return self.work.run(todo, "SimLingoFaithfulness", self._frame_bytes, make_replica)

    def _frame_bytes(self, dtype: str) -> float:
        # Eight changed pictures go through the model at once, without a graph.
        return 0.5 * estimate_bytes("full", self.work.model, DTYPES[dtype])


def priors(maps: Location, method: str) -> dict[tuple[str, str], np.ndarray]:
    """(target, scene) -> the mean map of all *other* scenes; of all frames where there is one scene only.

    What such a map scores is what a method gets for knowing where causes usually are.
    """
    table = read_metrics(maps, ["frame_id", "scene", "target", "status", "target_scalar", "payload_path"])
    rows = table.filter(pc.equal(table["status"], OK)).to_pylist()
    known = {(row["frame_id"], row["target"]): row for row in rows}
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for path, part in read_rows(maps, (row["payload_path"] for row in rows if row["payload_path"]), MAPS):
        for row in part.filter(pc.equal(part["method"], method)).to_pylist():
            own = known.get((row["frame_id"], row["target"]))
            if own is not None and own["payload_path"] == path:
                values = evidence_of(row, own["target_scalar"])
                found.setdefault(row["target"], {}).setdefault(row["scene"], []).append(values)
    result = {}
    for target, scenes in found.items():
        means = {scene: (len(values), mean_map(values)) for scene, values in scenes.items()}
        for scene in scenes:
            others = {s: m for s, m in means.items() if s != scene} or means
            weight = sum(n for n, _ in others.values())
            shapes = {m.shape for _, m in others.values()}
            if len(shapes) == 1:  # scenes of other sizes have other grids: no common prior
                result[target, scene] = np.sum([n * m for n, m in others.values()], axis=0) / weight
    return result


def companions(frames: Sequence[FrameRef], masks: dict[str, MaskRef]) -> dict[str, Companion]:
    """Another frame for each: of another scene and the same cause where there is one, else of another scene.

    In a run of one scene any other frame will do.
    """
    causes = {f.frame_id: masks.get(f.frame_id, MaskRef("")).cause for f in frames}
    several = len({f.scene for f in frames}) > 1
    alike: dict[str, FrameRef] = {}
    for cause in {*causes.values()} - {""}:
        alike |= _next_elsewhere([f for f in frames if causes[f.frame_id] == cause], several)
    found = {}
    for frame_id, other in _next_elsewhere(frames, several).items():
        chosen = alike.get(frame_id, other)
        mask = masks.get(chosen.frame_id) if frame_id in alike else None
        found[frame_id] = Companion(chosen.image, mask.path if mask else None)
    return found


def _next_elsewhere(frames: Sequence[FrameRef], other_scene: bool) -> dict[str, FrameRef]:
    """frame_id -> the next frame, of another scene if asked for, around the end; without those that have none."""
    found: dict[str, FrameRef] = {}
    circle = [*frames, *frames]
    for frame, after in zip(circle[-2::-1], circle[:0:-1], strict=True):
        differs = after.scene != frame.scene if other_scene else after.frame_id != frame.frame_id
        other = after if differs else found.get(after.frame_id)
        if other is not None:
            found[frame.frame_id] = other
    return found
