"""bench=relevance: what relevance costs beside a plain forward and backward pass of the same model.

Every side explains the same scalar of the same frame with the same fixed text; they differ in what is kept of
attention: nothing, relevance folded on the way, or every matrix, reduced or full, in memory or through a file. Several
targets share a visit's forward pass; as real runs also share the text that is written there, that is measured as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_ray.attention import IMPLEMENTATION, AttentionRecorder
from vla_ray.config import BenchmarkConfig, CaptureConfig, ModelConfig
from vla_ray.evaluation.benchmarks.interleaved import Side, Timing, interleave
from vla_ray.evaluation.benchmarks.memory import peak_bytes
from vla_ray.evaluation.benchmarks.subjects import Subject, check_sizes, make_subject
from vla_ray.evaluation.benchmarks.table import Goal, aligned, context, goal_lines
from vla_ray.explain.matrices import relevance_of
from vla_ray.explain.methods import folds_of, parse_methods
from vla_ray.models.simlingo import SimLingoConfig
from vla_ray.models.simlingo.processing import normalise
from vla_ray.stages.payloads import build_payload, estimate_bytes
from vla_ray.stages.visit import Visit
from vla_ray.storage import payload as payload_file
from vla_ray.storage.files import Location
from vla_ray.targets import Spline, Target, kinematic_scalar, parse_targets

FOLDS = folds_of(parse_methods(CaptureConfig.methods))  # of a capture that is told nothing
TARGETS = parse_targets("action", ["longitudinal_progress", "forward_speed", "curv_energy", "acc_energy"])
# The first always has a gradient, whatever the weights.
TARGET = TARGETS[0]
PLAIN = "plain forward + backward"
RELEVANCE = "relevance"
ONE_FOLD = "relevance, one fold"
SEVERAL = f"relevance, {len(TARGETS)} targets"
WRITTEN = "relevance, text written"
SEVERAL_WRITTEN = f"relevance, text written, {len(TARGETS)} targets"
RELEVANCE_FILE = "relevance, saved + loaded"
REDUCED = "reduced, in memory"
FULL = "full, in memory"
FULL_FILE = "full, saved + loaded + explained"
ORIGINAL = "the original way"  # every matrix retained, weights have gradients, a file, products of matrices
LEVELS = ("relevance", "reduced", "full")

# The released model, as far as sizes of payloads depend on it: InternVL2-1B, two tiles of 448 pixels, no thumbnail.
RELEASED = SimLingoConfig(
    variant="OpenGVLab/InternVL2-1B",
    variant_dir="",
    vision={"num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
    language={"num_hidden_layers": 24, "num_attention_heads": 14},
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one side took. Bytes of the peak above the loaded model, and of the payload."""

    timing: Timing
    peak: int | None
    payload: int | None


@dataclass(frozen=True, slots=True)
class OfSize:
    """All sides on one model."""

    name: str
    description: str
    sides: Mapping[str, Measured]

    @property
    def goals(self) -> tuple[Goal, ...]:
        """DESIGN's targets for what was measured."""
        time = {name: side.timing for name, side in self.sides.items()}
        peaks = {name: side.peak for name, side in self.sides.items()}
        fused, plain = peaks[RELEVANCE], peaks[PLAIN]
        memory = None if fused is None or plain is None else fused / plain
        several = 1 + 0.6 * (len(TARGETS) - 1)
        return (
            Goal("relevance / plain, clock", time[RELEVANCE].wall, 1.25),
            Goal("relevance / plain, CPU seconds", time[RELEVANCE].cpu, 1.25),
            *(() if memory is None else (Goal("relevance / plain, peak memory", memory, 1.05),)),
            Goal(f"{len(TARGETS)} targets / one, text fixed", time[SEVERAL].wall / time[RELEVANCE].wall, several),
            Goal(
                f"{len(TARGETS)} targets / one, text written", time[SEVERAL_WRITTEN].wall / time[WRITTEN].wall, several
            ),
            Goal("the original way / relevance", time[ORIGINAL].wall / time[RELEVANCE_FILE].wall, 3.0, at_least=True),
        )

    @property
    def lines(self) -> list[str]:
        plain = self.sides[PLAIN]
        head = ("", "clock", "CPU", "peak memory", "clock", "bytes a frame")
        rows = [
            (
                name,
                f"{x.timing.wall:.2f}x",
                f"{x.timing.cpu:.2f}x",
                "-"
                if x.peak is None or plain.peak is None
                else f"{x.peak / plain.peak:.2f}x {x.peak / 2**20:7,.0f} MiB",
                f"{1000 * x.timing.wall_s:,.0f} ms",
                "-" if x.payload is None else f"{x.payload:,}",
            )
            for name, x in self.sides.items()
        ]
        return [f"{self.name}: {self.description}", *aligned([head, *rows]), "", *goal_lines(self.goals)]


@dataclass(frozen=True, slots=True)
class RelevanceCost:
    """The result of the bench."""

    context: Mapping[str, str]
    sizes: tuple[OfSize, ...]
    released: Mapping[str, int]

    @property
    def released_goals(self) -> tuple[Goal, ...]:
        sizes = self.released
        return (
            Goal("bytes a frame of relevance", sizes["relevance"], 100_000),
            Goal("bytes of full / relevance", sizes["full"] / sizes["relevance"], 10_000, at_least=True),
        )

    @property
    def text(self) -> str:
        of_released = ", ".join(f"{level} {size:,}" for level, size in self.released.items())
        return "\n".join(
            [
                "relevance beside plain forward + backward (ratios to it; medians over rounds)",
                ", ".join(f"{key} {value}" for key, value in self.context.items()),
                *(line for size in self.sizes for line in ("", *size.lines)),
                "",
                f"released model, two tiles, estimated bytes a frame: {of_released}",
                *goal_lines(self.released_goals),
            ]
        )

    @property
    def content(self) -> dict[str, object]:
        return {
            "bench": "relevance",
            "context": dict(self.context),
            "sizes": {
                size.name: {
                    "description": size.description,
                    "sides": {name: asdict(side) for name, side in size.sides.items()},
                    "goals": [goal.to_dict() for goal in size.goals],
                }
                for size in self.sizes
            },
            "released": {"bytes": dict(self.released), "goals": [goal.to_dict() for goal in self.released_goals]},
        }


def run(config: BenchmarkConfig) -> RelevanceCost:
    """Measure all sides on each of the sizes."""
    sizes = check_sizes(config.size)
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="vla_ray-benchmark-") as scratch:
        measured = tuple(_measure(size, config, scratch) for size in sizes)
    released = {level: estimate_bytes(level, RELEASED, torch.bfloat16, len(FOLDS)) for level in LEVELS}
    return RelevanceCost(context(config.threads, config.rounds), measured, released)


def _measure(size: str, config: BenchmarkConfig, scratch: str) -> OfSize:
    subject = make_subject(size, config.model)
    sides = make_sides(subject, scratch)
    payloads = {name: _payload_bytes(side, scratch) for name, side in sides.items()}  # and all are warm
    plain, *others = sides.values()
    timings = interleave(plain, others, config.rounds)
    peaks = {
        name: peak_bytes(prepare_side, size, config.model, name, config.threads, scratch) if config.memory else None
        for name in sides
    }
    return OfSize(
        size, subject.description, {name: Measured(timings[name], peaks[name], payloads[name]) for name in sides}
    )


def _payload_bytes(side: Side, scratch: str) -> int | None:
    side.prepare()
    result = side.run()
    return payload_file.save(Location.of(Path(scratch) / "payload.pt"), result) if isinstance(result, dict) else None


def prepare_side(size: str, model: ModelConfig, name: str, threads: int, scratch: str) -> Callable[[], object]:
    """One side on a freshly loaded model, for a process of its own."""
    torch.set_num_threads(threads)
    side = make_sides(make_subject(size, model), scratch)[name]
    side.prepare()
    return side.run


def make_sides(subject: Subject, scratch: str) -> dict[str, Side]:
    """Name -> side, the plain one first. Those that make one payload return it."""
    file = Location.of(Path(scratch) / "side.pt")

    def through_file(content: dict[str, Any]) -> None:
        payload_file.save(file, content)
        relevance_of(payload_file.load(file), FOLDS)

    runs: dict[str, Callable[[], object]] = {
        RELEVANCE: lambda: _payloads(subject, "relevance", FOLDS)[0],
        ONE_FOLD: lambda: _payloads(subject, "relevance", FOLDS[:1])[0],
        SEVERAL: lambda: _payloads(subject, "relevance", FOLDS, TARGETS),
        WRITTEN: lambda: _payloads(subject, "relevance", FOLDS, written=True)[0],
        SEVERAL_WRITTEN: lambda: _payloads(subject, "relevance", FOLDS, TARGETS, written=True),
        RELEVANCE_FILE: lambda: through_file(_payloads(subject, "relevance", FOLDS)[0]),
        REDUCED: lambda: _payloads(subject, "reduced")[0],
        FULL: lambda: _payloads(subject, "full")[0],
        FULL_FILE: lambda: through_file(_payloads(subject, "full")[0]),
        ORIGINAL: lambda: _original(subject, file),
    }
    plain = Side(PLAIN, lambda: _plain(subject), lambda: subject.model.set_attention("sdpa"))
    watched = {name: Side(name, run, lambda: subject.model.set_attention(IMPLEMENTATION)) for name, run in runs.items()}
    return {PLAIN: plain, **watched}


def _plain(subject: Subject) -> None:
    """The scalar's gradient at the patch embeddings, as every other side needs it, and nothing else."""
    leaf = subject.model.embed_patches(normalise(subject.tiles)).detach().requires_grad_()
    torch.autograd.grad(_scalar(subject, leaf), leaf)


def _scalar(subject: Subject, patches: Tensor) -> Tensor:
    model, processor = subject.model, subject.processor
    batch = processor.batch([subject.prompt], [len(subject.tiles)])
    embeds = model.embed_prompt(batch, model.encode_patches(patches), processor.image_token_id)
    decision = model.decide(embeds, batch.mask_BP, [list(subject.text)])
    return kinematic_scalar(TARGET.name, decision.route_B202, decision.speed_B102, Spline()).sum()


def _original(subject: Subject, file: Location) -> None:
    """Eager attention with `retain_grad`, one backward through everything, a file, and R as a product of matrices."""
    model = subject.model.requires_grad_()
    with AttentionRecorder({"vision": model.vision, "language": model.language}) as recorder:
        scalar = _scalar(subject, model.embed_patches(normalise(subject.tiles)))
    for probabilities in recorder.probabilities.values():
        probabilities.retain_grad()
    scalar.backward()
    blocks = {name: (p.detach(), p.grad) for name, p in recorder.probabilities.items()}
    payload_file.save(file, {"attention": blocks})
    del blocks, recorder, scalar
    model.requires_grad_(False).zero_grad()
    attention = payload_file.load(file)["attention"]
    for tower in ("vision", "language"):
        matrices = [(p * dp).clamp_min(0).mean(1) for name, (p, dp) in attention.items() if name.startswith(tower)]
        relevance = torch.eye(matrices[0].shape[-1]).expand_as(matrices[0])
        for matrix in matrices:
            relevance = relevance + matrix @ relevance


def _payloads(
    subject: Subject,
    level: str,
    folds: Sequence[str] | None = None,
    targets: Sequence[Target] = (TARGET,),
    written: bool = False,
) -> list[dict[str, Any]]:
    """What a capture makes of the frame, in memory; with the fixed text, or one as long that the model writes."""
    visit = Visit(
        subject.model,
        subject.processor,
        [subject.tiles],
        [subject.prompt],
        max_new_tokens=len(subject.text),
        folds=folds,
        texts=None if written else [subject.text],
    )
    payloads = []
    for i, target in enumerate(targets):
        explained = visit.explain(target, Spline(), keep_graph=i + 1 < len(targets))
        payloads.append(
            build_payload(
                level,
                visit,
                explained,
                0,
                subject.frame,
                subject.geometry,
                subject.processor,
                Spline(),
                torch.float32,
            )
        )
        del explained  # as a capture does: a full set of gradients must not live on beside the next one
    return payloads
