"""Sanity checks that need no masks: a map must change with the target and with the model's weights.

A method that gives the same map for every target, or for a model whose weights are noise, shows the picture, not the
model (Adebayo et al. 2018, cascading randomisation from the output down).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from vla_ray.explain.faithfulness.grid import MapArray
from vla_ray.explain.faithfulness.similarity import Similarity, similarity
from vla_ray.models.simlingo import SimLingo

GROUP = 4  # blocks in a stage


def between_targets(maps: Mapping[str, MapArray]) -> dict[tuple[str, str], Similarity]:
    """Target randomisation: similarity of every two maps of one frame. Near 1, the map ignores what it explains."""
    return {(a, b): similarity(maps[a], maps[b]) for a, b in combinations(maps, 2)}


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the model that is randomised in one step; every parameter belongs to exactly one stage."""

    name: str
    parts: tuple[nn.Module | nn.Parameter, ...]


def randomisation_stages(model: SimLingo, group: int = GROUP) -> list[Stage]:
    """The model from its outputs down to its pixels: heads, language blocks, projector, vision blocks.

    Blocks come in groups of `group`, the last ones first. A norm behind the blocks goes with the topmost group, what
    feeds them (word and target point embeddings, queries; patch and position embeddings) with the lowest one. At full
    size, with 24 blocks in each tower and groups of 4, these are 14 stages.
    """
    language, vision = model.language.model, model.vision
    feeds_language = [language.embed_tokens, model.waypoint_encoder, model.route_queries, model.speed_queries]
    heads: list[nn.Module | nn.Parameter] = [model.route_head, model.speed_head]
    tied = model.language.lm_head.weight is language.embed_tokens.weight
    if not tied:  # a tied head is the word embeddings, which have their own place
        heads.append(model.language.lm_head)
    return [
        Stage("heads", tuple(heads)),
        *_groups("language", language.layers, group, language.norm, feeds_language),
        Stage("projector", (model.projector,)),
        *_groups("vision", vision.encoder.layer, group, vision.layernorm, [vision.embeddings]),
    ]


def _groups(
    tower: str, blocks: nn.ModuleList, size: int, above: nn.Module, below: list[nn.Module | nn.Parameter]
) -> list[Stage]:
    stages = []
    for stop in range(len(blocks), 0, -size):
        start = max(0, stop - size)
        parts: list[nn.Module | nn.Parameter] = list(blocks[start:stop])
        if stop == len(blocks):
            parts = [above, *parts]
        if start == 0:
            parts += below
        name = f"{tower} {start}-{stop - 1}" if stop - start > 1 else f"{tower} {start}"
        stages.append(Stage(name, tuple(parts)))
    return stages


@torch.no_grad()
def randomise_(parts: Iterable[nn.Module | nn.Parameter], seed: int = 0) -> None:
    """Replace what these parts have learned by noise of the same scale, in place; randomise a copy of the model.

    * Matrices, embeddings, queries and biases: normal with the tensor's own mean and deviation. What was learned is
      gone, while activations keep their size, so that later blocks and half precision behave as before.
    * Gains (the weights of norms, the layer scales of InternViT): one value for all channels, their mean. Freshly
      initialised gains are constant (1 for a norm); noise in them would be an arbitrary choice of channels.

    Equal seeds give equal weights on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for part in parts:
        for parameter, is_gain in _parameters(part):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            old = parameter.detach().float().cpu()
            noise = torch.zeros_like(old) if is_gain else torch.randn(old.shape, generator=generator)
            parameter.copy_(old.mean() + old.std(correction=0) * noise)


def _parameters(part: nn.Module | nn.Parameter) -> list[tuple[Tensor, bool]]:
    if isinstance(part, nn.Parameter):
        return [(part, False)]
    found: list[tuple[Tensor, bool]] = []
    for module in part.modules():
        is_norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            found.append((parameter, (is_norm and name == "weight") or name.startswith("lambda_")))
    return found
