"""Settings of jobs/prepare_cast.py: which data, which of its samples, where they go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vla_ray.config.knobs import at_least, choose, knob, resolve_path
from vla_ray.config.shared import ClusterConfig
from vla_ray.errors import ConfigError

SYNTHETIC = "synthetic"
KNOWN_SPACINGS = "known"


@dataclass(frozen=True)
class SourceDataConfig:
    cache_dir: str = knob("", "downloads go there, and archives are unpacked there; every node must see it")
    scale_m: Any = knob(
        (), "where a source lacks normalization_factor: metres per unit, [sacson=0.12,recon=0.25,*=0.3] or [known]"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache_dir", resolve_path(self.cache_dir or "datasets/cache"))
        given = [self.scale_m] if isinstance(self.scale_m, str) else list(self.scale_m or ())
        object.__setattr__(self, "scale_m", tuple(str(item) for item in given))
        _ = self.scales

    @property
    def scales(self) -> tuple[tuple[str, float], ...]:
        """Metres per unit by source directory; `known` stands for a table of published spacings and has no number."""
        return tuple(_scale(item) for item in self.scale_m)


@dataclass(frozen=True)
class ActionStepsConfig:
    num_steps: int = knob(8, "steps of an action")

    def __post_init__(self) -> None:
        at_least("action.num_steps", self.num_steps, 1)


@dataclass(frozen=True)
class PrepareConfig:
    """Turn CAST data into a prepared dataset: Parquet files that training and inference read.

    Sources: synthetic (rendered corridors), a directory or file (RLDS/TFDS TFRecords, *.tar.gz of these, Parquet,
    JSONL or datasets tables; local or s3://), owner/name of a dataset on the Hugging Face hub.
    """

    source: str = knob(SYNTHETIC, "synthetic | a path | owner/name on the hub, e.g. catglossop/CAST-dataset")
    output_dir: str = knob("", "where prepared datasets are kept; local or s3://")
    name: str | None = knob(None, "of the dataset; an existing one is resumed; null: from the source")
    every: int = knob(1, "every N-th step of an episode is a sample")
    padding: str = knob("drop", "samples whose actions pass the episode's end: drop | keep (zeros, marked not valid)")
    crc: str = knob("header", "TFRecord checksums that are checked: none | header | full")
    split_by: str = knob("source", "source | recording: train and val share no recording, decided by a hash")
    val_share: float = knob(0.05, "of the recordings, for split_by=recording")
    row_group: int = knob(64, "samples of a Parquet row group: what a reader reads at once")
    targets: str = knob("required", "tables without actions, as logs of a robot: required (refused) | optional (kept)")
    max_error_rate: float = knob(0.05, "with a larger share of corrupt records the job exits with 1")
    pictures: int = knob(3000, "for source=synthetic: pictures to train on")
    val_pictures: int = knob(200, "for source=synthetic: pictures to validate on")
    action: ActionStepsConfig = knob(ActionStepsConfig, "actions")
    data: SourceDataConfig = knob(SourceDataConfig, "the source's files")
    cluster: ClusterConfig = knob(ClusterConfig, "Ray")

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("source is empty; give synthetic, a path, or owner/name of a dataset on the hub")
        object.__setattr__(self, "output_dir", resolve_path(self.output_dir or "datasets"))
        choose("padding", self.padding, ("drop", "keep"))
        choose("crc", self.crc, ("none", "header", "full"))
        choose("split_by", self.split_by, ("source", "recording"))
        choose("targets", self.targets, ("required", "optional"))
        for name in ("every", "row_group", "pictures", "val_pictures"):
            at_least(name, getattr(self, name), 1)
        for name in ("val_share", "max_error_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name):g} is no share: it must lie between 0 and 1.")


def _scale(item: str) -> tuple[str, float]:
    source, separator, metres = item.partition("=")
    if item == KNOWN_SPACINGS:
        return item, 1.0
    try:
        value = float(metres)
    except ValueError:
        value = 0.0
    if not (source and separator and 0 < value < float("inf")):
        raise ConfigError(
            f"data.scale_m={item!r} is no scale. Give metres per waypoint spacing by source directory, for example "
            f"data.scale_m=[sacson=0.12,recon=0.25], *=0.12 for all others, or data.scale_m=[{KNOWN_SPACINGS}]."
        )
    return source, value
