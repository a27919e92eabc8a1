"""The plain training loop: every way of splitting up the same batches learns the same."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import PaliGemmaForConditionalGeneration

from vla_ray.config.train import (
    AugmentConfig,
    LoraConfig,
    PolicyModelConfig,
    TrainConfig,
    TrainDataConfig,
    TrainingConfig,
)
from vla_ray.data.cast.instructions import permuted
from vla_ray.data.cast.statistics import ActionStatistics
from vla_ray.data.prepared import PreparedDataset
from vla_ray.errors import CheckpointError, ConfigError, DataError, TrainingError
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.processing import Processor
from vla_ray.models.paligemma.tiny import build_tiny
from vla_ray.models.paligemma.tokenizer_file import load_decoding, load_tokenizer
from vla_ray.pipelines.train import result_settings
from vla_ray.storage.files import Location
from vla_ray.training.batches import BatchMaker, MicroBatch
from vla_ray.training.checkpoints import RunFiles
from vla_ray.training.loop import Loop
from vla_ray.training.order import Steps
from vla_ray.training.parallel import Workers
from vla_ray.training.session import load_policy, local_stream, merge_best, run_worker
from vla_ray.training.spec import TrainSpec, fit_tokenizer
from vla_ray.training.tensors import inputs
from vla_ray.training.validation import choose_samples

STEPS = 6


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_spec(corridors: Path, base: Path, tmp_path: Path) -> Callable[..., TrainSpec]:
    def make(name: str = "run", workers: int = 1, parallel: str = "ddp", **given: Any) -> TrainSpec:
        often = {"logging_steps": 1, "eval_steps": 3, "save_steps": 2, "eval_samples": 8, "eval_decode": 4}
        usual = {"batch_size": 8, "max_steps": STEPS, "learning_rate": 1e-3, **often}
        groups = {
            "data": TrainDataConfig(path=str(corridors), window=2, **given.pop("data", {})),
            "lora": LoraConfig(**given.pop("lora", {})),
            "augment": AugmentConfig(**given.pop("augment", {})),
        }
        model = PolicyModelConfig(name=str(base))
        training = TrainingConfig(**{**usual, **given})
        config = TrainConfig(str(tmp_path), name, workers, parallel, model=model, training=training, **groups)
        dataset = PreparedDataset.open(str(corridors))
        tokenizer = fit_tokenizer(config.action, dataset, "train")
        return TrainSpec(config, str(tmp_path / name), str(base), dataset, tokenizer)

    return make


def run(spec: TrainSpec) -> dict[str, torch.Tensor]:
    run_worker(spec, Workers(), local_stream())
    return weights(spec)


def weights(spec: TrainSpec, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(next(Path(spec.directory, which).glob("*model.safetensors")))


def log(spec: TrainSpec, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in RunFiles(Path(spec.directory)).log.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def stop_at(step: int) -> Any:
    """A stream that breaks off before a step, as a process that dies."""

    def stream(maker: BatchMaker, steps: Steps, start: int, total: int) -> Iterator[MicroBatch]:
        yield from (b for b in local_stream()(maker, steps, start, total) if b.step < step)
        raise KeyboardInterrupt

    return stream


# The same batch, split up in different ways ---------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_whole_batch(make_spec: Callable[..., TrainSpec]) -> None:
    whole = run(make_spec("whole"))
    parts = run(make_spec("parts", batch_size=2, gradient_accumulation_steps=4))
    assert_same(whole, parts)


def _worker(rank: int, port: int, spec: TrainSpec, kind: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    run_worker(spec, Workers(kind, rank, 2), local_stream(rank))
    dist.destroy_process_group()


def run_two(spec: TrainSpec, kind: str) -> dict[str, torch.Tensor]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (port, spec, kind), nprocs=2)
    return weights(spec)


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_workers_learn_what_one_does(kind: str, make_spec: Callable[..., TrainSpec]) -> None:
    alone = run(make_spec("alone"))
    spec = make_spec("together", workers=2, parallel=kind, batch_size=2, gradient_accumulation_steps=2)
    assert_same(alone, run_two(spec, kind))
    assert [line["step"] for line in log(spec, "train")] == [*range(1, STEPS + 1)]
    for mine, theirs in zip(log(make_spec("alone"), "validation"), log(spec, "validation"), strict=True):
        for name in ("loss", "ade", "ade_still", "token_accuracy"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4)


@pytest.mark.parametrize("given", [{}, {"lora": {"enabled": True, "rank": 4, "dropout": 0.1}}], ids=["full", "lora"])
def test_a_resumed_run_is_an_uninterrupted_one(given: dict[str, Any], make_spec: Callable[..., TrainSpec]) -> None:
    whole = run(make_spec("whole", **given))
    spec = make_spec("broken", **given)
    with pytest.raises(KeyboardInterrupt):
        run_worker(spec, Workers(), stop_at(5))
    assert RunFiles(Path(spec.directory)).load_state()["step"] == 4, "saved each second step"
    assert_same(whole, run(spec))
    assert [line["step"] for line in log(spec, "train")] == [*range(1, STEPS + 1)], "no step is logged twice"


def test_a_resume_never_reads_what_was_consumed(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec()
    with pytest.raises(KeyboardInterrupt):
        run_worker(spec, Workers(), stop_at(4))
    started: list[int] = []

    def stream(maker: BatchMaker, steps: Steps, start: int, total: int) -> Iterator[MicroBatch]:
        started.append(start)
        return local_stream()(maker, steps, start, total)

    run_worker(spec, Workers(), stream)
    assert started == [4]


@pytest.mark.slow
def test_an_fsdp_run_is_resumed_by_ddp(make_spec: Callable[..., TrainSpec]) -> None:
    """States are whole: they fit any number and kind of workers."""
    whole = run(make_spec("whole"))
    half = make_spec("half", workers=2, parallel="fsdp", batch_size=4, max_steps=STEPS)
    short = replace(half, config=replace(half.config, training=replace(half.config.training, save_steps=3)))
    with pytest.raises(mp.ProcessRaisedException, match="KeyboardInterrupt"):
        _run_two_and_stop(short)
    assert RunFiles(Path(half.directory)).load_state()["step"] == 3
    alone = replace(half, config=make_spec("half").config)
    assert_same(whole, run(alone))


def _stopping_worker(rank: int, port: int, spec: TrainSpec) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)

    def stream(maker: BatchMaker, steps: Steps, start: int, total: int) -> Iterator[MicroBatch]:
        yield from (b for b in local_stream(rank)(maker, steps, start, total) if b.step < 4)
        raise RuntimeError("KeyboardInterrupt")

    run_worker(spec, Workers("fsdp", rank, 2), stream)


def _run_two_and_stop(spec: TrainSpec) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_stopping_worker, (port, spec), nprocs=2)


# What is learnt, and what is kept -------------------------------------------------------------------------------

# Losses of the tiny model's first twenty steps on the fixture's corridors, seed 0, one thread, float32.
GOLDEN = (
    7.4183,
    7.3384,
    7.2059,
    7.0612,
    6.9472,
    6.8416,
    6.7100,
    6.4232,
    6.6263,
    6.4900,
    6.3993,
    6.4253,
    5.8487,
    6.3495,
    6.1591,
    5.9671,
    6.2116,
    5.9891,
    6.0918,
    5.8139,
)


def test_golden_losses(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec(max_steps=20, eval_steps=20, save_steps=20, learning_rate=2e-3)
    run(spec)
    found = [line["loss"] for line in log(spec, "train")]
    assert found == pytest.approx(list(GOLDEN), rel=1e-3)


def test_checkpoints_are_plain_transformers_directories(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec()
    run(spec)
    for which in ("last", "best_model"):
        directory = Path(spec.directory, which)
        model = PaliGemmaForConditionalGeneration.from_pretrained(directory)
        own = ActionPolicy.from_pretrained(directory, spec.tokenizer).model
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own.parameters(), strict=True))
        assert load_tokenizer(Location.of(directory / "tokenizers.pt")) == spec.tokenizer
        assert (directory / "model.safetensors").stat().st_mode & 0o044, "colleagues can read it"
    assert not Path(spec.directory, "best_model", "training_state.pt").exists()


def test_adapters_alone_are_learnt_and_saved(make_spec: Callable[..., TrainSpec], base: Path) -> None:
    spec = make_spec(lora={"enabled": True, "rank": 4})
    run(spec)
    saved = weights(spec)
    assert saved
    assert all("lora_" in name for name in saved)
    assert any(saved[name].abs().max() > 0 for name in saved if "lora_B" in name)
    model = PaliGemmaForConditionalGeneration.from_pretrained(Path(spec.directory, "last"))
    before = PaliGemmaForConditionalGeneration.from_pretrained(base)
    for name, parameter in before.named_parameters():
        found = dict(model.named_parameters())
        own = found.get(name, found.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(own, parameter), name


def test_actions_may_be_learnt_in_parallel(make_spec: Callable[..., TrainSpec]) -> None:
    """Same batches, same validation; the checkpoint says how it decodes, and is not gone on with in another way."""
    often = {"learning_rate": 4e-3, "eval_steps": 30, "save_steps": 30, "logging_steps": 10}
    spec = make_spec("parallel", decoding="parallel", max_steps=30, **often)
    run(spec)
    losses = [line["loss"] for line in log(spec, "train")]
    assert losses[-1] < 0.85 * losses[0]
    (validated,) = log(spec, "validation")
    assert 0 < validated["ade"] < validated["ade_still"], "decoded as it was learnt"
    best = Path(spec.directory, "best_model")
    assert load_decoding(Location.of(best / "tokenizers.pt")) == "parallel"
    assert ActionPolicy.from_pretrained(best, spec.tokenizer).decoding == "parallel"
    other = make_spec("parallel", decoding="autoregressive", max_steps=31)
    with pytest.raises(CheckpointError, match="the decoding is parallel there, autoregressive here"):
        run(other)


def test_decoding_belongs_to_a_run(make_spec: Callable[..., TrainSpec]) -> None:
    key = "training.decoding"
    assert key not in result_settings(make_spec().config), "runs from when there was one way only are resumed"
    assert result_settings(make_spec(decoding="parallel").config)[key] == "parallel"
    config = make_spec(decoding="parallel").config
    with pytest.raises(ConfigError, match=r"placeholders for 64 steps; action\.num_steps is 65"):
        replace(config, action=replace(config.action, num_steps=65))


def test_frozen_parts_stay(make_spec: Callable[..., TrainSpec], base: Path) -> None:
    spec = make_spec(freeze=("vision", "embeddings"), max_steps=2)
    after, before = run(spec), load_file(base / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("vision" in name or "embed" in name for name in changed)
    assert any("layers" in name for name in changed)
    assert any("projector" in name for name in changed)


def test_the_best_model_is_the_one_of_the_lowest_validation_loss(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec(learning_rate=3.0, eval_steps=1, warmup_ratio=0.5)  # soon gets worse
    run(spec)
    losses = {line["step"]: line["loss"] for line in log(spec, "validation")}
    (best,) = [line for line in log(spec, "validation") if line["best"]][-1:]
    assert best["step"] == min(losses, key=losses.__getitem__) < STEPS
    assert any(not torch.equal(a, weights(spec)[n]) for n, a in weights(spec, "best_model").items())


def test_the_log_says_how_fast_and_how_well(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec()
    run(spec)
    train, validation = log(spec, "train"), log(spec, "validation")
    assert [line["step"] for line in validation] == [3, 6]
    assert {"loss", "learning_rate", "grad_norm", "samples_per_s", "tokens_per_s", "waiting"} <= train[0].keys()
    names = {"loss", "token_accuracy", "ade", "fde", "ade_m", "fde_m", "ade_permuted", "language_use", "ade_straight"}
    assert names <= validation[0].keys()
    assert validation[0]["ade_m"] == pytest.approx(0.25 * validation[0]["ade"], rel=1e-5), "corridors: 0.25 m a unit"
    examples = [json.loads(line) for line in RunFiles(Path(spec.directory)).examples.read_text().splitlines()]
    assert len(examples[0]["examples"][0]["predicted"]) == 8


# What goes wrong ------------------------------------------------------------------------------------------------


def test_a_loss_that_explodes_is_said_and_last_stays(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec(learning_rate=1e30, warmup_ratio=0.9, save_steps=1)
    with pytest.raises(TrainingError, match=r"step \d+ is not finite.*training\.learning_rate"):
        run(spec)


def test_out_of_memory_names_the_knobs(make_spec: Callable[..., TrainSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(ActionPolicy, "forward", full)
    with pytest.raises(TrainingError, match=r"training\.batch_size=8 .*Halve training\.batch_size and double .*lora"):
        run(make_spec())


def test_batches_out_of_order_are_refused(make_spec: Callable[..., TrainSpec]) -> None:
    def stream(maker: BatchMaker, steps: Steps, start: int, total: int) -> Iterator[MicroBatch]:
        batches = [*local_stream()(maker, steps, start, 2)]
        yield from reversed(batches)

    with pytest.raises(TrainingError, match="a batch of step 1 came at step 0"):
        run_worker(make_spec(), Workers(), stream)


def test_a_damaged_state_is_refused(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec(max_steps=2)
    run(spec)
    state = Path(spec.directory, "last", "training_state.pt")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"training_state\.pt cannot be read.*restore it"):
        run(spec)


def test_a_crash_between_two_renames_loses_nothing(make_spec: Callable[..., TrainSpec]) -> None:
    whole = run(make_spec("whole"))
    spec = make_spec("broken")
    with pytest.raises(KeyboardInterrupt):
        run_worker(spec, Workers(), stop_at(4))
    last = Path(spec.directory, "last")
    last.rename(last.with_name(".last.old"))
    assert_same(whole, run(spec))


def test_an_empty_validation_split_is_named(make_spec: Callable[..., TrainSpec]) -> None:
    with pytest.raises(DataError, match=r"no samples of the split 'validation'.*train, val"):
        run(make_spec(data={"val_split": "validation"}))


def test_bounds_that_cut_off_actions_are_refused(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec()
    action = replace(spec.config.action, normalizer="none", action_bounds=(-0.2, 0.2))
    with pytest.raises(ConfigError, match=r"% of x and .*% of y .*max_clip_rate.*quantile"):
        fit_tokenizer(action, spec.dataset, "train")


def test_another_horizon_is_refused(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec()
    with pytest.raises(DataError, match=r"actions of 8 steps, action\.num_steps is 4"):
        fit_tokenizer(replace(spec.config.action, num_steps=4), spec.dataset, "train")


def test_merged_adapters_are_a_plain_model(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec(lora={"enabled": True, "rank": 4}, max_steps=3)
    run(spec)
    merge_best(spec)
    merged = Path(spec.directory, "merged")
    assert not (merged / "adapter_config.json").exists()
    samples = choose_samples(spec.dataset, "val", 4)
    maker = BatchMaker(spec.dataset, (), Processor.from_directory(merged), spec.tokenizer)
    batch = inputs(maker.plain(samples), torch.device("cpu"))
    found = [
        ActionPolicy.from_pretrained(d, load_tokenizer(Location.of(d / "tokenizers.pt"))).eval()(**batch).loss
        for d in (merged, Path(spec.directory, "best_model"))
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_mirrored_actions_fit_the_bounds(make_spec: Callable[..., TrainSpec]) -> None:
    """Of a dataset that only ever turns left, half of what training sees turns right."""
    spec = make_spec()
    one_sided = ActionStatistics()
    one_sided.add([[1.0, y] for y in (0.2, 0.3, 0.4)])
    dataset = replace(spec.dataset, statistics={"train": one_sided})
    plain, mirrored = (fit_tokenizer(spec.config.action, dataset, "train", m) for m in (False, True))
    turned = np.tile([[1.0, -0.4]], (8, 1))
    assert abs(plain.decode(plain.encode(turned)) - turned).max() > 0.5
    assert abs(mirrored.decode(mirrored.encode(turned)) - turned).max() < 0.01


def test_padded_samples_are_not_trained_on(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec()
    document = {**spec.dataset.document, "options": {**spec.dataset.document["options"], "padding": "keep"}}
    with pytest.raises(DataError, match=r"padding=keep.*padding=drop"):
        fit_tokenizer(spec.config.action, replace(spec.dataset, document=document), "train")


def test_last_of_other_action_tokens_is_refused(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec(max_steps=2)
    run(spec)
    other = replace(spec, tokenizer=replace(spec.tokenizer, bounds=(-2.0, 2.0)))
    with pytest.raises(CheckpointError, match=r"tokenizers\.pt does not fit: the fingerprint"):
        run(other)


@pytest.mark.parametrize("enabled", [True, False], ids=["adapters", "all weights"])
def test_training_starts_from_adapters(enabled: bool, make_spec: Callable[..., TrainSpec]) -> None:
    first = make_spec("first", lora={"enabled": True, "rank": 4}, max_steps=3, learning_rate=0.05)
    run(first)
    second = make_spec("second", lora={"enabled": enabled, "rank": 4}, max_steps=2)
    run(replace(second, base=str(Path(first.directory, "best_model"))))
    losses = [line["loss"] for line in log(first, "train")], [line["loss"] for line in log(second, "train")]
    assert losses[1][0] < losses[0][0] - 0.01, "what was learnt is there"
    names = weights(second).keys()
    assert enabled == all("lora_" in name for name in names)
    assert enabled or PaliGemmaForConditionalGeneration.from_pretrained(Path(second.directory, "last"))
    third = replace(
        make_spec("third", lora={"enabled": True, "rank": 8}), base=str(Path(first.directory, "best_model"))
    )
    with pytest.raises(ConfigError, match=r"lora\.rank=8, but .* have rank 4"):
        run(third)


@pytest.mark.parametrize(
    ("instructions", "moved"),
    [(["a", "b", "c", "d"], 4), (["a", "a", "a", "b"], 2), (["a", "a"], 0), (["a", "a", "b", "b", "c"], 5)],
)
def test_permuted_instructions_are_of_others(instructions: list[str], moved: int) -> None:
    for seed in range(5):
        found = permuted(instructions, seed)
        assert sorted(found) == sorted(instructions)
        assert sum(a != b for a, b in zip(found, instructions, strict=True)) == moved


@pytest.mark.parametrize(
    ("setting", "value"),
    [("betas", 0.9), ("betas", [2, 0.9]), ("seed", -1), ("learning_rate", float("nan")), ("warmup_ratio", 5)],
)
def test_settings_out_of_range(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"training\.{setting}="):
        TrainingConfig(**{setting: value})


def test_weights_are_positive_numbers() -> None:
    assert TrainDataConfig(weights=["a =0.5", "b=2"]).weights == {"a": 0.5, "b": 2.0}
    assert TrainDataConfig(weights=[]).weights is None
    for wrong in (["a=inf"], ["a"], ["a=-1"], 3):
        with pytest.raises(ConfigError, match=r"data\.weights: .*is no positive number"):
            TrainDataConfig(weights=wrong)


def test_bfloat16_learns_nearly_the_same_in_float32_weights(make_spec: Callable[..., TrainSpec]) -> None:
    exact, coarse = make_spec("exact"), make_spec("coarse")
    run(exact)
    run_worker(coarse, Workers(bfloat16=True), local_stream())
    losses = [[line["loss"] for line in log(spec, "train")] for spec in (exact, coarse)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert {tensor.dtype for tensor in weights(coarse).values()} == {torch.float32}


def test_mfu_is_work_over_what_the_device_could_do(make_spec: Callable[..., TrainSpec]) -> None:
    spec = make_spec(max_steps=2, logging_steps=2)
    policy = load_policy(spec, Path(spec.base), Workers())
    loop = Loop(policy, spec.config.training, Workers(), 2, lambda tokens: 1e6 * tokens, peak_flops=1e9)
    lines: list[dict[str, float]] = []
    hooks = SimpleNamespace(log=lambda step, values: lines.append(values), validate=lambda s: None, save=lambda s: None)
    steps = spec.steps()
    maker = BatchMaker(spec.dataset, steps.order.groups, Processor.from_directory(spec.base), spec.tokenizer)
    loop.run(local_stream()(maker, steps, 0, 2), hooks)
    (line,) = lines
    assert line["mfu"] == pytest.approx(line["tokens_per_s"] * 1e6 / 1e9)
