"""Glob patterns over directories of any filesystem: `/data/town*`, `s3://bucket/drives/2026-0[1-6]-*/front`.

Only directory listings are used, so that an object store answers the same way as a disk.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from vla_ray.storage.files import Location

_MAGIC = re.compile(r"[*?\[]")


def expand(pattern: str, files: bool = False) -> list[Location] | None:
    """The directories that a pattern matches, or None if it is an ordinary path.

    Args:
        files: the last segment may be a file, too.

    A directory whose name really contains the characters is taken as typed. Every segment matches one level (`**` is no
    different from `*`); names with a leading dot match only a segment with one.
    """
    if not _MAGIC.search(pattern):
        return None
    if "://" not in pattern and Location.of(pattern).exists():
        return None
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    above = "/".join(parts[:first]) or ("/" if first else ".")
    found = [Location.of(above)]
    rest = [part for part in parts[first:] if part]
    for number, part in enumerate(rest):
        any_kind = files and number == len(rest) - 1
        found = [below for location in found for below in _below(location, part, any_kind)]
    return found


def _below(location: Location, part: str, files: bool) -> list[Location]:
    if not _MAGIC.search(part):
        place = location / part
        return [place] if place.is_dir() or (files and place.exists()) else []
    shown = [e for e in location.list() if not e.name.startswith(".") or part.startswith(".")]
    return [location / e.name for e in shown if (e.is_dir or files) and fnmatchcase(e.name, part)]
