"""The recipe of `checkpoints/simlingo-tiny`: a SimLingo of a million parameters, trained from scratch on two CPU cores.

It is the package's own model, processor and prompts at a small size, on synthetic scenes whose causes are known. The
result is written in the released layout and then measured: loaded by the ordinary loader, generating freely, on scenes
that training never saw. One aid is not part of the driver and is said wherever results are shown: a probe on the vision
tower's patches (which category does this patch show?) stands in for InternViT's pre-training.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_ray.data.synthetic import CAUSES
from vla_ray.models.simlingo import Processor, SimLingo, load_model, load_processor
from vla_ray.models.simlingo.checkpoint import to_released
from vla_ray.models.simlingo.config import read_config
from vla_ray.models.simlingo.model import NUM_QUERIES, PromptBatch
from vla_ray.models.simlingo.processing import normalise
from vla_ray.training.tiny_driver.data import (
    CATEGORIES,
    NUM_TILES,
    PROMPTS,
    Frames,
    answer,
    prompt,
    question,
    render_frames,
)
from vla_ray.training.tiny_driver.files import CHECKPOINT_PATH, CONFIG_PATH, LORA_RANK, write_variant
from vla_ray.training.tiny_driver.report import evaluate, write_readme

logger = logging.getLogger(__name__)

TRAINING_SEEDS_FROM = 1_000_000  # held-out scenes, tests and demos use smaller seeds
_PRESENT_WEIGHT = 3.0  # in the probe's loss: most patches show few categories
_LENGTH_MULTIPLE = 8  # few distinct lengths: the CPU kernels are built once for each


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result. The schedule counts steps, not minutes, so that it can be repeated."""

    frames: int = 16_000
    held_out: int = 400
    steps: int = 3_600
    vision_steps: int = 900  # at the beginning: the vision tower alone, on the category probe
    warmup_steps: int = 200
    batch: int = 32
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    probe_weight: float = 0.3  # after the vision steps
    text_weight: float = 2.0
    plain_share: float = 0.4  # prompts without commentary, so that the action cannot rest on the text alone
    points_share: float = 0.5  # prompts with target points; without them the route must be read from the picture
    dim: int = 96
    vit_layers: int = 3
    lm_layers: int = 3
    seed: int = 0
    threads: int = 2
    workers: int = 2


def train(output_dir: str | Path, recipe: Recipe | None = None) -> dict[str, Any]:
    """Render, train, export to `output_dir` in the released layout, and measure what was exported.

    Repeatable for a given machine and thread count; sets torch's thread count for the process.

    Returns:
        `scores` and, with a grey picture, `blind` (see `evaluate`), `first_losses`, `last_losses`, `parameters`,
        `bytes`, `render_minutes`, `train_minutes`, `step_seconds` (median, after the vision steps).
    """
    recipe = recipe or Recipe()
    output_dir = Path(output_dir)
    torch.set_num_threads(recipe.threads)
    with tempfile.TemporaryDirectory(prefix="tiny_driver_") as scratch:
        root = Path(scratch) / "root"
        processor, model = build(root, recipe)
        start = time.monotonic()
        seeds = range(TRAINING_SEEDS_FROM, TRAINING_SEEDS_FROM + recipe.frames)
        frames = render_frames(seeds, model.config, Path(scratch) / "training.npy", recipe.workers)
        unseen = render_frames(range(recipe.held_out), model.config, Path(scratch) / "held_out.npy", recipe.workers)
        rendered = time.monotonic()
        logger.info("rendered %d frames in %.1f min", recipe.frames + recipe.held_out, (rendered - start) / 60)
        losses = fit(model, processor, frames, recipe)
        trained = time.monotonic()
        export(model, root)
        # Measured on the files, as anyone will load them.
        config = read_config(root / CONFIG_PATH)
        model = load_model(config, root / CHECKPOINT_PATH, processor.placeholder_id)
        result = {
            "scores": evaluate(model, processor, unseen),
            "blind": evaluate(model, processor, unseen, blind=True),
            "first_losses": losses[0],
            "last_losses": losses[-1],
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": (root / CHECKPOINT_PATH).stat().st_size,
            "render_minutes": (rendered - start) / 60,
            "train_minutes": (trained - rendered) / 60,
            "step_seconds": float(np.median([part["seconds"] for part in losses if "text" in part])),
        }
        write_readme(root / "README.md", recipe, result)
        shutil.copytree(root, output_dir, dirs_exist_ok=True)
    return result


def build(root: Path, recipe: Recipe) -> tuple[Processor, SimLingo]:
    """Write tokenizer and configuration under `root`, and make an untrained model from them."""
    asked = [question(v / 10, p, c) for v in range(0, 120, 7) for p, c in PROMPTS.values()]
    told = [answer(cause, comment) for cause in CAUSES for comment in (True, False)]
    texts = [f"user\n\n{q}assistant\n{a}" for q in asked for a in told]
    clean = [t.replace("<TARGET_POINT>", "") for t in texts]
    write_variant(root, clean, recipe.dim, recipe.vit_layers, recipe.lm_layers)
    config = read_config(root / CONFIG_PATH)
    processor = load_processor(config)
    torch.manual_seed(recipe.seed)
    model = SimLingo(config, processor.placeholder_id)
    # The native class leaves these at zero, for weights that are loaded.
    nn.init.normal_(model.vision.embeddings.position_embeddings, std=0.02)
    nn.init.normal_(model.vision.embeddings.cls_token, std=0.02)
    return processor, model


def export(model: SimLingo, root: Path) -> Path:
    """Write the weights in the released layout, beside the files that `build` wrote."""
    path = root / CHECKPOINT_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(to_released(model, LORA_RANK), path)
    return path


def fit(model: SimLingo, processor: Processor, frames: Frames, recipe: Recipe) -> list[dict[str, float]]:
    """Train in place; returns means over a hundred steps each: `probe`, `text`, `route`, `speed` losses, `seconds`."""
    rng = np.random.default_rng(recipe.seed)
    model.train().requires_grad_(True)
    model.set_attention("eager")  # on CPU in bfloat16 twice as fast as scaled_dot_product_attention
    probe = nn.Linear(int(model.config.vision["hidden_size"]), len(CATEGORIES))
    optimizer = _optimizer(model, probe, recipe)
    patches: list[Tensor] = []
    hook = model.vision.layernorm.register_forward_hook(lambda _m, _i, out: patches.append(out))
    batches = _Batches(frames, processor, recipe, rng)
    history: list[dict[str, float]] = []
    recent: list[dict[str, float]] = []
    start = time.monotonic()
    for step in range(recipe.steps):
        began = time.monotonic()
        vision_only = step < recipe.vision_steps
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        batch = batches.next()
        patches.clear()
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.encode_tiles(batch.pixels)
            seen = probe(patches[0][:, 1:]).float()
            weight = torch.tensor(_PRESENT_WEIGHT)
            losses = {"probe": functional.binary_cross_entropy_with_logits(seen, batch.categories, pos_weight=weight)}
            if not vision_only:
                losses |= _driving_losses(model, processor, tokens, batch)
        weights = {"probe": 1.0 if vision_only else recipe.probe_weight, "text": recipe.text_weight}
        loss = torch.stack([weights.get(name, 1.0) * value for name, value in losses.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        told = {name: float(value.detach()) for name, value in losses.items()}
        recent.append({**told, "seconds": time.monotonic() - began})
        if len(recent) == 100 or step == recipe.steps - 1:
            history.append({name: float(np.mean([r[name] for r in recent if name in r])) for name in recent[-1]})
            line = " ".join(f"{name} {value:.4f}" for name, value in history[-1].items())
            logger.info("step %d, %.1f min: %s", step + 1, (time.monotonic() - start) / 60, line)
            recent.clear()
    hook.remove()
    model.eval().requires_grad_(False)
    return history


def _optimizer(model: nn.Module, probe: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; embeddings, queries, norms and biases do not decay."""
    decayed: list[nn.Parameter] = []
    free = list(probe.parameters())
    for name, parameter in model.named_parameters():
        decays = parameter.dim() > 1 and "embed" not in name and "queries" not in name
        (decayed if decays else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / recipe.steps))
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * (0.02 + 0.98 * cosine)


@dataclass(frozen=True, slots=True)
class _Batch:
    pixels: Tensor  # [B * 2, 3, S, S]
    prompt: PromptBatch  # with the answer and EOS appended
    answer_lengths: tuple[int, ...]  # including EOS
    route: Tensor
    speed_waypoints: Tensor
    categories: Tensor  # [B * 2, patches, categories] float


class _Batches:
    """Endless shuffled batches: each epoch draws prompts, and brightness and contrast of the pictures, anew."""

    def __init__(self, frames: Frames, processor: Processor, recipe: Recipe, rng: np.random.Generator) -> None:
        self.frames, self.processor, self.recipe, self.rng = frames, processor, recipe, rng
        self.order = np.empty(0, np.int64)
        # Target points do not enter the ids: a few hundred prompts cover all frames.
        self.prompt_ids = lru_cache(maxsize=None)(self._prompt_ids)
        self.answer_ids = lru_cache(maxsize=None)(self._answer_ids)

    def next(self) -> _Batch:
        size = min(self.recipe.batch, len(self.frames))
        if len(self.order) < size:
            self.order = self.rng.permutation(len(self.frames))
        chosen, self.order = self.order[:size], self.order[size:]
        f, index = self.frames, torch.from_numpy(chosen)
        comment = self.rng.random(size) >= self.recipe.plain_share
        pointed = self.rng.random(size) < self.recipe.points_share
        rows, lengths = [], []
        for i, c, p in zip(chosen.tolist(), comment.tolist(), pointed.tolist(), strict=True):
            tail = self.answer_ids(CAUSES[int(f.cause[i])], c)
            rows.append([*self.prompt_ids(f"{float(f.speed[i]):.1f}", p, c), *tail])
            lengths.append(len(tail))
        length = -(-max(map(len, rows)) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        ids = torch.tensor([[self.processor.pad_id] * (length - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
        points = tuple(f.points[i] if p else None for i, p in zip(chosen.tolist(), pointed.tolist(), strict=True))
        return _Batch(
            pixels=self._jitter(normalise(f.tiles[chosen].reshape(-1, *f.tiles.shape[2:]))),
            prompt=PromptBatch(ids, mask, (NUM_TILES,) * size, points),
            answer_lengths=tuple(lengths),
            route=f.route[index],
            speed_waypoints=f.speed_waypoints[index],
            categories=f.categories[index].flatten(0, 1).float(),
        )

    def _jitter(self, pixels: Tensor) -> Tensor:
        """The same contrast and brightness for both tiles of a frame."""
        n = len(pixels) // NUM_TILES
        gain, offset = (torch.from_numpy(self.rng.uniform(a, b, (n, 1, 1, 1)).astype(np.float32)) for a, b in _JITTER)
        return pixels * gain.repeat_interleave(NUM_TILES, 0) + offset.repeat_interleave(NUM_TILES, 0)

    def _prompt_ids(self, speed: str, pointed: bool, comment: bool) -> tuple[int, ...]:
        return prompt(self.processor, float(speed), torch.zeros(2, 2) if pointed else None, comment).ids

    def _answer_ids(self, cause: str, comment: bool) -> tuple[int, ...]:
        ids = self.processor.tokenizer(answer(cause, comment), add_special_tokens=False)["input_ids"]
        return (*ids, self.processor.eos_id)


_JITTER = ((0.85, 1.15), (-0.2, 0.2))  # factor and offset on normalised pixels


def _driving_losses(model: SimLingo, processor: Processor, tokens: Tensor, batch: _Batch) -> dict[str, Tensor]:
    """Teacher-forced: text, route and speed losses of one pass over [prompt, answer, EOS, queries]."""
    size = len(batch.answer_lengths)
    x = model.embed_prompt(batch.prompt, tokens, processor.image_token_id)
    queries = torch.cat([model.route_queries, model.speed_queries], 1).expand(size, -1, -1)
    mask = torch.cat([batch.prompt.mask_BP, torch.ones(size, NUM_QUERIES, dtype=batch.prompt.mask_BP.dtype)], 1)
    hidden = model.language.model(
        inputs_embeds=torch.cat([x, queries.to(x.dtype)], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        use_cache=False,
    ).last_hidden_state
    longest = max(batch.answer_lengths)
    labels = batch.prompt.ids_BP[:, -longest:].clone()
    for row, length in enumerate(batch.answer_lengths):
        labels[row, : longest - length] = -100
    logits = model.token_logits(hidden[:, -NUM_QUERIES - longest - 1 : -NUM_QUERIES - 1])
    with torch.autocast("cpu", enabled=False):  # bfloat16 is too coarse for metres
        route, speed = model.deltas(hidden[:, -NUM_QUERIES:].float())
    return {
        "text": functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100),
        "route": _path_loss(route, batch.route),
        "speed": _path_loss(speed, batch.speed_waypoints),
    }


def _path_loss(deltas: Tensor, path: Tensor) -> Tensor:
    """Smooth L1 on the points (metres) and, four times, on the steps that the head predicts."""
    steps = functional.pad(path, (0, 0, 1, 0)).diff(dim=1)
    points = functional.smooth_l1_loss(deltas.cumsum(1), path, beta=0.2)
    return points + 4.0 * functional.smooth_l1_loss(deltas, steps, beta=0.1)
