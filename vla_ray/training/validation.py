"""How well a policy does on samples it does not learn from, and whether it listens.

Loss and token accuracy come from teacher forcing, ADE and FDE from decoded trajectories: in units and, where the scale
is known, in metres. The same pictures with the instructions of others show how much of the skill is language
(`language_use` = (ADE permuted - ADE) / ADE permuted, as diff_l1 of catglossop/cast-vla). Standing still and
going straight are what no model is needed for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vla_ray.config.train import TrainingConfig
from vla_ray.data.cast.instructions import permuted
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.trajectory import ade, fde, positions, still, straight
from vla_ray.data.prepared import PreparedDataset
from vla_ray.data.prepared import samples as to_samples
from vla_ray.errors import DataError
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.training.batches import BatchMaker, MicroBatch
from vla_ray.training.parallel import Workers
from vla_ray.training.spec import check_actions
from vla_ray.training.tensors import inputs

EXAMPLES = 16


@dataclass(frozen=True, slots=True)
class ValidationSet:
    """One worker's share. `permuted` has the same pictures and targets as `decoded`, with others' instructions."""

    batches: tuple[MicroBatch, ...]
    decoded: tuple[MicroBatch, ...]
    permuted: tuple[MicroBatch, ...]
    samples: tuple[Sample, ...]  # of `decoded`, in order
    median_step: float


def choose_samples(dataset: PreparedDataset, split: str, count: int) -> list[Sample]:
    """`count` samples spread evenly over a split, in its order. DataError if it is empty or lacks actions."""
    groups = [
        (number, group, rows)
        for number, file in enumerate(dataset.files)
        if file.split == split
        for group, rows in enumerate(file.row_groups)
    ]
    ends = np.cumsum([rows for _, _, rows in groups])
    if not groups:
        known = dataset.splits
        raise DataError(
            f"{dataset.location} has no samples of the split {split!r}; it has {', '.join(known)}. Set data.val_split, "
            "or prepare it with split_by=recording."
        )
    check_actions(dataset, split)
    chosen = np.unique(np.linspace(0, ends[-1] - 1, count).astype(int))
    within = np.searchsorted(ends, chosen, side="right")
    found: list[Sample] = []
    for index in np.unique(within).tolist():
        number, group, rows = groups[index]
        mine = chosen[within == index] - (ends[index] - rows)
        found += to_samples(dataset.read_group(dataset.files[number], group).take(mine))
    return found


def validation_set(
    maker: BatchMaker,
    samples: Sequence[Sample],
    settings: TrainingConfig,
    workers: Workers,
    median_step: float,
) -> ValidationSet:
    """This worker's share of the samples; every worker gets as many, as all must take part in each pass."""
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(settings.eval_decode, len(samples))).astype(int))
    other = permuted([samples[i].instruction for i in chosen], settings.seed)
    all_mine = _share(list(range(len(samples))), workers)
    decoded = _share(list(range(len(chosen))), workers)
    size = settings.batch_size

    def build(numbers: Sequence[int], texts: Sequence[str] | None, prompts_only: bool) -> tuple[MicroBatch, ...]:
        return tuple(
            maker.plain(
                [samples[i] for i in numbers[at : at + size]],
                None if texts is None else texts[at : at + size],
                prompts_only,
            )
            for at in range(0, len(numbers), size)
        )

    mine = [int(chosen[i]) for i in decoded]
    return ValidationSet(
        build(all_mine, None, prompts_only=False),
        build(mine, None, prompts_only=True),
        build(mine, [other[i] for i in decoded], prompts_only=True),
        tuple(samples[i] for i in mine),
        median_step,
    )


def _share(numbers: list[int], workers: Workers) -> list[int]:
    if len(numbers) < workers.size:  # too few to share: all see all, and all count the same
        return numbers
    return numbers[workers.rank : len(numbers) - len(numbers) % workers.size : workers.size]


@torch.no_grad()
def validate(
    policy: ActionPolicy, data: ValidationSet, tokenizer: ActionTokenizer, workers: Workers
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics over all workers' shares, and examples of this one's (`EXAMPLES` predicted trajectories)."""
    was_training = policy.training
    policy.eval()
    try:
        loss, correct, tokens = 0.0, 0.0, 0.0
        with workers.autocast():
            for batch in data.batches:
                found = policy(**inputs(batch, workers.device))
                loss += float(found.loss) * found.tokens
                correct += float(found.correct)
                tokens += found.tokens
            predicted = _decode(policy, data.decoded, tokenizer, workers)
            misled = _decode(policy, data.permuted, tokenizer, workers)
    finally:
        policy.train(was_training)
    target = np.concatenate([b.actions for b in data.decoded])
    scale = np.concatenate([b.scale_m for b in data.decoded])
    known = np.isfinite(scale)
    parts = {
        "ade": ade(predicted, target),
        "fde": fde(predicted, target),
        "ade_m": (ade(predicted, target) * scale)[known],
        "fde_m": (fde(predicted, target) * scale)[known],
        "ade_permuted": ade(misled, target),
        "ade_still": ade(still(target), target),
        "ade_straight": ade(straight(target, data.median_step), target),
    }
    pairs = [(loss, tokens), (correct, tokens), *((float(v.sum()), float(len(v))) for v in parts.values())]
    sums = workers.sum([x for pair in pairs for x in pair])
    means = [a / b if b else float("nan") for a, b in zip(sums[::2], sums[1::2], strict=True)]
    metrics = dict(zip(("loss", "token_accuracy", *parts), means, strict=True))
    metrics["language_use"] = 1 - metrics["ade"] / metrics["ade_permuted"] if metrics["ade_permuted"] else 0.0
    return metrics, _examples(data.samples, predicted, target)


def _decode(
    policy: ActionPolicy, batches: Sequence[MicroBatch], tokenizer: ActionTokenizer, workers: Workers
) -> NDArray[np.float32]:
    """[samples, H, 2] predicted deltas in units."""
    bins = [policy.decode(**inputs(batch, workers.device)).bins for batch in batches]
    return tokenizer.decode(torch.cat(bins).cpu().numpy())


def _examples(
    samples: Sequence[Sample], predicted: NDArray[np.float32], target: NDArray[np.float32]
) -> list[dict[str, Any]]:
    rows: list[Mapping[str, Any]] = [
        {
            "sample_id": sample.sample_id,
            "instruction": sample.instruction,
            "predicted": positions(p).round(3).tolist(),
            "target": positions(t).round(3).tolist(),
            "ade": float(ade(p, t)),
        }
        for sample, p, t in zip(samples[:EXAMPLES], predicted, target, strict=False)
    ]
    return [dict(row) for row in rows]
