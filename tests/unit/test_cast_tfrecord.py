"""Framing, checksums and messages of TFRecord files, byte by byte."""

from __future__ import annotations

import gzip
import io
import struct
from typing import Any

import numpy as np
import pytest

from vla_ray.data.cast.example import parse_example, serialise_example
from vla_ray.data.cast.tfrecord import Record, frame, masked_crc, read_records
from vla_ray.errors import DataError

PARTS = (b"first", b"", b"third" * 100)


def read(data: bytes, crc: str = "full") -> list[Record]:
    return list(read_records(io.BytesIO(data), len(data), crc))


def test_checksum_is_the_published_one() -> None:
    # CRC-32C of 32 zero bytes is 0x8a9136aa (RFC 3720, B.4), then masked.
    assert masked_crc(bytes(32)) == ((((0x8A9136AA >> 15) | (0x8A9136AA << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


@pytest.mark.parametrize("crc", ["none", "header", "full"])
def test_sound_records_arrive(crc: str) -> None:
    assert read(b"".join(map(frame, PARTS)), crc) == [Record(i, part) for i, part in enumerate(PARTS)]
    assert read(b"", crc) == []


def test_a_flipped_bit_in_the_data_costs_one_record_and_only_full_sees_it() -> None:
    data = bytearray(b"".join(map(frame, PARTS)))
    data[12] ^= 1
    records = read(bytes(data))
    assert [record.data for record in records] == [None, PARTS[1], PARTS[2]]
    assert records[0].problem == "record 0 at byte 0 has a bad data checksum"
    assert [record.problem for record in read(bytes(data), "header")] == [None, None, None]


def test_a_bad_length_ends_the_file() -> None:
    data = bytearray(b"".join(map(frame, PARTS)))
    second = len(frame(PARTS[0]))
    data[second] ^= 4
    records = read(bytes(data), "header")
    assert [record.number for record in records] == [0, 1]
    assert f"record 1 at byte {second} has a bad length checksum" in str(records[1].problem)


@pytest.mark.parametrize("crc", ["none", "header"])
def test_truncation_names_the_record_and_a_huge_length_allocates_nothing(crc: str) -> None:
    whole = b"".join(map(frame, PARTS))
    for cut in (len(whole) - 1, len(whole) - 300):
        last = read(whole[:cut], crc)[-1]
        assert last.number == 2
        assert last.data is None
        assert "truncated" in str(last.problem)
    in_header = read(whole[: len(frame(PARTS[0])) + 5], crc)
    assert "record 1 at byte 21 is cut off in its header" in str(in_header[1].problem)
    length = struct.pack("<Q", 1 << 62)
    huge = length + struct.pack("<I", masked_crc(length)) + b"abc"
    assert "wants 4611686018427387908 bytes and 3 are left" in str(read(huge, crc)[0].problem)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-LFS pointer"),
        (gzip.compress(b"x" * 100), "compressed with gzip"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ],
)
@pytest.mark.parametrize("crc", ["none", "full"])
def test_what_is_no_tfrecord_is_recognised(head: bytes, told: str, crc: str) -> None:
    records = read(head, crc)
    assert len(records) == 1
    assert told in str(records[0].problem)


def test_examples_go_round_and_only_what_is_asked_for_is_made() -> None:
    values: dict[str, Any] = {
        "b": [b"", b"\x00\xff", "\u00e4".encode()],
        "f": np.array([0.1, -2.5, 4e5], np.float32),
        "i": np.array([-1, 0, 2**62]),
        "none": [],
    }
    data = serialise_example(values)
    found = parse_example(data, [*values, "absent"])
    assert found["b"] == values["b"]
    assert found["none"] == []
    for key in "fi":
        assert isinstance(found[key], np.ndarray)
        assert np.asarray(found[key]).dtype == np.asarray(values[key]).dtype
        assert np.array_equal(found[key], values[key])
    assert "absent" not in found
    assert parse_example(data, ["f"]).keys() == {"f"}
    with pytest.raises(DataError, match=r"not a tf\.train\.Example"):
        parse_example(b"\xff\xff\xff", ["f"])


def test_wire_format_is_that_of_tensorflow() -> None:
    # Example{features: {feature {key: "k", value {int64_list {value: [1, 300]}}}}}, packed and unpacked, by hand.
    packed = bytes.fromhex("0a0e 0a0c 0a016b 1207 1a05 0a03 01 ac02")
    unpacked = bytes.fromhex("0a0e 0a0c 0a016b 1207 1a05 08 01 08 ac02")
    for data in (packed, unpacked):
        assert np.array_equal(parse_example(data, ["k"])["k"], [1, 300])
