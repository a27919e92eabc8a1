"""Which GPU the released model can be fine-tuned on: memory of one training process, by what learns. Computed.

Weights, gradients and optimiser are exact (models/paligemma/cost.py). What a forward pass keeps for its backward was
counted tensor by tensor in passes at the released widths, under bfloat16 autocast, on a CPU: a GPU's kernels keep a
little more or less, and its allocator and context come on top, so that part is an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vla_ray.evaluation.benchmarks.table import aligned
from vla_ray.models.paligemma.cost import (
    count_parameters,
    lora_parameters,
    released_config,
    sharded_bytes,
    training_bytes,
)
from vla_ray.models.paligemma.pretrained import RELEASED

RANK = 16
FSDP_WORKERS = 8
BATCH_SIZE = 8  # what jobs/train.py takes for this model
LAYERS = (27, 18)  # of vision and language
SUFFIX, VOCABULARY = 17, 257_216
# Of the vocabulary's log-probabilities, their gradient, the logits' gradient, all in float32, and that in bfloat16.
BYTES_LOGIT = 14


@dataclass(frozen=True, slots=True)
class Kept:
    """MB of one sample of 293 tokens, as counted: of a layer of each tower, and of all the rest."""

    vision: float
    language: float
    rest: float

    @property
    def bytes(self) -> int:
        return int(1e6 * (LAYERS[0] * self.vision + LAYERS[1] * self.language + self.rest))


@dataclass(frozen=True, slots=True)
class Budget:
    """One way of fine-tuning. Bytes; `kept` and `logits` of one sample.

    Attributes:
        trained: parameters that learn.
        alone: weights, gradients and optimiser of a process that holds all (one GPU, DDP).
        sharded: the same of one of 8 under FSDP, with the embeddings that it gathers in bfloat16.
        passing: for a moment of each step: the head's gradient beside the embeddings', which it is tied to.
        kept: what a forward pass keeps for its backward.
        checkpointed: the same with activations computed again, one layer's included.
    """

    name: str
    overrides: str
    trained: int
    alone: int
    sharded: int
    passing: int
    kept: int
    checkpointed: int
    logits: int

    def total(self, batch_size: int, fsdp: bool, checkpointing: bool) -> int:
        held = self.sharded if fsdp else self.alone
        return held + self.passing + batch_size * (self.logits + (self.checkpointed if checkpointing else self.kept))

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


# (what, overrides, frozen parts, rank, kept, kept with activation checkpointing)
_WAYS: tuple[tuple[str, str, tuple[str, ...], int, Kept, Kept], ...] = (
    (f"LoRA, rank {RANK}", "lora.enabled=true", (), RANK, Kept(0.0, 53.4, 0.4), Kept(0.6, 1.2, 3.1)),
    ("vision frozen", "training.freeze=[vision]", ("vision",), 0, Kept(0.0, 58.0, 5.6), Kept(1.2, 2.4, 6.2)),
    ("everything", "", (), 0, Kept(9.1, 58.0, 8.5), Kept(1.2, 2.4, 7.9)),
)


def budgets() -> tuple[Budget, ...]:
    """Of google/paligemma-3b-*-224 with this package's precisions: float32 masters, bfloat16 where adapters learn."""
    config = released_config()
    counts = count_parameters(config)
    found = []
    for name, overrides, frozen, rank, kept, checkpointed in _WAYS:
        trained = lora_parameters(config, rank) if rank else counts.total - counts.of(frozen)
        found.append(
            Budget(
                name,
                overrides,
                trained,
                training_bytes(config, frozen, rank, frozen_bytes=2 if rank else 4),
                sharded_bytes(config, FSDP_WORKERS, frozen, rank),
                0 if rank else 4 * counts.embeddings,
                kept.bytes,
                checkpointed.bytes + int(1e6 * kept.language),
                BYTES_LOGIT * SUFFIX * VOCABULARY,
            )
        )
    return tuple(found)


def budget_lines(budgets: Sequence[Budget]) -> list[str]:
    """A table in GB (1e9 bytes)."""
    rows = [
        (
            b.name,
            f"{b.trained / 1e6:,.1f} M",
            *(f"{x / 1e9:.1f}" for x in (b.alone, b.sharded, b.passing)),
            *(f"{(b.logits + x) / 1e9:.2f}" for x in (b.kept, b.checkpointed)),
            *(
                f"{b.total(BATCH_SIZE, fsdp, checkpointing) / 1e9:.0f}"
                for fsdp in (False, True)
                for checkpointing in (False, True)
            ),
        )
        for b in budgets
    ]
    recomputed = "recomputed"
    head = (
        *("what learns", "parameters", "state", f"FSDP/{FSDP_WORKERS}", "passing", "a sample", recomputed),
        *(f"batch of {BATCH_SIZE}", recomputed, f"FSDP/{FSDP_WORKERS}", recomputed),
    )
    return [
        f"{RELEASED}: GB (1e9 bytes) of one training process, computed, not measured",
        f"state: weights, gradients, optimiser, on one GPU (or DDP), or with parallel=fsdp over {FSDP_WORKERS}; "
        "passing: tied gradients, for a moment;",
        "a sample: activations and logits of 293 tokens (an estimate), or recomputed by "
        "training.activation_checkpointing=true",
        *aligned([head, *rows]),
    ]
