"""From addresses of samples to what a model eats: read, decode, augment, tokenise, collate. No torch, no Ray.

Runs in data workers, off the training process. The same addresses give the same batch, bit for bit, in whichever
process and however often: everything random is a function of (seed, visit, sample).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vla_ray import errors
from vla_ray.config.train import AugmentConfig
from vla_ray.data.cast.sample import Sample
from vla_ray.data.images import decode_rgb
from vla_ray.data.prepared import PreparedDataset
from vla_ray.data.prepared import samples as to_samples
from vla_ray.errors import VlaRayError
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.processing import Processor
from vla_ray.training.augment import augment
from vla_ray.training.order import Group


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass. B samples, L tokens, H steps.

    Attributes:
        step: optimiser step that it belongs to.
        pixels: uint8 [B, S, S, 3], resized, not normalised.
        ids, mask, types: int64 [B, L], left-padded; types is 1 on action tokens and EOS.
        actions: float32 [B, H, 2] in units, after augmentation.
        scale_m: float32 [B] metres per unit, NaN where unknown.
    """

    step: int
    pixels: NDArray[np.uint8]
    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    types: NDArray[np.int64]
    actions: NDArray[np.float32]
    scale_m: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Without padding."""
        return int(self.mask.sum())


@dataclass(frozen=True, slots=True)
class BatchMaker:
    """Picklable recipe of batches.

    Attributes:
        groups: what the first number of an address means.
        augmentation: None for validation: pictures as they are, the first instruction variant.
    """

    dataset: PreparedDataset
    groups: tuple[Group, ...]
    processor: Processor
    tokenizer: ActionTokenizer
    augmentation: AugmentConfig | None = None
    seed: int = 0

    def __call__(self, first_step: int, addresses: NDArray[np.int64]) -> Iterator[MicroBatch]:
        """Micro-batches of consecutive steps.

        Args:
            addresses: [steps, accumulation, B, 3], see order.py.
        """
        read = self._read(addresses.reshape(-1, 3))
        for step, of_step in enumerate(addresses, first_step):
            for rows in of_step:
                yield self._collate(step, rows, [read[int(group), int(row)] for group, row, _ in rows])

    def plain(
        self, samples: Sequence[Sample], instructions: Sequence[str] | None = None, prompts_only: bool = False
    ) -> MicroBatch:
        """A batch of samples as they are, or with other instructions; `prompts_only`: to be decoded, not learnt."""
        texts = instructions or [s.instruction for s in samples]
        pictures = [self.processor.resize(decode_rgb(s.image, s.sample_id)) for s in samples]
        return self._build(-1, pictures, texts, [s.actions for s in samples], samples, prompts_only)

    def _read(self, addresses: NDArray[np.int64]) -> dict[tuple[int, int], Sample]:
        """(group, row) -> sample; every group is read once."""
        found: dict[tuple[int, int], Sample] = {}
        for number in np.unique(addresses[:, 0]).tolist():
            group = self.groups[number]
            rows = np.unique(addresses[addresses[:, 0] == number, 1])
            table = self.dataset.read_group(self.dataset.files[group.file], group.number).take(rows)
            found |= {(number, row): sample for row, sample in zip(rows.tolist(), to_samples(table), strict=True)}
        return found

    def _collate(self, step: int, addresses: NDArray[np.int64], samples: list[Sample]) -> MicroBatch:
        pictures, texts, actions = [], [], []
        for (_, _, visit), sample in zip(addresses.tolist(), samples, strict=True):
            rgb = self.processor.resize(decode_rgb(sample.image, sample.sample_id))
            text, action = sample.instruction, sample.actions
            if self.augmentation is not None:
                generator = self._generator(sample, visit)
                text = sample.instructions[int(generator.integers(len(sample.instructions)))]
                # At the model's size: fewer pixels to change.
                rgb, text, action = augment(rgb, text, action, self.augmentation, generator)
            pictures.append(rgb)
            texts.append(text)
            actions.append(action)
        return self._build(step, pictures, texts, actions, samples)

    def _generator(self, sample: Sample, visit: int) -> np.random.Generator:
        name = hashlib.blake2b(sample.sample_id.encode(), digest_size=8).digest()
        return np.random.default_rng((self.seed, visit, int.from_bytes(name)))

    def _build(
        self,
        step: int,
        pictures: Sequence[NDArray[np.uint8]],
        texts: Sequence[str],
        actions: Sequence[NDArray[np.float32]],
        samples: Sequence[Sample],
        prompts_only: bool = False,
    ) -> MicroBatch:
        stacked = np.stack(actions).astype(np.float32)
        collated = self.processor.collate(
            pictures,
            [self.processor.prompt_ids(text) for text in texts],
            None if prompts_only else self.tokenizer.encode(stacked),
        )
        scale = np.array([np.nan if s.scale_m is None else s.scale_m for s in samples], np.float32)
        return MicroBatch(step, **collated, actions=stacked, scale_m=scale)


# Between processes: Arrow rows of bytes; Ray would otherwise guess types, block by block.
_ARRAYS: dict[str, type[np.generic]] = {
    "pixels": np.uint8,
    "ids": np.int64,
    "mask": np.int64,
    "types": np.int64,
    "actions": np.float32,
    "scale_m": np.float32,
}
_PACKED = pa.schema(
    [("step", pa.int64()), ("error_type", pa.string()), ("error", pa.string())]
    + [(name, pa.large_binary()) for name in _ARRAYS]
    + [(f"{name}_shape", pa.list_(pa.int64())) for name in _ARRAYS]
)


def pack(batch: MicroBatch) -> pa.Table:
    """One row."""
    columns: dict[str, list[object]] = {"step": [batch.step], "error_type": [None], "error": [None]}
    for name in _ARRAYS:
        array = getattr(batch, name)
        columns[name] = [np.ascontiguousarray(array).tobytes()]
        columns[f"{name}_shape"] = [list(array.shape)]
    return pa.Table.from_pydict(columns, schema=_PACKED)


def pack_error(error: VlaRayError) -> pa.Table:
    """One row that `unpack` raises. Thrown in a data worker, Ray would wrap it beyond recognition."""
    row = {"error_type": [type(error).__name__], "error": [str(error)]}
    return pa.Table.from_pydict({**{name: [None] for name in _PACKED.names}, **row}, schema=_PACKED)


def unpack(table: pa.Table) -> Iterator[MicroBatch]:
    """What `pack` packed, one batch per row."""
    for number in range(table.num_rows):
        if (error := table["error"][number].as_py()) is not None:
            raise getattr(errors, table["error_type"][number].as_py())(error)
        arrays = {}
        for name, dtype in _ARRAYS.items():
            shape = table[f"{name}_shape"][number].as_py()
            arrays[name] = np.frombuffer(table[name][number].as_buffer(), dtype).reshape(shape)
        yield MicroBatch(table["step"][number].as_py(), **arrays)
