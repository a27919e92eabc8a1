"""The explain job for a policy: maps of the samples of an inference run, as a run of their own inside it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from omegaconf import OmegaConf

from vla_ray.config.explain_policy import PolicyExplainConfig
from vla_ray.data.cast.shards import SYNTHETIC
from vla_ray.data.sample_refs import SampleRef
from vla_ray.errors import ConfigError, DataError
from vla_ray.evaluation.policy_localisation import policy_localisation, table
from vla_ray.explain.heatmap import HeatMap
from vla_ray.models.paligemma.tokenizer_file import NAME, load_tokenizer
from vla_ray.pipelines.driver import Driver, Job, Todo, spread
from vla_ray.pipelines.evaluate import measure
from vla_ray.pipelines.predicted import Predicted, read_predicted
from vla_ray.report.policy_build import build_policy_report
from vla_ray.report.shown import read_scene_maps
from vla_ray.schema import OK, PREDICTIONS
from vla_ray.stages.explain_policy import PolicyExplainer, PolicyExplainSpec, policy_methods
from vla_ray.stages.maps import evidence_of, read_map
from vla_ray.stages.policy import PolicySpec
from vla_ray.stages.work import Summary
from vla_ray.storage.files import Location, write_atomic
from vla_ray.storage.ledger import read_metrics
from vla_ray.targets.policy import policy_targets

logger = logging.getLogger(__name__)

MAX_BATCH = 16
GRAPH = 4.0  # working memory of a sample with its graph, over that of plain decoding


def explain_policy(config: PolicyExplainConfig) -> int:
    """Make or resume maps; returns the exit code (0 fine, 1 too many failed samples, 130 or 143 stopped).

    Raises:
        VlaRayError: no such run, its policy or data are gone, an unknown target or method; each in one line.
    """
    if config.run is None:
        raise ConfigError("run is empty; give the name of a run of jobs/infer.py")
    predicted = read_predicted(Location.of(config.output_dir) / config.run)
    methods = policy_methods(config.methods)
    model = predicted.config.model
    tokenizer = load_tokenizer(Location.of(model.tokenizers or predicted.checkpoint / NAME))
    targets = policy_targets(config.targets, tokenizer.num_steps)
    refs = predicted.samples(config.match)
    if not refs:
        raise DataError(f"no instruction of {predicted.location} contains {config.match!r}. Give another match.")
    if config.samples is not None:
        refs = of_pictures(refs, pictures_of(predicted.location), config.samples)
    driver = Driver(_job(config, predicted, refs, [t.name for t in targets], [m.name for m in methods]))
    if driver.is_finished:
        code = driver.report_finished()
    else:
        from vla_ray.pipelines.policy_work import PolicyWork  # Ray: only when there is work

        work = PolicyWork(config, replace(model, device=config.model.device), predicted.checkpoint)
        if config.dry_run:
            return driver.report_dry_run([f"methods: {', '.join(m.name for m in methods)}"])

        def explain(todo: Todo) -> Generator[Summary, None, None]:
            spec = PolicyExplainSpec(todo.location, targets, methods, config.strength, predicted.location)

            def make_replica(policy: PolicySpec) -> partial[PolicyExplainer]:
                return partial(PolicyExplainer, spec, policy)

            yield from work.run(todo, "PaliGemmaExplain", None, MAX_BATCH, make_replica, GRAPH)

        code = driver.execute(explain)
    if code in (0, 1) and not config.dry_run:
        if predicted.open_dataset().document["source"] == SYNTHETIC:
            sys.stdout.write(localisation(predicted, driver.location))
        if config.report:
            page = build_policy_report(measure(predicted.location), config.maps)
            sys.stdout.write(f"  report   {page}  (open it in a browser)\n")
    return code


def pictures_of(run: Location) -> dict[str, str]:
    """Sample -> the hash of its picture, as far as the run knows it."""
    table = read_metrics(run, ["frame_id", "picture"], PREDICTIONS)
    return {s: p for s, p in zip(*(column.to_pylist() for column in table.columns), strict=True) if p}


def of_pictures(refs: Sequence[SampleRef], pictures: Mapping[str, str], count: int) -> list[SampleRef]:
    """About `count` samples: all instructions of pictures that are spread evenly over the run.

    Whether a map follows its instruction only shows beside another instruction for the same picture.
    """
    groups: dict[str, list[SampleRef]] = {}
    for ref in refs:
        groups.setdefault(pictures.get(ref.frame_id, ref.frame_id), []).append(ref)
    chosen = spread([*groups.values()], max(1, round(count * len(groups) / len(refs))))
    return sorted((ref for group in chosen for ref in group), key=lambda ref: ref.number)


def _job(
    config: PolicyExplainConfig,
    predicted: Predicted,
    refs: Sequence[SampleRef],
    targets: Sequence[str],
    methods: Sequence[str],
) -> Job:
    model = predicted.config.model
    return Job(
        name="explain_policy",
        output_dir=str(predicted.location),
        run=config.maps,
        names={"run": predicted.location.name, "maps": config.maps},
        frames=refs,
        targets=targets,
        mode="action",
        settings={
            "predictions": predicted.document["created"],
            "methods": list(methods),
            "strength": config.strength,
            "model.dtype": model.dtype,
        },
        checkpoints=predicted.check_unchanged(),
        config_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)),
        max_error_rate=config.max_error_rate,
        retry_failed=config.retry_failed,
        wandb=config.wandb,
        key=("sample", "target"),
        directory="",
    )


def localisation(predicted: Predicted, maps: Location) -> str:
    """Lines on whether relevance lies on what instructions name; also written to localisation.txt beside the maps.

    Empty where no explained instruction names a part of its corridor.
    """
    recordings = read_metrics(predicted.location, ["frame_id", "recording"], PREDICTIONS)
    recording = dict(zip(*(column.to_pylist() for column in recordings.columns), strict=True))
    rows = [row for row in read_metrics(maps).to_pylist() if row["status"] == OK]
    found: dict[str, list[tuple[str, str, str, HeatMap]]] = {}
    all_maps = read_scene_maps(maps, rows)
    for row in rows:
        sample = row["frame_id"]
        for made in all_maps.get((sample, row["target"]), ()):
            heat = replace(read_map(made), values=evidence_of(made, row["target_scalar"]))
            named = f"{row['target']} {made['method']}"
            found.setdefault(named, []).append((sample, recording[sample], row["text"], heat))
    scores = {name: scored for name, many in found.items() if (scored := policy_localisation(many))}
    if not scores:
        return ""
    text = f"relevance on what instructions name (lift: 1 is chance; 95 % intervals over pictures)\n{table(scores)}\n"
    write_atomic(maps / "localisation.txt", text.encode())
    return text
