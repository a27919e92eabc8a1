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

from vla_ray.attention import AttentionRecorder
from vla_ray.explain.chain import STRENGTH, Seed, patch_groups, seed_of
from vla_ray.explain.descent import Descent, Layout
from vla_ray.explain.folds import Relevance
from vla_ray.models.simlingo import Processor, SimLingo
from vla_ray.models.simlingo.model import Decision
from vla_ray.models.simlingo.processing import Prompt, normalise
from vla_ray.targets import Spline, Target, choose_token, kinematic_scalar, kinematic_scalars

# Below this slope of y with respect to every predicted coordinate (unit of y per metre) only rounding is left to
# explain: standstill, or a route straight to a micrometre. So it is with a policy's logits (unit of y per nat): one bin
# has all of the probability.
DEGENERATE_SLOPE = 1e-6


@dataclass(frozen=True, slots=True)
class Explained:
    """One target of a batch of B frames.

    Attributes:
        scalar_B: the target's value per frame; its sum was differentiated.
        slope_B: largest |d scalar / d predicted coordinate| (action) or 1 (text); of a policy, |d scalar / d logit|.
        gradients: block -> d scalar / d probabilities, [tiles or B, heads, Q, K]; empty when relevance is folded.
        relevance: tower -> fold -> relevance of its tokens, language [B, L], vision [tiles, 1 + patches]; or empty.
        rows: per frame the columns of the padded sequence that the scalar reads.
        seeds: per frame the weights of these rows.
        finite: per frame whether value and gradient at these rows are finite.
        tokens: per frame the index of the explained generated token (text), else None.
        seconds: of the backward pass, for the whole batch.
        pixels: d scalar / d normalised pixels, [B, 3, S, S], where they were asked for.
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
    pixels: Tensor | None = None

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
        folds: fold relevance (names of FOLDS); None records every attention matrix instead.
        strength: how much one hop moves, see explain/chain.py.
        texts: token ids to take for the generated ones, e.g. what another model wrote.
    """

    def __init__(
        self,
        model: SimLingo,
        processor: Processor,
        tiles: Sequence[np.ndarray],
        prompts: Sequence[Prompt],
        max_new_tokens: int = 100,
        folds: Sequence[str] | None = None,
        strength: float = STRENGTH,
        texts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.model, self.prompts, self.strength = model, tuple(prompts), strength
        counts = [len(t) for t in tiles]
        self.tile_slices = [slice(sum(counts[:b]), sum(counts[: b + 1])) for b in range(len(counts))]
        batch = processor.batch(prompts, counts, model.device)
        self._image_B = batch.ids_BP == processor.image_token_id
        towers = {"vision": model.vision, "language": model.language}
        self._recorder = AttentionRecorder(towers) if folds is None else None
        self._descent = None if folds is None else Descent(towers, folds, strength)
        watch = self._recorder if self._descent is None else self._descent.tape
        assert watch is not None
        start = now(model.device)
        with torch.enable_grad(), watch:
            # The graph starts here: below the patch embeddings there is no attention, and weights have no gradient.
            leaf = model.embed_patches(normalise(np.concatenate(tiles), model.device)).detach().requires_grad_()
            tokens_TNH = model.encode_patches(leaf)
        vision_done = now(model.device)
        with torch.no_grad():
            embeds = model.embed_prompt(batch, tokens_TNH.detach(), processor.image_token_id)
            if texts is None:
                texts = model.generate(embeds, batch.mask_BP, processor.eos_id, max_new_tokens)
            self.texts = [list(text) for text in texts]
        generated = now(model.device)
        with torch.enable_grad(), watch:
            embeds = model.embed_prompt(batch, tokens_TNH, processor.image_token_id)
            self.decision: Decision = model.decide(embeds, batch.mask_BP, self.texts)
            self.scores = [self._token_scores(b) for b in range(len(self.texts))]
        if self._descent is not None:
            self._descent.arrive(self._layout())
        self.probabilities = {} if self._recorder is None else self._recorder.probabilities
        self.generate_s = generated - vision_done
        self.forward_s = (vision_done - start) + (now(self.model.device) - generated)

    def _layout(self) -> Layout:
        config, d = self.model.config, self.decision
        # Image tokens lie in the prompt; the final pass has shifted it by its own padding.
        starts = [s - (self._image_B.shape[1] - p) for s, p in zip(d.starts, d.prompt_lengths, strict=True)]
        columns = [torch.nonzero(image).squeeze(1) + s for image, s in zip(self._image_B, starts, strict=True)]
        groups = patch_groups(config.patch_grid, round(1 / config.downsample_ratio))
        return Layout(tuple(self.tile_slices), tuple(columns), groups, cls=True)

    def _token_scores(self, b: int) -> Tensor:
        logits = self.model.token_logits(self.decision.hidden_BLH[b, self.decision.text_rows(b)])
        ids = torch.tensor(self.texts[b], device=logits.device)
        return logits.gather(1, ids[:, None]).squeeze(1)

    @torch.no_grad()
    def kinematics(self, spline: Spline) -> dict[str, Tensor]:
        """All nine kinematic scalars, [B] each."""
        return kinematic_scalars(self.decision.route_B202.detach(), self.decision.speed_B102.detach(), spline)

    def explain(self, target: Target, spline: Spline, keep_graph: bool) -> Explained:
        """Differentiate one target. Frames whose value is not finite are left out of the sum (zero gradients)."""
        start = now(self.model.device)
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
            relevance: dict[str, dict[str, Tensor]] = {}
            if self._descent is not None:
                relevance, _ = self._descent.run(d.hidden_BLH, hidden_gradient, rows, seeds, keep_graph)
        slope = torch.ones(len(values)) if trajectory is None else outer[1].abs().flatten(1).amax(1).cpu()
        finite = tuple(
            bool(torch.isfinite(v)) and math.isfinite(seed.grad_rms) for v, seed in zip(values, seeds, strict=True)
        )
        return Explained(
            target=target,
            scalar_B=values.detach().cpu(),
            slope_B=slope,
            gradients=gradients,
            relevance=relevance,
            rows=rows,
            seeds=seeds,
            finite=finite,
            tokens=tokens,
            seconds=now(self.model.device) - start,
        )

    def seed_row(self, explained: Explained, b: int) -> Tensor:
        """Where frame `b`'s relevance starts, [L] of its own sequence, in main memory."""
        row = torch.zeros(self.decision.hidden_BLH.shape[1])
        row[explained.rows[b]] = explained.seeds[b].weights.float().cpu()
        return row[self.decision.starts[b] :]

    def relevance(self, explained: Explained, b: int) -> Relevance:
        """What the folds gave frame `b`, its padding cut away."""
        assert self._descent is not None
        return self._descent.of_frame(explained.relevance, b, self.decision.starts[b])


def now(device: torch.device) -> float:
    """Seconds, once all work that was given to the device is done; else it would be charged to the next stage."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
