"""Replicas that make maps: online, or from the payloads of a capture, with or without a model beside them.

A batch's maps go into one table (stages/maps.py), its rows into the ledger. What an attention method needs comes from
the visit's folds or from the payload; every other method asks the model about changed pictures, the text held fixed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import StorageError, TargetError
from vla_ray.explain.matrices import relevance_of, seed_row
from vla_ray.explain.methods import Method, folds_of
from vla_ray.explain.question import Question
from vla_ray.schema import DEGENERATE, FAILED, METRICS, OK, PAYLOAD_SCHEMA_VERSION
from vla_ray.stages.capture import check_finite
from vla_ray.stages.fitting import ends_with_its_gpu
from vla_ray.stages.maps import fold_maps, written
from vla_ray.stages.original_maps import original_maps
from vla_ray.stages.payloads import NonFiniteTarget, token_spans
from vla_ray.stages.pixel_maps import PixelOptions, pixel_maps
from vla_ray.stages.replica import ModelReplica, ModelSpec, about, failed
from vla_ray.stages.visit import Explained, Visit
from vla_ray.stages.work import Loaded, Row
from vla_ray.storage import payload as payload_file
from vla_ray.storage.files import Location
from vla_ray.storage.ledger import read_metrics
from vla_ray.targets import Spline, Target, acting_direction


@dataclass(frozen=True, slots=True)
class ExplainSpec:
    """What to explain, and by which methods.

    Attributes:
        run_dir: of the maps.
        capture: the run whose payloads are read; None explains online.
    """

    run_dir: Location
    targets: tuple[Target, ...]
    methods: tuple[Method, ...]
    spline: Spline
    strength: float
    pixels: PixelOptions
    capture: Location | None = None


class OnlineExplainer(ModelReplica):
    """Frames in, maps out."""

    def __init__(self, spec: ExplainSpec, model: ModelSpec) -> None:
        super().__init__(model, spec.targets, spec.spline)
        self.spec = spec

    def run(self, frames: Sequence[Loaded], targets: Sequence[Target]) -> list[Row]:
        visit = self.visit(frames, folds_of(self.spec.methods), self.spec.strength)
        shared = self.shared_columns(visit, frames)
        rows, maps = [], []
        for i, target in enumerate(targets):
            explained = visit.explain(target, self.spline, keep_graph=i + 1 < len(targets))
            for b, frame in enumerate(frames):
                columns = {
                    "target_scalar": float(explained.scalar_B[b]),
                    "token_index": explained.tokens[b],
                    "backward_s": explained.seconds / len(frames),
                }
                row = {**about(frame, target), **shared[b], **columns}
                row, found = with_maps(row, explained, b, partial(self._maps, visit, explained, b, frame))
                rows.append(row)
                maps += found
        return written(self.spec.run_dir, rows, maps)

    def _maps(self, visit: Visit, explained: Explained, b: int, frame: Loaded) -> list[Row]:
        ref, target, value = frame.ref, explained.target, float(explained.scalar_B[b])
        assert frame.geometry is not None
        assert frame.tiles is not None
        maps = fold_maps(
            self.spec.methods,
            visit.relevance(explained, b).cpu(),
            target,
            value,
            frame.geometry,
            token_spans(visit, self.processor, b),
            visit.seed_row(explained, b),
        )
        question = Question(
            self.model, self.processor, visit.prompts[b], visit.texts[b], target, self.spline, explained.tokens[b]
        )
        maps += pixel_maps(self.spec.methods, question, frame.tiles, frame.geometry, self.spec.pixels)
        return [m.row(ref.frame_id, ref.scene, target.name) for m in maps]


def with_maps(row: Row, explained: Explained, b: int, make: Callable[[], list[Row]]) -> tuple[Row, list[Row]]:
    """A frame's row with how it ended, and its maps: none if its scalar has no gradient, or if they cannot be made."""
    try:
        check_finite(explained, b)
        if explained.is_degenerate(b):
            return {**row, "status": DEGENERATE}, []
        return {**row, "status": OK}, make()
    except (TargetError, NonFiniteTarget) as e:
        return failed(row, type(e).__name__, str(e)), []


class PayloadExplainer:
    """Payloads of a capture in, maps out. A model is loaded only if a method asks about changed pictures."""

    def __init__(self, spec: ExplainSpec, model: ModelSpec | None = None) -> None:
        assert spec.capture is not None
        self.spec, self.capture = spec, spec.capture
        self.targets = {t.name: t for t in spec.targets}
        self.asker = None if model is None else OnlineExplainer(spec, model)
        self.rows = read_metrics(spec.capture)
        keys = zip(self.rows["frame_id"].to_pylist(), self.rows["target"].to_pylist(), strict=True)
        self.index = {key: i for i, key in enumerate(keys)}

    def failed(self, frame: Loaded, target: str, error_type: str, error: str) -> Row:
        return failed(about(frame, self.targets[target]), error_type, error)

    def process(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        """Rows of all frames and targets, their maps written."""
        rows, maps = [], []
        for frame in frames:
            for target in targets:
                with ends_with_its_gpu():
                    row, found = self._explain(frame, self.targets[target])
                rows.append(row)
                maps += found
        return written(self.spec.run_dir, rows, maps)

    def _explain(self, frame: Loaded, target: Target) -> tuple[Row, list[Row]]:
        number = self.index.get((frame.ref.frame_id, target.name))
        if number is None:
            return self.failed(frame, target.name, "TargetError", f"{self.capture} has no row of {target.name}"), []
        captured = self.rows.slice(number, 1).to_pylist()[0]
        row = {name: captured[name] for name in METRICS.names if name not in ("payload_path", "payload_bytes")}
        if captured["status"] != OK:
            return row, []
        try:
            content = self._load(captured)
            return row, self._maps(frame, target, captured, content)
        except (TargetError, StorageError) as e:
            return {**row, "status": FAILED, "error_type": type(e).__name__, "error": str(e)}, []

    def _load(self, captured: Mapping[str, Any]) -> dict[str, Any]:
        location = self.capture / captured["payload_path"]
        content = payload_file.load(location)
        version = content.get("meta", {}).get("schema_version")
        if version != PAYLOAD_SCHEMA_VERSION:
            raise TargetError(
                f"{location} is a payload of version {version}, this is version {PAYLOAD_SCHEMA_VERSION}. "
                "Capture it again under another run=NAME."
            )
        if content["meta"]["target"] != captured["target"]:
            raise TargetError(
                f"{location} explains {content['meta']['target']}, not {captured['target']}: it is another run's file."
            )
        return content

    def _maps(
        self, frame: Loaded, target: Target, captured: Mapping[str, Any], content: Mapping[str, Any]
    ) -> list[Row]:
        geometry = TileGeometry.from_dict(json.loads(captured["geometry"]))
        meta, value = content["meta"], float(content["target_scalar"])
        acting = acting_direction(target.name, value)
        # Not the folds of the direction that does not act here: a relevance payload may lack them.
        folds = tuple(dict.fromkeys(m.fold_for(acting) for m in self.spec.methods if m.kind == "fold"))
        relevance = relevance_of(content, folds, self.spec.strength)
        maps = fold_maps(self.spec.methods, relevance, target, value, geometry, meta["spans"], seed_row(meta))
        maps += original_maps(self.spec.methods, content, geometry)
        if self.asker is not None:
            assert frame.tiles is not None
            prompt, text, token = self.asker.prompt(frame), captured["text_ids"], captured["token_index"]
            question = Question(self.asker.model, self.asker.processor, prompt, text, target, self.spec.spline, token)
            maps += pixel_maps(self.spec.methods, question, frame.tiles, geometry, self.spec.pixels)
        return [m.row(captured["frame_id"], captured["scene"], target.name) for m in maps]
