"""The rules that keep the tree readable: who may import what, where files lie, how long they are."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "vla_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT_RAY = ("pipelines/", "training/trainer.py", "cluster.py")

# Layers from the bottom up; a module may import its own layer and those below it.
LAYERS = (
    ("errors", "schema", "config", "logs", "tracking", "before_ray"),
    ("storage",),
    ("data",),
    ("models",),
    ("attention", "targets"),
    ("explain", "training"),
    ("stages",),
    ("evaluation", "report", "progress"),
    ("policy",),
    ("cluster",),
    ("pipelines",),
    ("command_line", "bundled"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LEVEL["training/trainer"] = LEVEL["pipelines"]  # Ray around the plain loop beside it


def level(module: str) -> int | None:
    """Of `training/loop` or `config/knobs`: the most special entry counts."""
    return LEVEL.get(module, LEVEL.get(module.split("/")[0]))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_only_pipelines_trainer_and_cluster_import_ray(path: Path) -> None:
    if not relative(path).startswith(MAY_IMPORT_RAY):
        assert not [name for name in imports(path) if name.split(".")[0] == "ray"]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    own = relative(path).removesuffix(".py")
    if own == "__init__":
        return
    mine = level(own)
    assert mine is not None, f"vla_ray/{own} has no layer: give it one in LAYERS"
    for name in imports(path):
        if name.startswith("vla_ray."):
            theirs = level("/".join(name.split(".")[1:]))
            assert theirs is not None, name
            assert theirs <= mine, f"{relative(path)} imports {name}, which lies above it"


def test_nothing_imports_jobs_or_tests() -> None:
    for path in MODULES:
        assert not [n for n in imports(path) if n.split(".")[0] in ("jobs", "tests")]


@pytest.mark.parametrize("path", sorted((REPO / "jobs").glob("*.py")), ids=lambda p: p.name)
def test_jobs_are_thin(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
    assert path.stem not in sys.stdlib_module_names, "it would shadow the standard library for everything in jobs/"
    assert (REPO / "configs" / f"{path.stem}.yaml").is_file(), "every job has its values in configs/"


def test_files_are_one_idea() -> None:
    long = {relative(p): n for p in MODULES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_data_folders_are_no_packages() -> None:
    """An __init__.py in datasets/ would shadow the PyPI package of that name."""
    for folder in ("datasets", "checkpoints", "outputs", "wandb"):
        assert not (REPO / folder / "__init__.py").exists()


def test_nothing_is_unpickled() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("allow_pickle", "False") == "False", f"{relative(path)}:{node.lineno}"
                assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load")
                if ast.unparse(node.func) == "torch.load":
                    assert given.get("weights_only") == "True", f"{relative(path)}:{node.lineno}"


def test_readme_tree_is_true() -> None:
    """Every path of the README's annotated tree exists, and every package and job is in it."""
    tree = re.search(r"```text\n(vla_ray/.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    assert tree, "the README has no annotated tree"
    stack: list[str] = []
    listed = set()
    for line in tree[1].splitlines():
        if match := re.match(r"( *)(\S+)", line):
            depth = len(match[1]) // 2
            stack = stack[:depth] + [match[2].rstrip("/")]
            listed.add("/".join(stack))
    missing = [p for p in listed if not (REPO / p).exists()]
    assert not missing, f"in the README, not in the tree: {missing}"
    packages = {relative(p.parent) for p in PACKAGE.rglob("__init__.py")} - {"."}
    unlisted = [p for p in sorted(packages) if f"vla_ray/{p}" not in listed]
    jobs = [p.name for p in (REPO / "jobs").glob("*.py") if f"jobs/{p.name}" not in listed]
    assert not unlisted + jobs, f"not in the README's tree: {unlisted + jobs}"
