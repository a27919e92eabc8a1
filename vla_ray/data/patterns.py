"""Glob patterns over directories of any filesystem: `/data/town*`, `s3://bucket/drives/2026-0[1-6]-*/front`.

Only directory listings are used, so that an object store answers the same way as a disk.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from vla_ray.storage.files import Location

_MAGIC = re.compile(r"[*?\[]")


def expand(pattern: str) -> list[Location] | None:
    """The directories that a pattern matches, or None if it is an ordinary path.

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
    for part in filter(None, parts[first:]):
        found = [below for location in found for below in _below(location, part)]
    return found


def _below(location: Location, part: str) -> list[Location]:
    if not _MAGIC.search(part):
        return [location / part] if (location / part).is_dir() else []
    return [
        location / entry.name
        for entry in location.list()
        if entry.is_dir and fnmatchcase(entry.name, part) and (not entry.name.startswith(".") or part.startswith("."))
    ]
