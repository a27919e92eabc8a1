"""`tokenizers.pt`: what a checkpoint's action tokens mean, beside the weights that learnt them.

Primitives and tensors, nothing that needs unpickling: `torch.load(path, weights_only=True)` reads it. A file that was
made for other bins, another horizon or another vocabulary is refused; decoding with it would give wrong trajectories.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from vla_ray.errors import CheckpointError
from vla_ray.models.paligemma.actions import AUTOREGRESSIVE, DECODINGS, PROMPT_TEMPLATE, UNITS, VERSION, ActionTokenizer
from vla_ray.storage.files import Location, write_atomic

NAME = "tokenizers.pt"
FORMAT = "vla_ray.action_tokenizer"
_REMEDY = "Give the checkpoint directory that belongs to these settings, or the settings it was trained with."


def save_tokenizer(
    location: Location, tokenizer: ActionTokenizer, first_action_id: int, decoding: str = AUTOREGRESSIVE
) -> None:
    """Write `tokenizers.pt` at `location` (the file itself), whole or not at all.

    Args:
        first_action_id: token id of bin 0; see Processor.
        decoding: how the weights have learnt to give actions, one of DECODINGS.
    """
    content = tokenizer.to_dict()
    content["action_tokenizer"]["centers"] = torch.from_numpy(tokenizer.centers())  # for other readers
    for key in ("center", "scale"):
        content["action_normalizer"][key] = torch.tensor(content["action_normalizer"][key], dtype=torch.float64)
    content |= {
        "format": FORMAT,
        "version": VERSION,
        "units": UNITS,
        "prompt_template": PROMPT_TEMPLATE,
        "token_map": {"scheme": "loc", "first_id": first_action_id, "count": tokenizer.num_bins},
        "fingerprint": tokenizer.fingerprint,
        "decoding": decoding,
    }
    stream = io.BytesIO()
    torch.save(content, stream)
    write_atomic(location, stream.getvalue())


def load_tokenizer(
    location: Location,
    *,
    num_bins: int | None = None,
    num_steps: int | None = None,
    first_action_id: int | None = None,
    fingerprint: str | None = None,
    decoding: str | None = None,
) -> ActionTokenizer:
    """Read `tokenizers.pt`. What is given is expected of it.

    Raises:
        CheckpointError: not there, pickled objects, damaged, of another version, or not as expected.
    """
    content = _read(location)
    tokenizer = _tokenizer(location, content)
    found = {
        "action.vocab_size": (tokenizer.num_bins, num_bins),
        "action.num_steps": (tokenizer.num_steps, num_steps),
        "the first action token's id": (content["token_map"]["first_id"], first_action_id),
        "the fingerprint": (tokenizer.fingerprint, fingerprint),
        "the decoding": (_decoding(location, content), decoding),
    }
    for what, (has, expected) in found.items():
        if expected is not None and has != expected:
            raise CheckpointError(f"{location} does not fit: {what} is {has} there, {expected} here. {_REMEDY}")
    return tokenizer


def load_decoding(location: Location) -> str:
    """How the weights beside a `tokenizers.pt` have learnt to give actions: one of DECODINGS.

    Raises:
        CheckpointError: see load_tokenizer.
    """
    return _decoding(location, _read(location))


def _decoding(location: Location, content: dict[str, Any]) -> str:
    decoding = content.get("decoding", AUTOREGRESSIVE)  # older files do not say: there was no other
    if decoding not in DECODINGS:
        raise CheckpointError(
            f"{location} says decoding={decoding!r}; known: {', '.join(DECODINGS)}. Use the version that wrote it."
        )
    return decoding


def _read(location: Location) -> dict[str, Any]:
    data = location.try_read_bytes()
    if data is None:
        raise CheckpointError(f"there is no {location}. Every checkpoint of jobs/train.py has one; give its directory.")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen kinds for a file that is not what it should be
        raise CheckpointError(
            f"{location} cannot be read: it is damaged, or holds pickled objects as the original scripts wrote them, "
            f"which are never loaded ({type(e).__name__}). Train again, or restore the file."
        ) from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{location} holds a {type(content).__name__}, not an action tokenizer. {_REMEDY}")
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise CheckpointError(
            f"{location} is {content.get('format')!r} version {content.get('version')!r}; here {FORMAT!r} "
            f"version {VERSION} is read. Train again, or use the version that wrote it."
        )
    return content


def _tokenizer(location: Location, content: dict[str, Any]) -> ActionTokenizer:
    try:
        tokenizer = ActionTokenizer.from_dict(content)
        stored = (content["units"], content["prompt_template"], content["fingerprint"])
        scheme, _, count = (content["token_map"][key] for key in ("scheme", "first_id", "count"))
    except (KeyError, TypeError, CheckpointError) as e:
        raise CheckpointError(f"{location} is incomplete ({type(e).__name__}: {e}). Restore the file.") from e
    if stored[0] != UNITS:
        raise CheckpointError(
            f"{location} holds actions in {str(stored[0])[:40]!r}; here they are {UNITS}. Give the checkpoint of a "
            "policy that was trained on these, or convert its data and train again."
        )
    if stored != (UNITS, PROMPT_TEMPLATE, tokenizer.fingerprint) or (scheme, count) != ("loc", tokenizer.num_bins):
        raise CheckpointError(
            f"{location} is damaged or was edited: its fingerprint {str(stored[2])[:12]} does not match its content "
            f"({tokenizer.fingerprint[:12]}). Restore the file."
        )
    return tokenizer
