"""What every settings class is made of: a field with its help, paths, and checks that answer in one line."""

from __future__ import annotations

import os
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from vla_ray.errors import ConfigError, nearest

T = TypeVar("T")


def knob(default: Any, help: str) -> Any:
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def resolve_path(path: str) -> str:
    """An absolute path or a URI. Relative paths start at VLA_RAY_ROOT or the current directory."""
    if "://" in path:
        return path
    base = Path(os.environ.get("VLA_RAY_ROOT") or Path.cwd())
    return os.path.normpath(base / Path(path).expanduser())


def choose(setting: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{setting}={value!r} is unknown; known: {', '.join(known)}.{nearest(value, known)}")


def at_least(setting: str, value: float | None, low: float) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{setting}={value:g} is too small: it must be at least {low:g}.")


def typed(schema: type[T], values: DictConfig) -> T:
    """Values as an object of a settings class, checked by it."""
    node = OmegaConf.structured(schema)
    _thaw(node)
    return OmegaConf.to_object(OmegaConf.merge(node, values))  # type: ignore[return-value]


def kept(schema: type[T], text: bytes) -> T:
    """What a run's config.yaml says."""
    values = OmegaConf.create(text.decode())
    assert isinstance(values, DictConfig)
    return typed(schema, values)


def _thaw(node: DictConfig) -> None:
    """Frozen dataclasses become read-only nodes, which is right for the result and wrong for the merge."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        if isinstance(child := node._get_node(key), DictConfig):
            _thaw(child)
