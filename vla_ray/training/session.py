"""One worker's part in a training run, from its directory to its last checkpoint. Plain torch; Ray only calls it.

What is learnt, what is validated on and where one left off are all read from the run directory, so that a worker that
is started anew needs nothing but the spec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vla_ray.models.paligemma import lora, tokenizer_file
from vla_ray.models.paligemma.cost import flops_per_sample, peak_flops
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.processing import Processor
from vla_ray.storage.files import Location
from vla_ray.training.batches import BatchMaker, MicroBatch
from vla_ray.training.checkpoints import RunFiles
from vla_ray.training.loop import Loop, is_better, state_of
from vla_ray.training.order import Steps
from vla_ray.training.parallel import Workers
from vla_ray.training.spec import TrainSpec, halves_base
from vla_ray.training.validation import choose_samples, validate, validation_set

Stream: TypeAlias = Callable[[BatchMaker, Steps, int, int], Iterator[MicroBatch]]


def local_stream(rank: int = 0) -> Stream:
    """Batches made in this process, one after the other."""

    def stream(maker: BatchMaker, steps: Steps, start: int, total: int) -> Iterator[MicroBatch]:
        for step in range(start, total):
            yield from maker(step, steps.addresses(step, rank)[None])

    return stream


def run_worker(spec: TrainSpec, workers: Workers, stream: Stream) -> None:
    """Train from `last/`, or from the beginning, to the end. All workers call it with the same spec.

    Raises:
        VlaRayError: a damaged or foreign checkpoint, an empty split, out of memory, a loss that is not finite.
    """
    config, files = spec.config, RunFiles(Path(spec.directory))
    if workers.rank == 0:
        files.recover()
    workers.barrier()
    state = files.load_state() if files.last.exists() else None
    if state:
        tokenizer_file.load_tokenizer(
            Location.of(files.last) / tokenizer_file.NAME,
            fingerprint=spec.tokenizer.fingerprint,
            decoding=config.training.decoding,
        )
    source = files.last if state else Path(spec.base)
    torch.manual_seed(config.training.seed)  # of adapters' first weights; the same on all workers
    policy = load_policy(spec, source, workers)
    processor = Processor.from_directory(source, config.model.max_text_length)
    module = workers.wrap(policy, policy.layers())
    steps = spec.steps()
    groups = steps.order.groups
    peak = peak_flops(torch.cuda.get_device_name(workers.device)) if workers.device.type == "cuda" else None
    loop = Loop(module, config.training, workers, spec.total(steps), partial(_flops, policy, spec), peak)
    if state:
        loop.step = state["step"]
        workers.load_optimizer(module, loop.optimizer, state["optimizer"])
    maker = BatchMaker(spec.dataset, groups, processor, spec.tokenizer, config.augment, config.training.seed)
    hooks = _Hooks(spec, files, workers, loop, policy, maker, state)
    if workers.rank == 0:
        files.cut_logs(loop.step)
    workers.barrier()
    loop.run(stream(maker, steps, loop.step, loop.total), hooks)


def load_policy(spec: TrainSpec, source: Path, workers: Workers) -> ActionPolicy:
    """The policy of a directory, with what learns in it set to learn."""
    config = spec.config
    policy = ActionPolicy.from_pretrained(
        source,
        spec.tokenizer,
        dtype=torch.bfloat16 if workers.bfloat16 and halves_base(config) else torch.float32,
        loss_over=config.training.loss_over,
        base=_base_of(spec, source),
        decoding=config.training.decoding,
    )
    if not config.lora.enabled:
        policy.model = lora.merged(policy.model)
        policy.requires_grad_(True)
        policy.freeze(config.training.freeze)
    elif lora.has_adapters(policy.model):
        lora.check_rank(policy.model, config.lora.rank)
    else:
        torch.manual_seed(config.training.seed)  # the same adapters on all workers
        lora.add_adapters(policy.model, config.lora.rank, config.lora.alpha, config.lora.dropout)
    if config.training.activation_checkpointing:
        policy.checkpoint_activations()
    return policy


def _base_of(spec: TrainSpec, source: Path) -> str | None:
    """Where the base of adapters is. Those of this run know it too, but runs get moved."""
    own = source != Path(spec.base) and (Path(spec.base) / "config.json").is_file()
    return spec.base if own else None


def merge_best(spec: TrainSpec) -> None:
    """Write `merged/`: `best_model/` with its adapters folded into the weights. Takes memory for two models."""
    files = RunFiles(Path(spec.directory))
    policy = ActionPolicy.from_pretrained(files.best, spec.tokenizer, base=_base_of(spec, files.best))

    def write(directory: Path) -> None:
        policy.save_merged(directory)
        location = Location.of(directory) / tokenizer_file.NAME
        tokenizer_file.save_tokenizer(location, spec.tokenizer, policy.first_action_id, policy.decoding)

    files.save_merged(write)


def _flops(policy: ActionPolicy, spec: TrainSpec, tokens: float) -> float:
    """Of one sample of so many tokens."""
    rank = spec.config.lora.rank if spec.config.lora.enabled else 0
    frozen = spec.config.training.freeze
    return flops_per_sample(policy.model.config, round(tokens), spec.tokenizer.num_tokens + 1, frozen, rank)


class _Hooks:
    """Logs, validates and saves. Collective where weights or sums are; only the first worker writes."""

    def __init__(
        self,
        spec: TrainSpec,
        files: RunFiles,
        workers: Workers,
        loop: Loop,
        policy: ActionPolicy,
        maker: BatchMaker,
        state: dict[str, Any] | None,
    ) -> None:
        self.spec, self.files, self.workers, self.loop = spec, files, workers, loop
        self.policy = policy
        self.best: dict[str, float] | None = state["best"] if state else None
        self.saved_step = loop.step if state else -1
        settings, data = spec.config.training, spec.config.data
        samples = choose_samples(spec.dataset, data.val_split, settings.eval_samples)
        median = spec.dataset.statistics[data.train_split].median_step
        self.data = validation_set(maker, samples, settings, workers, median)

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.workers.rank == 0:
            self.files.append_log({"step": step, "total": self.loop.total, "kind": "train", **values})

    def validate(self, step: int) -> None:
        metrics, examples = validate(self.policy, self.data, self.spec.tokenizer, self.workers)
        self.workers.settle(self.loop.module)
        better = is_better(metrics["loss"], self.best)
        if self.workers.rank == 0:
            line = {"step": step, "total": self.loop.total, "kind": "validation", "best": better, **metrics}
            self.files.append_log(line)
            self.files.append_examples({"step": step, "examples": examples})
        if better:
            self.best = {"step": step, **metrics}
            self.save(step)
            if self.workers.rank == 0:
                self.files.copy_last_to_best()
            self.workers.barrier()

    def save(self, step: int) -> None:
        if step == self.saved_step:
            return
        state = state_of(self.loop, self.best)
        weights = self.workers.model_state(self.loop.module, trained_only=self.spec.config.lora.enabled)
        if self.workers.rank == 0:
            self.files.save_last(lambda directory: self._write(directory, weights), state)
        self.saved_step = step
        self.workers.barrier()

    def _write(self, directory: Path, weights: dict[str, Tensor]) -> None:
        self.policy.save(directory, weights)
        location = Location.of(directory) / tokenizer_file.NAME
        policy = self.policy
        tokenizer_file.save_tokenizer(location, self.spec.tokenizer, policy.first_action_id, policy.decoding)
