"""One visit of a batch of frames: text, trajectory and the graph once, then one backward per target.

The vision tower runs once, with gradient; generation uses its detached tokens; one grad-enabled pass over the
finished sequence serves every target, action and text alike. What backward yields is either every attention matrix
with its gradient, or relevance folded on the way. Plain torch: no files, no cluster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_ray.attention import AttentionRecorder, Kind, RelevanceTape
from vla_ray.explain.chain import STRENGTH, Seed, cross_projector, patch_groups, seed_of
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
        gradients: block -> d scalar / d probabilities, [tiles or B, heads, Q, K]; empty when relevance is folded.
        relevance: tower -> kind -> relevance of its tokens, language [B, L], vision [tiles, 1 + patches]; or empty.
        rows: per frame the columns of the padded sequence that the scalar reads.
        seeds: per frame the weights of these rows.
        finite: per frame whether value and gradient at these rows are finite.
        tokens: per frame the index of the explained generated token (text), else None.
        seconds: of the backward pass, for the whole batch.
    """

    target: Target
    scalar_B: Tensor
    slope_B: Tensor
    gradients: dict[str, Tensor]
    relevance: dict[str, dict[str, Tensor]]
    rows: tuple[slice, ...]
    seeds: tuple[Seed, ...]
    finite: tuple[bool, ...]
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
        probabilities: block -> recorded attention, [tiles or B, heads, Q, K]; empty when relevance is folded.
        generate_s, forward_s: seconds for the whole batch.

    Args:
        model: with the attention implementation of vla_ray.attention.
        kinds: fold relevance of these kinds; None records every attention matrix instead.
    """

    def __init__(
        self,
        model: SimLingo,
        processor: Processor,
        tiles: Sequence[np.ndarray],
        prompts: Sequence[Prompt],
        max_new_tokens: int = 100,
        kinds: Sequence[Kind] | None = None,
    ) -> None:
        self.model, self.prompts = model, tuple(prompts)
        counts = [len(t) for t in tiles]
        self.tile_slices = [slice(sum(counts[:b]), sum(counts[: b + 1])) for b in range(len(counts))]
        batch = processor.batch(prompts, counts, model.device)
        self._image_B = batch.ids_BP == processor.image_token_id
        towers = {"vision": model.vision, "language": model.language}
        self._recorder = AttentionRecorder(towers) if kinds is None else None
        self._tape = None if kinds is None else RelevanceTape(towers, kinds)
        watch = self._recorder or self._tape
        assert watch is not None
        start = self._now()
        with torch.enable_grad(), watch:
            # The graph starts here: below the patch embeddings there is no attention, and weights have no gradient.
            self._leaf = model.embed_patches(normalise(np.concatenate(tiles), model.device)).detach().requires_grad_()
            tokens_TNH = model.encode_patches(self._leaf)
        vision_done = self._now()
        with torch.no_grad():
            embeds = model.embed_prompt(batch, tokens_TNH.detach(), processor.image_token_id)
            self.texts = model.generate(embeds, batch.mask_BP, processor.eos_id, max_new_tokens)
        generated = self._now()
        with torch.enable_grad(), watch:
            embeds = model.embed_prompt(batch, tokens_TNH, processor.image_token_id)
            self.decision: Decision = model.decide(embeds, batch.mask_BP, self.texts)
            self.scores = [self._token_scores(b) for b in range(len(self.texts))]
        self.probabilities = {} if self._recorder is None else self._recorder.probabilities
        self.generate_s = generated - vision_done
        self.forward_s = (vision_done - start) + (self._now() - generated)

    def _now(self) -> float:
        if self.model.device.type == "cuda":  # work is queued there, and would be charged to the next stage
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
            inputs = [d.hidden_BLH] if trajectory is None else [d.hidden_BLH, trajectory]
            gradients: dict[str, Tensor] = {}
            if self._recorder is not None:
                gradients, outer = self._recorder.gradients(total, inputs, keep_graph)
            else:
                outer = list(torch.autograd.grad(total, inputs, retain_graph=True))
            hidden_gradient = outer[0]
            seeds = tuple(seed_of(d.hidden_BLH[b, r], hidden_gradient[b, r]) for b, r in enumerate(rows))
            relevance = {} if self._tape is None else self._fold(hidden_gradient, rows, seeds, keep_graph)
        slope = torch.ones(len(values)) if trajectory is None else outer[1].abs().flatten(1).amax(1).cpu()
        finite = tuple(
            bool(torch.isfinite(v)) and math.isfinite(seed.grad_rms) for v, seed in zip(values, seeds, strict=True)
        )
        seconds = self._now() - start
        return Explained(
            target, values.detach().cpu(), slope, gradients, relevance, rows, seeds, finite, tokens, seconds
        )

    def _fold(
        self, gradient_BLH: Tensor, rows: Sequence[slice], seeds: Sequence[Seed], keep_graph: bool
    ) -> dict[str, dict[str, Tensor]]:
        """Run the unit gradient of every frame down to the patches, folding relevance on the way."""
        assert self._tape is not None
        d, tape = self.decision, self._tape
        unit = torch.zeros_like(gradient_BLH)
        weights = torch.zeros(gradient_BLH.shape[:2], device=unit.device)
        for b, (r, seed) in enumerate(zip(rows, seeds, strict=True)):
            if 0 < seed.grad_rms < math.inf:  # nothing flows for a frame without a usable gradient
                unit[b, r] = gradient_BLH[b, r] * (STRENGTH / seed.grad_rms)
                weights[b, r] = seed.weights
        tape.start(language=weights, vision=self._vision_seeds)
        torch.autograd.grad(d.hidden_BLH, self._leaf, grad_outputs=unit, retain_graph=keep_graph)
        relevance = {tower: tape.rows(tower) for tower in ("language", "vision")}
        tape.start()  # lets go of _vision_seeds: a cycle would keep this visit's whole graph until the next collection
        return relevance

    def _vision_seeds(self) -> dict[str, Tensor]:
        assert self._tape is not None
        config, d = self.model.config, self.decision
        groups = patch_groups(config.patch_grid, round(1 / config.downsample_ratio))
        # Image tokens lie in the prompt; the final pass has shifted it by its own padding.
        starts = [s - (self._image_B.shape[1] - p) for s, p in zip(d.starts, d.prompt_lengths, strict=True)]
        columns = [torch.nonzero(image).squeeze(1) + s for image, s in zip(self._image_B, starts, strict=True)]
        return {
            kind: cross_projector(
                torch.cat([row[c] for row, c in zip(rows, columns, strict=True)]).view(-1, len(groups)), groups
            )
            for kind, rows in self._tape.rows("language").items()
        }
