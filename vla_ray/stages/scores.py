"""The scores of one frame's maps, as rows: curves, places on masks, dependence on the picture. One frame, no files.

Measures per method and baseline: `early`, `deletion_auc`, `insertion_auc`, `gap`, `comprehensiveness`, `sufficiency`,
`flip_auc`, the curve `deleted` (relative to everything hidden, at a share), `early_regenerated` (the text written
anew); on masks `lift`, `near_mass`, `pointing`, `rank_accuracy`, `lift_elsewhere` (against another frame's mask of the
same cause: what position alone gives), `nuisance`, `nuisance_lift`; `occlusion` (rank correlation with that map).
Per frame, subject `picture`: `all_hidden_m`, `mask_area`; per perturbation: `route_m`, `speed_m`, and the same
`_regenerated`. Per stage of randomised weights: `randomised_similarity` (stages/faithfulness.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.tiles import TileGeometry
from vla_ray.explain.faithfulness.baselines import random_maps
from vla_ray.explain.faithfulness.curves import average, evaluate_maps
from vla_ray.explain.faithfulness.dependence import dependence, perturbed_tiles
from vla_ray.explain.faithfulness.grid import on_grid
from vla_ray.explain.faithfulness.localisation import localise, nuisance
from vla_ray.explain.faithfulness.similarity import spearman
from vla_ray.explain.perturb import Probe, canvas_grid
from vla_ray.explain.question import Question
from vla_ray.models.simlingo.processing import normalise

Map = NDArray[np.floating]
Mask = NDArray[np.bool_]
Row = dict[str, Any]

RANDOM, PRIOR, PICTURE = "random", "prior (mean map)", "picture"
_CURVES = ("early", "deletion_auc", "insertion_auc", "gap", "comprehensiveness", "sufficiency", "flip_auc")
_PLACES = ("lift", "near_mass", "pointing", "rank_accuracy")


@dataclass(frozen=True, slots=True)
class Masks:
    """What is known about one frame's picture, each [H, W]: what truly matters for the target, the same of another
    frame, and what never matters."""

    cause: Mask | None = None
    elsewhere: Mask | None = None
    distractor: Mask | None = None


class Scorer:
    """Rows of one frame and target.

    Args:
        key: frame, scene and target of every row.
        maps: by method, on whatever grid.
    """

    def __init__(self, key: Row, probe: Probe, question: Question, maps: Mapping[str, Map], seed: int) -> None:
        self.key, self.probe, self.question, self.maps, self.seed = key, probe, question, dict(maps), seed
        self.shape = canvas_grid(probe.geometry, question.model.config.patch_grid)
        self.head = question.target.head
        self.rows: list[Row] = []

    def add(self, subject: str, measure: str, value: float | None, at: float | None = None) -> None:
        self.rows.append({**self.key, "subject": subject, "measure": measure, "at": at, "value": value})

    def baselines(self, reference: Map, prior: Map | None, num_random: int) -> dict[str, list[Map]]:
        """Maps to compare with: the reference method's own blobs elsewhere, and the mean map of other scenes."""
        # Another seed for every frame: the same offsets everywhere would not be random where causes lie alike.
        seed = zlib.crc32(f"{self.seed} {self.key['frame_id']}".encode())
        found = {RANDOM: [np.asarray(m) for m in random_maps(reference, num_random, seed)]}
        return found | ({PRIOR: [prior]} if prior is not None else {})

    def curves(self, baselines: Mapping[str, list[Map]]) -> None:
        """Deletion and insertion with the text held fixed."""
        everything = dict(self.maps)
        for name, several in baselines.items():
            everything |= {f"{name} {i}": values for i, values in enumerate(several)}
        found = evaluate_maps(self.probe, everything, self.head, self.shape, seed=self.seed)
        self.add(PICTURE, "all_hidden_m", found.all_hidden_m)
        if found.excluded:
            return
        subjects = {name: [name] for name in self.maps}
        subjects |= {name: [f"{name} {i}" for i in range(len(several))] for name, several in baselines.items()}
        for subject, names in subjects.items():
            curves = [found.curves[name] for name in names]
            scores = average([c.scores for c in curves if c.scores is not None])
            for name in _CURVES if scores is not None else ():
                self.add(subject, name, getattr(scores, name))
            relative = np.mean([c.deleted_m / c.deleted_m[-1] for c in curves], axis=0)
            for share, value in zip(curves[0].shares.tolist(), relative.tolist(), strict=True):
                self.add(subject, "deleted", value, share)

    def regenerated(self, probe: Probe, baselines: Mapping[str, list[Map]]) -> None:
        """Early deletion while the model writes its text anew for every picture."""
        everything = dict(self.maps) | {name: several[0] for name, several in baselines.items()}
        found = evaluate_maps(probe, everything, self.head, self.shape, seed=self.seed)
        for subject, curve in found.curves.items():
            if curve.scores is not None:
                self.add(subject, "early_regenerated", curve.scores.early)

    def places(self, masks: Masks, baselines: Mapping[str, list[Map]]) -> None:
        """Where maps lie, on masks."""
        geometry = self.probe.geometry
        for subject, several in [*((n, [m]) for n, m in self.maps.items()), *baselines.items()]:
            for mask, names in ((masks.cause, _PLACES), (masks.elsewhere, ("lift",))):
                found = [] if mask is None else [localise(m, mask, geometry) for m in several]
                known = [f for f in found if f is not None]
                for name in names if known else ():
                    suffix = "_elsewhere" if mask is masks.elsewhere else ""
                    self.add(subject, name + suffix, float(np.mean([getattr(f, name) for f in known])))
            irrelevant = [] if masks.distractor is None else [nuisance(m, masks.distractor, geometry) for m in several]
            wrong = [n for n in irrelevant if n is not None]
            if wrong:
                self.add(subject, "nuisance", float(np.mean([n.ratio for n in wrong])))
                self.add(subject, "nuisance_lift", float(np.mean([n.lift for n in wrong])))

    def agreement(self, reference: str) -> None:
        """Rank correlation of every other map with one of them."""
        if reference not in self.maps:
            return
        truth = on_grid(self.maps[reference], self.shape)
        for name, values in self.maps.items():
            if name != reference:
                self.add(name, reference, spearman(np.abs(on_grid(values, self.shape)), truth))

    def dependence(
        self, tiles: NDArray[np.uint8], other: NDArray[np.uint8] | None, regenerate: Question | None
    ) -> None:
        """How far changed pictures move the trajectory, the text held fixed and, if asked for, written anew."""
        geometry: TileGeometry = self.probe.geometry
        device = self.probe.pixels_T3SS.device
        changed = {n: normalise(t, device) for n, t in perturbed_tiles(tiles, geometry, other, self.seed).items()}
        for ask, suffix in ((self.question, ""), (regenerate, "_regenerated")):
            if ask is None:
                continue
            for name, moved in dependence(ask, self.probe.pixels_T3SS, changed).items():
                self.add(name, f"route_m{suffix}", moved.route_m)
                self.add(name, f"speed_m{suffix}", moved.speed_m)
