"""The published layout: equal to what TFDS decodes, and every way in which a shard can be damaged or incomplete."""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vla_ray.data.cast.episodes import recording_of
from vla_ray.data.cast.example import parse_example, serialise_example
from vla_ray.data.cast.features import decode_fields, parse_features
from vla_ray.data.cast.sample import Sample
from vla_ray.data.cast.scales import group_of, source_of
from vla_ray.data.cast.shards import ReadOptions, Shard, Tally
from vla_ray.data.cast.source import find_shards, read_shard
from vla_ray.data.cast.tfrecord import frame, read_records
from vla_ray.data.cast.windows import action_windows
from vla_ray.errors import ConfigError, DataError

FULL = ReadOptions(crc="full")


def read(shards: list[Shard], options: ReadOptions = FULL) -> tuple[list[Sample], Tally]:
    tallies = [Tally() for _ in shards]
    samples = [s for shard, tally in zip(shards, tallies, strict=True) for s in read_shard(shard, options, tally)]
    return samples, Tally.total(tallies)


@pytest.fixture(scope="module")
def published(golden: Path) -> Path:
    return golden / "cast_rlds"


@pytest.fixture
def copied(published: Path, tmp_path: Path) -> Path:
    """One sub-dataset with one split, to be damaged. Four records."""
    source = published / "cast_filtered_dataset/cast_filtered_dataset/1.0.0"
    target = tmp_path / "cast_filtered_dataset/1.0.0"
    target.mkdir(parents=True)
    for name in ("features.json", "dataset_info.json", "cast_filtered_dataset-train.tfrecord-00000-of-00001"):
        shutil.copyfile(source / name, target / name)
    return target


def shard_file(directory: Path) -> Path:
    return next(directory.glob("*.tfrecord*"))


# Golden --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cast_filtered_dataset", "cast_counterfactual_dataset"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_field_equals_what_tfds_decodes(published: Path, name: str, split: str) -> None:
    directory = published / name / name / "1.0.0"
    features = parse_features((directory / "features.json").read_bytes(), "features.json")
    data = (directory / f"{name}-{split}.tfrecord-00000-of-00001").read_bytes()
    compared = set()
    with np.load(published / f"{name}.{split}.ref.npz") as reference:
        for record in read_records(io.BytesIO(data), len(data), "full"):
            assert record.data is not None
            fields = decode_fields(parse_example(record.data, features), features)
            for key, found in fields.items():
                expected = reference[f"{record.number}/{key}"]
                if expected.dtype.kind == "S":
                    assert features[key].dtype == "string"
                    found = found.astype(np.bytes_)
                elif features[key].dtype == "float64":
                    assert found.dtype == np.float64
                    expected = expected.astype(np.float32).astype(np.float64)
                else:
                    assert found.dtype == expected.dtype
                assert found.shape == expected.shape, key
                assert np.array_equal(found, expected), key
                compared.add(f"{record.number}/{key}")
        assert compared == set(reference.files)
        assert len(features) == 15


def test_samples_of_the_published_layout(published: Path) -> None:
    shards = find_shards(str(published))
    assert [(shard.dataset, shard.split) for shard in shards] == [
        (f"cast_{name}_dataset", split) for name in ("counterfactual", "filtered") for split in ("train", "val")
    ]
    assert shards[0].name == "cast_counterfactual_dataset-train-00000-of-00001"
    for shard in shards:
        samples, tally = read([shard])
        with np.load(published / f"{shard.dataset}.{shard.split}.ref.npz") as reference:
            expected = []
            for i in range(tally.episodes):
                state = reference[f"{i}/steps/observation/state"].astype(np.float32).astype(np.float64)
                scale = float(np.float32(reference[f"{i}/episode_metadata/normalization_factor"]))
                language = [text.decode() for text in reference[f"{i}/steps/language_instruction"][0] if text]
                for t in range(len(state) - 8):
                    pixels = reference[f"{i}/steps/observation/image"][t]
                    expected.append((i, t, state, scale, list(dict.fromkeys(language)), pixels))
        assert len(samples) == len(expected)
        for sample, (i, t, state, scale, language, pixels) in zip(samples, expected, strict=True):
            assert sample.sample_id == f"{shard.dataset}/{shard.split}/00000-of-00001:{i:05d}/{t:04d}"
            assert (sample.dataset, sample.split, sample.t) == (shard.dataset, shard.split, t)
            assert sample.scale_m == scale
            assert list(sample.instructions) == language
            assert sample.instruction == language[0]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), pixels)
            # Positions in the robot's frame, one by one, are the cumulative sums of the actions.
            for k in range(8):
                east, north = state[t + k + 1, :2] - state[t, :2]
                yaw = state[t, 2]
                ahead = (math.cos(yaw) * east + math.sin(yaw) * north) / scale
                left = (math.cos(yaw) * north - math.sin(yaw) * east) / scale
                np.testing.assert_allclose(sample.actions[: k + 1].sum(0), [ahead, left], atol=2e-6)
            assert sample.actions.shape == (8, 2)
            assert sample.actions.dtype == np.float32
            assert sample.valid.all()
    # Filtered and counterfactual sub-datasets hold the same recordings.
    named = [{s.recording for s in read([shard])[0]} for shard in shards]
    assert named[:2] == named[2:]
    assert named[1] == {"recon/traj_005", "sacson/traj_004"}


@pytest.mark.parametrize(
    ("path", "recording", "source"),
    [
        ("/data/gnm/recon/traj_003", "recon/traj_003", "recon"),
        ("/data/gnm/recon/traj_003_chunk_0", "recon/traj_003", "recon"),
        ("/data/gnm/recon/traj_003_chunk_12_start_3_end_9", "recon/traj_003", "recon"),
        ("/data/recon_v2/traj_003_chunk_1", "recon/traj_003", "recon_v2"),
        ("/data/recon_filtered_v2/traj_003_chunk_1", "recon/traj_003", "recon_filtered_v2"),
        ("/data/sacson/traj_003", "sacson/traj_003", "sacson"),
        ("/data/go_stanford2/a", "go_stanford2/a", "go_stanford2"),
        # One level deeper: the file is not the recording.
        ("/data/recon/traj_003_chunk_0/traj.npz", "recon/traj_003", "recon"),
        ("/data/recon/traj_003_chunk_0/part_2.npz", "recon/traj_003", "recon"),
        ("/data/recon/traj_003/traj_data.pkl", "recon/traj_003", "recon"),
        ("/data/recon/traj_003/17.JPG", "recon/traj_003", "recon"),
        ("/data/recon/traj_003/frame_17.png", "recon/traj_003", "recon"),
        # Unless it names itself.
        ("/data/recon/jackal_2019-09-02.h5", "recon/jackal_2019-09-02", "recon"),
        ("/data/sacson/Dec-06-2022.bag", "sacson/Dec-06-2022", "sacson"),
        # Versions and selections of a set of all robots.
        ("/x/lcbc_filtered_dataset/a.b_chunk_3", "a.b", "lcbc_filtered_dataset"),
        ("/x/lcbc_filtered_dataset_v2/a.b_chunk_3", "a.b", "lcbc_filtered_dataset_v2"),
        ("traj_003_chunk_0_start_0_end_17", "traj_003", ""),
    ],
)
def test_recordings_are_named_by_their_paths(path: str, recording: str, source: str) -> None:
    assert recording_of(path) == recording
    assert source_of(path) == source


def test_a_split_keeps_a_recording_together_however_it_is_named() -> None:
    """A sub-dataset that does not name the robot still has it on the same side."""
    assert {group_of(recording) for recording in ("recon/traj_003", "traj_003")} == {"traj_003"}
    assert group_of("drives/7.png") == "drives/7.png"


@pytest.mark.parametrize(
    "path", [b"/x/lcbc_filtered_dataset/walk_1", b"/x/recon/walk_1", b"/x/recon_v2/walk_1/traj.npz"]
)
def test_the_side_of_an_episode_is_that_of_its_recording(tmp_path: Path, path: bytes) -> None:
    def move(record: dict[str, Any]) -> None:
        record["episode_metadata/file_path"] = [path]

    options = replace(FULL, split_by="recording", val_share=0.5)
    samples, _ = read(find_shards(str(older(tmp_path / "d/1.0.0", move))), options)
    assert {s.split for s in samples} == {options.split_of("walk_1", "x")}
    assert {options.split_of(f"{robot}/walk_1", "x") for robot in ("recon", "recon_v2")} != {
        options.split_of("walk_1", "x")
    }, "the robot in the hash would tear it apart"


def test_white_frames_and_padding_are_dropped_and_counted(published: Path) -> None:
    shards = [shard for shard in find_shards(str(published)) if shard.dataset == "cast_counterfactual_dataset"]
    # 6 episodes of 16 steps, of which the last 8 are white.
    for options, samples, padding, white in (
        (FULL, 6 * 8, 6 * 8, 0),
        (replace(FULL, padding="keep"), 6 * 8, 6, 6 * 8 - 6),  # the last step has nothing but padding
        (replace(FULL, horizon=4), 6 * 8, 6 * 4, 6 * 4),
        (replace(FULL, horizon=4, every=3), 6 * 3, 6 * 2, 6),  # t = 0 3 6 | 9 white | 12 15 padding
        (replace(FULL, horizon=16), 0, 6 * 16, 0),
    ):
        found, tally = read(shards, options)
        assert (len(found), tally.padding, tally.white) == (samples, padding, white)
        assert tally.samples == samples
        assert tally.steps == samples + padding + white
        assert tally.episodes == 6
        assert all(np.asarray(Image.open(io.BytesIO(s.image))).mean() < 250 for s in found)
    filtered = [shard for shard in find_shards(str(published)) if shard.dataset == "cast_filtered_dataset"]
    assert len(read(filtered)[0]) == 51
    kept, tally = read(filtered, replace(FULL, padding="keep"))
    assert (tally.samples, tally.padding, tally.steps) == (99 - 6, 6, 99)
    assert sum(not s.valid.all() for s in kept) == 6 * 8 - 6
    assert all(not s.actions[~s.valid].any() for s in kept)


def test_source_regrouped_by_recording_leaks_nothing(published: Path) -> None:
    shards = find_shards(str(published))
    grouped, _ = read(shards, replace(FULL, split_by="recording", val_share=0.4))
    sides: dict[str, set[str]] = {}
    for sample in grouped:
        sides.setdefault(sample.recording, set()).add(sample.split)
    assert len(sides) == 6
    assert {side for both in sides.values() for side in both} == {"train", "val"}
    assert all(len(both) == 1 for both in sides.values())
    assert [s.sample_id for s in grouped] == [s.sample_id for s in read(shards)[0]]
    assert {s.split for s in read(shards, replace(FULL, split_by="recording", val_share=0.0))[0]} == {"train"}
    assert {s.split for s in read(shards, replace(FULL, split_by="recording", val_share=1.0))[0]} == {"val"}
    # The share is met, and the side of a recording does not depend on the other recordings.
    options = replace(FULL, split_by="recording", val_share=0.1)
    share = np.mean([options.split_of(f"drive_{i}", "x") == "val" for i in range(5000)])
    assert 0.085 < share < 0.115


# Damage --------------------------------------------------------------------------------------------------------


def test_one_corrupt_record_is_named_and_the_others_arrive(copied: Path) -> None:
    whole, _ = read(find_shards(str(copied)))
    file = shard_file(copied)
    data = bytearray(file.read_bytes())
    first = int.from_bytes(data[:8], "little") + 16
    data[first + 12 + 2000] ^= 0x10
    file.write_bytes(data)
    samples, tally = read(find_shards(str(copied)))
    assert tally.corrupt == 1
    assert tally.episodes == 3
    assert tally.problems == [
        f"cast_filtered_dataset-train-00000-of-00001: record 1 at byte {first} has a bad data checksum"
    ]
    assert [s.sample_id for s in samples] == [s.sample_id for s in whole if ":00001/" not in s.sample_id]


def test_a_truncated_shard_gives_what_is_whole(copied: Path) -> None:
    file = shard_file(copied)
    file.write_bytes(file.read_bytes()[:-10])
    samples, tally = read(find_shards(str(copied)), ReadOptions())
    assert {s.sample_id.split(":")[1][:5] for s in samples} == {"00000", "00001", "00002"}
    assert (tally.episodes, tally.corrupt) == (3, 1)
    assert "train-00000-of-00001: record 3 at byte" in tally.problems[0]
    assert "truncated" in tally.problems[0]


def test_records_that_do_not_fit_together_are_named(copied: Path) -> None:
    write(
        copied, [episode(), {**episode(), "steps/observation/state": np.zeros(7)}, {"x": [b""]}, episode(), b"\xff\xff"]
    )
    samples, tally = read(find_shards(str(copied)))
    assert (tally.episodes, tally.corrupt) == (2, 3)
    assert "record 1 does not fit together: 12 pictures, 7 numbers of state" in tally.problems[0]
    assert "record 2 lacks steps/observation/image" in tally.problems[1]
    assert "record 4 is not a tf.train.Example" in tally.problems[2]
    assert len(samples) == 8


def test_bad_pictures_states_and_missing_language_are_dropped_one_by_one(copied: Path) -> None:
    record = episode()
    record["steps/observation/image"][1] = b"no picture"
    record["steps/observation/state"][3 * 11] = np.nan  # x of step 11, which the windows of t = 3 reach
    record["steps/language_instruction"][:10] = [b" "] * 10
    write(copied, [record])
    samples, tally = read(find_shards(str(copied)))
    assert [s.t for s in samples] == [2]
    assert (tally.no_language, tally.undecodable, tally.not_finite, tally.padding) == (1, 1, 1, 8)
    assert tally.steps == 12
    assert "00000-of-00001:00000/0001: the picture is not a PNG or JPEG" in tally.problems[0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-LFS pointer.*git lfs pull"),
        (b"\x1f\x8b\x08", "gunzip"),
    ],
)
def test_lfs_pointers_and_compressed_shards_are_refused_by_name(copied: Path, content: bytes, told: str) -> None:
    shard_file(copied).write_bytes(content)
    with pytest.raises(DataError, match=rf"00000-of-00001 is .*{told}"):
        find_shards(str(copied))


def test_a_shard_that_is_missing_and_one_that_is_there_twice(
    copied: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    file = shard_file(copied)
    file.rename(file.with_name(file.name.replace("of-00001", "of-00003")))
    with caplog.at_level(logging.WARNING):
        find_shards(str(copied))
    assert "1 of 3 shards are in" in caplog.text
    shutil.copytree(copied, copied.with_name("1.1.0"))
    with pytest.raises(DataError, match="two shards are named cast_filtered_dataset-train-00000-of-00003"):
        find_shards(str(tmp_path))


def test_a_changed_shard_or_features_file_has_another_identity(copied: Path) -> None:
    (before,) = find_shards(str(copied))
    assert find_shards(str(copied)) == [before]
    assert Shard.from_dict(json.loads(json.dumps(before.to_dict()))) == before
    features = copied / "features.json"
    features.write_bytes(features.read_bytes() + b"\n")
    assert find_shards(str(copied))[0].identity != before.identity


def test_a_features_file_without_what_samples_need_lists_what_it_has(copied: Path) -> None:
    features = copied / "features.json"
    document = json.loads(features.read_text())
    steps = document["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    del steps["language_instruction"]
    steps["observation"]["featuresDict"]["features"].pop("state")
    features.write_text(json.dumps(document))
    with pytest.raises(
        DataError,
        match=r"lacks steps/observation/state, steps/language_instruction .*it has .*steps/observation/image \(image",
    ):
        find_shards(str(copied))
    features.write_text("{}")
    with pytest.raises(DataError, match=r"is not a features\.json"):
        find_shards(str(copied))


# Builders of the older generation, and scales ------------------------------------------------------------------


def png(value: int, size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (value, 10, 20)).save(stream, "PNG")
    return stream.getvalue()


def episode(path: bytes = b"/data/gnm/recon/traj_7_chunk_1", factor: float | None = 0.25, steps: int = 12) -> Any:
    """A record of the newer generation: a robot that turns left while it goes ahead one unit a step."""
    yaw = np.arange(steps) * 0.1
    state = np.stack([np.arange(steps) * 0.25, np.zeros(steps), yaw], axis=1)
    record: dict[str, Any] = {
        "steps/observation/image": [png(t) for t in range(steps)],
        "steps/observation/state": state.ravel(),
        "steps/language_instruction": ([b"Go left", b"Turn  left ", b"Go left"] + [b""] * 7) * steps,
        "episode_metadata/file_path": [path],
    }
    if factor is not None:
        record["episode_metadata/normalization_factor"] = np.array([factor])
    return record


def write(directory: Path, records: list[Any]) -> None:
    data = (record if isinstance(record, bytes) else serialise_example(record) for record in records)
    shard_file(directory).write_bytes(b"".join(map(frame, data)))


def older(directory: Path, change: Callable[[dict[str, Any]], None] = lambda record: None, steps: int = 12) -> Path:
    """A directory as the older atomic builders wrote it: scalar language, 64 pixels, an integer id or none."""

    def tensor(dtype: str, *shape: int) -> dict[str, Any]:
        dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
        return {"pythonClassName": "x.Tensor", "tensor": {"shape": dimensions, "dtype": dtype, "encoding": "none"}}

    def group(**features: Any) -> dict[str, Any]:
        return {"pythonClassName": "x.FeaturesDict", "featuresDict": {"features": features}}

    picture = {"shape": {"dimensions": ["64", "64", "3"]}, "dtype": "uint8", "encodingFormat": "png"}
    step = group(
        observation=group(
            image={"pythonClassName": "x.Image", "image": picture},
            state=tensor("float64", 3),
        ),
        action=tensor("float64", 2),
        action_angle=tensor("float64", 3),
        language_instruction={"pythonClassName": "x.Text", "text": {}},
        language_embedding=tensor("float32", 512),
        discount=tensor("float64"),
    )
    document = group(
        steps={"pythonClassName": "x.Dataset", "sequence": {"feature": step, "length": "-1"}},
        episode_metadata=group(
            file_path={"pythonClassName": "x.Text", "text": {}},
            episode_id=tensor("int32"),
            normalization_fctor=tensor("float32"),
        ),
    )
    directory.mkdir(parents=True)
    (directory / "features.json").write_text(json.dumps(document))
    record: dict[str, Any] = {
        "steps/observation/image": [png(t, 64) for t in range(steps)],
        "steps/observation/state": np.stack([np.arange(steps) * -0.24, np.full(steps, 4e3), np.full(steps, np.pi)], 1),
        "steps/language_instruction": [b"go forward"] * steps,
        "steps/language_embedding": np.zeros(512 * steps),
        "steps/action": np.ones(2 * steps),
        "episode_metadata/file_path": [b"/x/lcbc_filtered_dataset_v2/a_chunk_3"],
        "episode_metadata/episode_id": np.array([7]),
        "episode_metadata/normalization_fctor": np.array([0.12]),
    }
    change(record)
    (directory / "atomic_forward_dataset-train.tfrecord-00000-of-00001").write_bytes(frame(serialise_example(record)))
    return directory


def test_the_older_generation_with_the_mistyped_factor(tmp_path: Path) -> None:
    samples, tally = read(find_shards(str(older(tmp_path / "atomic_forward_dataset/1.0.0"))))
    assert (tally.episodes, tally.samples) == (1, 4)
    assert samples[0].instructions == ("go forward",)
    assert samples[0].recording == "a"
    assert samples[0].scale_m == float(np.float32(0.12))
    np.testing.assert_allclose(samples[0].actions, [[2.0, 0.0]] * 8, atol=1e-5)  # it looks back along -x
    features = parse_features((tmp_path / "atomic_forward_dataset/1.0.0/features.json").read_bytes(), "features.json")
    assert features["steps/language_instruction"].shape == ()
    assert features["steps/observation/image"].shape == (64, 64, 3)


def test_records_without_path_or_id_are_recordings_of_their_own(tmp_path: Path) -> None:
    def strip(record: dict[str, Any]) -> None:
        del record["episode_metadata/file_path"], record["episode_metadata/episode_id"]

    samples, _ = read(find_shards(str(older(tmp_path / "d/1.0.0", strip))))
    assert {s.recording for s in samples} == {"atomic_forward_dataset-train-00000-of-00001-00000"}


def test_episodes_too_short_for_any_sample(tmp_path: Path) -> None:
    samples, tally = read(find_shards(str(older(tmp_path / "d/1.0.0", steps=8))))
    assert samples == []
    assert tally.to_dict() == Tally(episodes=1, steps=8, padding=8).to_dict()
    assert Tally.from_dict(json.loads(json.dumps(tally.to_dict()))) == tally


def test_a_missing_factor_asks_for_scales_by_source(copied: Path) -> None:
    write(
        copied,
        [episode(b"/d/sacson/a", None), episode(), episode(b"/d/my_robot/b", None), episode(b"/d/recon/c", None)],
    )
    (shard,) = find_shards(str(copied))
    with pytest.raises(DataError) as raised:
        read([shard])
    message = str(raised.value)
    assert "for episodes of: my_robot, recon, sacson" in message
    assert "data.scale_m=[my_robot=METRES,recon=0.25,sacson=0.12]" in message
    assert "tartan_drive=0.72" in message
    with pytest.raises(DataError, match=r"for episodes of: my_robot\."):
        read([shard], replace(FULL, scale_m=(("known", 0.0),)))
    given = (("recon", 0.5), ("known", 0.0), ("*", 0.3))
    samples, tally = read([shard], replace(FULL, scale_m=given))
    assert tally.episodes == 4
    # By name before the table before the rest; a factor in the data wins over all.
    assert [s.scale_m for s in samples[::4]] == [0.12, 0.25, 0.3, 0.5]
    assert samples[-1].actions[0, 0] == pytest.approx(math.cos(0.3) / 2)


def test_a_factor_that_is_no_scale_costs_the_record(copied: Path) -> None:
    write(copied, [episode(factor=0.0), episode(factor=math.nan), episode()])
    _, tally = read(find_shards(str(copied)))
    assert (tally.episodes, tally.corrupt) == (1, 2)
    assert "record 0 has episode_metadata/normalization_factor=0" in tally.problems[0]


def test_instructions_follow_the_step_and_variants_are_distinct(copied: Path) -> None:
    record = episode()
    record["steps/language_instruction"][10:20] = [b"Stop"] + [b""] * 9
    write(copied, [record])
    samples, _ = read(find_shards(str(copied)))
    assert samples[0].instructions == samples[2].instructions == ("Go left", "Turn left")
    assert samples[1].instructions == ("Stop",)


# Actions and options -------------------------------------------------------------------------------------------


def test_actions_of_a_circle_are_the_same_at_every_step() -> None:
    angle = np.arange(30) * 0.2 + 1.0
    circle = np.stack([3e5 + np.sin(angle), 7.0 - np.cos(angle), angle], axis=1)
    actions, valid = action_windows(circle, 8, 0.2)
    assert actions.shape == (30, 8, 2)
    np.testing.assert_allclose(actions[:22], np.broadcast_to(actions[0], (22, 8, 2)), atol=1e-8)
    assert (actions[0, :, 1] > 0).all()  # it turns left
    assert np.array_equal(valid.sum(1), np.minimum(8, 29 - np.arange(30)))
    assert not actions[~valid].any()
    # Rotating and moving the world changes nothing.
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    moved = np.concatenate([circle[:, :2] @ turn.T + [5.0, -9.0], circle[:, 2:] + np.pi / 2], axis=1)
    np.testing.assert_allclose(action_windows(moved, 8, 0.2)[0], actions, atol=1e-8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"horizon": 0},
        {"every": 0},
        {"padding": "zero"},
        {"crc": "ful"},
        {"split_by": "episode"},
        {"val_share": 1.5},
        {"targets": "none"},
        {"scale_m": (("recon", 0.0),)},
        {"scale_m": (("recon", math.inf),)},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ReadOptions(**wrong)


def test_options_and_tallies_travel_as_json() -> None:
    options = ReadOptions(horizon=4, scale_m=(("recon", 0.25), ("known", 0.0)))
    assert ReadOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    assert "targets" not in options.to_dict(), "documents of datasets with actions stay what they were"
    logs = ReadOptions(targets="optional")
    assert ReadOptions.from_dict(json.loads(json.dumps(logs.to_dict()))) == logs
    many = Tally(samples=1)
    for i in range(30):
        many.lost(f"problem {i}")
    both = many + many
    assert (both.samples, both.corrupt, len(both.problems)) == (2, 60, 20)
