"""One frame as a function of its pixels: trajectory and explained scalar, with the text held fixed or written anew.

What gradient methods differentiate and perturbation methods probe. With the text held fixed this is exactly the
function whose gradient the attention methods use; `regenerate=True` lets the model write again for every picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_ray.models.simlingo import Processor, SimLingo
from vla_ray.models.simlingo.model import Decision
from vla_ray.models.simlingo.processing import Prompt
from vla_ray.targets import Spline, Target, kinematic_scalar


@dataclass(frozen=True, slots=True)
class Answer:
    """What n pictures of one frame lead to: route [n, 20, 2], speed [n, 10, 2] (metres), scalar [n]."""

    route: Tensor
    speed: Tensor
    scalar: Tensor

    def trajectory(self, head: str | None) -> Tensor:
        """The points that a target of this head reads: the route, else the speed waypoints."""
        return self.route if head == "route" else self.speed


# Pictures [n, T, 3, S, S], normalised as the model wants them, to what they lead to.
Ask = Callable[[Tensor], Answer]


class Question:
    """See the module docstring; an `Ask` for one frame and target.

    Args:
        text: the token ids that the model wrote for the unperturbed frame.
        token: which of them a text target explains; its logit is the scalar.
        regenerate: write the text anew for every picture, at most `max_new_tokens`.
    """

    def __init__(
        self,
        model: SimLingo,
        processor: Processor,
        prompt: Prompt,
        text: Sequence[int],
        target: Target,
        spline: Spline,
        token: int | None = None,
        regenerate: bool = False,
        max_new_tokens: int = 100,
    ) -> None:
        if regenerate and target.mode == "text":
            raise ValueError("a text target explains a token of the fixed text; it cannot be regenerated")
        self.model, self.processor, self.prompt, self.text = model, processor, prompt, list(text)
        self.target, self.spline, self.token = target, spline, token
        self.regenerate, self.max_new_tokens = regenerate, max_new_tokens

    def __call__(self, pixels_NT3SS: Tensor) -> Answer:
        """Differentiable with respect to the pixels unless gradients are off."""
        n, tiles = pixels_NT3SS.shape[:2]
        model, processor = self.model, self.processor
        batch = processor.batch([self.prompt] * n, [tiles] * n, model.device)
        tokens = model.encode_tiles(pixels_NT3SS.flatten(0, 1).to(model.device))
        embeds = model.embed_prompt(batch, tokens, processor.image_token_id)
        texts = [self.text] * n
        if self.regenerate:
            texts = model.generate(embeds, batch.mask_BP, processor.eos_id, self.max_new_tokens)
        decision = model.decide(embeds, batch.mask_BP, texts)
        return Answer(decision.route_B202, decision.speed_B102, self._scalar(decision))

    def _scalar(self, decision: Decision) -> Tensor:
        if self.target.mode == "action":
            return kinematic_scalar(self.target.name, decision.route_B202, decision.speed_B102, self.spline)
        assert self.token is not None
        rows = decision.prompt_lengths[0] - 1 + self.token
        at = torch.tensor([start + rows for start in decision.starts], device=decision.hidden_BLH.device)
        hidden = decision.hidden_BLH[torch.arange(len(at), device=at.device), at]
        return self.model.token_logits(hidden)[:, self.text[self.token]]
