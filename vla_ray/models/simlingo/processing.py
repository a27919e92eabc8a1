"""From tiles and a speed to what the model reads: normalised pixels, prompt, placeholders.

Pictures arrive as uint8 tiles (data/tiles.py), small to ship between processes, and are normalised on the replica's
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from vla_ray.data.tiles import Tiler
from vla_ray.errors import CheckpointError, SceneError
from vla_ray.models.simlingo.config import SimLingoConfig
from vla_ray.models.simlingo.model import PromptBatch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as InternViT was trained
# Added to the tokenizer at run time, in this order, behind the last row of the embedding table.
ADDED_TOKENS = (
    "<WAYPOINTS>",
    "<WAYPOINTS_DIFF>",
    "<ORG_WAYPOINTS_DIFF>",
    "<ORG_WAYPOINTS>",
    "<WAYPOINT_LAST>",
    "<ROUTE>",
    "<ROUTE_DIFF>",
    "<TARGET_POINT>",
)
TARGET_POINT, IMAGE_TOKEN = "<TARGET_POINT>", "<IMG_CONTEXT>"
Points = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One frame's prompt: its text, token ids, and the points that fill its placeholders."""

    text: str
    ids: tuple[int, ...]
    points: Points | None


def make_tiler(config: SimLingoConfig) -> Tiler:
    """The tiles of this model."""
    return Tiler(config.image_size, config.max_tiles, config.cut_bottom, config.use_thumbnail)


def normalise(tiles_TSS3: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [T, S, S, 3] -> float32 [T, 3, S, S] with ImageNet mean and deviation."""
    x = torch.as_tensor(np.require(tiles_TSS3, requirements="W")).to(device).permute(0, 3, 1, 2).float().div(255)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def default_question(speed_mps: float, target_points: Points | None) -> str:
    """The question of a frame that brings none, in the wording of the training data."""
    route = f"Target waypoint: {TARGET_POINT}{TARGET_POINT}." if target_points else "Command: follow the road."
    return f"Current speed: {speed_mps:.1f} m/s. {route} What should the ego do next?"


class Processor:
    """Tokenizer and prompt template of a checkpoint, with the token ids that the model needs."""

    def __init__(self, config: SimLingoConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.tiler = make_tiler(config)
        if any(token not in tokenizer.get_vocab() for token in ADDED_TOKENS):
            tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
        vocabulary = tokenizer.get_vocab()
        self.placeholder_id = vocabulary[TARGET_POINT]
        try:
            self.image_token_id, self.eos_id = vocabulary[IMAGE_TOKEN], vocabulary["<|im_end|>"]
            self.pad_id = vocabulary["<|endoftext|>"]
        except KeyError as e:
            raise CheckpointError(f"the tokenizer in {config.variant_dir} lacks {e}; it is not InternVL2's.") from e
        rows = int(config.language["vocab_size"])
        if not max(self.image_token_id, self.eos_id) < rows <= vocabulary[ADDED_TOKENS[0]]:
            raise CheckpointError(
                f"the tokenizer in {config.variant_dir} does not fit the embedding table of {rows} rows: "
                f"<IMG_CONTEXT> is {self.image_token_id}, <WAYPOINTS> is {vocabulary[ADDED_TOKENS[0]]}."
            )

    def prompt(
        self, num_tiles: int, speed_mps: float, target_points: Points | None = None, question: str | None = None
    ) -> Prompt:
        """The chat prompt of one frame: picture, then question; no system message.

        Args:
            target_points: next two route nodes, metres, x forward, y right.
            question: `default_question` when None; may hold `<TARGET_POINT><TARGET_POINT>`.

        Raises:
            SceneError: the question's placeholders do not fit, or it spells another of the model's own tokens.
        """
        question = default_question(speed_mps, target_points) if question is None else question
        points = target_points if TARGET_POINT in question else None
        self._check(question, target_points)
        image = f"<img>{IMAGE_TOKEN * (num_tiles * self.config.tokens_per_tile)}</img>"
        text = f"<|im_start|>user\n{image}\n{question}<|im_end|><|im_start|>assistant\n"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt(text, tuple(ids), points)

    def _check(self, question: str, target_points: Points | None) -> None:
        count = question.count(TARGET_POINT)
        if count and (count != 2 or TARGET_POINT * 2 not in question or target_points is None):
            raise SceneError(
                f"question {question!r} has {count} {TARGET_POINT}, the frame "
                f"{'no' if target_points is None else 'two'} target points. "
                f"Write {TARGET_POINT}{TARGET_POINT} once and give target_points [[x, y], [x, y]]."
            )
        reserved = [t for t in self.tokenizer.get_added_vocab() if t in question and t != TARGET_POINT]
        if reserved:
            raise SceneError(f"question {question!r} spells {reserved[0]}, which is the model's own token. Remove it.")

    def batch(
        self, prompts: Sequence[Prompt], tile_counts: Sequence[int], device: torch.device | str = "cpu"
    ) -> PromptBatch:
        """Left-padded prompts of several frames."""
        length = max(len(p.ids) for p in prompts)
        ids = [[self.pad_id] * (length - len(p.ids)) + list(p.ids) for p in prompts]
        mask = [[0] * (length - len(p.ids)) + [1] * len(p.ids) for p in prompts]
        points = tuple(None if p.points is None else torch.tensor(p.points, device=device) for p in prompts)
        return PromptBatch(
            torch.tensor(ids, device=device), torch.tensor(mask, device=device), tuple(tile_counts), points
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Generated text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        return [str(t) for t in self.tokenizer.convert_ids_to_tokens(list(ids))]


def load_processor(config: SimLingoConfig) -> Processor:
    """Tokenizer from the variant's directory; nothing is fetched and no code from the checkpoint is run.

    Raises:
        CheckpointError: the directory has no usable tokenizer.
    """
    directory = Path(config.variant_dir)
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as e:  # OSError, ValueError, KeyError or tokenizers' own: all mean "no usable tokenizer here"
        raise CheckpointError(
            f"no usable tokenizer in {directory} ({str(e).splitlines()[0] if str(e) else type(e).__name__}). "
            "Give the InternVL2 variant's directory with tokenizer.json: model.variant_dir=DIR"
        ) from e
    return Processor(config, tokenizer)
