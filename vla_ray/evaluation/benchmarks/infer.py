"""bench=infer: what our decoding costs beside transformers' `generate`, one prompt at a time and batched.

All sides have the same weights, dtype, device and inputs: resized pictures and collated prompts that are ready on the
device, so reading and collating are in none of them. `generate` is greedy with a cache and writes exactly as many
tokens (least = most), over the whole vocabulary, as the original script let it: restricting it would cost it more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration

from vla_ray.config import BenchmarkConfig
from vla_ray.errors import ConfigError
from vla_ray.evaluation.benchmarks.interleaved import Side, Timing, interleave
from vla_ray.evaluation.benchmarks.pipeline_cost import PipelineCost
from vla_ray.evaluation.benchmarks.subjects import check_sizes
from vla_ray.evaluation.benchmarks.table import Goal, aligned, context, goal_lines
from vla_ray.evaluation.benchmarks.train import SIZES as TRAINING_SIZES
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.cost import released_config
from vla_ray.models.paligemma.inputs import normalise
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.processing import Processor, SpecialIds
from vla_ray.models.paligemma.steps import FixedSteps
from vla_ray.models.paligemma.tiny import CORPUS, build_tiny

OURS = "batched decode"
COMPILED = "batched decode, compiled steps"
PARALLEL = "one pass, all tokens at once"
TOGETHER = "generate, batched"
ONE_BY_ONE = "generate, one by one"
FULL = "full"
SIZES: dict[str, Mapping[str, int]] = {"tiny": {}, "mid": TRAINING_SIZES["mid"].model, FULL: {}}  # of `build_tiny`
JUDGED = ("tiny", FULL)  # mid size on a CPU is reported as it is: the prompt is all its work
LARGE, FASTER = 32, 10.0  # at such a batch so many times as many samples per second as one by one
_TOKENIZER = ActionTokenizer()
_PIPELINES = "both sides read and decode samples, keep pictures, predict and commit rows; start-up is in neither"
_RELEASED_IDS = SpecialIds(image=257152, pad=0, bos=2, eos=1, first_action=256000, placeholder=257024)

Batch = dict[str, Any]  # tensors: what a policy is called with


@dataclass(frozen=True, slots=True)
class Subject:
    """A policy of random weights. `parallel` has the same ones, and decodes in one pass."""

    policy: ActionPolicy
    parallel: ActionPolicy
    processor: Processor

    @property
    def device(self) -> torch.device:
        return self.policy.model.device

    @property
    def description(self) -> str:
        config: Any = self.policy.model.config
        layers = f"{config.vision_config.num_hidden_layers} + {config.text_config.num_hidden_layers} layers"
        return (
            f"{sum(p.numel() for p in self.policy.parameters()) / 1e6:,.1f} M random parameters, {layers}, "
            f"{self.processor.image_tokens} image tokens, {str(self.policy.model.dtype).removeprefix('torch.')} on "
            f"{torch.cuda.get_device_name() if self.device.type == 'cuda' else 'CPU'}"
        )

    def batch(self, first: int, count: int) -> Batch:
        """Prompts of different lengths, each with another picture, on the device; the same numbers give the same."""
        side, own = self.processor.image_size, range(first, first + count)
        pictures = [np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8) for i in own]
        prompts = [self.processor.prompt_ids(CORPUS[i % len(CORPUS)]) for i in own]
        arrays = self.processor.collate(pictures, prompts)
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}


def make_subject(size: str, device: str, scratch: Path) -> Subject:
    """Args: scratch: an existing directory, for files that are made."""
    directory = build_tiny(scratch / size, **SIZES[size])  # type: ignore[arg-type]  # numbers alone
    processor = Processor.from_directory(directory)
    if size == FULL:  # only the text's tokenizer is the tiny one's: its ids are among the released model's
        processor = Processor(processor.tokenizer, _RELEASED_IDS, image_size=224, image_tokens=256)
        model = _released(device)
    else:
        policy = ActionPolicy.from_pretrained(
            directory, _TOKENIZER, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        )
        model = policy.model.to(device)  # type: ignore[arg-type]  # a module's `to`, which transformers wraps
    ids, numbers = processor.ids, (_TOKENIZER.num_bins, _TOKENIZER.num_tokens)
    one, other = (
        ActionPolicy(model, ids.first_action, *numbers, placeholder_id=p).eval().requires_grad_(False)
        for p in (None, ids.placeholder)
    )
    return Subject(one, other, processor)


def _released(device: str) -> PaliGemmaForConditionalGeneration:
    """The architecture of the released 3B model with random weights in bfloat16, made where it will be."""
    torch.manual_seed(0)
    with torch.device(device):
        return PaliGemmaForConditionalGeneration._from_config(released_config(), dtype=torch.bfloat16)


def make_sides(subject: Subject, count: int) -> dict[str, Callable[[], Tensor]]:
    """Name -> what gives int64 [count, T] tokens or bins of `count` prompts on the CPU; ours is the first."""
    batch = subject.batch(0, count)
    alone = [subject.batch(i, 1) for i in range(count)]  # not padded
    sides: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: subject.policy.decode(**batch).bins.cpu(),
        PARALLEL: lambda: subject.parallel.decode(**batch).bins.cpu(),
        TOGETHER: lambda: _generate(subject, batch),
        ONE_BY_ONE: lambda: torch.cat([_generate(subject, one) for one in alone]),
    }
    if subject.device.type == "cuda":
        length, width = batch["ids"].shape[1], subject.policy.num_tokens
        steps = FixedSteps(subject.policy.model.model, count, length, width, compiled=True)
        sides[COMPILED] = lambda: subject.policy.decode(**batch, steps=steps).bins.cpu()
    return sides


@torch.no_grad()
def _generate(subject: Subject, batch: Batch) -> Tensor:
    model: Any = subject.policy.model
    written = model.generate(
        input_ids=batch["ids"],
        pixel_values=normalise(batch["pixels"]),
        attention_mask=batch["mask"],
        token_type_ids=batch["types"],
        min_new_tokens=subject.policy.num_tokens,
        max_new_tokens=subject.policy.num_tokens,
        do_sample=False,
        use_cache=True,
    )
    return written[:, batch["ids"].shape[1] :].cpu()


@dataclass(frozen=True, slots=True)
class OfBatch:
    """All sides on a batch of `count` prompts; ratios are to our time, so that 2 is twice as slow."""

    count: int
    timings: Mapping[str, Timing]

    def rate(self, side: str) -> float:
        """Samples per second."""
        return self.count / self.timings[side].wall_s

    def row(self, side: str) -> tuple[str, ...]:
        t = self.timings[side]
        spread = "-" if side == OURS else f"{t.wall_range[0]:.2f}..{t.wall_range[1]:.2f}"
        rate, each = f"{self.rate(side):,.1f}", f"{1000 / self.rate(side):,.2f} ms"
        return side, str(self.count), rate, each, f"{t.wall:.2f}x", spread, f"{t.cpu:.2f}x"


@dataclass(frozen=True, slots=True)
class OfSize:
    """All batches of one model."""

    name: str
    description: str
    batches: Sequence[OfBatch]

    @property
    def goals(self) -> tuple[Goal, ...]:
        if self.name not in JUDGED:
            return ()
        return tuple(
            Goal(f"{OURS} / {ONE_BY_ONE}, samples/s at {b.count}", b.timings[ONE_BY_ONE].wall, FASTER, at_least=True)
            for b in self.batches
            if b.count == LARGE
        )

    @property
    def lines(self) -> list[str]:
        head = ("", "batch", "samples/s", "a sample", "time", "least..most", "CPU")
        rows = [b.row(side) for b in self.batches for side in b.timings]
        lines = [f"{self.name}: {self.description}", *aligned([head, *rows])]
        return [*lines, "", *goal_lines(self.goals)] if self.goals else lines


@dataclass(frozen=True, slots=True)
class InferCost:
    """The result of the bench. `pipelines` is what pipelines/bench_infer.py adds."""

    context: Mapping[str, str]
    sizes: Sequence[OfSize]
    pipelines: Sequence[PipelineCost] = ()

    @property
    def text(self) -> str:
        return "\n".join(
            [
                f"decoding {_TOKENIZER.num_tokens} action tokens (ratios to batched decode at the same batch; medians)",
                ", ".join(f"{key} {value}" for key, value in self.context.items()),
                "inputs are ready on the device: no side reads or collates; generate is greedy, over the vocabulary",
                *(line for size in self.sizes for line in ("", *size.lines)),
                *(["", _PIPELINES] if self.pipelines else []),
                *(line for cost in self.pipelines for line in ("", *cost.lines)),
            ]
        )

    @property
    def content(self) -> dict[str, object]:
        return {
            "bench": "infer",
            "context": dict(self.context),
            "sizes": {
                size.name: {
                    "description": size.description,
                    "batches": {
                        str(b.count): {
                            side: {"samples_per_s": b.rate(side), "timing": asdict(timing)}
                            for side, timing in b.timings.items()
                        }
                        for b in size.batches
                    },
                    "goals": [goal.to_dict() for goal in size.goals],
                }
                for size in self.sizes
            },
            "pipelines": {cost.name: cost.content for cost in self.pipelines},
        }


def measure(subject: Subject, name: str, counts: Sequence[int], rounds: int) -> OfSize:
    """Time all sides at each batch, interleaved."""
    batches = []
    for count in counts:
        sides = make_sides(subject, count)
        for run_side in sides.values():  # now all are warm
            run_side()
        ours, *others = (Side(side, run_side) for side, run_side in sides.items())
        batches.append(OfBatch(count, interleave(ours, others, rounds)))
    return OfSize(name, subject.description, batches)


def run(config: BenchmarkConfig) -> InferCost:
    """Measure all sizes in this process. ConfigError for the full size without a GPU."""
    sizes = check_sizes(config.size, SIZES)
    device = config.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if FULL in sizes and device != "cuda":
        raise ConfigError(
            f"size={FULL} is the released 3B model: on a CPU a batch of {LARGE} takes many minutes. Run it where there "
            "is a GPU (model.device=cuda), or give size=[tiny,mid]."
        )
    torch.set_num_threads(config.threads)
    measured = []
    for size in sizes:  # one model in memory at a time
        with tempfile.TemporaryDirectory(prefix="vla_ray-benchmark-") as scratch:
            measured.append(measure(make_subject(size, device, Path(scratch)), size, config.batches, config.rounds))
    return InferCost(context(config.threads, config.rounds), measured)
