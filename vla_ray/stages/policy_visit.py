"""One visit of a batch by an action policy: its actions and the graph once, then one backward per target.

Actions are decoded without a graph, greedily; one grad-enabled pass over [prompt, chosen actions] with the policy's own
mask and positions serves every target. Relevance is folded on the way (explain/descent.py). Plain torch: no files, no
cluster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vla_ray.explain.chain import STRENGTH, seed_of
from vla_ray.explain.descent import Descent, Layout
from vla_ray.explain.folds import Relevance
from vla_ray.explain.gradients import patch_mean
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.forced import embed_patches, encode_patches, hidden_states, with_actions
from vla_ray.models.paligemma.inputs import normalise
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.processing import Processor
from vla_ray.stages.visit import Explained, now
from vla_ray.targets import Target, policy_scalar
from vla_ray.targets.policy import tokens_read


class PolicyVisit:
    """See the module docstring. `b` below indexes the samples of the batch.

    Attributes:
        bins: the actions [B, 2H] that were chosen, or given.
        logits: of every action token over bins, [B, 2H, K].
        generate_s, forward_s: seconds for the whole batch.

    Args:
        policy: with the attention implementation of vla_ray.attention.
        pictures: uint8 [S, S, 3] each.
        instructions: one for each.
        folds: names of FOLDS.
        strength: how much one hop moves, see explain/chain.py.
        bins: int64 [B, 2H], actions to take for the decoded ones, e.g. those of an inference run.
        pixels: whether targets also give the gradient at the pixels.
    """

    def __init__(
        self,
        policy: ActionPolicy,
        processor: Processor,
        tokenizer: ActionTokenizer,
        pictures: Sequence[np.ndarray],
        instructions: Sequence[str],
        folds: Sequence[str],
        strength: float = STRENGTH,
        bins: Tensor | None = None,
        pixels: bool = False,
    ) -> None:
        self.policy, self.num_steps = policy, tokenizer.num_steps
        self.device = next(policy.parameters()).device
        self.prompts = [processor.prompt_ids(text) for text in instructions]
        collated = processor.collate(pictures, self.prompts)
        pictures_BSS3, ids, mask, types = (
            torch.from_numpy(collated[name]).to(self.device) for name in ("pixels", "ids", "mask", "types")
        )
        self._length = ids.shape[1]
        self._image_tokens = processor.image_tokens
        self._centers = torch.from_numpy(tokenizer.centers()).to(self.device)
        start = now(self.device)
        self.bins = policy.decode(pictures_BSS3, ids, mask, types).bins if bins is None else bins.to(self.device)
        decoded = now(self.device)
        inner = policy.model.model
        self._descent = Descent({"vision": inner.vision_tower, "language": inner.language_model}, folds, strength)
        normalised = normalise(pictures_BSS3).requires_grad_(pixels)
        self._pixels = normalised if pixels else None
        with torch.enable_grad(), self._descent.tape:
            patches = embed_patches(policy, normalised)
            # The graph starts here at the latest: below there is no attention.
            patches = patches if pixels else patches.detach().requires_grad_()
            tokens = encode_patches(policy, patches)
            asked = with_actions(policy, ids, mask, types, self.bins)
            self.hidden = hidden_states(policy, tokens, asked.ids, asked.mask, asked.types)
            self._first = asked.first
            self.logits = policy.action_logits(self.hidden[:, self._first : self._first + self.bins.shape[1]])
        self._descent.arrive(self._layout())
        self.generate_s, self.forward_s = decoded - start, now(self.device) - decoded

    def start(self, b: int) -> int:
        """Padding before sample `b`."""
        return self._length - len(self.prompts[b])

    def spans(self, b: int) -> dict[str, list[int]]:
        """[first, one past the last] position of each part of sample b's own sequence.

        `text` is its instruction, `queries` are its actions or placeholders, `prompt` is its picture with the token
        that begins the sequence.
        """
        image, prompt = self._image_tokens, len(self.prompts[b])
        return {
            "image": [0, image],
            "prompt": [0, image + 1],
            "text": [image + 1, prompt],
            "queries": [prompt, prompt + self.bins.shape[1]],
        }

    def explain(self, target: Target, keep_graph: bool) -> Explained:
        """Differentiate one target. Samples whose value is not finite are left out of the sum (zero gradients)."""
        start, count = now(self.device), len(self.prompts)
        read = tokens_read(target, self.num_steps)
        rows = (slice(self._first + read.start, self._first + read.stop, read.step),) * count
        with torch.enable_grad():
            values = policy_scalar(target, self.logits[:, read], self.bins[:, read], self._centers)
            total = torch.where(torch.isfinite(values), values, torch.zeros_like(values)).sum()
            gradient, logit_gradient = torch.autograd.grad(total, [self.hidden, self.logits], retain_graph=True)
            seeds = tuple(seed_of(self.hidden[b, r], gradient[b, r]) for b, r in enumerate(rows))
            extra = [] if self._pixels is None else [self._pixels]
            relevance, found = self._descent.run(self.hidden, gradient, rows, seeds, keep_graph, extra)
        return Explained(
            target=target,
            scalar_B=values.detach().cpu(),
            slope_B=logit_gradient.abs().flatten(1).amax(1).cpu(),
            gradients={},
            relevance=relevance,
            rows=rows,
            seeds=seeds,
            finite=tuple(
                bool(torch.isfinite(v)) and math.isfinite(seed.grad_rms) for v, seed in zip(values, seeds, strict=True)
            ),
            tokens=(target.index,) * count,
            seconds=now(self.device) - start,
            pixels=found[0] if found else None,
        )

    def seed_row(self, explained: Explained, b: int) -> Tensor:
        """Where sample `b`'s relevance starts, [L] of its own sequence, in main memory."""
        row = torch.zeros(self.hidden.shape[1])
        row[explained.rows[b]] = explained.seeds[b].weights.float().cpu()
        return row[self.start(b) :]

    def relevance(self, explained: Explained, b: int) -> Relevance:
        """What the folds gave sample `b`, its padding cut away."""
        return self._descent.of_frame(explained.relevance, b, self.start(b))

    def gradient_x_input(self, explained: Explained, b: int) -> Tensor:
        """|pixels * gradient| summed over channels, its mean over each patch: [1, G, G]."""
        if self._pixels is None or explained.pixels is None:
            raise ValueError("the visit was made without pixels=True")
        product_SS = (self._pixels[b].detach() * explained.pixels[b]).sum(0).abs()
        return patch_mean(product_SS[None], math.isqrt(self._image_tokens))

    def _layout(self) -> Layout:
        count, image = len(self.prompts), self._image_tokens
        columns = tuple(torch.arange(image, device=self.device) + self.start(b) for b in range(count))
        patches = torch.arange(image)[:, None]  # one token is one patch
        return Layout(tuple(slice(b, b + 1) for b in range(count)), columns, patches, cls=False)
