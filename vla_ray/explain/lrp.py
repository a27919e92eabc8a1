"""AttnLRP-style propagation for SimLingo: one backward whose gradient, times the input, is relevance.

Opt-in only, by its own name, and nothing else here depends on it: layer-wise relevance propagation is patented, and
licences of its public implementations grant no patent rights. Clear the rights before any commercial use.

`lrp_rules` changes how gradients propagate and nothing else: outputs stay bit for bit what they were. Rules
(Achtibat et al. 2024, in the input x gradient form), and where relevance is conserved:
* Linear layers, convolution, residuals, layer scale, rotary embedding, cumulative sums: the plain gradient. Exact;
  biases, position embeddings, CLS, text and query embeddings take their part as inputs of their own.
* LayerNorm, RMSNorm: the variance is a constant; the mean is not, it is linear. Exact, the bias taking its part.
* GELU, SiLU: f(x) = x * (f(x)/x) with the ratio constant. Exact.
* Gated product and attention output P V: half to each factor. Exact.
* Softmax: the plain gradient; q k^T: half to each. With the half that P got of P V, q and k receive 1/4 of their plain
  gradient and v 1/2. NOT conserved: softmax is not homogeneous, so a call receives sum(P dP)/2 for P and hands on
  sum(S dS)/2, S being the scores.
  `scores="constant"` treats P as constant and gives all to v (CP-LRP, Ali et al. 2022): conserved, but blind to why a
  token was looked at.
* The scalar's own gradient with respect to the trajectory is the plain one, so all relevance adds up to
  <trajectory, dy/dtrajectory>, which is n y for a scalar of degree n in the trajectory: y for positions, progress and
  speed, 2 y for acceleration, braking and jerk energies, -2 y for the curvature ones, and 0 for yaw rate energy.
Of that, a map holds the pixels' part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.models.internvl.modeling_internvl import InternVLVisionMLP, InternVLVisionRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from vla_ray.attention.watch import IMPLEMENTATION, AttentionCall, Watcher, sdpa
from vla_ray.errors import ConfigError
from vla_ray.explain.gradients import input_gradient, patch_mean
from vla_ray.explain.question import Question
from vla_ray.models.simlingo import SimLingo
from vla_ray.models.simlingo.model import Projector

Scores = Literal["shared", "constant"]
Forward = Callable[[Tensor], Tensor]


def lrp(question: Question, pixels_T3SS: Tensor, scores: Scores = "shared") -> Tensor:
    """Signed relevance of each patch [T, G, G]: pixels x propagated gradient, summed over channels and the patch.

    Args:
        pixels_T3SS: normalised tiles of the question's frame.
        scores: see the module docstring.

    Raises:
        ConfigError, RuntimeError: see lrp_rules().
        TargetError: the scalar has no gradient, or it is not finite.
    """
    config = question.model.config
    with lrp_rules(question.model, scores):
        gradient_T3SS = input_gradient(question, pixels_T3SS[None])[0]
    return patch_mean((pixels_T3SS * gradient_T3SS).sum(1), config.patch_grid) * config.patch_size**2


@contextmanager
def lrp_rules(model: SimLingo, scores: Scores = "shared") -> Iterator[None]:
    """While open, forward passes of `model` build a graph whose backward follows the rules of the module docstring.

    Backward may run later. The model is as it was before when this is left, by an error too.

    Raises:
        ConfigError: a tower's attention does not run through vla_ray, so its rule would silently not apply.
        RuntimeError: another watcher is open in this process, these rules included.
    """
    for name, tower in (("vision tower", model.vision), ("language model", model.language)):
        if tower.config._attn_implementation != IMPLEMENTATION:
            raise ConfigError(
                f"lrp cannot follow the {name}'s attention {tower.config._attn_implementation!r}; "
                f"call model.set_attention({IMPLEMENTATION!r}) first."
            )
    with _AttentionRule(scores):
        changed: list[tuple[nn.Module, Forward | None]] = []
        try:
            for module, rule in _rules(model).items():
                changed.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = rule
            yield
        finally:
            for module, own in changed:
                if own is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = own


class _AttentionRule(Watcher):
    """Attention whose q, k and v receive their share of the gradient."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        if self._scores == "constant":
            return sdpa(module, replace(call, query=call.query.detach(), key=call.key.detach()))
        query, key, value = _scaled(call.query, 0.25), _scaled(call.key, 0.25), _scaled(call.value, 0.5)
        return sdpa(module, replace(call, query=query, key=key, value=value))


def _rules(model: SimLingo) -> dict[nn.Module, Forward]:
    """The new forward of every module that has a rule of its own."""
    rules: dict[nn.Module, Forward] = {}
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            rules[module] = _layer_norm(module)
        elif isinstance(module, Qwen2RMSNorm | InternVLVisionRMSNorm):
            rules[module] = _rms_norm(module)
        elif isinstance(module, Projector):
            rules[module] = _projector(module)
        elif isinstance(module, InternVLVisionMLP):
            rules[module.activation_fn] = _activation(module.activation_fn.forward)
        elif isinstance(module, Qwen2MLP):
            rules[module] = _gated(module)
            rules[module.act_fn] = _activation(module.act_fn.forward)
    for module in (*model.route_head, *model.speed_head):
        if isinstance(module, nn.SiLU):
            rules[module] = _activation(module.forward)
    return rules


def _layer_norm(module: nn.LayerNorm) -> Forward:
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        scale = (centred.detach().square().mean(-1, keepdim=True) + module.eps).rsqrt()
        return _with_gradient_of(original(x), (centred * scale).to(x.dtype) * module.weight + module.bias)

    return forward


def _rms_norm(module: Qwen2RMSNorm | InternVLVisionRMSNorm) -> Forward:
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.detach().square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
        return _with_gradient_of(original(x), (wide * scale).to(x.dtype) * module.weight)

    return forward


def _activation(original: Forward) -> Forward:
    def forward(x: Tensor) -> Tensor:
        value = original(x)
        # At x = 0 there is no relevance to hand on: f(0) = 0.
        ratio = torch.where(x == 0, torch.zeros_like(x), value / x).detach()
        return _with_gradient_of(value, x * ratio)

    return forward


def _projector(module: Projector) -> Forward:
    gelu = _activation(nn.functional.gelu)
    return lambda x: module.linear_2(gelu(module.linear_1(module.norm(x))))


def _gated(module: Qwen2MLP) -> Forward:
    return lambda x: module.down_proj(_scaled(module.act_fn(module.gate_proj(x)) * module.up_proj(x), 0.5))


def _scaled(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient arrives multiplied by `factor`."""
    if not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(lambda gradient: gradient * factor)
    return x


def _with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """The numbers of `value`, exactly, with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())
