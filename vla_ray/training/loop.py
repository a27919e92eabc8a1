"""The training loop, in plain torch: one process, or one of several that exchange gradients (parallel.py).

It knows nothing of Ray or of files: batches come from an iterator, and what is to be logged or saved is handed to
callbacks. An optimiser step is a function of weights, optimiser state and its number, so a resumed run goes on exactly
as an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from vla_ray.config.train import TrainingConfig
from vla_ray.errors import TrainingError
from vla_ray.training.batches import MicroBatch
from vla_ray.training.optimiser import learning_rate, make_optimizer
from vla_ray.training.parallel import Workers, whole
from vla_ray.training.tensors import inputs


class Hooks(Protocol):
    """What the loop tells the world. All workers call all of them, as saving and validating are collective."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Means since the last call, each `logging_steps`."""

    def validate(self, step: int) -> None:
        """Each `eval_steps` and at the end."""

    def save(self, step: int) -> None:
        """Each `save_steps` and at the end."""


@dataclass(slots=True)
class _Window:
    """What happened since the last log line."""

    losses: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    waited: float = 0.0
    began: float = field(default_factory=time.perf_counter)


class Loop:
    """Trains `module` (a wrapped ActionPolicy) from step `step` to step `total`."""

    def __init__(
        self,
        module: nn.Module,
        settings: TrainingConfig,
        workers: Workers,
        total: int,
        flops: Callable[[float], float] | None = None,
        peak_flops: float | None = None,
    ) -> None:
        """Args:
        flops: of one sample of so many tokens, forward and backward.
        peak_flops: of the device; None if unknown, then there is no MFU.
        """
        self.module, self.settings, self.workers, self.total = module, settings, workers, total
        self.flops, self.peak_flops = flops, peak_flops
        self.optimizer = make_optimizer(module, settings)
        self.step = 0

    def run(self, batches: Iterator[MicroBatch], hooks: Hooks) -> None:
        """Consume `gradient_accumulation_steps` batches per step until `total`.

        Raises:
            TrainingError: the loss is not finite, batches ended early or came out of order, memory ran out.
        """
        self.module.train()
        window = _Window()
        while self.step < self.total:
            try:
                self._one(batches, window)
            except torch.OutOfMemoryError as e:
                raise TrainingError(self._out_of_memory(str(e))) from e
            self.step += 1
            done, s = self.step == self.total, self.settings
            if self.step % s.logging_steps == 0 or done:
                hooks.log(self.step, self._means(window))
                window = _Window()
            if self.step % s.eval_steps == 0 or done:
                hooks.validate(self.step)
            if self.step % s.save_steps == 0 or done:
                hooks.save(self.step)
            if not window.samples:  # neither validation nor saving counts as training time
                window.began = time.perf_counter()

    def _one(self, batches: Iterator[MicroBatch], window: _Window) -> None:
        """One optimiser step."""
        s = self.settings
        rate = learning_rate(self.step, self.total, s)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Dropout: a function of the step, so that a resumed run draws what an uninterrupted one would.
        torch.manual_seed((s.seed * 1_000_003 + self.step) * 1009 + self.workers.rank)
        total = torch.zeros((), device=self.workers.device)
        for part in range(s.gradient_accumulation_steps):
            batch = self._next(batches, window)
            more = part + 1 < s.gradient_accumulation_steps
            with self.workers.accumulating(self.module, more):
                with self.workers.autocast():
                    found = self.module(**inputs(batch, self.workers.device))
                # All batches have as many action tokens: the mean over parts is the mean over the whole.
                loss = found.loss / s.gradient_accumulation_steps
                loss.backward()
            total += loss.detach()
            window.samples += len(batch)
            window.tokens += batch.tokens
        norm = whole(nn.utils.clip_grad_norm_(self.module.parameters(), s.max_grad_norm))
        if not torch.isfinite(norm):
            raise TrainingError(
                f"the gradient of step {self.step + 1} is not finite (loss {float(total):g}). Lower "
                f"training.learning_rate ({s.learning_rate:g}) or set training.precision=float32."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        window.losses.append(total)
        window.norms.append(norm)

    def _next(self, batches: Iterator[MicroBatch], window: _Window) -> MicroBatch:
        began = time.perf_counter()
        batch = next(batches, None)
        window.waited += time.perf_counter() - began
        if batch is None:
            raise TrainingError(f"batches ended at step {self.step} of {self.total}: the dataset has changed.")
        if batch.step != self.step:
            raise TrainingError(f"a batch of step {batch.step} came at step {self.step}: batches are out of order.")
        return batch

    def _means(self, window: _Window) -> dict[str, float]:
        seconds = time.perf_counter() - window.began
        loss = float(torch.stack(window.losses).mean())
        norm = float(torch.stack(window.norms).mean())
        size = self.workers.size
        losses, samples, tokens, waited = self.workers.sum([loss, window.samples, window.tokens, window.waited])
        values = {
            "loss": losses / size,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "samples_per_s": samples / seconds,
            "tokens_per_s": tokens / seconds,
            "waiting": waited / size / seconds,
            "seconds": seconds,
        }
        if self.flops and self.peak_flops:
            values["mfu"] = samples / size * self.flops(tokens / samples) / seconds / self.peak_flops
        return values

    def _out_of_memory(self, reason: str) -> str:
        s = self.settings
        return (
            f"out of memory with training.batch_size={s.batch_size} ({' '.join(reason.split())[:120]}). Halve "
            f"training.batch_size and double training.gradient_accumulation_steps ({s.gradient_accumulation_steps}), "
            "set training.activation_checkpointing=true, lora.enabled=true, training.freeze=[vision], or parallel=fsdp "
            "with more workers."
        )


def state_of(loop: Loop, best: dict[str, float] | None) -> dict[str, Any]:
    """What `last/training_state.pt` holds. Collective."""
    optimizer = loop.workers.optimizer_state(loop.module, loop.optimizer)
    return {"step": loop.step, "total": loop.total, "best": best, "optimizer": optimizer}


def is_better(loss: float, best: dict[str, float] | None) -> bool:
    return math.isfinite(loss) and (best is None or loss < best["loss"])
