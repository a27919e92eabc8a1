"""A replica that measures maps: what hiding their cells does to the trajectory, and whether they lie on the truth.

Reads the maps of a run, writes one table of scores per batch (schema.SCORES), rows into the ledger.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_ray.data.images import decode_rgb
from vla_ray.data.masks import read_labels
from vla_ray.data.synthetic import MASKS
from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import SceneError, TargetError, VlaRayError
from vla_ray.explain.faithfulness.sanity import randomisation_stages, randomise_
from vla_ray.explain.faithfulness.similarity import similarity
from vla_ray.explain.heatmap import assemble
from vla_ray.explain.methods import METHODS, tiles_of
from vla_ray.explain.question import Question
from vla_ray.schema import MAPS, METRICS, OK, SCORES
from vla_ray.stages.maps import evidence_of
from vla_ray.stages.payloads import token_spans
from vla_ray.stages.pixel_maps import make_probe
from vla_ray.stages.replica import ModelReplica, ModelSpec, about, failed
from vla_ray.stages.scores import Masks, Scorer
from vla_ray.stages.visit import Visit
from vla_ray.stages.work import Loaded, Row
from vla_ray.storage.files import Location
from vla_ray.storage.fragments import fragment_path, read_rows, write_rows
from vla_ray.storage.ledger import read_metrics
from vla_ray.targets import Spline, Target, acting_direction


@dataclass(frozen=True, slots=True)
class Companion:
    """Another frame, for swapped pictures and for what position alone gives."""

    image: str
    mask: str | None


@dataclass(frozen=True, slots=True)
class FaithfulnessSpec:
    """What to measure.

    Attributes:
        run_dir, maps: of the scores, and the run of the maps.
        reference: the method whose blobs the random maps have, and which is randomised.
        priors: (target, scene) -> mean map of the reference method over other scenes.
        masks: frame -> its mask image (values: 0 neither, then data.synthetic.MASKS).
        companions: frame -> another one.
        regenerate: frames on which the text is also written anew.
        randomise: frames on which the model's weights are randomised.
    """

    run_dir: Location
    maps: Location
    targets: tuple[Target, ...]
    spline: Spline
    reference: str
    priors: Mapping[tuple[str, str], np.ndarray]
    masks: Mapping[str, str] = field(default_factory=dict)
    companions: Mapping[str, Companion] = field(default_factory=dict)
    regenerate: frozenset[str] = frozenset()
    randomise: frozenset[str] = frozenset()
    num_random: int = 5
    seed: int = 0


class FaithfulnessReplica(ModelReplica):
    """See stages/work.py for the protocol it serves."""

    def __init__(self, spec: FaithfulnessSpec, model: ModelSpec) -> None:
        super().__init__(model, spec.targets, spec.spline)
        self.spec = spec
        table = read_metrics(spec.maps)
        keys = zip(table["frame_id"].to_pylist(), table["target"].to_pylist(), strict=True)
        self.rows, self.index = table, {key: i for i, key in enumerate(keys)}

    def run(self, frames: Sequence[Loaded], targets: Sequence[Target]) -> list[Row]:
        rows, scores = [], []
        for frame in frames:
            for target in targets:
                row, found = self._score(frame, target)
                rows.append(row)
                scores += found
        for target in targets:
            scores += self._randomised([f for f in frames if f.ref.frame_id in self.spec.randomise], target)
        if not scores:
            return rows
        path = fragment_path((row["frame_id"], row["target"]) for row in rows)
        size = write_rows(self.spec.run_dir / path, scores, SCORES)
        share = size // len(rows)
        return [{**row, "payload_path": path, "payload_bytes": share} if row["status"] == OK else row for row in rows]

    def _score(self, frame: Loaded, target: Target) -> tuple[Row, list[Row]]:
        ref = frame.ref
        if (ref.frame_id, target.name) not in self.index:
            reason = f"{self.spec.maps} has no row of {ref.frame_id} for {target.name}"
            return failed(about(frame, target), "TargetError", reason), []
        explained = self._explained(frame, target)
        row = {name: explained[name] for name in METRICS.names if name not in ("payload_path", "payload_bytes")}
        if explained["status"] != OK:
            return row, []
        try:
            return row, self._scores(frame, target, explained)
        except VlaRayError as e:  # a mask of the wrong size, a damaged table: this frame's failure
            return failed(row, type(e).__name__, str(e)), []

    def _scores(self, frame: Loaded, target: Target, explained: Mapping[str, Any]) -> list[Row]:
        ref, spec = frame.ref, self.spec
        assert frame.tiles is not None
        geometry = TileGeometry.from_dict(json.loads(explained["geometry"]))
        maps = self._maps(ref.frame_id, target.name, explained["target_scalar"], explained["payload_path"])
        question = self._question(frame, target, explained)
        probe = make_probe(question, frame.tiles, geometry)
        key = {"frame_id": ref.frame_id, "scene": ref.scene, "target": target.name}
        scorer = Scorer(key, probe, question, maps, spec.seed)
        baselines = scorer.baselines(maps[spec.reference], spec.priors.get((target.name, ref.scene)), spec.num_random)
        scorer.curves(baselines)
        scorer.places(self._masks(ref.frame_id, target, geometry), baselines)
        scorer.agreement("occlusion")
        regenerated = None
        if ref.frame_id in spec.regenerate and target.mode == "action":
            regenerated = self._question(frame, target, explained, regenerate=True)
            scorer.regenerated(make_probe(regenerated, frame.tiles, geometry), baselines)
        scorer.dependence(frame.tiles, self._other_tiles(ref.frame_id, geometry), regenerated)
        return scorer.rows

    def _question(
        self, frame: Loaded, target: Target, explained: Mapping[str, Any], regenerate: bool = False
    ) -> Question:
        return Question(
            self.model,
            self.processor,
            self.prompt(frame),
            explained["text_ids"],
            target,
            self.spline,
            explained["token_index"],
            regenerate,
            self.model_spec.max_new_tokens,
        )

    def _maps(self, frame_id: str, target: str, value: float, path: str) -> dict[str, np.ndarray]:
        ((_, table),) = read_rows(self.spec.maps, [path], MAPS)
        rows = [r for r in table.to_pylist() if (r["frame_id"], r["target"]) == (frame_id, target)]
        maps = {row["method"]: evidence_of(row, value) for row in rows}
        if self.spec.reference not in maps:
            raise TargetError(
                f"{self.spec.maps} has no map of {frame_id} by {self.spec.reference}, which the baselines need; "
                f"explain it with methods={self.spec.reference} as well."
            )
        return maps

    def _masks(self, frame_id: str, target: Target, geometry: TileGeometry) -> Masks:
        path = self.spec.masks.get(frame_id)
        if path is None:
            return Masks()
        labels = read_labels(path)
        if labels.shape != (geometry.height, geometry.width):
            size, own = " x ".join(map(str, labels.shape)), f"{geometry.height} x {geometry.width}"
            raise SceneError(f"mask {path} is {size}, its picture {own} (height x width); give one of the same size.")
        wanted = 1 + MASKS.index("markings" if target.head == "route" else "cause")
        other = self._other_labels(frame_id) if (labels == wanted).any() else None
        elsewhere = other == wanted if other is not None and other.shape == labels.shape else None
        return Masks(labels == wanted, elsewhere, labels == 1 + MASKS.index("distractor"))

    def _other_labels(self, frame_id: str) -> np.ndarray | None:
        companion = self.spec.companions.get(frame_id)
        if companion is None or companion.mask is None:
            return None
        try:
            return read_labels(companion.mask)
        except SceneError:
            return None  # the other frame's mask is broken; that is not this frame's failure

    def _other_tiles(self, frame_id: str, geometry: TileGeometry) -> np.ndarray | None:
        companion = self.spec.companions.get(frame_id)
        if companion is None:
            return None
        try:
            tiles, other = self.processor.tiler(decode_rgb(Location.of(companion.image).read_bytes(), companion.image))
        except VlaRayError:
            return None  # the other frame's picture is broken; that is not this frame's failure
        return tiles if other.boxes == geometry.boxes else None

    def _randomised(self, frames: Sequence[Loaded], target: Target) -> list[Row]:
        """Similarity of the reference method's map to that of ever more random models, from the heads down."""
        method = METHODS[self.spec.reference]
        known = [f for f in frames if (f.ref.frame_id, target.name) in self.index]
        good = [f for f in known if self._explained(f, target)["status"] == OK]
        # Another model would choose another token: its map would be one of another target.
        if not good or method.kind != "fold" or target.mode == "text":
            return []
        rows: list[Row] = []
        trained, model = self.model, copy.deepcopy(self.model)
        texts = [self._explained(f, target)["text_ids"] for f in good]  # only the weights change
        before = self._reference_maps(good, target, texts)
        try:
            self.model = model
            for stage in randomisation_stages(model):
                randomise_(stage.parts, self.spec.seed)
                for frame, old, new in zip(good, before, self._reference_maps(good, target, texts), strict=True):
                    alike = None if old is None or new is None else similarity(old, new)
                    rows.append(
                        {
                            "frame_id": frame.ref.frame_id,
                            "scene": frame.ref.scene,
                            "target": target.name,
                            "subject": stage.name,
                            "measure": "randomised_similarity",
                            "at": None,
                            "value": None if alike is None else alike.spearman,
                        }
                    )
        finally:
            self.model = trained
        return rows

    def _explained(self, frame: Loaded, target: Target) -> Row:
        row: Row = self.rows.slice(self.index[frame.ref.frame_id, target.name], 1).to_pylist()[0]
        return row

    def _reference_maps(
        self, frames: Sequence[Loaded], target: Target, texts: Sequence[Sequence[int]]
    ) -> list[np.ndarray | None]:
        """Maps of the reference method with the model as it is now; None where nothing can be explained."""
        method = METHODS[self.spec.reference]
        visit: Visit = self.visit(frames, method.folds(), texts=texts)
        explained = visit.explain(target, self.spline, keep_graph=False)
        maps: list[np.ndarray | None] = []
        for b, frame in enumerate(frames):
            assert frame.geometry is not None
            if not explained.finite[b] or explained.is_degenerate(b):
                maps.append(None)
                continue
            fold = method.fold_for(acting_direction(target.name, float(explained.scalar_B[b])))
            image = token_spans(visit, self.processor, b)["image"]
            tiles = tiles_of(fold, method.tokens, visit.relevance(explained, b), image)
            try:
                maps.append(assemble(tiles, frame.geometry).combined().values)
            except TargetError:  # not finite: a model of noise may do that
                maps.append(None)
        return maps
