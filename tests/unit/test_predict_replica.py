"""A policy replica: pictures in, rows out; the same whatever else is in the batch."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla_ray.data.prepared import PreparedDataset, read_group
from vla_ray.data.sample_refs import SampleRef, sample_refs
from vla_ray.errors import StorageError
from vla_ray.models.paligemma import lora
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.tokenizer_file import NAME, load_tokenizer
from vla_ray.schema import FAILED, OK, PREDICTIONS, SKIPPED
from vla_ray.stages.decode import pack, unpack
from vla_ray.stages.decode_samples import SampleDecoder
from vla_ray.stages.infer import InferSpec, PredictReplica
from vla_ray.stages.policy import PolicySpec
from vla_ray.stages.work import Loaded, Worker, WorkFrame, WorkItem
from vla_ray.storage.files import Location


@pytest.fixture(scope="module")
def refs(corridors: Path) -> list[SampleRef]:
    return sample_refs(PreparedDataset.open(str(corridors)), "val", limit=12, permute_seed=0)


@pytest.fixture(scope="module")
def loaded(refs: list[SampleRef]) -> list[Loaded]:
    return decoded(refs)


@pytest.fixture(scope="module")
def replica(policy_dir: Path) -> PredictReplica:
    return PredictReplica(InferSpec(samples=3), PolicySpec(str(policy_dir)))


def decoded(refs: Sequence[SampleRef], keep: Location | None = None) -> list[Loaded]:
    item = WorkItem(tuple(WorkFrame(ref, "images") for ref in refs), ("given",))
    decoder = SampleDecoder(56, keep)
    return unpack(item, *pack(decoder(item), decoder.tiler.image_size))  # as Ray ships them


def numbers(row: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(row[name]) for name in ("predicted", "probability", "entropy", "samples")}


def test_rows_say_what_was_asked_predicted_and_right(
    replica: PredictReplica, loaded: list[Loaded], refs: list[SampleRef]
) -> None:
    rows = replica.process(loaded, ["given"])
    assert set().union(*rows) <= set(PREDICTIONS.names)
    assert [row["frame_id"] for row in rows] == [ref.frame_id for ref in refs]
    for row, ref in zip(rows, refs, strict=True):
        source = read_group(Location.of(ref.path), ref.group).to_pylist()[ref.row]
        assert (row["status"], row["instruction"]) == (OK, source["instruction"])
        assert (row["actions"], row["scale_m"]) == (source["actions"], source["scale_m"])
        assert len(row["predicted"]) == len(row["probability"]) == 16
        assert len(row["samples"]) == 3 * 16
    error = np.array([np.subtract(row["predicted"], row["actions"]) for row in rows])
    assert np.abs(error).mean() < 0.3  # the policy knows its corridors


def test_a_batch_gives_what_single_samples_give(replica: PredictReplica, loaded: list[Loaded]) -> None:
    together = replica.process(loaded, ["given", "go to the left door"])
    alone = [row for frame in loaded for row in replica.process([frame], ["given", "go to the left door"])]
    key = ("frame_id", "target")
    by_key = {tuple(row[k] for k in key): row for row in alone}
    assert len(by_key) == len(together) == 2 * len(loaded)
    for row in together:
        for name, value in numbers(row).items():
            np.testing.assert_allclose(value, numbers(by_key[tuple(row[k] for k in key)])[name], atol=1e-4)


def test_other_instructions_for_the_same_picture(replica: PredictReplica, loaded: list[Loaded]) -> None:
    rows = replica.process(loaded, ["turn left", "turn right", "permuted", "opposite"])
    by_variant = {v: [r for r in rows if r["target"] == v] for v in ("turn left", "turn right", "permuted", "opposite")}
    assert [len(found) for found in by_variant.values()] == [len(loaded)] * 4
    side = {v: np.mean([np.sum(r["predicted"][1::2]) for r in by_variant[v]]) for v in ("turn left", "turn right")}
    assert side["turn left"] > 1 > -1 > side["turn right"]
    assert {r["instruction"] for r in by_variant["turn left"]} == {"turn left"}
    for frame, row in zip(loaded, by_variant["permuted"], strict=True):
        assert row["instruction"] == frame.sample.permuted != frame.columns["instruction"]
    skipped = [r for r in by_variant["opposite"] if r["status"] == SKIPPED]
    assert all("predicted" not in row for row in skipped)
    assert all(r["status"] == OK for r in by_variant["opposite"] if r not in skipped)


def test_expected_actions_lie_between_bins(policy_dir: Path, loaded: list[Loaded], replica: PredictReplica) -> None:
    expected = PredictReplica(InferSpec(decode="expected"), PolicySpec(str(policy_dir)))
    a = np.array([row["predicted"] for row in expected.process(loaded, ["given"])])
    b = np.array([row["predicted"] for row in replica.process(loaded, ["given"])])
    centers = expected.tokenizer.centers()
    distance = np.abs(a.reshape(-1, 2)[:, :, None] - centers[None]).min(-1)
    assert (distance > 1e-4).mean() > 0.5
    assert np.abs(a - b).mean() < 0.1


def test_pictures_are_kept_once_as_jpeg(refs: list[SampleRef], tmp_path: Path) -> None:
    run = Location.of(tmp_path)
    first = decoded(refs[:3], run)
    names = [f"images/{ref.image_filename}" for ref in refs[:3]]
    assert [x.columns["image_path"] for x in first] == names
    times = [(tmp_path / name).stat().st_mtime_ns for name in names]
    assert Image.open(io.BytesIO((tmp_path / names[0]).read_bytes())).format == "JPEG"
    decoded(refs[:3], run)
    assert [(tmp_path / name).stat().st_mtime_ns for name in names] == times


def test_what_cannot_be_read_fails_alone(
    refs: list[SampleRef], replica: PredictReplica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = SampleRef("x", 99, "d", str(tmp_path / "gone.parquet"), 0, 0)
    moved = SampleRef("y", 98, refs[0].dataset, refs[0].path, refs[0].group, refs[0].row)
    good, missing, other = decoded([refs[0], gone, moved])
    assert good.error is None
    assert missing.error_type == "StorageError"
    assert "made again" in (other.error or "")
    row = replica.failed(other, "given", "DataError", "why")
    assert (row["status"], row["error"], row["frame_id"]) == (FAILED, "why", "y")


def test_logits_that_are_not_finite_are_no_prediction(
    replica: PredictReplica, loaded: list[Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = replica.decode

    def broken(*args: Any) -> Any:
        found = decode(*args)
        found.probability[1] = float("nan")
        return found

    monkeypatch.setattr(replica, "decode", broken)
    rows = replica.process(loaded[:3], ["given"])
    assert [row["status"] for row in rows] == [OK, FAILED, OK]
    assert "predicted" not in rows[1]


def test_adapters_are_folded_in(policy_dir: Path, loaded: list[Loaded], tmp_path: Path) -> None:
    """Of a checkpoint that holds adapters alone: the same as from the merged one, and not the same as without."""
    places = {name: tmp_path / name for name in ("adapters", "merged")}
    tokenizer = load_tokenizer(Location.of(policy_dir) / NAME)
    policy = ActionPolicy.from_pretrained(policy_dir, tokenizer)
    torch.manual_seed(0)
    lora.add_adapters(policy.model, rank=2, alpha=4)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    for name, place in places.items():
        place.mkdir()
        (policy.save if name == "adapters" else policy.save_merged)(place)
        shutil.copyfile(policy_dir / NAME, place / NAME)
    assert not (places["adapters"] / "model.safetensors").exists()
    found = {
        name: PredictReplica(InferSpec(), PolicySpec(str(p))) for name, p in {**places, "plain": policy_dir}.items()
    }
    p = {name: np.array([r["probability"] for r in x.process(loaded, ["given"])]) for name, x in found.items()}
    np.testing.assert_allclose(p["adapters"], p["merged"], atol=1e-4)
    assert np.abs(p["adapters"] - p["plain"]).max() > 0.01


def test_half_precision_predicts_much_the_same(policy_dir: Path, loaded: list[Loaded], replica: PredictReplica) -> None:
    half = PredictReplica(InferSpec(), PolicySpec(str(policy_dir), dtype="bfloat16"))
    assert {p.dtype for p in half.policy.parameters()} == {torch.bfloat16}
    ends = [
        np.sum(np.reshape([r["predicted"] for r in x.process(loaded, ["turn left"])], (-1, 8, 2)), 1)
        for x in (half, replica)
    ]
    assert np.abs(ends[0] - ends[1]).max() < 1
    assert {row["status"] for row in half.process(loaded, ["given"])} == {OK}


def test_steps_of_one_shape_predict_the_same(policy_dir: Path, loaded: list[Loaded], replica: PredictReplica) -> None:
    static = PredictReplica(InferSpec(steps="static", samples=3), PolicySpec(str(policy_dir)))
    for few in (loaded[:3], loaded, loaded[:1]):  # the shape grows with the largest batch, and then stays
        for a, b in zip(static.process(few, ["given"]), replica.process(few, ["given"]), strict=True):
            assert numbers(a).keys() == numbers(b).keys()
            for name, value in numbers(a).items():
                np.testing.assert_allclose(value, numbers(b)[name], atol=1e-4)


def test_a_disk_that_is_full_is_no_fault_of_the_sample(
    refs: list[SampleRef], replica: PredictReplica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise StorageError("no space left on device")

    monkeypatch.setattr("vla_ray.stages.decode_samples.write_atomic", full)
    run = Location.of(tmp_path)
    item = WorkItem(tuple(WorkFrame(ref, "images") for ref in refs[:2]), ("given",))
    with pytest.raises(StorageError, match="no space left"):
        Worker(replica, run, "driver", PREDICTIONS)(item, decoded(refs[:2], run))
    assert not list(tmp_path.glob("ledger/*"))


def test_a_sample_that_kills_its_decoder_is_still_known(refs: list[SampleRef], corridors: Path) -> None:
    about = SampleDecoder(56, None).describe(WorkFrame(refs[0], "images"))
    assert about["instruction"]
    assert about["recording"]
    assert about["picture"] == decoded(refs[:1])[0].columns["picture"]
