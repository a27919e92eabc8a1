"""The page of an inference run: what its evaluation measured, sample by sample, with the maps that explain it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.cast.instructions import kind
from vla_ray.errors import RunError
from vla_ray.evaluation.policy.evaluate import Evaluation
from vla_ray.evaluation.policy.predictions import Predictions
from vla_ray.report.policy_page import RIGHT, WRONG, Figure, ShownMap, ShownSample, Table, write_policy_page
from vla_ray.report.shown import method_order, read_scene_maps, shares
from vla_ray.schema import FAILED, OK
from vla_ray.stages.maps import read_map
from vla_ray.storage.files import Location, read_json
from vla_ray.storage.ledger import read_metrics

REPORT = "report"
_SAMPLES = 64  # whose maps are in memory at once
_SHOWN = ("ade", "fde", "ade_m", "fde_m", "min_ade", "heading_error")


def build_policy_report(evaluation: Evaluation, maps: str = "maps") -> Location:
    """Write report/ beside the predictions and return its page.

    Args:
        maps: name of maps in the run, which are shown where there are any.
    """
    predictions = evaluation.predictions
    home = predictions.location.parent
    explained = _Maps(home / maps)
    write_policy_page(
        home / REPORT,
        f"{predictions.name}: what the policy predicted",
        _facts(home, predictions),
        _samples(evaluation, explained),
        [Table(**asdict(table)) for table in evaluation.tables],
        [Figure(*figure) for figure in evaluation.figures],
        method_order(explained.methods),
        predictions.median_step or None,
    )
    return home / REPORT / "index.html"


class _Maps:
    """The maps of some samples at a time; of none where the run was not explained."""

    def __init__(self, location: Location) -> None:
        self.location = location
        document = read_json(location / "run.json") or {}
        if document and document["settings"].get("job") != "explain_policy":
            raise RunError(f"{location} holds no maps of a policy, but a run of {document['settings'].get('job')}.")
        self.methods = set(document.get("settings", {}).get("methods", ()))
        self._rows: dict[str, list[dict[str, Any]]] = {}
        if document:
            table = read_metrics(location, ["frame_id", "target", "status", "payload_path"])
            for row in table.to_pylist():
                if row["status"] == OK:
                    self._rows.setdefault(row["frame_id"], []).append(row)
        order = document.get("fingerprint", {}).get("targets", [])
        for rows in self._rows.values():
            rows.sort(key=lambda row: order.index(row["target"]) if row["target"] in order else len(order))

    def of(self, samples: Sequence[str]) -> dict[str, list[ShownMap]]:
        rows = [row for sample in samples for row in self._rows.get(sample, ())]
        found = read_scene_maps(self.location, rows) if rows else {}
        shown: dict[str, list[ShownMap]] = {}
        for row in rows:
            shown.setdefault(row["frame_id"], []).extend(
                ShownMap(m["target"], m["method"], m["direction"], read_map(m), shares(m))
                for m in found.get((row["frame_id"], row["target"]), ())
            )
        return shown


def _samples(evaluation: Evaluation, explained: _Maps) -> Iterator[ShownSample]:
    p = evaluation.predictions
    columns = {} if evaluation.scores is None else evaluation.scores[""].columns
    rows = iter(range(len(p)))
    while batch := list(islice(rows, _SAMPLES)):
        maps = explained.of([p.sample_id[i] for i in batch])
        for i in batch:
            yield _sample(p, i, columns, evaluation.confidence, maps.get(p.sample_id[i], ()))


def _sample(
    p: Predictions,
    i: int,
    columns: Mapping[str, NDArray[np.floating]],
    confidence: NDArray[np.floating] | None,
    maps: Sequence[ShownMap],
) -> ShownSample:
    predicted = bool(p.predicted_ok[i])
    target = np.where(p.valid[i][:, None], p.target[i], np.nan)
    metrics: dict[str, float | str | None] = {name: _number(columns[name][i]) for name in _SHOWN if name in columns}
    if "turn_side" in columns:
        side = _number(columns["turn_side"][i])
        metrics["turn_side"] = None if side is None else (RIGHT if side else WRONG)
    if confidence is not None:
        sure = _number(confidence[i])
        metrics["confidence"] = None if sure is None else math.exp(sure)
    return ShownSample(
        sample_id=p.sample_id[i],
        number=i,
        instruction=p.instruction[i],
        kind=kind(p.instruction[i]),
        dataset=p.dataset[i] or "",
        recording=p.recording[i] or "",
        image=p.place(i),
        predicted=p.predicted[i] if predicted else None,
        target=None if np.isnan(target).all() else target,
        scale_m=_number(p.scale_m[i]),
        status=OK if predicted else FAILED,
        error=None if predicted else p.error[i] or "there is no prediction",
        metrics=metrics,
        probability=None if p.probability is None or not predicted else p.probability[i].reshape(-1, 2),
        variants={
            text: variant.predicted[i]
            for variant in p.variants.values()
            if (text := variant.instructions[i]) is not None and np.isfinite(variant.predicted[i]).all()
        },
        maps=maps,
    )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _facts(home: Location, predictions: Predictions) -> dict[str, str]:
    document = read_json(home / "run.json") or {}
    known = predictions.metadata
    facts = {
        "samples": f"{len(predictions):,}, {int(predictions.predicted_ok.sum()):,} predicted",
        "policy": known.get("checkpoint", ""),
        "dataset": known.get("dataset", ""),
        "decoded": known.get("decode", ""),
        "straight": f"{predictions.median_step:.3g} units a step, the median of {predictions.median_from}",
    }
    if document:
        facts["computed"] = document["updated"][:16].replace("T", " ")
        facts["command"] = document["command"]
    return {name: value for name, value in facts.items() if value}
