"""Finding and reading a PaliGemma: a directory, a name on the hub, or adapters with the model they belong to.

Whatever cannot be used is one line that says why; a model with missing weights is refused, never filled with noise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import PaliGemmaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from vla_ray.errors import CheckpointError, ConfigError, nearest
from vla_ray.models.paligemma.lora import CONFIG, load_adapters

RELEASED = "google/paligemma-3b-mix-224"
ATTENTION = ("sdpa", "eager")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(name: str, cache_dir: str | Path | None = None) -> Path:
    """The local directory of a model: `name` itself, or downloaded (resumed, if it broke off) from the hub.

    Raises:
        CheckpointError: nothing of that name, a gated model, or no way to the hub.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if directory.is_absolute() or name.startswith((".", "~")) or not _HUB_NAME.fullmatch(name):
        known = ("tiny", RELEASED)
        raise CheckpointError(
            f"there is no model {name!r}. Give a directory that exists, a name on the hub such as {RELEASED}, or tiny."
            f"{nearest(name, known)}"
        )
    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=list(_HUB_FILES)))
    except GatedRepoError as e:
        raise CheckpointError(
            f"{name} is gated: accept its licence at huggingface.co/{name}, then set HF_TOKEN on every node (or run "
            "`hf auth login`)."
        ) from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise CheckpointError(
            f"there is no {name} on the hub, or it is private. Check the name, and for a private one "
            f"set HF_TOKEN.{nearest(name, (RELEASED,))}"
        ) from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        raise CheckpointError(
            f"{name} is not in the hub cache, and the hub cannot be reached (HF_HUB_OFFLINE, or no network). "
            f"Download it where there is a network (`hf download {name}`), or give a directory."
        ) from e
    except OSError as e:
        raise CheckpointError(f"{name} cannot be downloaded: {_line(e)}. Try again; what has arrived is kept.") from e


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    base: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[PaliGemmaForConditionalGeneration, Path]:
    """The model, on the CPU in eval mode, and its directory. Adapters come with their base, and can be trained on.

    Args:
        dtype: of the weights; adapters are float32 in any case.
        attention: sdpa | eager.
        base: where the base of adapters is, if not where it was when they were learnt.

    Raises:
        CheckpointError: see `find_model`; not a PaliGemma, damaged, or incomplete.
        ConfigError: an attention implementation that cannot be used.
    """
    check_attention(attention)
    directory = find_model(name, cache_dir)
    if (directory / CONFIG).is_file():
        return _load_adapters(directory, dtype, attention, base, cache_dir), directory
    check_architecture(directory)
    with quiet():
        try:
            loaded: Any = PaliGemmaForConditionalGeneration.from_pretrained(
                directory, dtype=dtype, attn_implementation=attention, output_loading_info=True, local_files_only=True
            )
        except Exception as e:  # transformers and safetensors raise a dozen kinds for a damaged or missing file
            raise CheckpointError(f"{directory} cannot be loaded: {_line(e)}. Restore or download it again.") from e
    model, found = loaded
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "misshapen": sorted(str(k[0] if isinstance(k, tuple) else k) for k in found["mismatched_keys"]),
    }
    if any(wrong.values()):
        listed = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in wrong.items() if names)
        raise CheckpointError(
            f"the weights in {directory} do not fit its config.json: {listed}. Download or save the model again."
        )
    model.name_or_path = name if _HUB_NAME.fullmatch(name) and not Path(name).is_dir() else str(directory.resolve())
    return model.eval(), directory


def check_architecture(directory: Path) -> None:
    """CheckpointError unless config.json says PaliGemma."""
    config = _json(directory / "config.json")
    found = config.get("model_type")
    if found != "paligemma":
        names = ", ".join(config.get("architectures") or ()) or "no architecture named"
        raise CheckpointError(
            f"{directory} is a model of type {found!r} ({names}), not a PaliGemma. Give model.name={RELEASED}."
        )


def check_attention(attention: str) -> None:
    """ConfigError for implementations that cannot be used."""
    if attention.startswith("flash_attention"):
        raise ConfigError(
            f"attention={attention!r} cannot express PaliGemma's mask (pictures and prompt see each other, actions see "
            "only what came before): actions would see their own future in training. Use sdpa."
        )
    if attention not in ATTENTION:
        raise ConfigError(
            f"attention={attention!r} is unknown; known: {', '.join(ATTENTION)}.{nearest(attention, ATTENTION)}"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no reports of transformers: errors say it all."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_adapters(
    directory: Path, dtype: torch.dtype, attention: str, base: str | None, cache_dir: str | Path | None
) -> PaliGemmaForConditionalGeneration:
    named = base or _json(directory / CONFIG).get("base_model_name_or_path")
    if not named:
        raise CheckpointError(f"{directory / CONFIG} does not name the model it adapts. Add base_model_name_or_path.")
    try:
        model, _ = load_model(named, dtype=dtype, attention=attention, cache_dir=cache_dir)
    except CheckpointError as e:
        raise CheckpointError(f"the adapters in {directory} belong to {named}: {e}") from e
    load_adapters(model, directory)
    return model.eval()


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path.name} in {path.parent}: it is no model directory. Give one that save_pretrained wrote."
        ) from None
    except ValueError as e:
        raise CheckpointError(f"{path} is not valid JSON ({e}). Restore the file.") from e


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
