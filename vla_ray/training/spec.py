"""What a training run is: settings, samples, the model it starts from, and what its action tokens mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vla_ray.config.train import ActionConfig, TrainConfig
from vla_ray.data.prepared import PreparedDataset
from vla_ray.errors import ConfigError, DataError
from vla_ray.models.paligemma.actions import ActionNormalizer, ActionTokenizer
from vla_ray.training.order import Group, SampleOrder, Steps


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """All that a worker needs; picklable.

    Attributes:
        directory: of the run, seen by all workers.
        base: directory of the model that training starts from.
    """

    config: TrainConfig
    directory: str
    base: str
    dataset: PreparedDataset
    tokenizer: ActionTokenizer

    def computes_in_bfloat16(self, device: torch.device) -> bool:
        precision = self.config.training.precision
        return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")

    def order(self) -> SampleOrder:
        data = self.config.data
        return SampleOrder(
            groups_of(self.dataset, data.train_split), self.config.training.seed, data.window, data.weights
        )

    def steps(self) -> Steps:
        t = self.config.training
        return Steps(self.order(), t.batch_size, t.gradient_accumulation_steps, self.config.workers)

    def total(self, steps: Steps) -> int:
        t = self.config.training
        return t.max_steps or steps.total(t.num_epochs)


def halves_base(config: TrainConfig) -> bool:
    """Whether, where bfloat16 is computed in, frozen weights lie in it too: under adapters they need no float32 master.
    FSDP cannot mix dtypes in a unit."""
    return config.lora.enabled and config.training.precision != "float32" and config.parallel != "fsdp"


def groups_of(dataset: PreparedDataset, split: str) -> tuple[Group, ...]:
    return tuple(
        Group(number, index, rows, file.dataset)
        for number, file in enumerate(dataset.files)
        if file.split == split
        for index, rows in enumerate(file.row_groups)
    )


def check_actions(dataset: PreparedDataset, split: str) -> None:
    """DataError if samples of a split have none, as logs of a robot. The dataset has no padded samples."""
    lacking = dataset.without_actions(split)
    if lacking:
        raise DataError(
            f"{lacking:,} of the {dataset.rows(split):,} samples of the split {split!r} of {dataset.location} have no "
            "actions, so they cannot be learnt or validated on. Give another dataset, or prepare one of samples with "
            "actions, with targets=required; jobs/infer.py predicts for the others."
        )


def fit_tokenizer(
    action: ActionConfig,
    dataset: PreparedDataset,
    split: str,
    mirrored: bool = False,
    known: ActionTokenizer | None = None,
) -> ActionTokenizer:
    """The action tokenizer for the actions of a split.

    Args:
        mirrored: training will also see the actions with y negated.
        known: what the model that training starts from has learnt; its tokens keep their meaning.

    Raises:
        DataError: the split is empty, its samples have another number of steps, or no actions.
        ConfigError: the bounds cut off more than `max_clip_rate` of the actions.
    """
    if not dataset.rows(split):
        raise DataError(
            f"{dataset.location} has no samples of the split {split!r} to train on, but of "
            f"{', '.join(dataset.splits)}. Set data.train_split."
        )
    if dataset.horizon != action.num_steps:
        raise DataError(
            f"{dataset.location} has actions of {dataset.horizon} steps, action.num_steps is {action.num_steps}. Set "
            f"action.num_steps={dataset.horizon}, or prepare it again with action.num_steps={action.num_steps}."
        )
    if dataset.document["options"]["padding"] == "keep":
        raise DataError(
            f"{dataset.location} was prepared with padding=keep: a policy would learn to stop where a recording ends. "
            "Prepare it with padding=drop under another name."
        )
    check_actions(dataset, split)
    statistics = dataset.statistics[split].with_mirror() if mirrored else dataset.statistics[split]
    tokenizer = known
    if tokenizer is None:
        normalizer = ActionNormalizer.from_statistics(statistics, action.normalizer)
        tokenizer = ActionTokenizer(action.vocab_size, action.num_steps, normalizer, action.action_bounds)
    clipped = tokenizer.clip_rate(statistics)
    if clipped.max() > action.max_clip_rate:
        low, high = tokenizer.limits()
        raise ConfigError(
            f"{clipped[0]:.1%} of x and {clipped[1]:.1%} of y of the training actions lie outside the bounds "
            f"x {low[0]:.2f}..{high[0]:.2f}, y {low[1]:.2f}..{high[1]:.2f} (units), more than action.max_clip_rate="
            f"{action.max_clip_rate:g}. Use action.normalizer=quantile, widen action.action_bounds, or raise the limit."
        )
    return tokenizer
