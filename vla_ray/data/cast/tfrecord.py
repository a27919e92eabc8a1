"""TFRecord framing without TensorFlow: records out of a stream, and a line for each one that is damaged.

A record is `uint64 length, uint32 crc(length), data, uint32 crc(data)`, little-endian; the checksums are masked
CRC-32C (tensorflow/core/lib/io/record_writer.h). A record whose data fails its checksum is reported and skipped, the
framing is sound; where a length fails its own, or the file ends early, nothing after it can be found.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import google_crc32c

HEADER_BYTES, FOOTER_BYTES = 12, 4
GZIP = b"\x1f\x8b"  # how a compressed file begins
_MASK = 0xA282EAD8


class Readable(Protocol):
    def read(self, nbytes: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Record:
    """The `number`-th record of a file: its data, or the problem it has instead."""

    number: int
    data: bytes | None
    problem: str | None = None


def masked_crc(data: bytes) -> int:
    """The checksum as the format stores it: CRC-32C, rotated right by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """One record as it lies in a file."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def read_records(stream: Readable, size: int, crc: str = "header") -> Iterator[Record]:
    """All records in order. Nothing follows a problem that loses the framing.

    Args:
        stream: positioned at the file's beginning; should be buffered, for it is read in small pieces.
        size: of the file in bytes; a length that claims more than is left is a cut-off file, never an allocation.
        crc: none | header | full.
    """
    at = number = 0
    while at < size:
        header = stream.read(HEADER_BYTES)
        where = f"record {number} at byte {at}"
        if len(header) < HEADER_BYTES:
            cut = f"{where} is cut off in its header: the file is truncated"
            yield Record(number, None, foreign(header) if number == 0 and foreign(header) else cut)
            return
        length, length_crc = struct.unpack("<QI", header)
        if crc != "none" and masked_crc(header[:8]) != length_crc:
            strange = foreign(header) if number == 0 else None
            yield Record(
                number, None, strange or f"{where} has a bad length checksum: no TFRecord from here on; fetch it again"
            )
            return
        left = size - at - HEADER_BYTES
        if length + FOOTER_BYTES > left:
            strange = foreign(header) if number == 0 else None
            cut = f"{where} wants {length + FOOTER_BYTES} bytes and {left} are left: the file is truncated"
            yield Record(number, None, strange or cut)
            return
        data, footer = stream.read(length), stream.read(FOOTER_BYTES)
        if crc == "full" and masked_crc(data) != struct.unpack("<I", footer)[0]:
            yield Record(number, None, f"{where} has a bad data checksum")
        else:
            yield Record(number, data)
        at += HEADER_BYTES + length + FOOTER_BYTES
        number += 1


def foreign(head: bytes) -> str | None:
    """What a file really is that should hold data, judged by its first bytes; None for anything else."""
    if head.startswith(b"version http"):
        return "a git-LFS pointer, not the data: fetch it with `git lfs pull`, or give source=owner/name"
    if head.startswith(GZIP):
        return "compressed with gzip: unpack it with gunzip"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the data: the download was refused"
    return None
