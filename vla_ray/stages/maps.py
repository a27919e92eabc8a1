"""Maps of the attention methods, and any map as a row on disk and back. A batch's maps are one table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import TargetError
from vla_ray.explain.folds import Relevance
from vla_ray.explain.heatmap import HeatMap, assemble
from vla_ray.explain.methods import Method, tiles_of
from vla_ray.schema import MAPS, OK
from vla_ray.storage.files import Location
from vla_ray.storage.fragments import fragment_path, write_rows
from vla_ray.targets import Target, acting_direction

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class MadeMap:
    """A map of one frame and target.

    Attributes:
        direction: which evidence it shows.
        columns: what else a row of MAPS says of it: shares, completeness_error, forwards ...
        standard_error: of its values, on the same grid.
    """

    method: Method
    direction: str
    heat: HeatMap
    columns: Mapping[str, Any] = field(default_factory=dict)
    standard_error: NDArray[np.floating] | None = None

    def row(self, frame_id: str, scene: str, target: str) -> Row:
        """A row of MAPS. Values are kept as float16 times a power of two, so that small ones do not vanish."""
        heat = self.heat
        parts = [x for x in (heat.values, heat.thumbnail, self.standard_error) if x is not None]
        top = max(float(np.abs(x).max(initial=0.0)) for x in parts)
        scale = 2.0 ** math.floor(math.log2(top)) if top > 0 else 1.0

        def stored(values: NDArray[np.floating] | None) -> NDArray[np.float16] | None:
            return None if values is None else (values / scale).astype(np.float16).ravel()

        return {
            "frame_id": frame_id,
            "scene": scene,
            "target": target,
            "method": self.method.name,
            "direction": self.direction,
            "rows": heat.values.shape[0],
            "columns": heat.values.shape[1],
            "values": stored(heat.values),
            "thumbnail": stored(heat.thumbnail),
            "standard_error": stored(self.standard_error),
            "scale": scale,
            "geometry": json.dumps(heat.geometry.to_dict()),
            **self.columns,
        }


def read_map(row: Mapping[str, Any]) -> HeatMap:
    """The map of a row of MAPS."""
    scale, thumbnail = np.float32(row["scale"]), row["thumbnail"]
    if thumbnail is not None:
        side = math.isqrt(len(thumbnail))
        thumbnail = np.asarray(thumbnail, np.float32).reshape(side, side) * scale
    values = np.asarray(row["values"], np.float32).reshape(row["rows"], row["columns"]) * scale
    return HeatMap(values, TileGeometry.from_dict(json.loads(row["geometry"])), thumbnail)


def evidence_of(row: Mapping[str, Any], value: float) -> NDArray[np.float32]:
    """The map of a row of MAPS on one canvas, a signed one turned so that positive is what acts.

    A red light is evidence against progress, and still what the action came from.

    Args:
        value: of the target.
    """
    turned = row["direction"] == "signed" and acting_direction(row["target"], value) == "negative"
    values = read_map(row).combined().values
    return -values if turned else values


def fold_maps(
    methods: Sequence[Method],
    relevance: Relevance,
    target: Target,
    value: float,
    geometry: TileGeometry,
    spans: Mapping[str, Sequence[int]],
    seed_L: Tensor,
) -> list[MadeMap]:
    """Maps of the attention methods among `methods`.

    Args:
        value: of the target; decides which direction acts.
        seed_L: where the relevance started, [L].

    Raises:
        TargetError: a map is not finite, or does not fit the picture.
    """
    made = []
    for method in methods:
        if method.kind != "fold":
            continue
        acting = acting_direction(target.name, value)
        fold = method.fold_for(acting)
        try:
            heat = assemble(tiles_of(fold, method.tokens, relevance, spans["image"]), geometry)
        except TargetError as e:
            raise TargetError(f"{method.name}: {e}") from e
        columns = {f"share_{part}": share for part, share in relevance.shares(fold, spans, seed_L).items()}
        if not method.tokens and fold in relevance.cls:
            columns["share_cls"] = _share(relevance.cls[fold], relevance.patches[fold])
        made.append(MadeMap(method, method.direction or acting, heat, columns))
    return made


def written(run_dir: Location, rows: list[Row], maps: list[Row]) -> list[Row]:
    """The rows, pointing at the table of their maps, which is on disk."""
    if not maps:
        return rows
    path = fragment_path((row["frame_id"], row["target"]) for row in rows)
    size = write_rows(run_dir / path, maps, MAPS)
    share = size // len({(m["frame_id"], m["target"]) for m in maps})
    return [{**row, "payload_path": path, "payload_bytes": share} if row["status"] == OK else row for row in rows]


def _share(part: Tensor, rest: Tensor) -> float:
    inside, outside = float(part.abs().sum()), float(rest.abs().sum())
    return inside / (inside + outside) if inside + outside > 0 else 0.0
