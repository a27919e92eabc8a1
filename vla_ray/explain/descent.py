"""Backward from a scalar's rows through language model and projector down to the patches, folding on the way.

What a visit of any model does once it knows the gradient of its scalar at the last hidden states: a frame's gradient
is brought to a size of one, seeds start at the rows that the scalar reads, what gathers on the image tokens seeds the
vision tower, and series are summed at the scale that one hop asks for (explain/chain.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_ray.attention import RelevanceTape
from vla_ray.attention.relevance import Start, sum_series
from vla_ray.attention.watch import attention_modules
from vla_ray.explain.chain import STRENGTH, Seed, cross_projector, hop_scale, uniform_seed
from vla_ray.explain.folds import FIRST_HOP, FOLDS, Relevance, chains, check_folds


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the pictures of a batch lie in both towers.

    Attributes:
        tiles: per frame its tiles along the vision tower's batch.
        columns: per frame the positions of its image tokens in the padded sequence.
        groups: [tokens, n] of a tile: the patches behind each token.
        cls: whether the vision tower has a CLS token, its first.
    """

    tiles: tuple[slice, ...]
    columns: tuple[Tensor, ...]
    groups: Tensor
    cls: bool


Rows = dict[str, dict[str, Tensor]]  # tower -> fold -> language [B, L], vision [tiles, N]


class Descent:
    """Of one batch. Its tape has to be open around the forward pass; then `arrive`, then `run` for every target.

    Args:
        towers: `vision` and `language`, with the attention implementation of vla_ray.attention.
        folds: names of FOLDS.
        strength: how much one hop moves, see explain/chain.py.
    """

    def __init__(self, towers: Mapping[str, nn.Module], folds: Sequence[str], strength: float = STRENGTH) -> None:
        self.folds, self.strength = check_folds(folds), strength
        self.tape = RelevanceTape(towers, chains(self.folds))
        self._layers = {tower: len(attention_modules(model)) for tower, model in towers.items()}
        self._layout: Layout | None = None
        self._bottom: Tensor | None = None

    def arrive(self, layout: Layout) -> None:
        """The forward pass is over."""
        self._layout = layout
        self._bottom = self.tape.bottoms["vision"]
        self.tape.bottoms.clear()

    def run(
        self,
        hidden_BLH: Tensor,
        gradient_BLH: Tensor,
        rows: Sequence[slice],
        seeds: Sequence[Seed],
        keep_graph: bool,
        extra: Sequence[Tensor] = (),
    ) -> tuple[Rows, list[Tensor]]:
        """The relevance of one target of every frame.

        Args:
            gradient_BLH: d scalar / d hidden states.
            rows, seeds: per frame the positions that its scalar reads, and what they start with.
            extra: other tensors whose gradient is asked for.

        Returns:
            The folds, and the gradient of each of `extra`; of a frame without a usable gradient all is zero.
        """
        assert self._bottom is not None
        unit = torch.zeros_like(gradient_BLH)
        weights = torch.zeros(gradient_BLH.shape[:2], dtype=torch.float64, device=unit.device)
        sizes = [seed.grad_rms if 0 < seed.grad_rms < math.inf else 0.0 for seed in seeds]
        for b, (r, seed, size) in enumerate(zip(rows, seeds, sizes, strict=True)):
            if size:  # nothing flows for a frame without a usable gradient
                unit[b, r] = gradient_BLH[b, r] / size  # of a size that no precision minds
                weights[b, r] = seed.weights
        self.tape.start(language=dict.fromkeys([*self.folds, FIRST_HOP], weights), vision=self._vision_seeds)
        inputs = [self._bottom, *extra]
        found = torch.autograd.grad(hidden_BLH, inputs, grad_outputs=unit, retain_graph=keep_graph)[1:]
        relevance = {"language": self._summed("language"), "vision": self._summed("vision")}
        self.tape.start()  # lets go of _vision_seeds: a cycle would keep the whole graph until the next collection
        return relevance, [g * g.new_tensor(sizes).view(-1, *(1,) * (g.dim() - 1)) for g in found]

    def of_frame(self, relevance: Rows, b: int, start: int) -> Relevance:
        """What the folds gave frame `b`, whose sequence begins at position `start` of the padded one."""
        assert self._layout is not None
        tiles, first = self._layout.tiles[b], int(self._layout.cls)
        language, vision = relevance["language"], relevance["vision"]
        return Relevance(
            {fold: r[b, start:].float() for fold, r in language.items()},
            {fold: r[tiles, first:].float() for fold, r in vision.items()},
            {fold: r[tiles, 0].float() for fold, r in vision.items() if first},
        )

    def _summed(self, tower: str) -> dict[str, Tensor]:
        """Fold -> [B, L] or [tiles, N], series summed at the scale that the first hop asks for."""
        rows = self.tape.rows(tower)
        first = rows.pop(FIRST_HOP, None)
        if first is None:
            return rows
        scale = self._scale(tower, first)
        # A uniform start says nothing: of the vision tower alone, what has moved from there counts.
        skip = 1 if tower == "vision" else 0
        return {fold: sum_series(r, scale, skip) if r.dim() == 3 else r for fold, r in rows.items()}

    def _scale(self, tower: str, first_hop: Tensor) -> Tensor:
        """[B] or [tiles], see explain/chain.py: tiles of a frame share its scale."""
        assert self._layout is not None
        mass = first_hop.sum(-1)
        if tower == "vision":
            mass = torch.stack([mass[tiles].sum() for tiles in self._layout.tiles])
        scale = hop_scale(mass, self._layers[tower], self.strength)
        return self._per_tile(scale) if tower == "vision" else scale

    def _per_tile(self, values_B: Tensor) -> Tensor:
        assert self._layout is not None
        counts = torch.tensor([t.stop - t.start for t in self._layout.tiles], device=values_B.device)
        return values_B.repeat_interleave(counts)

    def _vision_seeds(self) -> dict[str, Start]:
        layout = self._layout
        assert layout is not None
        groups, cls = layout.groups, layout.cls
        rows, first = self._summed("language"), self.tape.rows("language").get(FIRST_HOP)
        scale_T = 1.0 if first is None else self._per_tile(self._scale("language", first))

        def start(fold: str) -> Start:
            # Only relevancy is a product of gradients; the other rules are linear in them, or have none.
            scale = scale_T if FOLDS[fold].vision.rule == "product" else 1.0
            tokens = torch.cat([row[c] for row, c in zip(rows[fold], layout.columns, strict=True)])
            return Start(cross_projector(tokens.view(-1, len(groups)), groups, cls), scale)

        uniform = torch.cat([uniform_seed(t.stop - t.start, groups.numel(), cls) for t in layout.tiles])
        uniform = uniform.to(layout.columns[0].device)
        vit = {fold: Start(uniform) for fold in (*self.folds, FIRST_HOP) if fold not in rows}
        return vit | {fold: start(fold) for fold in self.folds if fold in rows}
