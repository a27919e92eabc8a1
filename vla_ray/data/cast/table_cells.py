"""The cells of one row of a table, each checked: what a sample needs, or one line that names file, row and column.

`where` is that file and row. A value of a wrong type ends the reading: a column that is not what it is taken for is
so in every row. Numbers that are merely unusable (NaN in actions) are left to the filters of windows.py.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_ray.data.cast.listing import COMPLETE
from vla_ray.errors import DataError
from vla_ray.storage.location import Location

IMAGE = ("image", "image_path")
TEXT = ("instruction", "language_instruction", "text")
ACTIONS = ("actions", "action")

_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # as scale_m is stored


def has_actions(row: Mapping[str, Any]) -> bool:
    """Whether a row says what was right; an empty list, as prepared logs have it, does not."""
    return any(row.get(name) not in (None, []) for name in ACTIONS)


def actions_of(row: Mapping[str, Any], horizon: int, where: str) -> NDArray[np.float32]:
    """The first `horizon` actions, [H, 2]. DataError if they are none, or too few."""
    given = next((row[name] for name in ACTIONS if row.get(name) is not None), None)
    try:
        actions = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        actions = np.zeros((), np.float32)  # of no use either
    if actions.ndim == 1 and actions.size % 2 == 0:
        actions = actions.reshape(-1, 2)
    if actions.ndim != 2 or actions.shape[1] != 2:
        raise DataError(f"{where}: actions are {str(given)[:60]}; expected [[x, y], ...] or [x0, y0, x1, y1, ...]")
    if len(actions) < horizon:
        raise DataError(
            f"{where} has actions of {len(actions)} steps and action.num_steps={horizon} are asked for; "
            f"set action.num_steps={len(actions)} or less"
        )
    return actions[:horizon]


def valid_of(row: Mapping[str, Any], horizon: int, where: str) -> NDArray[np.bool_]:
    """Which of the actions are real, [H]; all, if the row does not say."""
    given = row.get("valid")
    if given is None:
        return np.ones(horizon, bool)
    if not isinstance(given, list) or any(value not in (0, 1) for value in given):
        raise _wrong(where, "valid", given, "true or false for each step of the actions")
    if len(given) < horizon:
        raise DataError(
            f"{where}: `valid` has {len(given)} values for {horizon} steps of actions; give one for each step"
        )
    return np.array(given[:horizon], dtype=bool)


def texts_of(row: Mapping[str, Any], where: str) -> list[str]:
    """All instructions of a row, in the order of the columns."""
    found = []
    for name in (*TEXT, "instructions"):
        given = row.get(name)
        for text in given if name == "instructions" and isinstance(given, list) else (given,):
            if isinstance(text, str):
                found.append(text)
            elif text is not None:
                raise _wrong(where, name, given, "a text or null" if name in TEXT else "a list of texts")
    return found


def step_of(row: Mapping[str, Any], where: str) -> int:
    """The step in its episode; 0 if the row does not say."""
    given = row.get("t")
    if given is None:
        return 0
    if isinstance(given, int | float) and 0 <= given < 2**31 and given == int(given):
        return int(given)
    raise _wrong(where, "t", given, "a whole number from 0 to 2^31 - 1: the step in its episode")


def scale_of(row: Mapping[str, Any], where: str) -> float | None:
    """Metres per unit; None if the row has none."""
    given = row.get("scale_m")
    if given is None:
        return None
    if isinstance(given, int | float) and _LEAST <= given <= _MOST:
        return float(given)
    raise _wrong(where, "scale_m", given, "metres per unit, a finite number > 0")


def name_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text of a cell, or a number as text; empty if the row has none."""
    given = row.get(column)
    if given is None or isinstance(given, str | int):
        return "" if given is None else str(given)
    raise _wrong(where, column, given, "a text or a whole number")


def _wrong(where: str, column: str, given: object, expected: str) -> DataError:
    return DataError(f"{where}: {column} is {repr(given)[:60]}; expected {expected}. Correct the table.")


def is_downloaded(location: Location) -> bool:
    """Whether hub.download wrote this file: a directory above it has the mark of a finished download."""
    marks = (Location.of(directory / COMPLETE).try_read_bytes() for directory in location.local_path.parents)
    return any(b'"repo_id"' in mark for mark in marks if mark)


def image_of(row: Mapping[str, Any], directory: Location, bounded: bool, where: str) -> tuple[bytes, str | None]:
    """The encoded picture, and its path if it was read from a file of its own. Empty bytes: the row has none.

    Args:
        bounded: a path may only name what lies below `directory`.
    """
    for name in IMAGE:
        value = row.get(name)
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
        if isinstance(data, bytes):
            return data, None
        if isinstance(path, str) and path:
            if "\0" in path:
                raise _wrong(where, name, path, "the path of a picture")
            below = posixpath.normpath(path)
            absolute = path.startswith("/") or "://" in path
            if not (absolute or below == ".." or below.startswith("../")):
                return (directory / below).read_bytes(), below
            if bounded:
                raise DataError(
                    f"{where}: {name} is {path[:200]!r}, which leaves {directory}. Only a local table of your own may "
                    "name such pictures; one from the hub or in a store may not. Put the pictures below the table."
                )
            return Location.of(path if absolute else f"{directory}/{path}").read_bytes(), path
    return b"", None
