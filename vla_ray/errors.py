"""Every expected error, each with its remedy.

A message answers four questions: what is wrong, what was given, what is allowed, what to do.
Jobs print it as one line and exit with code 2; anything that is not a VlaRayError is a bug and shows its stack.
Inside a run, `error_type` in the metrics is the class name of what failed the frame.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlaRayError(Exception):
    """An expected error: its text is the whole story for the user."""


class ConfigError(VlaRayError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class SceneError(VlaRayError):
    """A scene, its frames or its tables cannot be read as described in data/scenes.py."""


class ImageError(VlaRayError):
    """One frame's image cannot be decoded. Inside a run this fails the frame, not the run."""


class DataError(VlaRayError):
    """A dataset, a shard or a record of it cannot be read, or holds nothing to train on."""


class CheckpointError(VlaRayError):
    """A checkpoint or its configuration does not fit the model."""


class TargetError(VlaRayError):
    """An unknown target, or one that a frame cannot give."""


class TrainingError(VlaRayError):
    """Training cannot go on: a loss that is not finite, memory, batches that end early."""


class StorageError(VlaRayError):
    """A file or directory cannot be read or written (permission, full disk, unknown filesystem)."""


class RunError(VlaRayError):
    """A run directory refuses: another driver holds it, or its settings differ."""


class ClusterError(VlaRayError):
    """The Ray cluster cannot be reached or cannot hold what was asked for."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A did-you-mean clause, or the empty string: `" Did you mean 'curv_energy'?"`."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""
