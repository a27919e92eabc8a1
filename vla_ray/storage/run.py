"""A run directory that explains itself: what was asked, by which code, how far it got.

`run.json` is small and always whole. Naming an existing run resumes it, provided that every setting that changes
results is the same; a finished run is recognised from this one file. Opening writes nothing, so it needs no lease;
`start()` and everything after it belong to the driver that holds the lease.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import vla_ray
from vla_ray.errors import RunError
from vla_ray.storage.files import Location, read_json, write_atomic, write_json

STATUSES = ("running", "finished", "stopped", "failed")

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_RAY_COPIES = ("/_ray_pkg_", "working_dir_files")
_PACKAGES = ("torch", "transformers", "ray", "numpy", "pyarrow")
_FIELDS = (
    "status",
    "counts",
    "fingerprint",
    "settings",
    "checkpoints",
    "versions",
    "git",
    "command",
    "overrides",
    "created",
    "updated",
    "stamp",
    "scene_dirs",
    "pinned",
    "first_failure",
    "earlier_starts",
)
_KEPT = ("created", "stamp", "counts", "scene_dirs", "pinned", "first_failure")
_HEADER_BYTES = 64 * 1024
_SMALL_BYTES = 64 << 20  # hashed whole, in a fraction of a second


class RunDirectory:
    """`<output_dir>/<run>/` with its run.json. `location` is the directory."""

    def __init__(self, location: Location, asked: dict[str, Any], config_yaml: str, setting: str) -> None:
        self.location = location
        self._setting = setting
        self._asked = asked
        self._config_yaml = config_yaml
        self._document: dict[str, Any] | None = None

    @staticmethod
    def open(
        output_dir: str | os.PathLike[str] | Location,
        run: str,
        *,
        settings: Mapping[str, Any],
        config_yaml: str,
        command: str,
        overrides: Sequence[str] = (),
        checkpoints: Mapping[str, Mapping[str, Any]] | None = None,
        setting: str = "run",
    ) -> RunDirectory:
        """Find or prepare a run; nothing is written yet.

        Args:
            settings: every key that changes results, flat, JSON values only.
            config_yaml: the whole resolved configuration, kept as config.yaml.
            checkpoints: `file_identity` of each checkpoint by the name of its setting.
            setting: what names the run on the command line.

        Raises:
            RunError: a bad name, a directory that will vanish, or a run that was started with other settings.
        """
        check_name(run, setting)
        root = output_dir if isinstance(output_dir, Location) else Location.of(output_dir)
        if root.is_local and any(part in f"{root}/" for part in _RAY_COPIES):
            raise RunError(
                f"output_dir {root} lies in a Ray job's working copy, which vanishes with the cluster. "
                "Set VLA_RAY_ROOT or output_dir to an absolute path outside it."
            )
        asked = {
            "settings": dict(settings),
            "checkpoints": dict(checkpoints or {}),
            "command": command,
            "overrides": list(overrides),
        }
        directory = RunDirectory(root / run, json.loads(json.dumps(asked)), config_yaml, setting)
        directory._read_and_compare()
        return directory

    def start(self, fingerprint: Mapping[str, Any]) -> None:
        """Write run.json (status running) and config.yaml, for a new run or to resume. Hold the lease.

        `fingerprint`: `manifest` (see manifest_fingerprint), `frames` (how many), `targets`.
        """
        old = self._read_and_compare()  # again: another driver may have created it since open()
        now = datetime.now().astimezone()
        start = {
            "command": self._asked["command"],
            "overrides": self._asked["overrides"],
            "versions": versions(),
            "git": git_state(),
            "updated": _iso(now),
        }
        if old is None:
            kept: dict[str, Any] = {"created": _iso(now), "stamp": f"{now:%y%m%d_%H%M}"}
            kept |= {"counts": {}, "scene_dirs": {}, "pinned": {}, "first_failure": None}
            earlier = []
        else:
            kept = {name: old[name] for name in _KEPT}
            earlier = [*old["earlier_starts"], {name: old[name] for name in start}]
        write_atomic(self.location / "config.yaml", self._config_yaml.encode())
        document = {"status": "running", "fingerprint": dict(fingerprint), **self._asked, **start, **kept}
        self._write({**document, "earlier_starts": earlier})

    def update(self, **fields: Any) -> None:
        """Change fields of run.json, atomically, and the time of its last change."""
        for name, value in fields.items():
            if name not in _FIELDS or (name == "status" and value not in STATUSES):
                raise ValueError(f"run.json holds no {name}={value!r}. Fields: {_FIELDS}, statuses: {STATUSES}.")
        self._write({**self.document, "updated": _iso(datetime.now().astimezone()), **fields})

    def pin(self, name: str, value: str) -> None:
        """Fix what an `auto` setting turned out to be, for all resumes of this run.

        Raises:
            RunError: the run was started with another value, so that its rows would not compare.
        """
        old = self.document["pinned"].get(name)
        if old is None:
            self.update(pinned={**self.document["pinned"], name: value})
        elif old != value:
            raise RunError(
                f"Run {self.location} was started with {name}={old}, here it would be {value}. "
                f"Set {name}={old}, or give another {self._setting}=NAME."
            )

    @property
    def document(self) -> dict[str, Any]:
        """What run.json holds, as of the last read or write by this object."""
        if self._document is None:
            raise RunError(f"{self.location} is not a run yet: start() was not called.")
        return self._document

    @property
    def is_new(self) -> bool:
        return self._document is None

    @property
    def stamp(self) -> str:
        """YYMMDD_HHMM of the first start."""
        return self.document["stamp"]

    def is_finished(self, manifest: str) -> bool:
        """Whether nothing is left to do for the manifest of this fingerprint."""
        if self._document is None:
            return False
        return self._document["status"] == "finished" and self._document["fingerprint"].get("manifest") == manifest

    def scene_dirs(self, scenes: Iterable[str], mode: str) -> dict[str, Location]:
        """Each scene's output directory, `<scene>_<mode>_<stamp>`, the same in every resume.

        A name that is taken when a scene is first met gets `_1`, `_2`, ...
        """
        known: dict[str, str] = dict(self.document["scene_dirs"])
        taken = {entry.name for entry in self.location.list()} | set(known.values())
        result = {}
        for scene in scenes:
            key = f"{scene}/{mode}"
            if key not in known:
                base = name = f"{scene}_{mode}_{self.stamp}"
                number = 0
                while name in taken:
                    number += 1
                    name = f"{base}_{number}"
                known[key] = name
                taken.add(name)
            result[scene] = self.location / known[key]
        if known != self.document["scene_dirs"]:
            self.update(scene_dirs=known)
        return result

    def scene_dir(self, scene: str, mode: str) -> Location:
        """See scene_dirs."""
        return self.scene_dirs([scene], mode)[scene]

    def _write(self, document: dict[str, Any]) -> None:
        write_json(self.location / "run.json", document)
        self._document = document

    def _read_and_compare(self) -> dict[str, Any] | None:
        path = self.location / "run.json"
        document = read_json(path)
        if document is not None:
            if not isinstance(document, dict) or not set(_FIELDS) <= set(document):
                raise RunError(f"{path} was not written by this version of vla_ray. Give another {self._setting}=NAME.")
            differences = _differences(document["settings"], self._asked["settings"])
            differences += _differences(document["checkpoints"], self._asked["checkpoints"], "file of ")
            if differences:
                raise RunError(
                    f"Run {self.location} was started with other settings: {'; '.join(differences)}. "
                    f"Give another {self._setting}=NAME, or the run's own values to resume it."
                )
        self._document = document
        return document


def check_name(run: str, setting: str = "run") -> None:
    """RunError if this cannot name a run, that is a directory."""
    if not _NAME.fullmatch(run):
        raise RunError(
            f"{setting}={run!r} is no name for a run. Use letters, digits, '.', '_' and '-', not starting with '.'."
        )


def manifest_fingerprint(frames: Iterable[Mapping[str, Any]], targets: Iterable[str]) -> str:
    """A hash of what is to be done: the frames with all their inputs, in their natural order, and the targets."""
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(json.dumps(frame, sort_keys=True).encode() + b"\n")
    digest.update(json.dumps(list(targets)).encode())
    return digest.hexdigest()


def file_identity(loc: Location) -> dict[str, Any]:
    """What tells one checkpoint from another: the content of a small file; of a large one size, time and beginning.

    A new clone or an unpacked copy has new times, which must not matter where the content can be compared.
    """
    entry = loc.info()
    with loc.open_input() as stream:
        if entry.size <= _SMALL_BYTES:
            return {"size": entry.size, "sha256": hashlib.sha256(stream.read()).hexdigest()}
        header = hashlib.sha256(stream.read(_HEADER_BYTES)).hexdigest()
    return {"size": entry.size, "mtime_ns": entry.mtime_ns, "header": header}


def versions() -> dict[str, str]:
    """Versions of what computes results. Read from package metadata: nothing is imported."""
    installed = {package: metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), "vla_ray": vla_ray.__version__, **installed}


def git_state() -> dict[str, Any] | None:
    """`{commit, dirty}` of the checkout that vla_ray runs from; None for an installed package."""
    root = Path(vla_ray.__file__).resolve().parent.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None or top is None or Path(top) != root:
        return None
    return {"commit": commit, "dirty": _git(root, "status", "--porcelain", "--untracked-files=no") != ""}


def _git(root: Path, *arguments: str) -> str | None:
    # Inside a git hook, GIT_DIR and its like name the repository of the hook.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    def shown(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key]) if key in values else "(not set)"

    different = [key for key in sorted({*old, *new}) if key not in old or key not in new or old[key] != new[key]]
    return [f"{prefix}{key}: run has {shown(old, key)}, asked {shown(new, key)}" for key in different]


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="seconds")
