"""Every way to make a map, by name, with what it needs and which stages it crosses.

    pixels <- [vision tower] <- projector <- [language model] <- queries <- scalar

A plain name crosses the whole chain; `_lm` stops at the image tokens, `_vit` uses the vision tower alone. Nothing here
computes: a fold (explain/folds.py) is turned into a map, anything else is found by its `kind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from vla_ray.errors import TargetError, nearest

if TYPE_CHECKING:  # this table is read before anything heavy is loaded
    from vla_ray.explain.folds import Relevance

# fold: attention, from any payload level or online. gradient: a backward pass to the pixels. perturbation: forwards on
# changed pictures. original: definitions of the original scripts, from a full payload. propagation: LRP.
MethodKind = Literal["fold", "gradient", "perturbation", "original", "propagation"]
Direction = Literal["positive", "negative", "signed", "none"]

CHEFER = "Chefer et al. 2021, rule 6"


@dataclass(frozen=True, slots=True)
class Method:
    """How a map is made.

    Attributes:
        fold: for kind fold; `{direction}` stands for the direction that acts.
        tokens: the map is taken at the image tokens, before the vision tower.
        direction: of the evidence shown; None: the one that acts, by target (`Kinematic.acts`).
        forwards: a rough count of forward passes (a backward counts as two) per frame and target.
    """

    name: str
    kind: MethodKind
    summary: str
    source: str
    fold: str = ""
    tokens: bool = False
    direction: Direction | None = None
    forwards: str = "3"

    def fold_for(self, direction: Direction) -> str:
        return self.fold.format(direction=direction)

    def folds(self) -> tuple[str, ...]:
        """Folds that any frame may need."""
        if self.kind != "fold":
            return ()
        return tuple(dict.fromkeys(self.fold.format(direction=d) for d in ("positive", "negative")))

    @property
    def needs_pixels(self) -> bool:
        return self.kind in ("gradient", "perturbation", "propagation")

    @property
    def is_signed(self) -> bool:
        return self.direction == "signed"


ABNAR, ONE_HOP, ORIGINAL = "Abnar & Zuidema 2020", "Chefer et al. 2021, without the product", "TML_UDD scripts"
ACTING = "relevancy_{direction}"
ONE_HOP_FOLD = "attention_x_gradient_{direction}"


def _fold(
    name: str, summary: str, source: str, fold: str, tokens: bool = False, direction: Direction | None = None
) -> Method:
    return Method(name, "fold", summary, source, fold, tokens, direction)


def _other(
    name: str, kind: MethodKind, summary: str, source: str, direction: Direction = "none", forwards: str = "3"
) -> Method:
    return Method(name, kind, summary, source, direction=direction, forwards=forwards)


_ALL = (
    _fold("relevancy", "relevancy of what acts: what raises an energy, what holds progress back", CHEFER, ACTING),
    _fold("relevancy_positive", "of what raises the scalar", CHEFER, "relevancy_positive", direction="positive"),
    _fold("relevancy_negative", "of what lowers the scalar", CHEFER, "relevancy_negative", direction="negative"),
    _fold("relevancy_signed", "of both, cancelling (no relu)", CHEFER, "relevancy_signed", direction="signed"),
    _fold("relevancy_lm", "of what acts, at the image tokens: language model only", CHEFER, ACTING, tokens=True),
    _fold("relevancy_vit", "of what acts, in the vision tower alone, all rows alike", CHEFER, ACTING + "_vit"),
    _fold("attention_x_gradient", "mean over layers of relu(A * dA), one hop in each tower", ONE_HOP, ONE_HOP_FOLD),
    _fold("attention_x_gradient_lm", "the same in the language model only", ONE_HOP, ONE_HOP_FOLD, tokens=True),
    _fold("rollout", "product of (A + I) / 2 through the whole chain", ABNAR, "rollout", direction="none"),
    _fold("rollout_lm", "the same in the language model only", ABNAR, "rollout", True, "none"),
    _fold("rollout_vit", "the same in the vision tower alone, all rows alike", ABNAR, "rollout_vit", direction="none"),
    _fold("raw_attention", "mean of A over layers, one hop in each tower", "-", "raw_attention", direction="none"),
    _fold("raw_attention_lm", "the same in the language model only", "-", "raw_attention", True, "none"),
    _fold("raw_attention_last_lm", "A of the language model's last layer", "-", "raw_attention_last", True, "none"),
    _fold("raw_attention_vit", "mean of A in the vision tower alone", "-", "raw_attention_vit", direction="none"),
    _other("gradient_x_input", "gradient", "|pixels * gradient|, mean over a patch", "Shrikumar et al. 2017"),
    _other(
        "integrated_gradients",
        "gradient",
        "gradients on the way from the blurred picture; they sum to the scalar's change",
        "Sundararajan et al. 2017",
        "signed",
        "100 or more",
    ),
    _other(
        "occlusion",
        "perturbation",
        "trajectory displacement while a window of 2 x 2 patches is blurred (a reference)",
        "Zeiler & Fergus 2014",
        forwards="one per window",
    ),
    _other(
        "iss",
        "perturbation",
        "interventional score: error with a cell hidden minus error with it shown (a reference)",
        "arXiv 2605.00321",
        forwards="200 to 2,000",
    ),
    _other("original_raw", "original", "last block of the vision tower", ORIGINAL),
    _other("original_rollout", "original", "rollout of the vision tower, rows summed", ORIGINAL),
    _other("original_flow", "original", "product of A without residual, vision tower", ORIGINAL),
    _other("original_generic", "original", "relevancy of the vision tower, raw gradient", ORIGINAL, "positive"),
    _other(
        "lrp",
        "propagation",
        "layer-wise relevance propagation; opt-in: patents cover its commercial use",
        "Achtibat et al. 2024 (AttnLRP)",
        "signed",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
DEFAULT_METHOD = "relevancy"


def parse_methods(names: str | Sequence[str]) -> tuple[Method, ...]:
    """Methods by name, in the order given, without duplicates; `[a,b]` or `"a,b"`.

    Raises:
        TargetError: none, or an unknown one.
    """
    given = names.split(",") if isinstance(names, str) else [part for n in names for part in str(n).split(",")]
    wanted = [name.strip() for name in given if name.strip()]
    if not wanted:
        raise TargetError(f"methods is empty; give one or more of: {', '.join(METHODS)}")
    for name in wanted:
        if name not in METHODS:
            raise TargetError(f"unknown method {name!r}; known: {', '.join(METHODS)}.{nearest(name, METHODS)}")
    return tuple(METHODS[name] for name in dict.fromkeys(wanted))


def folds_of(methods: Sequence[Method]) -> tuple[str, ...]:
    """All folds that these methods may need."""
    return tuple(dict.fromkeys(fold for method in methods for fold in method.folds()))


def tiles_of(fold: str, tokens: bool, relevance: Relevance, image: Sequence[int]) -> NDArray[np.float32]:
    """A fold's map per tile, [T, patches] or [T, image tokens].

    Args:
        image: first and one past the last position of the image tokens in the sequence.
    """
    patches = relevance.patches[fold]
    if not tokens:
        return patches.float().cpu().numpy()
    return relevance.language[fold][slice(*image)].view(len(patches), -1).float().cpu().numpy()
