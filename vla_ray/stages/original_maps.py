"""Maps by the original scripts' definitions, from a `full` payload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vla_ray.data.tiles import TileGeometry
from vla_ray.explain.heatmap import assemble
from vla_ray.explain.matrices import gradient_of, tower_blocks
from vla_ray.explain.methods import Method
from vla_ray.explain.original import original_flow, original_generic, original_raw, original_rollout
from vla_ray.stages.maps import MadeMap

_ATTENTION_ONLY = {
    "original_raw": original_raw,
    "original_rollout": original_rollout,
    "original_flow": original_flow,
}


def original_maps(methods: Sequence[Method], payload: Mapping[str, Any], geometry: TileGeometry) -> list[MadeMap]:
    """Maps by the original definitions among `methods`.

    Raises:
        TargetError: a gradient is needed that the payload lacks, or a map is not finite.
    """
    wanted = [m for m in methods if m.kind == "original"]
    if not wanted:
        return []
    blocks = tower_blocks(payload, "vision")
    attention = [entry["attn"] for entry in blocks]
    made = []
    for method in wanted:
        if method.name in _ATTENTION_ONLY:
            tiles = _ATTENTION_ONLY[method.name](attention)
        else:
            tiles = original_generic(attention, [gradient_of(entry) for entry in blocks])
        made.append(MadeMap(method, method.direction or "none", assemble(tiles.numpy(), geometry)))
    return made
