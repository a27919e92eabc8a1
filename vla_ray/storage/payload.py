"""The `.pt` files of a run: dictionaries of tensors and primitives that `torch.load(weights_only=True)` can read.

What cannot be read back without unpickling is refused when it is written, not when somebody needs it. Saving streams
into the file: a payload of gigabytes is never a second time in memory. Loading maps local files.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from typing import Any, BinaryIO

import torch

from vla_ray.errors import StorageError
from vla_ray.storage.files import Location, write_atomic
from vla_ray.storage.location import storage_errors

_PRIMITIVES = (str, int, float, bool, type(None))
_COPY_BYTES = 8 * 1024 * 1024


def storable(payload: object) -> None:
    """TypeError, naming the place inside the payload, if anything in it could not be stored as it is.

    Stored are exactly: str, int, float, bool, None, list, tuple, dict with str or int keys, and plain CPU tensors that
    are contiguous, detached and own their memory (of a view, torch would store everything that it is a view of).
    """
    _check(payload, "payload")


def save(loc: Location, payload: dict[str, Any]) -> int:
    """Write a payload atomically and return its size in bytes. TypeError: see storable()."""
    storable(payload)

    def write(file: BinaryIO) -> None:
        try:
            torch.save(payload, file)
        except RuntimeError as error:
            # torch hides what the file refused (a full disk) behind a message about positions.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise

    return write_atomic(loc, write)


def load(loc: Location, mmap: bool = True) -> dict[str, Any]:
    """Read a payload to the CPU; with `mmap`, tensors are read from disk when they are touched.

    A file in an object store is copied to a local temporary file first, which vanishes with the last tensor mapped
    from it. StorageError: missing, damaged, or not readable without running code from it.
    """
    if loc.is_local:
        loc.info()  # a missing file
        return _load(loc, loc.path, mmap)
    with tempfile.NamedTemporaryFile(prefix="vla_ray-", suffix=".pt") as spool:
        with storage_errors("read", loc), loc.open_input() as stream:
            shutil.copyfileobj(stream, spool, _COPY_BYTES)
            spool.flush()
        return _load(loc, spool.name, mmap)


def _load(loc: Location, path: str, mmap: bool) -> dict[str, Any]:
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StorageError(
            f"{loc} is damaged or no payload ({reason}). Delete it and compute the frame again."
        ) from error
    if not isinstance(payload, dict):
        raise StorageError(f"{loc} holds a {type(payload).__name__}, not a dictionary: it is no payload.")
    return payload


def _check(value: object, place: str) -> None:
    # Exact types throughout: numpy.float64 is a float and a named tuple is a tuple, and neither can be read back.
    kind = type(value)
    if kind in _PRIMITIVES:
        return
    if isinstance(value, torch.Tensor):
        _check_tensor(value, place)
    elif kind is dict:
        for key, item in value.items():  # type: ignore[attr-defined]
            if type(key) not in (str, int):
                raise TypeError(f"{place} has the key {key!r} ({type(key).__name__}). Use str or int.")
            _check(item, f"{place}[{key!r}]")
    elif kind in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type]
            _check(item, f"{place}[{index}]")
    else:
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(
            f"{place} is a {name}. A payload holds tensors, str, int, float, bool, None, list, tuple and dict."
        )


def _check_tensor(tensor: torch.Tensor, place: str) -> None:
    if type(tensor) is not torch.Tensor:
        problem, remedy = f"a {type(tensor).__name__}", ".detach()"
    elif tensor.device.type != "cpu":
        problem, remedy = f"on {tensor.device}", ".cpu()"
    elif tensor.requires_grad:
        problem, remedy = "part of a graph", ".detach()"
    elif tensor.layout != torch.strided or not tensor.is_contiguous():
        problem, remedy = "not contiguous", ".contiguous()"
    elif tensor.untyped_storage().nbytes() != tensor.nbytes:
        problem, remedy = "a view of a larger tensor", ".clone()"
    else:
        return
    raise TypeError(f"{place} is a tensor of shape {tuple(tensor.shape)} that is {problem}. Store it after {remedy}.")
