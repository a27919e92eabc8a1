"""Which samples of a prepared dataset an inference run asks about, and how: small references that the driver can keep.

The order is that of the dataset's files, so a sample's number, and with it the name of its picture, is the same in
every resume, whatever runs when.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import pyarrow.parquet as pq

from vla_ray.data.cast.instructions import ATOMIC, opposite, permuted
from vla_ray.data.prepared import PreparedDataset, PreparedFile
from vla_ray.errors import ConfigError, DataError, nearest
from vla_ray.schema import GIVEN
from vla_ray.storage.files import Location
from vla_ray.storage.location import storage_errors

PERMUTED, OPPOSITE = "permuted", "opposite"
_ALL_ATOMIC = "atomic"
_READERS = 8  # threads that read the two small columns


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where one sample is, and what it is asked.

    Attributes:
        frame_id: the sample's id; the engine's word for the unit of work.
        number: place in the split, from 0.
        dataset: the sub-dataset.
        path: of the Parquet file; absolute or a URI.
        group, row: of the file.
        permuted: another sample's instruction; None if nobody asks for it.
    """

    frame_id: str
    number: int
    dataset: str
    path: str
    group: int
    row: int
    permuted: str | None = None

    @property
    def scene(self) -> str:
        """What the engine groups output by."""
        return self.dataset

    @property
    def image_filename(self) -> str:
        """`sample_%06d_<hash of the id>.jpg`."""
        return f"sample_{self.number:06d}_{blake2b(self.frame_id.encode(), digest_size=4).hexdigest()}.jpg"

    def instruction(self, variant: str, own: str) -> str | None:
        """What is asked in this variant of the sample's own instruction; None if there is no such variant of it."""
        if variant == GIVEN:
            return own
        if variant == PERMUTED:
            return self.permuted
        return opposite(own) if variant == OPPOSITE else variant

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> SampleRef:
        return SampleRef(**values)


def parse_variants(given: Any) -> tuple[str, ...]:
    """Variants of instructions in the order given, without duplicates, `given` first: the others say little alone.

    Args:
        given: one or a list of given, permuted, opposite, atomic (all six commands), or texts to ask everywhere.

    Raises:
        ConfigError: a single word that is no variant, most likely a misspelt one.
    """
    names = [GIVEN]
    for item in (" ".join(str(item).split()) for item in ([given] if isinstance(given, str) else given or ())):
        if item == _ALL_ATOMIC:
            names += ATOMIC
        elif item in (GIVEN, PERMUTED, OPPOSITE, *ATOMIC) or " " in item:
            names.append(item)
        else:
            known = (GIVEN, PERMUTED, OPPOSITE, _ALL_ATOMIC)
            raise ConfigError(
                f"instructions: {item!r} is unknown; known: {', '.join(known)}, or a text of several words."
                f"{nearest(item, known)}"
            )
    return tuple(dict.fromkeys(names))


def sample_refs(
    dataset: PreparedDataset,
    split: str,
    every: int = 1,
    limit: int | None = None,
    permute_seed: int | None = None,
    match: str | None = None,
) -> list[SampleRef]:
    """Every n-th sample of a split, then the first `limit` of these.

    Args:
        match: of these again, those whose instruction contains this text.
        permute_seed: give each the instruction of another one, with other words where there are any. Other samples
            are asked about otherwise when `every` or `limit` change.

    Raises:
        DataError: the split has no samples.
    """
    files = [file for file in dataset.files if file.split == split]
    if not files:
        raise DataError(
            f"{dataset.location} has no samples of the split {split!r}; it has {', '.join(dataset.splits)}. "
            "Set split to one of these."
        )
    found: list[SampleRef] = []
    instructions: list[str] = []
    with ThreadPoolExecutor(_READERS) as pool:
        number = 0
        for file, (ids, texts) in zip(files, pool.map(lambda f: _columns(dataset, f), files), strict=True):
            place = str(dataset.location / file.path)
            rows = ((group, row) for group, count in enumerate(file.row_groups) for row in range(count))
            for sample_id, text, (group, row) in zip(ids, texts, rows, strict=True):
                if number % every == 0:
                    found.append(SampleRef(sample_id, number, file.dataset, place, group, row))
                    instructions.append(text)
                number += 1
    found, instructions = found[:limit], instructions[:limit]
    if match is not None:
        chosen = [i for i, text in enumerate(instructions) if match.lower() in text.lower()]
        found, instructions = [found[i] for i in chosen], [instructions[i] for i in chosen]
    _refuse_repeated(found, dataset.location)
    if permute_seed is None:
        return found
    others = permuted(instructions, permute_seed)
    return [SampleRef(**{**ref.to_dict(), "permuted": text}) for ref, text in zip(found, others, strict=True)]


def _columns(dataset: PreparedDataset, file: PreparedFile) -> tuple[Sequence[str], Sequence[str]]:
    location = dataset.location / file.path
    with storage_errors("read", location), location.open_input() as stream:
        table = pq.ParquetFile(stream).read(columns=["sample_id", "instruction"])
    return table["sample_id"].to_pylist(), table["instruction"].to_pylist()


def _refuse_repeated(refs: Sequence[SampleRef], location: Location) -> None:
    seen: set[str] = set()
    for ref in refs:
        if ref.frame_id in seen:
            raise DataError(
                f"{location} has the sample_id {ref.frame_id!r} twice: predictions could not be told apart. Prepare it "
                "from a source whose sample_id column has no repetitions, or has none."
            )
        seen.add(ref.frame_id)
