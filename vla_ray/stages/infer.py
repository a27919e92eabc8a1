"""A policy replica that predicts: batches of pictures in, one row per sample and variant of its instruction out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vla_ray.models.paligemma.decode import Decoded
from vla_ray.models.paligemma.noise import gumbel_noise
from vla_ray.models.paligemma.steps import FixedSteps
from vla_ray.schema import FAILED, GIVEN, OK, SKIPPED
from vla_ray.stages.fitting import Fitting
from vla_ray.stages.policy import PolicySpec, load_replica_policy
from vla_ray.stages.work import Loaded, Row


@dataclass(frozen=True, slots=True)
class InferSpec:
    """What is predicted, beside the policy.

    Attributes:
        decode: greedy | expected, see config/infer.py.
        samples, temperature, seed: drawn predictions.
        steps: growing | static | compiled, see models/paligemma/steps.py.
    """

    decode: str = "greedy"
    steps: str = "growing"
    samples: int = 0
    temperature: float = 1.0
    seed: int = 0


class PredictReplica(Fitting):
    """See stages/work.py for the protocol it serves."""

    def __init__(self, spec: InferSpec, policy: PolicySpec) -> None:
        super().__init__()
        self.spec = spec
        self.policy, self.processor, self.tokenizer = load_replica_policy(policy)
        self.device = torch.device(policy.device)
        self._steps: FixedSteps | None = None

    def attempt(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        rows = []
        for variant in targets:
            asked = [frame.sample.instruction(variant, frame.columns["instruction"]) for frame in frames]
            able = [(frame, text) for frame, text in zip(frames, asked, strict=True) if text is not None]
            rows += [{**about(f, variant), "status": SKIPPED} for f, t in zip(frames, asked, strict=True) if t is None]
            if able:
                rows += self._predict([frame for frame, _ in able], [text for _, text in able], variant)
        return rows

    def failed(self, frame: Loaded, target: str, error_type: str, error: str) -> Row:
        """The row of a sample that cannot be predicted."""
        return {**about(frame, target), "status": FAILED, "error_type": error_type, "error": error}

    def _predict(self, frames: Sequence[Loaded], texts: Sequence[str], variant: str) -> list[Row]:
        start = time.perf_counter()
        names = [frame.sample.frame_id for frame in frames]
        decoded = self.decode([f.tiles[0] for f in frames if f.tiles is not None], texts, names)
        bins = decoded.expected if self.spec.decode == "expected" else decoded.bins
        predicted = self.tokenizer.decode(bins.cpu().numpy())
        probability, entropy = decoded.probability.cpu().numpy(), decoded.entropy.cpu().numpy()
        drawn = None if decoded.samples is None else self.tokenizer.decode(decoded.samples.cpu().numpy())
        seconds = (time.perf_counter() - start) / len(frames)
        rows = []
        for b, (frame, text) in enumerate(zip(frames, texts, strict=True)):
            row = {**about(frame, variant), "instruction": text, "predict_s": seconds}
            row |= self._outcome(predicted[b], probability[b], entropy[b])
            if drawn is not None and row["status"] == OK:
                row["samples"] = drawn[b].ravel().tolist()
            rows.append(row)
        return rows

    def decode(self, pictures: Sequence[np.ndarray], texts: Sequence[str], names: Sequence[str]) -> Decoded:
        """Actions of a batch.

        Args:
            pictures: uint8 [S, S, 3] each.
            names: of the samples, on which draws depend.
        """
        batch = self.processor.collate(pictures, [self.processor.prompt_ids(text) for text in texts])
        pixels, ids, mask, types = (
            torch.from_numpy(batch[name]).to(self.device) for name in ("pixels", "ids", "mask", "types")
        )
        noise, spec = None, self.spec
        if spec.samples:
            shape = (spec.samples, self.tokenizer.num_tokens, self.tokenizer.num_bins)
            noise = torch.from_numpy(gumbel_noise(names, spec.seed, *shape)).to(self.device)
        steps = None if spec.steps == "growing" else self._fixed_steps(len(ids))
        return self.policy.decode(pixels, ids, mask, types, noise, spec.temperature, steps)

    def _fixed_steps(self, count: int) -> FixedSteps:
        """Of one shape for all batches up to the largest so far, and any instruction."""
        rows = count * (1 + self.spec.samples)
        if self._steps is None or self._steps.rows < rows:
            longest, tokens = self.processor.max_prompt_tokens, self.tokenizer.num_tokens
            self._steps = FixedSteps(self.policy.model.model, rows, longest, tokens, self.spec.steps == "compiled")
        return self._steps

    @staticmethod
    def _outcome(predicted: np.ndarray, probability: np.ndarray, entropy: np.ndarray) -> dict[str, Any]:
        if not np.isfinite(probability).all():
            return {"status": FAILED, "error_type": "NonFinite", "error": "the policy's logits are not finite"}
        return {
            "status": OK,
            "predicted": predicted.ravel().tolist(),
            "probability": probability.tolist(),
            "entropy": entropy.tolist(),
        }


def about(frame: Loaded, variant: str) -> Row:
    """The columns that every row has, failed ones included."""
    sample = frame.sample
    columns = {k: v for k, v in frame.columns.items() if k != "instruction"}
    own = frame.columns.get("instruction", "")
    return {
        "frame_id": sample.frame_id,
        "target": variant,
        "number": sample.number,
        "dataset": sample.dataset,
        **columns,
        **{name: columns.get(name) or None for name in ("actions", "valid")},  # logs of a robot have none
        "instruction": own if variant == GIVEN else sample.instruction(variant, own),
        "decode_s": frame.decode_s,
    }
