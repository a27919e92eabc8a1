"""The infer job: a policy, the samples of a dataset, what is missing -> replicas -> rows -> predictions.

The same road as a capture (pipelines/driver.py): every (sample, variant of its instruction) exactly once, whatever is
killed; a finished run is recognised without Ray. Data that is not prepared yet is prepared first, once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from omegaconf import OmegaConf

from vla_ray.config import InferConfig, PrepareConfig, resolve_path
from vla_ray.config.prepare import ActionStepsConfig
from vla_ray.config.train import TINY
from vla_ray.data.prepared import DOCUMENT, PreparedDataset
from vla_ray.data.sample_refs import PERMUTED, SampleRef, parse_variants, sample_refs
from vla_ray.errors import DataError
from vla_ray.models.paligemma.actions import UNITS, ActionTokenizer
from vla_ray.models.paligemma.tokenizer_file import NAME, load_tokenizer
from vla_ray.models.paligemma.trained import find_checkpoint, identities
from vla_ray.pipelines.driver import Driver, Job, Todo
from vla_ray.pipelines.predicted import read_predicted
from vla_ray.schema import PREDICTIONS
from vla_ray.stages.decode_samples import IMAGES
from vla_ray.stages.predictions import CSV, PARQUET, write_predictions
from vla_ray.stages.work import Summary
from vla_ray.storage.files import Location
from vla_ray.storage.run import file_identity

logger = logging.getLogger(__name__)

MAX_BATCH = 32  # prompts are short: more hardly pays on a CPU, and a GPU is asked for more with batch_size
_DEFAULT_SPLIT = "val"


def remembered(config: InferConfig) -> InferConfig:
    """With the policy and the source of the run of this name, where it exists and nothing else was named.

    The newest policy may be another one by the time that a run is resumed.

    Raises:
        RunError: the run is of another kind.
    """
    if config.run is None or not (location := Location.of(config.output_dir) / config.run / "run.json").exists():
        return config
    before = read_predicted(location.parent).config
    if config.model.name == TINY:
        known = before.model
        model = replace(config.model, name=known.name, base=known.base, tokenizers=known.tokenizers)
        config = replace(config, model=model)
    return config if config.source else replace(config, source=before.source)


def infer(config: InferConfig) -> int:
    """Predict or resume; returns the exit code (0 fine, 1 too many failed samples, 130 or 143 stopped).

    Raises:
        VlaRayError: a setting, dataset or policy that cannot be used, each in one line.
    """
    variants = parse_variants(config.instructions)
    directory = find_checkpoint(config.model.name, config.model.tokenizers)
    tokenizer = load_tokenizer(Location.of(config.model.tokenizers or directory / NAME))
    dataset = open_dataset(config, tokenizer.num_steps)
    split = _split(dataset, config.split)
    refs = sample_refs(dataset, split, config.every, config.limit, config.seed if PERMUTED in variants else None)
    driver = Driver(_job(config, directory, dataset, split, refs, variants))
    if driver.is_finished:
        code = driver.report_finished()
        if not config.dry_run and not _is_exported(driver):
            _export(driver, dataset, tokenizer, config)
        _say_where(driver.location)
        return code
    from vla_ray.pipelines.policy_work import PolicyWork  # transformers and Ray: only when there is work
    from vla_ray.stages.infer import InferSpec, PredictReplica
    from vla_ray.stages.policy import PolicySpec

    work = PolicyWork(config, config.model, directory)
    if config.dry_run:
        facts = [
            f"policy: {directory} ({work.parameters / 1e6:,.1f} M parameters, {tokenizer.num_steps} steps)",
            f"samples: split {split} of {dataset.location}",
        ]
        return driver.report_dry_run(facts)

    def predict(todo: Todo) -> Generator[Summary, None, None]:
        spec = InferSpec(config.decode, config.model.steps, config.samples, config.temperature, config.seed)

        def make_replica(policy: PolicySpec) -> partial[PredictReplica]:
            return partial(PredictReplica, spec, policy)

        keep = todo.location if config.images else None
        yield from work.run(todo, "PaliGemmaInfer", keep, MAX_BATCH, make_replica, 1 + config.samples)

    logger.info("policy %s on %s (%s)", directory, dataset.location, split)
    code = driver.execute(predict)
    if code in (0, 1):
        _export(driver, dataset, tokenizer, config)
        _say_where(driver.location)
    return code


def open_dataset(config: InferConfig, num_steps: int) -> PreparedDataset:
    """The prepared dataset of a source, which is prepared now unless it is one.

    Raises:
        DataError: it cannot be read, or has other steps than the policy.
    """
    assert config.source is not None
    location = Location.of(resolve_path(config.source))
    if not (location / DOCUMENT).exists():
        location = _prepared(config, num_steps)
    dataset = PreparedDataset.open(location)
    if dataset.horizon != num_steps:
        raise DataError(
            f"{dataset.location} has actions of {dataset.horizon} steps, the policy predicts {num_steps}. Prepare its "
            f"source again with action.num_steps={num_steps}, or give another policy."
        )
    return dataset


def _prepared(config: InferConfig, num_steps: int) -> Location:
    from vla_ray.pipelines.prepare_cast import default_name, prepare_cast

    assert config.source is not None
    place = hashlib.sha256(resolve_path(config.source).encode()).hexdigest()[:8]
    name = f"{default_name(config.source)}-{place}-{num_steps}"
    settings = PrepareConfig(
        source=config.source,
        output_dir=f"{config.data.cache_dir}/prepared",
        name=name,
        targets="optional",  # logs of a robot have none
        action=ActionStepsConfig(num_steps),
        data=config.data,
        cluster=config.cluster,
    )
    location = Location.of(settings.output_dir) / name
    code = prepare_cast(settings)
    if code:
        raise DataError(
            f"{config.source} could not be prepared (exit code {code}; the lines above say why). "
            "Prepare it with jobs/prepare_cast.py, then give the dataset as source."
        )
    return location


def _split(dataset: PreparedDataset, asked: str) -> str:
    if asked == _DEFAULT_SPLIT and len(dataset.splits) == 1 and asked not in dataset.splits:
        logger.info("%s has one split only, %s: using it", dataset.location, dataset.splits[0])
        return dataset.splits[0]
    return asked


def _job(
    config: InferConfig,
    directory: Path,
    dataset: PreparedDataset,
    split: str,
    refs: Sequence[SampleRef],
    variants: Sequence[str],
) -> Job:
    drawn = config.samples > 0
    return Job(
        name="infer",
        output_dir=config.output_dir,
        run=config.run or time.strftime("infer_%y%m%d_%H%M%S"),
        frames=refs,
        targets=variants,
        mode="action",
        settings={
            "split": split,
            "decode": config.decode,
            "samples": config.samples,
            "temperature": config.temperature if drawn else None,
            "seed": config.seed,  # also of permuted instructions, by which a run may grow later
            "model.dtype": config.model.dtype,
            "model.max_text_length": config.model.max_text_length,
        },
        checkpoints={
            "source": file_identity(dataset.location / DOCUMENT),
            **{f"model/{name}": value for name, value in identities(directory, config.model.tokenizers).items()},
        },
        config_yaml=OmegaConf.to_yaml(OmegaConf.structured(config.named(str(directory), str(dataset.location)))),
        max_error_rate=config.max_error_rate,
        retry_failed=config.retry_failed,
        wandb=config.wandb,
        schema=PREDICTIONS,
        key=("sample", "instruction"),
        directory=IMAGES,
    )


def _export(driver: Driver, dataset: PreparedDataset, tokenizer: ActionTokenizer, config: InferConfig) -> None:
    split = "train" if "train" in dataset.statistics else next(iter(dataset.statistics))
    statistics = dataset.statistics[split]
    metadata = {
        "units": UNITS,
        "num_steps": str(tokenizer.num_steps),
        "num_bins": str(tokenizer.num_bins),
        "action_tokenizer": json.dumps(tokenizer.to_dict()),
        "decode": config.decode,
        "checkpoint": config.model.name,
        "dataset": str(dataset.location),
        **({"median_step": f"{statistics.median_step:.6g}", "median_split": split} if statistics.count else {}),
    }
    write_predictions(driver.location, tokenizer.num_steps, metadata)


def _is_exported(driver: Driver) -> bool:
    """Whether a finished run has its tables: its driver may have been killed just before they were written."""
    table = driver.location / PARQUET
    if not (driver.location / CSV).exists() or not table.exists():
        return False
    with table.open_input() as stream:
        statuses = pq.ParquetFile(stream).read(columns=["status"])["status"].to_pylist()
    counts = {status: n for status, n in driver.run.document["counts"].items() if n}
    return Counter(statuses) == counts


def _say_where(run: Location) -> None:
    sys.stdout.write(f"  tables   {run / CSV}, {PARQUET}\n  evaluate python jobs/evaluate.py results={run / CSV}\n")
