"""Payload files: what may go in, comes out the same, and nothing from a file is ever run."""

from __future__ import annotations

import collections
import errno
import os
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_ray.errors import StorageError
from vla_ray.storage import payload as payload_module
from vla_ray.storage.files import Location
from vla_ray.storage.payload import load, save, storable

Point = collections.namedtuple("Point", "x y")


@pytest.fixture
def loc(tmp_path: Path) -> Location:
    return Location.of(tmp_path) / "scene" / "0001_action.pt"


def example() -> dict[str, Any]:
    return {
        "tag": "0001",
        "meta": {"schema_version": 1, "boxes": [(0, 0, 448, 448)], "speed": 3.5, "text": None, "flip": False, 7: "x"},
        "attention": [
            {"attn": torch.rand(2, 3, 3).half(), "grad": torch.randn(2, 3, 3).bfloat16(), "shape": [2, 3, 3]}
        ],
        "ids": torch.arange(4),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
    }


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("mmap", [True, False])
def test_a_payload_comes_back_the_same(loc: Location, mmap: bool) -> None:
    payload = example()
    size = save(loc, payload)
    assert size == loc.info().size > 0
    assert_same(load(loc, mmap=mmap), payload)
    assert_same(torch.load(loc.path, weights_only=True), payload)
    assert os.listdir(loc.local_path.parent) == [loc.name]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float64(1.0), r"payload\['meta'\]\[1\] is a numpy\.float64"),
        (np.zeros(2), r"payload\['meta'\]\[1\] is a numpy\.ndarray"),
        (Path("x"), r"is a pathlib\.PosixPath"),
        (Point(1, 2), r"Point"),
        (collections.OrderedDict(), r"OrderedDict"),
        (torch.float32, r"is a torch\.dtype"),
        ({(1, 2): 3}, r"has the key \(1, 2\) \(tuple\)"),
        ({np.str_("a"): 3}, r"has the key .* \(str_\)"),
        ({"deep": [object()]}, r"payload\['meta'\]\[1\]\['deep'\]\[0\] is a builtins\.object"),
        (torch.zeros(2, requires_grad=True), r"shape \(2,\) that is part of a graph\. Store it after \.detach\(\)"),
        (torch.nn.Parameter(torch.zeros(2)), r"a Parameter"),
        (torch.zeros(2, 3).T, r"not contiguous"),
        (torch.eye(2).to_sparse(), r"not contiguous"),
        (torch.zeros(8, 3)[2], r"a view of a larger tensor\. Store it after \.clone\(\)"),
        (torch.zeros(2, device="meta"), r"on meta"),
    ],
)
def test_what_could_not_be_read_back_is_refused_when_it_is_written(loc: Location, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        storable({"meta": [0, value]})
    with pytest.raises(TypeError, match=message):
        save(loc, {"meta": [0, value]})
    assert not loc.exists()


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(loc: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A file on a disk with room for a thousand bytes."""

        def __init__(self, file: Any) -> None:
            self.file, self.written = file, 0

        def write(self, data: Any) -> int:
            self.written += len(data)
            if self.written > 1000:
                raise OSError(errno.ENOSPC, "stub")
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    torch_save = torch.save
    monkeypatch.setattr(payload_module.torch, "save", lambda payload, file: torch_save(payload, Full(file)))
    with pytest.raises(
        StorageError, match=r"Cannot write .*0001_action\.pt: no space left on device\. Free some space"
    ):
        save(loc, {"x": torch.zeros(10_000)})
    assert os.listdir(loc.local_path.parent) == []


def test_saving_streams(loc: Location) -> None:
    payload = {"x": torch.zeros(4_000_000)}
    tracemalloc.start()
    try:
        assert save(loc, payload) > 16_000_000
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (sys.exit, ("unpickled",))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "pickle", "evil zip", "list"])
def test_a_damaged_or_foreign_file_is_a_storage_error(loc: Location, damage: str, mmap: bool) -> None:
    save(loc, example())
    path = loc.local_path
    data = path.read_bytes()
    if damage == "evil zip":
        torch.save({"x": Evil()}, path)
    elif damage == "list":
        torch.save([1], path)
    else:
        contents = {
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "text": b"hello",
            "pickle": pickle.dumps(Evil(), 2),
        }
        path.write_bytes(contents[damage])
    with pytest.raises(
        StorageError, match=r"0001_action\.pt (is damaged or no payload \(.+\)\.|holds a list)"
    ) as error:
        load(loc, mmap=mmap)
    assert "\n" not in str(error.value)


def test_a_missing_payload(loc: Location) -> None:
    with pytest.raises(StorageError, match=r"Cannot find .*no such file"):
        load(loc)
