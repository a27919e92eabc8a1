"""An inference run as a later stage sees it: policy, dataset, samples, from the run directory alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vla_ray.config import InferConfig
from vla_ray.config.knobs import kept
from vla_ray.data.prepared import DOCUMENT, PreparedDataset
from vla_ray.data.sample_refs import SampleRef, sample_refs
from vla_ray.errors import RunError, VlaRayError
from vla_ray.models.paligemma.trained import identities
from vla_ray.storage.files import Location, read_json
from vla_ray.storage.run import file_identity


@dataclass(frozen=True, slots=True)
class Predicted:
    """See the module docstring. `config` is what it was started with, `document` its run.json."""

    location: Location
    config: InferConfig
    document: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The policy's directory."""
        return Path(self.config.model.name)

    @property
    def num_samples(self) -> int:
        return int(self.document["fingerprint"]["frames"])

    def open_dataset(self) -> PreparedDataset:
        """Its data. DataError if they are gone."""
        assert self.config.source is not None
        return PreparedDataset.open(self.config.source)

    def samples(self, match: str | None = None) -> list[SampleRef]:
        """What it predicted, or those of it whose instruction contains a text."""
        c = self.config
        return sample_refs(self.open_dataset(), self.document["settings"]["split"], c.every, c.limit, match=match)

    def check_unchanged(self) -> dict[str, dict[str, Any]]:
        """The identities of its files.

        Raises:
            RunError: the policy or the data are others by now, so that what it holds is not theirs.
        """
        config = self.config
        now = {
            "source": file_identity(self.open_dataset().location / DOCUMENT),
            **{f"model/{k}": v for k, v in identities(self.checkpoint, config.model.tokenizers).items()},
        }
        changed = [name for name, identity in self.document["checkpoints"].items() if now.get(name) != identity]
        if changed:
            raise RunError(
                f"{', '.join(changed)} changed since {self.location} was made with {config.model.name} on "
                f"{config.source}. Put the old files back, or predict anew under another run=NAME."
            )
        return now


def read_predicted(location: Location) -> Predicted:
    """The inference run at this place.

    Raises:
        RunError: there is none, it is of another kind, or its config.yaml was not written by this version.
    """
    document, config = read_json(location / "run.json"), (location / "config.yaml").try_read_bytes()
    if document is None or config is None:
        raise RunError(f"there is no run at {location}. Predict first: python jobs/infer.py run={location.name}")
    job = document.get("settings", {}).get("job")
    if job != "infer":
        raise RunError(f"{location} is a run of {job}, not of infer. Give the run=NAME of a run of jobs/infer.py.")
    try:
        return Predicted(location, kept(InferConfig, config), document)
    except (OmegaConfBaseException, YAMLError, VlaRayError) as e:
        reason = " ".join(str(e).split())[:160]
        raise RunError(
            f"{location / 'config.yaml'} cannot be read ({reason}): it is damaged, or another version wrote it. "
            "Predict anew under another run=NAME."
        ) from e
