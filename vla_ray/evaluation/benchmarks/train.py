"""What batches cost beside the training step that eats them: ready in memory, made in the training process, streamed.

One loop (training/loop.py) takes all of them in turn, so weights, optimiser and batches are the same and only where a
batch comes from differs. A stretch of steps opens its source, goes some steps untimed, and then counts; nothing of the
other sources runs meanwhile. The stream is what `pipelines/bench_train.py` brings.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from vla_ray.config.train import AugmentConfig, PolicyModelConfig, TrainConfig, TrainDataConfig, TrainingConfig
from vla_ray.data import corridors
from vla_ray.data.cast.shards import ReadOptions
from vla_ray.data.images import decode_rgb
from vla_ray.data.prepared import DOCUMENT, PreparedDataset
from vla_ray.data.prepared import samples as to_samples
from vla_ray.evaluation.benchmarks.interleaved import Side, Timing, interleave
from vla_ray.evaluation.benchmarks.train_cost import MADE, READY, STREAMED, Measured, OfSize
from vla_ray.models.paligemma.processing import Processor
from vla_ray.models.paligemma.tiny import build_tiny
from vla_ray.stages.dataset_document import build_document
from vla_ray.stages.prepare import ShardPreparer
from vla_ray.storage.files import Location, write_json
from vla_ray.training.batches import BatchMaker, MicroBatch
from vla_ray.training.loop import Loop
from vla_ray.training.parallel import Workers
from vla_ray.training.session import load_policy
from vla_ray.training.spec import TrainSpec, fit_tokenizer

PICTURES = 64  # of training; each has several instructions

Source = Callable[[int], Iterator[MicroBatch]]  # number of steps -> their batches, from step 0


@dataclass(frozen=True, slots=True)
class Size:
    """A model and a batch.

    Attributes:
        model: of `build_tiny`; what is not named is the bundled tiny policy's.
        steps: of a timed stretch.
        warm_up: untimed steps before it.
        stream: steps of a Ray stream, more than its workers can make ahead: they still work at the last timed one.
        judged: whether overhead should vanish beside its steps.
    """

    model: Mapping[str, int]
    batch_size: int
    steps: int
    warm_up: int
    stream: int
    judged: bool


SIZES = {
    "tiny": Size({}, 32, 80, 16, 400, judged=False),
    "mid": Size(
        {"image_size": 224, "vision_dim": 384, "vision_layers": 8, "dim": 384, "layers": 8, "heads": 6},
        4,
        8,
        2,
        500,
        judged=True,
    ),
}


def make_dataset(directory: Path, pictures: int = PICTURES) -> PreparedDataset:
    """Rendered corridors, prepared as `jobs/prepare_cast.py` does."""
    directory.mkdir(parents=True)
    location, options = Location.of(directory), ReadOptions()
    preparer = ShardPreparer(location, options, row_group=64, read=corridors.read)
    records = [preparer(shard) for shard in corridors.shards(train=pictures, val=8)]
    write_json(location / DOCUMENT, build_document(records, "synthetic", options))
    return PreparedDataset.open(location)


def make_spec(size: Size, dataset: PreparedDataset, directory: Path, workers: int = 1, max_steps: int = 1) -> TrainSpec:
    """A run on the dataset that nothing was learnt in; its base model is built now."""
    base = build_tiny(directory / "base", **size.model)  # type: ignore[arg-type]  # numbers alone
    often = {"logging_steps": 1, "eval_samples": 2, "eval_decode": 2}
    config = TrainConfig(
        output_dir=str(directory),
        run="run",
        workers=workers,
        model=PolicyModelConfig(name=str(base), device="cpu"),
        data=TrainDataConfig(path=str(dataset.location)),
        augment=AugmentConfig(),
        training=TrainingConfig(batch_size=size.batch_size, max_steps=max_steps, **often),  # type: ignore[arg-type]
    )
    return TrainSpec(config, str(directory / "run"), str(base), dataset, fit_tokenizer(config.action, dataset, "train"))


@dataclass(slots=True)
class _Windows:
    """Keeps what the loop says of itself."""

    said: list[dict[str, float]] = field(default_factory=list)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.said.append(values)

    def validate(self, step: int) -> None:
        pass

    def save(self, step: int) -> None:
        pass


class Subject:
    """A model in training, and where its batches may come from."""

    def __init__(self, size: Size, dataset: PreparedDataset, directory: Path, chunk_samples: int) -> None:
        """Args: chunk_samples: that a data worker reads together."""
        self.size = size
        self.spec = make_spec(size, dataset, directory)
        self.policy = load_policy(self.spec, Path(self.spec.base), Workers())
        processor = Processor.from_directory(Path(self.spec.base), self.spec.config.model.max_text_length)
        self.steps = self.spec.steps()
        training = self.spec.config.training
        groups = self.steps.order.groups
        self.maker = BatchMaker(
            dataset, groups, processor, self.spec.tokenizer, self.spec.config.augment, training.seed
        )
        self.per_chunk = max(1, chunk_samples // size.batch_size)
        self.loop = Loop(self.policy, training, Workers(), total=1)
        self.windows: dict[str, _Windows] = {}
        self.first_batch_s: dict[str, list[float]] = {}
        self._ready: list[MicroBatch] = []
        self._open: Iterator[MicroBatch] | None = None

    def ready(self, count: int) -> Iterator[MicroBatch]:
        """Source: batches that were made before."""
        if len(self._ready) < count:
            self._ready = list(self.made(count))
        return iter(self._ready[:count])

    def made(self, count: int) -> Iterator[MicroBatch]:
        """Source: batches made as they are asked for, of samples read for as many steps as a data worker reads for."""
        for at in range(0, count, self.per_chunk):
            steps = range(at, min(at + self.per_chunk, count))
            yield from self.maker(at, np.stack([self.steps.addresses(step, 0) for step in steps]))

    def side(self, name: str, source: Source, steps: int, warm_up: int) -> Side:
        """Timed are `steps` steps in the middle of a source of them."""
        windows = self.windows.setdefault(name, _Windows())
        waits = self.first_batch_s.setdefault(name, [])

        def prepare() -> None:
            self.close()
            began = perf_counter()
            batches = source(warm_up + steps)
            first = next(batches)
            waits.append(perf_counter() - began)
            self._open = chain([first], batches)
            self.loop.step, self.loop.total = 0, warm_up
            self.loop.run(self._open, _Windows())

        def run() -> None:
            assert self._open is not None
            self.loop.total = warm_up + steps
            self.loop.run(self._open, windows)

        return Side(name, run, prepare)

    def close(self) -> None:
        """End the open source: what makes its batches must not run beside another one's steps."""
        for _ in self._open or ():  # to its end: broken off, Ray says that it killed somebody
            pass
        self._open = None

    @property
    def description(self) -> str:
        config: Any = self.policy.model.config
        vision, text = config.vision_config, config.text_config
        first = next(self.ready(1))
        group = self.maker.groups[0]
        sample = next(to_samples(self.spec.dataset.read_group(self.spec.dataset.files[group.file], group.number)))
        height, width = decode_rgb(sample.image, sample.sample_id).shape[:2]
        return (
            f"{sum(p.numel() for p in self.policy.parameters()) / 1e6:.1f} M parameters, "
            f"{vision.num_hidden_layers} + {text.num_hidden_layers} layers, pictures of {width} x {height} brought to "
            f"{vision.image_size} x {vision.image_size}, {first.ids.shape[1]} tokens, batch {self.size.batch_size}"
        )


def measure(subject: Subject, name: str, streamed: Source, steps: int | None, rounds: int) -> OfSize:
    """Time all sources, interleaved. Args: steps: of a stretch; None: the size's own."""
    size = subject.size
    count, warm_up = steps or size.steps, size.warm_up
    sources: dict[str, Source] = {READY: subject.ready, MADE: subject.made, STREAMED: streamed}
    list(subject.ready(count + warm_up))  # made now, and the files are in the page cache
    plain, *others = (subject.side(side, source, count, warm_up) for side, source in sources.items())
    plain.prepare()
    plain.run()
    subject.windows[READY].said.clear()
    timings = interleave(plain, others, rounds)
    subject.close()
    return OfSize(
        name,
        subject.description,
        count,
        size.judged,
        {side: _measured(subject, side, timings[side], count) for side in sources},
    )


def _measured(subject: Subject, name: str, timing: Timing, steps: int) -> Measured:
    said = subject.windows[name].said

    def median(key: str) -> float:
        return statistics.median(values[key] for values in said)

    waits = statistics.median(subject.first_batch_s[name])
    return Measured(
        timing, timing.wall_s / steps, median("samples_per_s"), median("tokens_per_s"), median("waiting"), waits
    )
