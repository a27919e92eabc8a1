"""A capture as a later stage sees it: its frames, targets, settings and model, from its run directory alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from vla_ray.config import ModelConfig, SplineConfig
from vla_ray.data.scenes import FrameRef
from vla_ray.errors import RunError
from vla_ray.storage.files import Location, read_json
from vla_ray.storage.ledger import read_metrics
from vla_ray.targets import Target, named_target


@dataclass(frozen=True, slots=True)
class Captured:
    """See the module docstring. `document` is its run.json."""

    location: Location
    document: dict[str, Any]
    frames: tuple[FrameRef, ...]
    targets: tuple[Target, ...]
    model: ModelConfig
    spline: SplineConfig

    @property
    def payload(self) -> str:
        """full, reduced, relevance, or none (a run of maps made online)."""
        return str(self.document["settings"].get("payload", "none"))

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its results from those of another run under the same name."""
        return {"settings": self.document["settings"], "created": self.document["created"]}


def read_captured(location: Location) -> Captured | None:
    """The run at this place, None if there is none.

    Raises:
        RunError: it is of another kind, or has no rows yet.
    """
    document = read_json(location / "run.json")
    if document is None:
        return None
    job = document.get("settings", {}).get("job")
    if job not in ("capture", "explain"):
        raise RunError(f"{location} is a run of {job}, not of capture. Give the run=NAME of a capture.")
    table = read_metrics(location, ["frame_id", "target", "frame"])
    if not table.num_rows:
        raise RunError(f"{location} has no rows yet. Finish it first: run the capture again.")
    seen: dict[str, FrameRef] = {}
    for frame_id, text in zip(table["frame_id"].to_pylist(), table["frame"].to_pylist(), strict=True):
        if frame_id not in seen:
            seen[frame_id] = FrameRef.from_dict(json.loads(text))
    names = set(table["target"].to_pylist())
    config = OmegaConf.to_container(OmegaConf.create((location / "config.yaml").read_bytes().decode()))
    assert isinstance(config, dict)
    order = [t for t in document["fingerprint"].get("targets", ()) if t in names]
    targets = [named_target(name) for name in [*order, *sorted(names - set(order))]]
    return Captured(
        location,
        document,
        tuple(seen.values()),
        tuple(targets),
        ModelConfig(**config["model"]),
        SplineConfig(**config["spline"]),
    )
