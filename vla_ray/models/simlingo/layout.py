"""The released key layout: which tensor of `pytorch_model.pt` becomes which parameter of our model.

The released names come from the original class tree (an InternVL2 chat model split in two, a PEFT wrapper, Lightning
sub-modules); ours from native transformers modules. This table is the only place that knows both. Its 992 names and
shapes equal the released file's for InternVL2-1B sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

VISION = "vision_model.image_encoder.model.vision_model."
PROJECTOR = "vision_model.image_encoder.model.mlp1."
DRIVING = "adaptors.driving."
LM_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VIT_NAMES = (  # ours -> released, inside a block or the embeddings
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.projection_layer", "attn.proj"),
    ("attention.q_norm", "attn.q_norm"),
    ("attention.k_norm", "attn.k_norm"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_1", "ls1"),
    ("lambda_2", "ls2"),
)
PROJECTOR_NAMES = {"norm": "0", "linear_1": "1", "linear_2": "3"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where one parameter comes from.

    Attributes:
        parameter: name in our model.
        shape: its shape.
        name: released tensor; for q/k/v of the vision tower the fused `qkv`.
        third: 0, 1, 2 = rows of q, k, v in that fused tensor; None = the whole tensor.
        aliases: released names that hold the same tensor; each may be absent, and one of them may stand in for `name`.
        lora: stem of a LoRA pair (`<stem>.lora_A.default.weight`, `.lora_B.`) to be merged; None without one.
    """

    parameter: str
    shape: tuple[int, ...]
    name: str
    third: int | None = None
    aliases: tuple[str, ...] = ()
    lora: str | None = None

    def lora_names(self) -> tuple[str, str]:
        return f"{self.lora}.lora_A.default.weight", f"{self.lora}.lora_B.default.weight"


def sources(model: nn.Module, lora: bool) -> Iterator[Source]:
    """Every parameter of `model` (a SimLingo, meta device suffices) with its released source, in our order."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part, _, rest = name.partition(".")
        shape = tuple(parameter.shape)
        match part:
            case "vision":
                yield _vision(name, rest, shape)
            case "projector":
                layer, _, leaf = rest.partition(".")
                yield Source(name, shape, f"{PROJECTOR}{PROJECTOR_NAMES[layer]}.{leaf}")
            case "language":
                yield _language(name, rest, shape, lora)
            case "waypoint_encoder":
                yield Source(name, shape, f"wp_encoder.mlp.{rest}")
            case "route_queries":
                yield Source(name, shape, DRIVING + "query_embeds_wps")
            case "speed_queries":
                yield Source(name, shape, DRIVING + "query_embeds_speed")
            case "route_head":
                yield Source(name, shape, f"{DRIVING}route_head.{rest}")
            case "speed_head":
                yield Source(name, shape, f"{DRIVING}speed_wps_head.{rest}")
            case _:
                raise ValueError(f"parameter {name} has no place in the released layout")


def _vision(name: str, rest: str, shape: tuple[int, ...]) -> Source:
    for i, letter in enumerate("qkv"):
        if f"attention.{letter}_proj" in rest:
            fused = rest.replace(f"attention.{letter}_proj", "attn.qkv").replace("encoder.layer.", "encoder.layers.")
            return Source(name, shape, VISION + fused, third=i)
    for ours, released in VIT_NAMES:
        rest = rest.replace(ours, released)
    return Source(name, shape, VISION + rest)


def _language(name: str, rest: str, shape: tuple[int, ...], lora: bool) -> Source:
    # PEFT inserts base_model.model; the embedding is registered once more beside it and both again in the adaptors.
    prefix = "language_model.model.base_model.model." if lora else "language_model.model."
    if rest == "model.embed_tokens.weight":
        again = "language_model.model.base_model.model." if lora else "language_model.model."
        return Source(
            name, shape, prefix + rest, aliases=(again + "embed_tokens.weight", "adaptors.language.embed_tokens.weight")
        )
    if rest == "lm_head.weight":
        return Source(name, shape, prefix + rest, aliases=("adaptors.language.lm_head.weight",))
    stem, _, leaf = rest.rpartition(".")
    if lora and stem.endswith(LM_LINEARS):
        return Source(
            name, shape, f"{prefix}{stem}.base_layer.{leaf}", lora=prefix + stem if leaf == "weight" else None
        )
    return Source(name, shape, prefix + rest)


def released_shapes(model: nn.Module, lora_rank: int) -> dict[str, tuple[int, ...]]:
    """Released name -> shape for a model of these sizes, aliases included (992 names for InternVL2-1B)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for s in sources(model, lora=lora_rank > 0):
        shapes[s.name] = (3 * s.shape[0], *s.shape[1:]) if s.third is not None else s.shape
        shapes.update(dict.fromkeys(s.aliases, s.shape))
        if s.lora:
            a, b = s.lora_names()
            shapes[a], shapes[b] = (lora_rank, s.shape[1]), (s.shape[0], lora_rank)
    return shapes


def optional_names(model: nn.Module, lora: bool) -> dict[str, tuple[str, ...]]:
    """Released name -> all names of the same tensor, for the tensors that the file may hold under fewer names."""
    groups: dict[str, tuple[str, ...]] = {}
    for s in sources(model, lora):
        if s.aliases:
            group = (s.name, *s.aliases)
            groups.update(dict.fromkeys(group, group))
    return groups


def find(state: Mapping[str, object], source: Source) -> str:
    """The name under which `state` holds the tensor: the released one or an alias."""
    return next((n for n in (source.name, *source.aliases) if n in state), source.name)
