"""Metres per unit (waypoint spacing) where a dataset does not say it itself.

A robot's spacing is its average step at 4 Hz, so the source recording decides; the source is the directory above the
one that `episode_metadata/file_path` names (sacson, recon, ...). Nothing is guessed unless the user asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from vla_ray.data.cast.shards import KNOWN_SCALES, ReadOptions
from vla_ray.errors import DataError

# metric_waypoint_spacing of the GNM datasets that CAST was made from, metres.
KNOWN = {
    "recon": 0.25,
    "scand": 0.38,
    "tartan_drive": 0.72,
    "go_stanford": 0.12,
    "go_stanford2": 0.12,
    "cory_hall": 0.06,
    "seattle": 0.35,
    "sacson": 0.12,
}
_NONE = "(no file_path)"
_PICTURES = (".jpg", ".jpeg", ".png")
_FILES = (".npz", ".npy", ".pkl", ".pickle", ".h5", ".hdf5", ".bag", *_PICTURES)
_CHUNKED = re.compile(r"_chunk_\d+")
_SELECTION = re.compile(r"(_v\d+|_filtered|_counterfactual|_dataset|_processed)+$")


def drive_of(file_path: str) -> PurePosixPath:
    """The directory or file of one drive: `recon/traj_003` of `recon/traj_003/traj.npz` and `.../traj_003/12.jpg`.

    A data file that is named by itself (`recon/jackal_2019-09-02.h5`) is the drive; a picture never is.
    """
    path = PurePosixPath(file_path)
    if path.suffix.lower() not in _FILES:
        return path
    named = any(c.isdigit() for c in path.stem) and not path.stem.isdigit()
    if path.suffix.lower() in _PICTURES or not named or _CHUNKED.search(path.parent.name):
        return path.parent
    return path.with_suffix("")


def source_of(file_path: str) -> str:
    """`/data/gnm/recon/traj_003` -> `recon`."""
    return drive_of(file_path).parent.name


def robot_of(file_path: str) -> str:
    """The source if it is a robot of KNOWN, in whatever version or selection (`recon_v2`, `recon_filtered`), or ''."""
    source = _SELECTION.sub("", source_of(file_path))
    return source if source in KNOWN else ""


def group_of(recording: str) -> str:
    """What a split keeps on one side: a recording without its robot, as other sub-datasets may not name that."""
    robot, _, name = recording.partition("/")
    return name if robot in KNOWN and name else recording


def scale_for(source: str, options: ReadOptions) -> float | None:
    """Metres per unit from `data.scale_m`: by the source's name, then `known`, then `*`. None: the user must say."""
    given = dict(options.scale_m)
    if source in given:
        return given[source]
    if KNOWN_SCALES in given and source in KNOWN:
        return KNOWN[source]
    return given.get("*")


def missing_scale(name: str, sources: Iterable[str]) -> DataError:
    """What to say about episodes of these sources, which have no normalization_factor and no given scale."""
    seen = sorted(source or _NONE for source in sources)
    example = ",".join(f"{source}={KNOWN.get(source, 'METRES')}" for source in seen if source != _NONE) or "*=METRES"
    known = ", ".join(f"{source}={metres:g}" for source, metres in KNOWN.items())
    return DataError(
        f"{name} has no normalization_factor (metres per unit) for episodes of: {', '.join(seen)}. Give one by source, "
        f"as in data.scale_m=[{example}], or for all others by *=METRES; spacings of known robots, which "
        f"data.scale_m=[known] uses: {known}"
    )
