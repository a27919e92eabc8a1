"""Fine-tune a policy: check everything first, train on Ray, say what came of it.

The run directory has a lease, settings and a status as every run has; training itself goes on from `last/`. Workers
write `logs/`; this process reads them, for the screen and for W&B, so that neither can disturb training.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import OmegaConf

from vla_ray.config.train import TINY, TrainConfig
from vla_ray.data.prepared import DOCUMENT, PreparedDataset, samples
from vla_ray.errors import ConfigError, RunError, VlaRayError
from vla_ray.models.paligemma.actions import AUTOREGRESSIVE, ActionTokenizer
from vla_ray.pipelines.stopping import Stopped, resume_command, sigterm_stops
from vla_ray.storage.files import Location
from vla_ray.storage.lease import Lease
from vla_ray.storage.run import RunDirectory, file_identity
from vla_ray.tracking import make_tracker
from vla_ray.training.checkpoints import RunFiles
from vla_ray.training.run_log import RunLog
from vla_ray.training.spec import TrainSpec, fit_tokenizer

logger = logging.getLogger(__name__)

POLL_S = 0.5
# How often something is written, and how a batch is split up, does not change what is learnt.
_HARMLESS = ("logging_steps", "save_steps", "eval_steps", "eval_samples", "eval_decode", "activation_checkpointing")
_IN_GLOBAL_BATCH = ("batch_size", "gradient_accumulation_steps")


def train(config: TrainConfig) -> int:
    """Train, or go on, or say that nothing is left to do. Returns the exit code (0 fine, 130 or 143 stopped).

    Raises:
        VlaRayError: a setting, dataset or model that does not fit. What was learnt before stays in `last/`.
    """
    if config.data.path is None:
        raise ConfigError("data.path is empty; give a prepared dataset (python jobs/prepare_cast.py makes one).")
    dataset = PreparedDataset.open(config.data.path)
    known = _learnt_tokenizer(config)
    tokenizer = fit_tokenizer(config.action, dataset, config.data.train_split, config.augment.mirror > 0, known)
    return _Training(config, dataset, tokenizer).execute()


def _learnt_tokenizer(config: TrainConfig) -> ActionTokenizer | None:
    """Of the checkpoint that training starts from, if it is one: its tokens must not change their meaning."""
    directory = Path(config.model.name)
    if not (directory / "tokenizers.pt").is_file():
        return None
    from vla_ray.models.paligemma.tokenizer_file import load_tokenizer

    location = Location.of(directory) / "tokenizers.pt"
    tokenizer = load_tokenizer(location, num_bins=config.action.vocab_size, num_steps=config.action.num_steps)
    logger.info("action tokens as %s has learnt them", directory)
    return tokenizer


def check_settings(config: TrainConfig) -> None:
    """Refuse what no dataset could make right: the place, the model, the machine. Nothing is written or started.

    Raises:
        VlaRayError: output_dir, model.name, workers or model.device cannot be used.
    """
    import ray  # takes seconds, as the next do; a refusal of a dataset should not
    import torch

    from vla_ray.cluster import Cluster
    from vla_ray.models.paligemma.processing import Processor
    from vla_ray.training.base import prepare_base
    from vla_ray.training.trainer import share_out

    location = _output(config)
    name = config.model.name
    if name != TINY and (Path(name).is_dir() or Path(name).is_absolute() or "/" not in name):  # else on the hub
        base = prepare_base(config, RunFiles(location.local_path))
        Processor.from_directory(base, config.model.max_text_length)
    address = config.cluster.address or os.environ.get("RAY_ADDRESS", "local")
    if address == "local" and not ray.is_initialized():
        cpus = config.cluster.num_cpus or os.cpu_count() or 1
        expected = Cluster(True, cpus, torch.cuda.device_count(), memory_bytes=0, largest_node_cpus=cpus)
        share_out(expected, config.workers, config.data.num_workers, _device(config, expected.num_gpus))


def _device(config: TrainConfig, gpus: float) -> str:
    """`auto` never trains a large model on CPUs because a GPU too few is there: that is refused. The tiny one may."""
    if config.model.device == "auto" and gpus and config.model.name != TINY:
        return "cuda"
    return config.model.device


def _output(config: TrainConfig) -> Location:
    scheme, separator, _ = config.output_dir.partition("://")
    if separator and scheme.lower() != "file":  # no store is asked: it could not be used anyway
        raise ConfigError(
            f"output_dir={config.output_dir}: checkpoints are written to a disk that all workers see, not to "
            f"{scheme}://. Give a path."
        )
    return Location.of(config.output_dir)


@dataclass(slots=True)
class _Training:
    config: TrainConfig
    dataset: PreparedDataset
    tokenizer: ActionTokenizer

    def execute(self) -> int:
        run = self._open()
        files = RunFiles(run.location.local_path)
        log = RunLog(files)
        manifest = f"{self.dataset.fingerprint} {self.tokenizer.fingerprint}"
        if run.is_finished(manifest):
            logger.info("run %s is finished: nothing to do", run.location.name)
            sys.stdout.write(log.conclusion())
            return 0
        check_settings(self.config)
        from vla_ray.training.base import prepare_base, report_plan
        from vla_ray.training.session import merge_best
        from vla_ray.training.validation import choose_samples

        is_tiny = self.config.model.name == TINY
        where = str(files.initial) if is_tiny else self.config.model.name
        spec = TrainSpec(self.config, str(files.directory), where, self.dataset, self.tokenizer)
        steps = spec.steps()
        steps.addresses(0, 0)  # weights that name nothing
        choose_samples(self.dataset, self.config.data.val_split, 1)
        if self.config.dry_run:
            with TemporaryDirectory() as scratch:
                if is_tiny:
                    spec = replace(spec, base=str(prepare_base(self.config, RunFiles(Path(scratch)))))
                sys.stdout.write(report_plan(spec))
            return 0
        if not is_tiny:
            spec = replace(spec, base=str(prepare_base(self.config, files)))  # a download may take long
        with Lease.acquire(run.location, command=shlex.join(["python", *sys.argv])) as lease, sigterm_stops():
            if is_tiny:
                prepare_base(self.config, files)
            total = spec.total(steps)
            run.start({"manifest": manifest, "frames": self.dataset.rows(self.config.data.train_split), "targets": []})
            logger.info(
                "%s: %d steps of %d samples, %d of %d done", run.location, total, steps.global_batch, log.step, total
            )
            if not self.config.run:
                logger.info("should it be interrupted: %s", resume_command({"run": run.location.name}))
            self._report_data()
            try:
                self._train(spec, run, log)
            except KeyboardInterrupt as e:
                with suppress(VlaRayError):
                    lease.check()
                    run.update(status="stopped", counts={"steps": log.step})
                logger.warning("stopped; to go on: %s", resume_command({"run": run.location.name}))
                return Stopped.exit_code(e)
            except BaseException as e:
                with suppress(VlaRayError):
                    lease.check()
                    run.update(status="failed", counts={"steps": log.step})
                if isinstance(e, VlaRayError) and files.last.exists():
                    again = resume_command({"run": run.location.name})
                    raise type(e)(f"{e} {files.last} is kept; to go on: {again}") from e
                raise
            if self.config.lora.enabled and self.config.lora.merged:
                merge_best(spec)
            lease.check()
            run.update(status="finished", counts={"steps": total})
        sys.stdout.write(log.conclusion())
        return 0

    def _report_data(self) -> None:
        """What the action tokens lose, and what is odd about the data."""
        data, dataset, tokenizer = self.config.data, self.dataset, self.tokenizer
        first = next(file for file in dataset.files if file.split == data.train_split)
        trip = tokenizer.round_trip([s.actions for s in samples(dataset.read_group(first, 0))])
        (x0, y0), (x1, y1) = tokenizer.limits()
        clipped = tokenizer.clip_rate(dataset.statistics[data.train_split])
        logger.info(
            "%d bins for x %.2f to %.2f, y %.2f to %.2f units: %.2f %% and %.2f %% lie outside, RMSE %.4f",
            *(tokenizer.num_bins, x0, x1, y0, y1, *(100 * clipped), trip.rmse),
        )
        if data.weights:
            left_out = sorted({f.dataset for f in dataset.files if f.split == data.train_split} - set(data.weights))
            if left_out:
                logger.warning("data.weights leaves out %s", ", ".join(left_out))
        if data.val_split == data.train_split:
            logger.warning("validating on what is trained on: data.val_split=%s", data.val_split)
        shared = dataset.document["recordings"].get("shared")
        if shared:
            logger.warning("%s recordings are in more than one split; split_by=recording separates them", shared)

    def _open(self) -> RunDirectory:
        config = self.config
        run = RunDirectory.open(
            _output(config),
            config.run or time.strftime("train_%y%m%d_%H%M%S"),
            settings={"job": "train", **result_settings(config)},
            checkpoints={"data.path": file_identity(self.dataset.location / DOCUMENT)},
            config_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)),
            command=shlex.join(["python", *sys.argv]),
            overrides=sys.argv[1:],
        )
        if (run.location / "last").exists() and run.is_new:
            raise RunError(
                f"{run.location} holds a last/ but no run.json: it is no run of this job. Give another run=NAME."
            )
        return run

    def _train(self, spec: TrainSpec, run: RunDirectory, log: RunLog) -> None:
        """On Ray, in a thread of its own: in the main one Ray Train would take over the signals."""
        import ray

        from vla_ray.cluster import connect
        from vla_ray.training.trainer import fit, share_out, stop

        config = self.config
        identity = hashlib.sha256(f"{run.location} {run.document['created']}".encode()).hexdigest()[:16]
        settings = {**result_settings(config), "workers": config.workers, "parallel": config.parallel}
        fitting: Future[None] | None = None
        try:
            with (
                connect(config.cluster) as cluster,
                make_tracker(config.wandb, run.location.name, identity, settings, Path(spec.directory)) as tracker,
            ):
                shares = share_out(cluster, config.workers, config.data.num_workers, _device(config, cluster.num_gpus))
                if cluster.num_gpus and config.model.device == "auto" and not shares.gpu:
                    logger.warning(
                        "training on CPUs: each of workers=%d needs a GPU, there are %g",
                        config.workers,
                        cluster.num_gpus,
                    )
                thread = ThreadPoolExecutor(1, thread_name_prefix="fit")
                fitting = thread.submit(fit, spec, shares)
                thread.shutdown(wait=False)
                while not wait_for([fitting], timeout=POLL_S).done:
                    log.follow(tracker)
                log.follow(tracker)
                fitting.result()
                tracker.summarise(log.best or {})
        finally:
            if fitting is not None and not fitting.done() and ray.is_initialized():
                stop(spec)  # somebody else's Ray, as in a notebook: training would go on without us
                wait_for([fitting])


def result_settings(config: TrainConfig) -> dict[str, Any]:
    """Every setting that changes what is learnt, flat. Batches count by their size over all workers."""
    groups = {
        name: asdict(getattr(config, name)) for name in ("model", "action", "data", "augment", "lora", "training")
    }
    del (
        groups["model"]["device"],
        groups["data"]["num_workers"],
        groups["data"]["path"],
        groups["action"]["max_clip_rate"],
        groups["lora"]["merged"],
    )
    for name in (*_HARMLESS, *_IN_GLOBAL_BATCH):
        del groups["training"][name]
    if groups["training"]["decoding"] == AUTOREGRESSIVE:
        del groups["training"]["decoding"]  # runs from when there was no other do not say so
    flat = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
    return {**flat, "global_batch": config.global_batch}
