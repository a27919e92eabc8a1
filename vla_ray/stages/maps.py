"""A map as a row on disk, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.tiles import TileGeometry
from vla_ray.explain.folds import Relevance
from vla_ray.explain.heatmap import HeatMap, assemble
from vla_ray.explain.methods import Method, tiles_of
from vla_ray.targets import Target, acting_direction

Row = dict[str, Any]


def map_row(
    frame_id: str,
    scene: str,
    target: str,
    method: Method,
    direction: str,
    heat: HeatMap,
    standard_error: NDArray[np.floating] | None = None,
    **columns: Any,
) -> Row:
    """A row of MAPS. Values are kept as float16 times a power of two, so that small ones do not vanish."""
    parts = [x for x in (heat.values, heat.thumbnail, standard_error) if x is not None]
    top = max(float(np.abs(x).max(initial=0.0)) for x in parts)
    scale = 2.0 ** math.floor(math.log2(top)) if top > 0 else 1.0

    def stored(values: NDArray[np.floating] | None) -> NDArray[np.float16] | None:
        return None if values is None else (values / scale).astype(np.float16).ravel()

    return {
        "frame_id": frame_id,
        "scene": scene,
        "target": target,
        "method": method.name,
        "direction": direction,
        "rows": heat.values.shape[0],
        "columns": heat.values.shape[1],
        "values": stored(heat.values),
        "thumbnail": stored(heat.thumbnail),
        "standard_error": stored(standard_error),
        "scale": scale,
        "geometry": json.dumps(heat.geometry.to_dict()),
        **columns,
    }


def read_map(row: Mapping[str, Any]) -> HeatMap:
    """The map of a row of MAPS."""
    scale, thumbnail = np.float32(row["scale"]), row["thumbnail"]
    if thumbnail is not None:
        side = math.isqrt(len(thumbnail))
        thumbnail = np.asarray(thumbnail, np.float32).reshape(side, side) * scale
    values = np.asarray(row["values"], np.float32).reshape(row["rows"], row["columns"]) * scale
    return HeatMap(values, TileGeometry.from_dict(json.loads(row["geometry"])), thumbnail)


def fold_rows(
    methods: Sequence[Method],
    relevance: Relevance,
    frame: tuple[str, str],
    target: Target,
    value: float,
    geometry: TileGeometry,
    spans: Mapping[str, Sequence[int]],
    seed_L: Any,
) -> list[Row]:
    """Maps of the attention methods among `methods`.

    Args:
        frame: its id and scene.
        value: of the target; decides which direction acts.
        seed_L: where the relevance started, [L].
    """
    rows = []
    for method in methods:
        if method.kind != "fold":
            continue
        acting = acting_direction(target.name, value)
        fold = method.fold_for(acting)
        direction = method.direction or acting
        heat = assemble(tiles_of(fold, method.tokens, relevance, spans["image"]), geometry)
        shares = relevance.shares(fold, spans, seed_L)
        columns: dict[str, Any] = {f"share_{part}": share for part, share in shares.items()}
        if not method.tokens:
            columns["share_cls"] = _share(relevance.cls[fold], relevance.patches[fold])
        rows.append(map_row(*frame, target.name, method, direction, heat, **columns))
    return rows


def _share(part: Any, rest: Any) -> float:
    inside, outside = float(part.abs().sum()), float(rest.abs().sum())
    return inside / (inside + outside) if inside + outside > 0 else 0.0
