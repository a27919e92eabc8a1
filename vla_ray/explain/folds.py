"""What is folded down the chain scalar -> queries -> language model -> projector -> vision tower -> patches.

A fold is one row through both towers: it starts at the query rows (or text row) that the scalar reads, and what has
gathered on the image tokens seeds the vision tower. A `_vit` fold leaves the language model out: the vision tower
starts uniformly, as the classical baselines do, and what is shown is what has moved from there. `Relevance` is what
all folds of one frame and target gave, whether they ran online, came from a relevance payload, or were computed from
stored matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vla_ray.attention.relevance import Chain, Weight
from vla_ray.errors import TargetError, nearest


@dataclass(frozen=True, slots=True)
class Fold:
    """`language` None: the vision tower is seeded uniformly."""

    language: Chain | None
    vision: Chain


def _both(chain: Chain) -> Fold:
    return Fold(chain, chain)


def _relevancy(weight: Weight) -> Fold:
    # A series, because its strength follows from the first hop of all layers (explain/chain.py).
    return Fold(Chain(weight, "series"), Chain(weight))


FOLDS: dict[str, Fold] = {
    "relevancy_positive": _relevancy("positive"),
    "relevancy_negative": _relevancy("negative"),
    "relevancy_signed": _relevancy("signed"),
    "attention_x_gradient_positive": _both(Chain("positive", "mean")),
    "attention_x_gradient_negative": _both(Chain("negative", "mean")),
    "rollout": _both(Chain("attention", "average")),
    "raw_attention": _both(Chain("attention", "mean")),
    "raw_attention_last": _both(Chain("attention", "last")),
    "relevancy_positive_vit": Fold(None, Chain("positive", "series")),
    "relevancy_negative_vit": Fold(None, Chain("negative", "series")),
    "rollout_vit": Fold(None, Chain("attention", "average")),
    "raw_attention_vit": Fold(None, Chain("attention", "mean")),
}


FIRST_HOP = "first hop"  # the chain whose mass says how much one hop moves


def check_folds(names: Sequence[str]) -> tuple[str, ...]:
    """The names themselves; TargetError with the known ones otherwise."""
    for name in names:
        if name not in FOLDS:
            raise TargetError(f"unknown fold {name!r}; known: {', '.join(FOLDS)}.{nearest(name, FOLDS)}")
    return tuple(dict.fromkeys(names))


def chains(names: Sequence[str]) -> dict[str, dict[str, Chain]]:
    """Tower -> fold -> chain, as a RelevanceTape wants them; and FIRST_HOP, by which series are scaled."""
    language = {name: chain for name in names if (chain := FOLDS[name].language) is not None}
    towers = {"language": language, "vision": {name: FOLDS[name].vision for name in names}}
    for tower in towers.values():
        if any(chain.rule == "series" for chain in tower.values()):
            tower[FIRST_HOP] = Chain("absolute", "mean")
    return towers


@dataclass(frozen=True, slots=True)
class Relevance:
    """Folds of one frame and target.

    Attributes:
        language: fold -> [L] of the frame's sequence, padding cut away; `_vit` folds have none.
        patches: fold -> [T, patches] of its tiles.
        cls: fold -> [T]; empty where the vision tower has no CLS token.
    """

    language: Mapping[str, Tensor]
    patches: Mapping[str, Tensor]
    cls: Mapping[str, Tensor]

    def cpu(self) -> Relevance:
        """The same numbers in main memory."""
        return Relevance(*({fold: row.cpu() for fold, row in part.items()} for part in self.to_dict().values()))

    def to_dict(self) -> dict[str, Any]:
        return {"language": dict(self.language), "patches": dict(self.patches), "cls": dict(self.cls)}

    def shares(self, fold: str, spans: Mapping[str, Sequence[int]], seed: Tensor) -> dict[str, float]:
        """Where the language model's relevance lies: image, text (generated), prompt (the rest of it), queries.

        The spans say what counts as which: an action policy's text is its instruction, its queries are its action
        tokens (`queries` in place of a driver's `route_queries` and `speed_queries`).

        A product keeps all of its own seed, which says nothing; only what has moved from there is counted. Absolute
        values of signed folds. Empty for `_vit` folds and where nothing has moved.
        """
        chain = FOLDS[fold].language
        if chain is None:
            return {}
        row = self.language[fold]
        moved = (row - seed.to(row.dtype) if chain.rule == "series" else row).abs()
        total = float(moved.sum())
        if not total > 0:
            return {}
        image = float(moved[slice(*spans["image"])].sum())
        queries = spans.get("queries") or (spans["route_queries"][0], spans["speed_queries"][1])
        return {
            "image": image / total,
            "text": float(moved[slice(*spans["text"])].sum()) / total,
            "prompt": (float(moved[slice(*spans["prompt"])].sum()) - image) / total,
            "queries": float(moved[slice(*queries)].sum()) / total,
        }
