"""Finding a trained policy: a run of jobs/train.py, a checkpoint in it, or any PaliGemma with a tokenizers.pt.

Action tokens have a meaning only with the tokenizers.pt that they were learnt with, so none is ever made up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PaliGemmaConfig

from vla_ray.errors import CheckpointError
from vla_ray.models.paligemma import lora
from vla_ray.models.paligemma.cost import released_config
from vla_ray.models.paligemma.pretrained import check_architecture
from vla_ray.models.paligemma.tokenizer_file import NAME
from vla_ray.storage.files import Location, read_json
from vla_ray.storage.run import file_identity

_OF_A_RUN = ("merged", "best_model", "last")  # the first that is there
_TRAIN = "Fine-tune it first (python jobs/train.py model.name=...) and give the run, or give model.tokenizers=FILE."


def find_checkpoint(name: str, tokenizers: str | None = None) -> Path:
    """The directory of a policy's files.

    Args:
        name: a run of jobs/train.py (its merged/, best_model/ or last/ is taken), or a directory with a model.
        tokenizers: a tokenizers.pt elsewhere.

    Raises:
        CheckpointError: nothing there, no PaliGemma, or one that nobody told what its action tokens mean.
    """
    directory = Path(name)
    if not directory.is_dir():
        if not directory.exists() and name.count("/") == 1 and not name.startswith("."):
            raise CheckpointError(
                f"{name} is no directory here. Of the hub's models none has a {NAME}, which says what its action "
                f"tokens mean. {_TRAIN}"
            )
        raise CheckpointError(f"there is no policy at {name}. Give a run of jobs/train.py or a checkpoint in it.")
    if not _has_model(directory):
        found = [directory / part for part in _OF_A_RUN if _has_model(directory / part)]
        if not found:
            raise CheckpointError(
                f"{directory} holds no model: neither a config.json, nor adapters, nor {', '.join(_OF_A_RUN)} with "
                "them. Give a run of jobs/train.py or a checkpoint in it."
            )
        directory = found[0]
    if not (directory / lora.CONFIG).is_file():
        check_architecture(directory)
    if tokenizers is None and not (directory / NAME).is_file():
        raise CheckpointError(f"{directory} has no {NAME}, which says what its action tokens mean. {_TRAIN}")
    return directory


def newest_tiny(runs: str | Path, num_steps: int) -> Path | None:
    """The newest training run of the tiny model that has learnt actions of so many steps, None if there is none."""
    found = []
    directory = Path(runs)
    for run in sorted(directory.iterdir()) if directory.is_dir() else []:
        if not (run / "best_model").is_dir():
            continue
        document = read_json(Location.of(run) / "run.json") or {}
        settings = document.get("settings", {})
        if [settings.get(n) for n in ("job", "model.name", "action.num_steps")] == ["train", "tiny", num_steps]:
            found.append((document["updated"], run))
    return max(found)[1] if found else None


def identities(directory: Path, tokenizers: str | None = None) -> dict[str, dict[str, Any]]:
    """What tells this policy's files from others', by name; see storage/run.py."""
    files = [f for f in sorted(directory.iterdir()) if f.suffix == ".safetensors" or f.name == lora.CONFIG]
    found = {f.name: file_identity(Location.of(f)) for f in files}
    return {**found, NAME: file_identity(Location.of(tokenizers or directory / NAME))}


def configuration(directory: Path, base: str | None = None) -> PaliGemmaConfig:
    """The model's configuration; of adapters, that of their base, which is taken for the released one if not here."""
    if (directory / lora.CONFIG).is_file():
        named = base or json.loads((directory / lora.CONFIG).read_bytes()).get("base_model_name_or_path") or ""
        if not (Path(named) / "config.json").is_file():
            return released_config()
        directory = Path(named)
    return PaliGemmaConfig.from_pretrained(directory)


def _has_model(directory: Path) -> bool:
    return (directory / "config.json").is_file() or (directory / lora.CONFIG).is_file()
