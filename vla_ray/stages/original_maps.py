"""Maps by the original scripts' definitions, from a `full` payload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vla_ray.data.tiles import TileGeometry
from vla_ray.explain.heatmap import assemble
from vla_ray.explain.matrices import tower_blocks
from vla_ray.explain.methods import Method
from vla_ray.explain.original import original_flow, original_generic, original_raw, original_rollout
from vla_ray.stages.maps import Row, map_row

_ATTENTION_ONLY = {
    "original_raw": original_raw,
    "original_rollout": original_rollout,
    "original_flow": original_flow,
}


def original_rows(
    methods: Sequence[Method],
    payload: Mapping[str, Any],
    frame: tuple[str, str],
    target: str,
    geometry: TileGeometry,
) -> list[Row]:
    """Rows of the original definitions among `methods`.

    Args:
        frame: its id and scene.
    """
    wanted = [m for m in methods if m.kind == "original"]
    if not wanted:
        return []
    blocks = tower_blocks(payload, "vision")
    attention = [entry["attn"] for entry in blocks]
    rows = []
    for method in wanted:
        if method.name in _ATTENTION_ONLY:
            tiles = _ATTENTION_ONLY[method.name](attention)
        else:
            tiles = original_generic(attention, [entry["grad"] for entry in blocks])
        direction = method.direction or "none"
        rows.append(map_row(*frame, target, method, direction, assemble(tiles.numpy(), geometry)))
    return rows
