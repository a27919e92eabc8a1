"""The evaluate job: predictions in, what they are worth out. A model is only asked for counterfactual instructions.

These predictions are a run of their own inside the run that they test, `<run>/counterfactual/`, made and resumed like
any other by pipelines/infer.py.
"""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from vla_ray.config import EvaluateConfig
from vla_ray.data.patterns import expand
from vla_ray.errors import ConfigError, DataError, RunError
from vla_ray.evaluation.bootstrap import Estimate
from vla_ray.evaluation.policy.compare import compare_predictions
from vla_ray.evaluation.policy.evaluate import Evaluation, evaluate_predictions
from vla_ray.evaluation.policy.prediction_files import read_predictions
from vla_ray.evaluation.policy.predictions import Predictions
from vla_ray.evaluation.policy.summary import PlainTable
from vla_ray.pipelines.predicted import read_predicted
from vla_ray.report.policy_build import build_policy_report
from vla_ray.stages.predictions import CSV
from vla_ray.storage.files import Location, read_json
from vla_ray.tracking import make_tracker

logger = logging.getLogger(__name__)

COUNTERFACTUAL = "counterfactual"
EVALUATION = "evaluation"


def evaluate(config: EvaluateConfig) -> int:
    """Measure, or compare; returns the exit code.

    Raises:
        VlaRayError: predictions that cannot be read, or nobody to ask for counterfactual ones; in one line.
    """
    places = found(config.results or ())
    if len(places) > 1:
        return _compare(config, places)
    home = read_predictions(places[0]).location.parent
    if config.counterfactual:
        ask_otherwise(config, home)
    result = measure(places[0])
    sys.stdout.write(f"{result.text}\n  report   {home / EVALUATION}\n")
    if config.report:
        sys.stdout.write(f"  page     {build_policy_report(result)}  (open it in a browser)\n")
    means = {} if result.summary is None else result.summary.estimates[""]
    _track(config, [result.predictions], result.tables, means)
    return 0


def measure(place: Location) -> Evaluation:
    """Evaluate predictions into evaluation/ beside them, with the counterfactual ones of their run, if it has any."""
    predictions = read_predictions(place)
    home = predictions.location.parent
    otherwise = home / COUNTERFACTUAL / CSV
    if otherwise.exists():
        predictions = predictions.with_variants(read_predictions(otherwise))
    return evaluate_predictions(predictions, home / EVALUATION, counterfactual=bool(predictions.variants))


def _compare(config: EvaluateConfig, places: Sequence[Location]) -> int:
    if config.counterfactual:
        raise ConfigError("counterfactual=true asks one policy: give one results=..., or compare without it.")
    many = [read_predictions(place) for place in places]
    out = many[0].location.parent / EVALUATION
    result = compare_predictions(many, out)
    sys.stdout.write(f"{result.text}\n  comparison {out}\n")
    _track(config, many, result.tables, {})
    return 0


def found(results: Sequence[str]) -> list[Location]:
    """What was named: files and runs, globs spelled out.

    Raises:
        DataError: a glob that matches nothing.
    """
    places = []
    for item in results:
        matches = expand(item, files=True)
        if matches == []:
            raise DataError(f"results={item} matches nothing. Give a predictions.csv or a run of jobs/infer.py.")
        places += [Location.of(item)] if matches is None else matches
    if not places:
        raise ConfigError("results is empty; give a predictions.csv, a run of jobs/infer.py, or a list of these.")
    return places


def ask_otherwise(config: EvaluateConfig, run: Location) -> None:
    """Predict with permuted, opposite and atomic instructions, with the policy and on the samples of an inference run.

    Raises:
        RunError: these predictions are of no run here, or its policy or its data are gone or others by now.
    """
    try:
        predicted = read_predicted(run)
    except RunError as e:
        raise RunError(
            f"counterfactual=true needs the policy that predicted, and {run} is no run of jobs/infer.py. Predict there "
            "with instructions=[permuted,opposite,atomic], or leave counterfactual out."
        ) from e
    from vla_ray.pipelines.infer import infer

    predicted.check_unchanged()
    before, asked = predicted.config, predicted.num_samples
    spread = max(1, math.ceil(asked / config.counterfactual_samples))
    wanted = replace(
        before,
        output_dir=str(run),
        run=COUNTERFACTUAL,
        every=before.every * spread,
        limit=min(config.counterfactual_samples, math.ceil(asked / spread)),
        instructions=("permuted", "opposite", "atomic"),
        samples=0,
        retry_failed=False,
        dry_run=False,
        cluster=config.cluster,
    )
    code = infer(wanted)
    if code:
        raise RunError(f"counterfactual predictions ended with exit code {code}; the lines above say why.")


def newest_predictions(output_dir: str) -> str | None:
    """The newest finished run of inference; None if there is none."""
    runs = []
    root = Location.of(output_dir)
    for entry in root.list() if root.exists() else []:
        if not entry.is_dir:
            continue
        document = read_json(root / entry.name / "run.json")
        if document is not None and document["status"] == "finished" and document["settings"].get("job") == "infer":
            runs.append((document["updated"], str(root / entry.name)))
    return max(runs)[1] if runs else None


def _track(
    config: EvaluateConfig, many: Sequence[Predictions], tables: Sequence[PlainTable], estimates: Mapping[str, Estimate]
) -> None:
    place = many[0].location
    identity = hashlib.sha256(" ".join(str(p.location) for p in many).encode()).hexdigest()[:16]
    directory = place.parent.local_path if place.is_local else Path.cwd()
    name = f"evaluate_{'_'.join(p.name for p in many)}"
    with make_tracker(config.wandb, name, identity, {"results": [str(p.location) for p in many]}, directory) as tracker:
        for table in tables:
            tracker.log_table(table.title, table.columns, table.rows)
        tracker.summarise({metric: asdict(e) for metric, e in estimates.items()})
