"""From argv to a frozen config and an exit code; the only place that knows Hydra.

Differences to plain Hydra, all for the person at the keyboard: values need no quoting (`epoch=013.ckpt`, spaces and
parentheses work as typed), a mistyped key, with or without `+`, fails with the nearest real one, nothing is written to
the current directory, and an expected error is one line on stderr and exit code 2.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vla_ray.config.knobs import typed
from vla_ray.errors import ConfigError, VlaRayError, nearest
from vla_ray.logs import setup_logging

T = TypeVar("T")


def run_job(
    script: str,
    schema: type[T],
    job: Callable[[T], int | None],
    argv: list[str] | None = None,
    config: str | None = None,
) -> None:
    """Compose `configs/<config>.yaml` with argv, call `job(config)`, and exit with its code.

    Args:
        script: the job's `__file__`; its repository is where configs and bundled data are found.
        schema: dataclass of the job's settings.
        config: name of the YAML file; None: the script's.
    """
    argv = sys.argv[1:] if argv is None else argv
    setup_logging()
    name, root = Path(script).stem, Path(script).resolve().parent.parent
    if {"-h", "--help"} & set(argv):
        print_help(name, schema)
        sys.exit(0)
    try:
        sys.exit(job(load_config(root, config or name, schema, argv)) or 0)
    except VlaRayError as e:
        print(f"{name}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def load_config(root: Path, name: str, schema: type[T], argv: list[str]) -> T:
    """The job's settings: YAML under `root`/configs, overridden by `key=value` arguments.

    Raises:
        ConfigError: unknown key, wrong type, or a value the schema refuses.
    """
    config_dir = root / "configs"
    groups = {p.name: _presets(p, schema) for p in config_dir.iterdir() if p.is_dir()}
    overrides = [_override(arg, schema, groups) for arg in argv]
    # Defaults name bundled files: ${repo:datasets/demo_drive}. Results default to VLA_RAY_ROOT, else to the checkout.
    OmegaConf.register_new_resolver("repo", lambda path: str(root / path), replace=True)
    home = Path(os.environ.get("VLA_RAY_ROOT") or root)
    OmegaConf.register_new_resolver("root", lambda path: str(home / path), replace=True)
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            values = compose(name, overrides)
        return typed(schema, values)
    except (OmegaConfBaseException, HydraException) as e:
        raise _readable(e) from e


def _presets(group: Path, schema: type) -> list[str]:
    """Those of a group whose keys the job knows: a driving model is no choice for training a policy."""
    hint = get_type_hints(schema).get(group.name)
    known = {f.name for f in fields(hint)} if is_dataclass(hint) else set()
    return sorted(f.stem for f in group.glob("*.yaml") if set(OmegaConf.load(f)) <= known)


def _override(arg: str, schema: type, groups: dict[str, list[str]]) -> str:
    key, separator, value = arg.lstrip("+").partition("=")
    if not separator or not key:
        raise ConfigError(f"{arg!r} is no setting; write key=value, for example limit=10 (--help lists the keys)")
    known = dict(known_keys(schema))
    if key in groups and key in known:
        if value not in groups[key]:
            raise ConfigError(
                f"{key}={value!r} is unknown; known: {', '.join(groups[key])}.{nearest(value, groups[key])} Its "
                f"settings can also be given one by one, {key}.<setting>=... (--help lists them)."
            )
        return f"{key}={value}"
    if key in known and (shorthand := getattr(known[key], "SHORTHAND", {})):
        if value.lower() not in shorthand:
            raise ConfigError(f"{key}={value!r} is unknown; known: {', '.join(shorthand)} (or {key}.<setting>=...).")
        setting, meant = shorthand[value.lower()]
        return f"++{key}.{setting}={quote(meant)}"
    if key not in known or is_dataclass(known[key]):
        leaves = [k for k, hint in known.items() if not is_dataclass(hint)]
        hint = nearest(key, leaves) or nearest(key.rpartition(".")[2], leaves)
        raise ConfigError(f"unknown setting {key!r}.{hint} --help lists all {len(leaves)}.")
    if known[key] is str and value.strip().lower() == "none":
        value = "'none'"  # a choice of that name: a text cannot be null
    return f"++{key}={quote(value)}"  # ++: the YAML need not list every key, the schema does


def known_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and type of every field, nested ones included."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        yield prefix + f.name, hints[f.name]
        if is_dataclass(hints[f.name]):
            yield from known_keys(hints[f.name], f"{prefix}{f.name}.")


def quote(value: str) -> str:
    """A value in Hydra's grammar that means what was typed.

    Everything is a string, which the schema's types then convert, but for `null`, nothing at all, and lists.
    """
    value = value.strip()
    if value.lower() in ("", "null", "none"):
        return "null"
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    elif value.startswith("[") and value.endswith("]"):
        lexer = shlex.shlex(value[1:-1], posix=True)
        lexer.whitespace, lexer.whitespace_split, lexer.escape, lexer.commenters = ",", True, "", ""
        return "[" + ",".join(quote(item) for item in lexer if item.strip()) + "]"
    value = value.replace("${", "\\${")  # no interpolation of what was typed
    # A backslash counts as an escape only before a quote, and the closing one is a quote too.
    value = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"'{value}'"


def _readable(error: Exception) -> ConfigError:
    """The first lines of an OmegaConf or Hydra error, without their framing."""
    cause = error
    while isinstance(cause.__cause__, (OmegaConfBaseException, HydraException)):
        cause = cause.__cause__
    key = getattr(cause, "full_key", None)
    text = str(cause).strip().splitlines()[0]
    return ConfigError(f"{key}: {text}" if key and key not in text else text)


def print_help(name: str, schema: type) -> None:
    """Every setting with its default and meaning."""
    lines = [f"python jobs/{name}.py key=value ...", "", (schema.__doc__ or "").strip(), ""]
    lines += list(_help_lines(schema))
    print("\n".join(lines))


def _help_lines(schema: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(schema)
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            yield from _help_lines(hints[f.name], f"{prefix}{f.name}.")
            continue
        default = "" if f.default is MISSING or f.default == "" else f" [{f.default}]"
        yield f"  {prefix + f.name:28s} {f.metadata.get('help', '')}{default}"
