"""Models to measure on, each with one frame to look at: the bundled tiny driver, and a mid-size one of random weights.

The text is fixed, so that sides of a comparison differ only in what is asked of the model, never in how much it says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from vla_ray.attention import IMPLEMENTATION
from vla_ray.config import ModelConfig
from vla_ray.data.scenes import FrameRef
from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import ConfigError, nearest
from vla_ray.models.simlingo import Processor, SimLingo, SimLingoConfig, load_model, load_processor
from vla_ray.models.simlingo.config import read_config
from vla_ray.models.simlingo.model import NUM_QUERIES
from vla_ray.models.simlingo.processing import Prompt

PICTURE = (224, 448, 3)  # two tiles side by side, where the model takes two
TEXT = "Stop for the red light ahead."
SPEED_MPS = 5.0


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and one frame, ready for a visit.

    Attributes:
        text: token ids that take the place of generated ones.
    """

    model: SimLingo
    processor: Processor
    tiles: NDArray[np.uint8]
    geometry: TileGeometry
    prompt: Prompt
    text: tuple[int, ...]

    @property
    def frame(self) -> FrameRef:
        return FrameRef("benchmark/frame", "benchmark", "frame", "frame.png", SPEED_MPS)

    @property
    def description(self) -> str:
        config = self.model.config
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        layers = f"{config.vision['num_hidden_layers']} + {config.language['num_hidden_layers']} layers"
        vision = f"{len(self.tiles)} tile{'s'[: len(self.tiles) - 1]} of {config.patch_grid**2 + 1} tokens"
        language = len(self.prompt.ids) + len(self.text) + NUM_QUERIES
        return f"{parameters:.1f} M parameters, {layers}, {vision}, {language} tokens in the language model"


def _tiny(checkpoint: ModelConfig) -> tuple[SimLingo, Processor]:
    config = read_config(str(checkpoint.config), checkpoint.variant_dir)
    processor = load_processor(config)
    return load_model(config, checkpoint.checkpoint, processor.placeholder_id), processor


def _mid(checkpoint: ModelConfig) -> tuple[SimLingo, Processor]:
    """Half the released model's depth and width, one tile; only the tokenizer is the checkpoint's."""
    tiny = read_config(str(checkpoint.config), checkpoint.variant_dir)
    processor = load_processor(mid_config(tiny))
    torch.manual_seed(0)
    model = SimLingo(processor.config, processor.placeholder_id).eval().requires_grad_(False)
    return model, processor


def mid_config(tiny: SimLingoConfig) -> SimLingoConfig:
    """12 layers a tower; 1025 vision tokens a tile; 8 heads of 64, of which the language model shares keys by four."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}
    vision = {**tiny.vision, **sizes, "intermediate_size": 2048, "image_size": 448}
    language = {**tiny.language, **sizes, "intermediate_size": 1408, "num_key_value_heads": 2}
    return replace(tiny, vision=vision, language=language, image_size=448, max_tiles=1, use_thumbnail=False)


SIZES: dict[str, Callable[[ModelConfig], tuple[SimLingo, Processor]]] = {"tiny": _tiny, "mid": _mid}


def check_sizes(names: object, known: Collection[str] = tuple(SIZES)) -> tuple[str, ...]:
    """Sizes by name, one or a list. ConfigError if one is unknown."""
    given = [names] if isinstance(names, str) else [str(n) for n in names]  # type: ignore[attr-defined]
    for name in given:
        if name not in known:
            raise ConfigError(f"size={name!r} is unknown; known: {', '.join(known)}.{nearest(name, known)}")
    return tuple(dict.fromkeys(given))


def make_subject(size: str, checkpoint: ModelConfig) -> Subject:
    """Args: checkpoint: of the tiny driver. CheckpointError if it cannot be read."""
    model, processor = SIZES[size](checkpoint)
    model.set_attention(IMPLEMENTATION)
    rgb = np.random.default_rng(0).integers(0, 256, PICTURE, dtype=np.uint8)
    tiles, geometry = processor.tiler(rgb)
    text = tuple(processor.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    return Subject(
        model, processor, tiles, geometry, processor.prompt(len(tiles), SPEED_MPS), (*text, processor.eos_id)
    )
