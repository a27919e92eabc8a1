"""A source is a list of shards: what one is, how it is read, and what happened to it.

All three are small, picklable and JSON-able: they travel to the worker that reads a shard, and the tally comes back
and is stored beside what was made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from typing import Any

from vla_ray.config.knobs import at_least, choose
from vla_ray.errors import ConfigError

RLDS, TABLE, SYNTHETIC = "rlds", "table", "synthetic"
PADDING = ("drop", "keep")
CRC = ("none", "header", "full")
SPLIT_BY = ("source", "recording")
REQUIRED, OPTIONAL = TARGETS = ("required", "optional")
KNOWN_SCALES = "known"  # in scale_m: the table of scales.py; its number means nothing
MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a source.

    Attributes:
        dataset: sub-dataset, e.g. cast_filtered_dataset.
        split: train, val, ... as the source names it.
        name: unique in its source and safe as a file name, e.g. cast_filtered_dataset-train-00000-of-00001.
        layout: rlds | table | synthetic.
        path: of the file, absolute or a URI; `synthetic` for what is computed.
        identity: differs when the content may differ: size, time, and for rlds the hash of its features.json.
    """

    dataset: str
    split: str
    name: str
    layout: str
    path: str
    identity: str

    @property
    def key(self) -> str:
        """What tells it from the other shards of its split: the name without the sub-dataset and split before it."""
        return self.name.removeprefix(f"{self.dataset}-").removeprefix(f"{self.split}-")

    def sample_id(self, record: int | str, t: int) -> str:
        """`<dataset>/<split>/<shard>:<record>/<t>`, whatever split a regrouping puts the sample in."""
        number = f"{record:05d}" if isinstance(record, int) else record
        return f"{self.dataset}/{self.split}/{self.key}:{number}/{t:04d}"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, str]) -> Shard:
        return Shard(**values)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How records become samples.

    Attributes:
        horizon: steps of a sample's actions.
        every: every n-th step of an episode is a sample. Rows of a table are samples already.
        padding: samples whose horizon passes the episode's end; kept ones have zero deltas there and valid=False.
            One without a single valid step is dropped in any case.
        crc: checksums of TFRecord files; `header` finds lost framing, `full` also a flipped bit in the data.
        split_by: `recording` regroups all sub-datasets alike, so that no recording lies in both train and val.
        val_share: of the recordings, for split_by=recording.
        scale_m: metres per unit by source directory, where normalization_factor is missing; see scales.py.
        targets: with `optional`, rows of tables need no actions; such samples can be predicted for, not learnt from.
    """

    horizon: int = 8
    every: int = 1
    padding: str = "drop"
    crc: str = "header"
    split_by: str = "source"
    val_share: float = 0.05
    scale_m: tuple[tuple[str, float], ...] = ()
    targets: str = REQUIRED

    def __post_init__(self) -> None:
        at_least("action.num_steps", self.horizon, 1)
        at_least("every", self.every, 1)
        choose("padding", self.padding, PADDING)
        choose("crc", self.crc, CRC)
        choose("split_by", self.split_by, SPLIT_BY)
        choose("targets", self.targets, TARGETS)
        if not 0.0 <= self.val_share <= 1.0:
            raise ConfigError(f"val_share={self.val_share:g} must lie between 0 and 1: the share of recordings in val.")
        for source, metres in self.scale_m:
            if source != KNOWN_SCALES and not (math.isfinite(metres) and metres > 0):
                raise ConfigError(f"data.scale_m: {source}={metres:g} must be a number of metres > 0.")

    def split_of(self, group: str, split: str) -> str:
        """train or val by the hash of what must stay together (scales.group_of), or the source's own split."""
        if self.split_by == "source":
            return split
        number = int.from_bytes(blake2b(group.encode(), digest_size=8).digest(), "big")
        return "val" if number < self.val_share * 2**64 else "train"

    def to_dict(self) -> dict[str, Any]:
        """Without `targets` where it says nothing new: fingerprints of datasets with actions do not depend on it."""
        values = asdict(self)
        values["scale_m"] = [list(pair) for pair in self.scale_m]
        if self.targets == REQUIRED:
            del values["targets"]
        return values

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ReadOptions:
        pairs = tuple((str(source), float(metres)) for source, metres in values["scale_m"])
        return ReadOptions(**{**values, "scale_m": pairs})


@dataclass(slots=True)
class Tally:
    """What happened to one shard, or, added up, to many.

    `steps` is what was looked at: steps == samples + white + padding + no_language + not_finite + undecodable.

    Attributes:
        episodes: records that were read; a row of a table counts as one.
        white: pictures that are placeholders (counterfactual frames after the branch point).
        padding: windows that pass the end of their episode, or with padding=keep begin at it.
        no_language: without an instruction that has words; angle brackets are none (the processor drops them).
        undecodable: pictures that cannot be read.
        corrupt: records that cannot be read, and one for whatever follows lost framing or a cut-off end.
        problems: the first messages, each naming shard and record.
    """

    episodes: int = 0
    steps: int = 0
    samples: int = 0
    white: int = 0
    padding: int = 0
    no_language: int = 0
    not_finite: int = 0
    undecodable: int = 0
    corrupt: int = 0
    problems: list[str] = field(default_factory=list)

    def problem(self, message: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(message)

    def lost(self, message: str) -> None:
        """A record that could not be read."""
        self.corrupt += 1
        self.problem(message)

    def __add__(self, other: Tally) -> Tally:
        counts = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        return Tally(**counts, problems=(self.problems + other.problems)[:MAX_PROBLEMS])

    @staticmethod
    def total(tallies: Iterable[Tally]) -> Tally:
        return sum(tallies, Tally())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Tally:
        return Tally(**values)


COUNTS = tuple(f.name for f in fields(Tally) if f.name != "problems")
