"""Pictures and instructions as PaliGemma reads them, without torch or transformers: data workers start in no time.

Token ids equal those of transformers' PaliGemmaProcessor, pixels those of its SigLIP image processor. Instructions are
data of strangers: nothing that they spell becomes a special token, and a long one never pushes out a picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from vla_ray.errors import CheckpointError, DataError
from vla_ray.models.paligemma.actions import MAX_BINS

IMAGE_MEAN = IMAGE_STD = 0.5  # SigLIP's, not ImageNet's
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_IMAGE, _FIRST, _LAST = "<image>", "<loc0000>", f"<loc{MAX_BINS - 1:04d}>"
PLACEHOLDERS = 128  # <seg000> ... <seg127>
_SEG_FIRST, _SEG_LAST = "<seg000>", f"<seg{PLACEHOLDERS - 1:03d}>"
_CACHE = 50_000  # prompts; instructions repeat within an epoch and between epochs
# What transformers' PaliGemmaConfig takes where config.json is silent, as that of the released 3B model is.
_IMAGE_SIZE, _PATCH_SIZE = 224, 14


def sanitise(instruction: str) -> str:
    """An instruction without angle brackets (`<loc0003>` and `<image>` would become the model's own tokens), white
    space collapsed. DataError if nothing is left."""
    text = " ".join(instruction.replace("<", " ").replace(">", " ").split())
    if not text:
        raise DataError(f"the instruction {instruction[:80]!r} is empty. Give words, or drop the sample.")
    return text


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Token ids that are no text. `first_action` is <loc0000>, bin 0; `placeholder` is <seg000>, the first of 128."""

    image: int
    pad: int
    bos: int
    eos: int
    first_action: int
    placeholder: int


class Processor:
    """Picklable; prompts are remembered within a process."""

    def __init__(
        self, tokenizer: Tokenizer, ids: SpecialIds, image_size: int, image_tokens: int, max_text_length: int = 128
    ) -> None:
        self.tokenizer, self.ids = tokenizer, ids
        self.image_size, self.image_tokens, self.max_text_length = image_size, image_tokens, max_text_length
        self._newline = self._encode("\n")
        self._prompts: dict[str, tuple[int, ...]] = {}

    @staticmethod
    def from_directory(path: str | Path, max_text_length: int = 128) -> Processor:
        """Of a PaliGemma directory: as released, or as `save_pretrained` writes it.

        Raises:
            CheckpointError: a file is missing or damaged, the tokenizer is not PaliGemma's, or the picture sizes of
                processor and model differ.
        """
        directory = Path(path)
        tokenizer = _read_tokenizer(directory / "tokenizer.json")
        size, tokens = _image_sizes(directory)
        return Processor(tokenizer, _special_ids(tokenizer, directory), size, tokens, max_text_length)

    @property
    def max_prompt_tokens(self) -> int:
        """Of the longest prompt there can be, its picture included."""
        return self.image_tokens + 1 + self.max_text_length + len(self._newline)

    def prompt_ids(self, instruction: str) -> tuple[int, ...]:
        """`<image>`*N `<bos>` text newline. At most `max_text_length` tokens of text.

        Raises:
            DataError: an empty instruction.
        """
        known = self._prompts.get(instruction)
        if known is None:
            if len(self._prompts) >= _CACHE:
                self._prompts.clear()
            text = self._encode(sanitise(instruction) + "\n")
            if len(text) > self.max_text_length + len(self._newline):
                text = text[: self.max_text_length] + self._newline
            known = self._prompts[instruction] = (self.ids.image,) * self.image_tokens + (self.ids.bos, *text)
        return known

    def resize(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] -> [S, S, 3], bicubic, proportions not kept."""
        side = self.image_size
        return np.array(Image.fromarray(rgb).resize((side, side), Image.Resampling.BICUBIC))

    def collate(
        self,
        images: Sequence[NDArray[np.uint8]],
        prompts: Sequence[Sequence[int]],
        bins: NDArray[np.int64] | None = None,
        multiple: int = 1,
    ) -> dict[str, NDArray[Any]]:
        """A batch, padded on the left, so that suffixes are aligned on the right.

        Args:
            images: uint8 [S, S, 3] each.
            prompts: of `prompt_ids`.
            bins: [B, 2H]; None for prompts alone. The suffix is <loc bin> x 2H, <eos>.
            multiple: L is rounded up to a multiple of it.

        Returns:
            pixels uint8 [B, S, S, 3]; int64 [B, L]: ids, mask (0 on padding), types (1 on the suffix, else 0).
        """
        count = len(prompts)
        if bins is None:
            suffix = np.empty((count, 0), np.int64)
        else:
            eos = np.full((count, 1), self.ids.eos, np.int64)
            suffix = np.concatenate([np.asarray(bins, np.int64) + self.ids.first_action, eos], axis=1)
        length = max(len(p) for p in prompts) + suffix.shape[1]
        length += -length % multiple
        ids = np.full((count, length), self.ids.pad, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        split = length - suffix.shape[1]
        for row, prompt in enumerate(prompts):
            ids[row, split - len(prompt) : split] = prompt
            mask[row, split - len(prompt) :] = 1
        ids[:, split:] = suffix
        types[:, split:] = 1
        return {"pixels": np.stack(images), "ids": ids, "mask": mask, "types": types}

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prompts": {}}


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise CheckpointError(
            f"there is no {path}. Give a directory with tokenizer.json, as save_pretrained writes it."
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read ({' '.join(str(e).split())[:160]}). Restore the file.") from e


def _special_ids(tokenizer: Tokenizer, directory: Path) -> SpecialIds:
    names = (_IMAGE, "<pad>", "<bos>", "<eos>", _FIRST, _LAST, _SEG_FIRST, _SEG_LAST)
    found = {name: number for name in names if (number := tokenizer.token_to_id(name)) is not None}
    missing = [name for name in names if name not in found]
    if missing:
        raise CheckpointError(
            f"the tokenizer in {directory} lacks {', '.join(missing)}: it is not PaliGemma's. Give a directory that "
            "PaliGemmaProcessor.save_pretrained wrote."
        )
    for first, last, count in ((_FIRST, _LAST, MAX_BINS), (_SEG_FIRST, _SEG_LAST, PLACEHOLDERS)):
        if found[last] - found[first] != count - 1:
            raise CheckpointError(
                f"the tokenizer in {directory} has {first} at {found[first]} and {last} at {found[last]}; they must be "
                "consecutive."
            )
    image, pad, bos, eos, action, _, placeholder, _ = found.values()
    return SpecialIds(image, pad, bos, eos, action, placeholder)


def _image_sizes(directory: Path) -> tuple[int, int]:
    """Side of the picture in pixels, and its number of tokens."""
    nested = _read_json(directory / "processor_config.json").get("image_processor")
    settings = nested or _read_json(directory / "preprocessor_config.json")
    if not settings:
        raise CheckpointError(
            f"{directory} has neither a preprocessor_config.json nor an image processor in its processor_config.json. "
            "Give a directory that PaliGemmaProcessor.save_pretrained wrote."
        )
    size = settings.get("size") or {}
    height, width = size.get("height"), size.get("width")
    usual = {"resample": 3, "image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
    odd = [f"{key}={settings[key]}" for key, value in usual.items() if settings.get(key, value) != value]
    if odd or not height or height != width:
        raise CheckpointError(
            f"the image processor in {directory} is not PaliGemma's ({', '.join([f'size={size}', *odd])}): "
            "square, bicubic, mean and deviation 0.5 are known."
        )
    tokens = settings.get("image_seq_length")
    config = _read_json(directory / "config.json")
    if config:
        vision = config.get("vision_config") or {}
        side, patch = vision.get("image_size", _IMAGE_SIZE), vision.get("patch_size", _PATCH_SIZE)
        expected = (side // patch) ** 2
        if (side, expected) != (height, tokens or expected):
            raise CheckpointError(
                f"{directory} contradicts itself: its processor makes pictures of {height} pixels and {tokens} tokens, "
                f"its model takes {side} pixels and {expected} tokens. Use the processor that belongs to the model."
            )
        tokens = expected
    if not tokens:
        raise CheckpointError(f"the image processor in {directory} has no image_seq_length. Add it: (size / patch)**2.")
    return int(height), int(tokens)


def _read_json(path: Path) -> Mapping[str, Any]:
    """Empty if there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise CheckpointError(f"{path} is not valid JSON ({e}). Restore the file.") from e
