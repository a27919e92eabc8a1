"""One visit of a batch of frames: text, trajectory and recorded attention once, then one backward per target.

The vision tower runs once, with gradient; generation uses its detached tokens; one grad-enabled pass over the
finished sequence serves every target, action and text alike. Plain torch: no files, no cluster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_ray.attention import AttentionRecorder
from vla_ray.models.simlingo import Processor, SimLingo
from vla_ray.models.simlingo.model import Decision
from vla_ray.models.simlingo.processing import Prompt, normalise
from vla_ray.targets import Spline, Target, choose_token, kinematic_scalar, kinematic_scalars

# Below this slope of y with respect to every predicted coordinate (unit of y per metre) only rounding is left to
# explain: standstill, or a route straight to a micrometre.
DEGENERATE_SLOPE = 1e-6


@dataclass(frozen=True, slots=True)
class Explained:
    """One target of a batch of B frames.

    Attributes:
        scalar_B: the target's value per frame; its sum was differentiated.
        slope_B: largest |d scalar / d predicted coordinate| (action) or 1 (text).
        gradients: block -> d scalar / d probabilities, [tiles or B, heads, Q, K].
        query_gradient_BLH: d scalar / d hidden states after the last norm.
        rows: per frame the columns of the padded sequence that the scalar reads.
        tokens: per frame the index of the explained generated token (text), else None.
        seconds: of the backward pass, for the whole batch.
    """

    target: Target
    scalar_B: Tensor
    slope_B: Tensor
    gradients: dict[str, Tensor]
    query_gradient_BLH: Tensor
    rows: tuple[slice, ...]
    tokens: tuple[int | None, ...]
    seconds: float

    def is_degenerate(self, b: int) -> bool:
        return float(self.slope_B[b]) < DEGENERATE_SLOPE


class Visit:
    """See the module docstring. Attributes are per batch; `b` below indexes its frames.

    Attributes:
        prompts, texts: what was asked, and the generated token ids (EOS included where reached).
        decision: hidden states and trajectories of the final pass.
        scores: per frame the raw logits [n] of its generated tokens.
        probabilities: block -> recorded attention, [tiles or B, heads, Q, K].
        generate_s, forward_s: seconds for the whole batch.
    """

    def __init__(
        self,
        model: SimLingo,
        processor: Processor,
        tiles: Sequence[np.ndarray],
        prompts: Sequence[Prompt],
        max_new_tokens: int = 100,
    ) -> None:
        self.model, self.prompts = model, tuple(prompts)
        counts = [len(t) for t in tiles]
        self.tile_slices = [slice(sum(counts[:b]), sum(counts[: b + 1])) for b in range(len(counts))]
        batch = processor.batch(prompts, counts, model.device)
        self._recorder = AttentionRecorder({"vision": model.vision, "language": model.language})
        start = self._now()
        with torch.enable_grad(), self._recorder:
            tokens_TNH = model.encode_tiles(normalise(np.concatenate(tiles), model.device), graph_from_patches=True)
        vision_done = self._now()
        with torch.no_grad():
            embeds = model.embed_prompt(batch, tokens_TNH.detach(), processor.image_token_id)
            self.texts = model.generate(embeds, batch.mask_BP, processor.eos_id, max_new_tokens)
        generated = self._now()
        with torch.enable_grad(), self._recorder:
            embeds = model.embed_prompt(batch, tokens_TNH, processor.image_token_id)
            self.decision: Decision = model.decide(embeds, batch.mask_BP, self.texts)
            self.scores = [self._token_scores(b) for b in range(len(self.texts))]
        self.probabilities = self._recorder.probabilities
        self.generate_s = generated - vision_done
        self.forward_s = (vision_done - start) + (self._now() - generated)

    def _now(self) -> float:
        if (
            self.model.device.type == "cuda"
        ):  # work is queued there: without this, time would be charged to the next stage
            torch.cuda.synchronize()
        return time.perf_counter()

    def _token_scores(self, b: int) -> Tensor:
        logits = self.model.token_logits(self.decision.hidden_BLH[b, self.decision.text_rows(b)])
        ids = torch.tensor(self.texts[b], device=logits.device)
        return logits.gather(1, ids[:, None]).squeeze(1)

    @torch.no_grad()
    def kinematics(self, spline: Spline) -> dict[str, Tensor]:
        """All nine kinematic scalars, [B] each."""
        return kinematic_scalars(self.decision.route_B202, self.decision.speed_B102, spline)

    def explain(self, target: Target, spline: Spline, keep_graph: bool) -> Explained:
        """Differentiate one target. Frames whose value is not finite are left out of the sum (zero gradients)."""
        start = self._now()
        d = self.decision
        with torch.enable_grad():
            if target.mode == "action":
                assert target.head is not None
                values = kinematic_scalar(target.name, d.route_B202, d.speed_B102, spline)
                trajectory = d.route_B202 if target.head == "route" else d.speed_B102
                rows = (d.query_rows(target.head),) * len(self.texts)
                tokens: tuple[int | None, ...] = (None,) * len(self.texts)
            else:
                assert target.strategy is not None
                chosen = [choose_token(s.detach(), target.strategy, target.index or 0) for s in self.scores]
                values = torch.stack([s[i] for s, i in zip(self.scores, chosen, strict=True)])
                trajectory = None
                first = [d.text_rows(b).start for b in range(len(chosen))]
                rows = tuple(slice(f + i, f + i + 1) for f, i in zip(first, chosen, strict=True))
                tokens = tuple(chosen)
            total = torch.where(torch.isfinite(values), values, torch.zeros_like(values)).sum()
            extra = [d.hidden_BLH] if trajectory is None else [d.hidden_BLH, trajectory]
            gradients, rest = self._recorder.gradients(total, extra, keep_graph)
        if trajectory is None:
            slope = torch.ones(len(values))
        else:
            slope = rest[1].abs().flatten(1).amax(1).cpu()
        return Explained(
            target,
            values.detach().cpu(),
            slope,
            gradients,
            rest[0],
            rows,
            tokens,
            self._now() - start,
        )
