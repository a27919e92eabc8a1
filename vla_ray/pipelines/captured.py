"""A capture, or maps, as a later stage sees them: frames, targets, settings and model, from the run directory alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from vla_ray.config import ModelConfig, SplineConfig
from vla_ray.data.scenes import FrameRef, natural_key
from vla_ray.errors import RunError
from vla_ray.pipelines.capture import checkpoint_identities
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

    def model_on(self, device: str) -> ModelConfig:
        """The model that made it, to run on this device.

        Raises:
            CheckpointError: a file of it is gone.
            RunError: a file of it is another one by now, so that what it holds is another model's.
        """
        now = checkpoint_identities(self.model)
        changed = [name for name, identity in self.document["checkpoints"].items() if now.get(name) != identity]
        if changed:
            raise RunError(
                f"{', '.join(changed)} changed since {self.location} was made with {self.model.checkpoint}: what it "
                "holds is another model's. Put the old file back, or make it anew under another run=NAME."
            )
        return replace(self.model, device=device)


def read_captured(location: Location, job: str = "capture") -> Captured | None:
    """The run at this place, None if there is none. Frames are in natural order.

    Args:
        job: what kind of run it must be: capture, or explain for maps.

    Raises:
        RunError: it is of another kind, or has no rows yet.
    """
    document = read_json(location / "run.json")
    if document is None:
        return None
    found = document.get("settings", {}).get("job")
    if found != job:
        setting = "run" if job == "capture" else "maps"
        hint = " A policy is explained by jobs/explain.py model=paligemma-tiny run=NAME." if found == "infer" else ""
        raise RunError(
            f"{location} is a run of {found}, not of {job}. Give the {setting}=NAME of a run of {job}.{hint}"
        )
    table = read_metrics(location, ["frame_id", "target", "frame"])
    if not table.num_rows:
        raise RunError(f"{location} has no rows yet. Finish it first: run {job} again.")
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
        tuple(sorted(seen.values(), key=lambda frame: (natural_key(frame.scene), natural_key(frame.stem)))),
        tuple(targets),
        ModelConfig(**config["model"]),
        SplineConfig(**config["spline"]),
    )
