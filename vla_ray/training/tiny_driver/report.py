"""How well a tiny driver drives: measured on held-out frames, as a table, and as the checkpoint's README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vla_ray.data.synthetic import CAUSES
from vla_ray.models.simlingo import Processor, SimLingo
from vla_ray.models.simlingo.processing import normalise
from vla_ray.training.tiny_driver.data import NUM_TILES, PROMPTS, Frames, answer, prompt
from vla_ray.training.tiny_driver.files import VARIANT

if TYPE_CHECKING:
    from vla_ray.training.tiny_driver.recipe import Recipe


@torch.no_grad()
def evaluate(
    model: SimLingo, processor: Processor, frames: Frames, batch: int = 50, blind: bool = False
) -> dict[str, dict[str, float]]:
    """Free-running: the model writes its own text, then acts.

    Args:
        blind: show a uniform grey instead of the picture, to see what the prompt alone gives.

    Returns:
        For each name in PROMPTS and for "overall": `route_ade` and `speed_ade` (mean distance, m), and, where
        commentary is asked for, `text_right` (share of frames whose text is exactly the true cause's), also per cause.
    """
    model.eval()
    rows: dict[str, list[tuple[float, float, bool | None, str]]] = {name: [] for name in PROMPTS}
    for first in range(0, len(frames), batch):
        chosen = slice(first, min(first + batch, len(frames)))
        tiles = np.array(frames.tiles[chosen])
        if blind:
            tiles[:] = 128
        tokens = model.encode_tiles(normalise(tiles.reshape(-1, *tiles.shape[2:])))
        causes = [CAUSES[i] for i in frames.cause[chosen].tolist()]
        for name, (pointed, comment) in PROMPTS.items():
            prompts = [
                prompt(processor, float(v), p if pointed else None, comment)
                for v, p in zip(frames.speed[chosen], frames.points[chosen], strict=True)
            ]
            ready = processor.batch(prompts, [NUM_TILES] * len(prompts))
            embeds = model.embed_prompt(ready, tokens, processor.image_token_id)
            text = model.generate(embeds, ready.mask_BP, processor.eos_id, max_new_tokens=24)
            decision = model.decide(embeds, ready.mask_BP, text)
            route = (decision.route_B202 - frames.route[chosen]).norm(dim=-1).mean(1).tolist()
            speed = (decision.speed_B102 - frames.speed_waypoints[chosen]).norm(dim=-1).mean(1).tolist()
            for k, cause in enumerate(causes):
                right = processor.decode(text[k]).strip() == answer(cause, comment) if comment else None
                rows[name].append((route[k], speed[k], right, cause))
    scores = {name: _score(found) for name, found in rows.items()}
    return {**scores, "overall": _score([row for found in rows.values() for row in found])}


def _score(rows: list[tuple[float, float, bool | None, str]]) -> dict[str, float]:
    score = {"route_ade": float(np.mean([r[0] for r in rows])), "speed_ade": float(np.mean([r[1] for r in rows]))}
    told = [(right, cause) for _, _, right, cause in rows if right is not None]
    if told:
        score["text_right"] = float(np.mean([right for right, _ in told]))
        for cause in CAUSES:
            of_cause = [right for right, c in told if c == cause]
            if of_cause:
                score[f"text_right_{cause}"] = float(np.mean(of_cause))
    return score


_README = """\
# simlingo-tiny

A driver of the SimLingo architecture with {parameters:,} parameters, trained from scratch on procedural scenes. It is
here so that every job runs on a laptop within a minute, on a model that really drives (in its own small world), and so
that relevance maps can be checked against scenes whose causes are known. It knows nothing of real roads.

The files are laid out like the released SimLingo checkpoint, and the ordinary loader reads them:
`.hydra/config.yaml`, `checkpoints/epoch=013.ckpt/pytorch_model.pt` ({megabytes:.2f} MB: language model float16, the
rest float32, LoRA pairs that add nothing), `pretrained/{variant}/` (tokenizer and sizes).

## How it was made

`vla_ray/training/tiny_driver/recipe.py`, seed {seed}, on {threads} CPU threads:

* {frames:,} frames, rendered in {render_minutes:.1f} min;
* {steps:,} steps of {batch} frames in {train_minutes:.1f} min (median {step_seconds:.2f} s a step; other work on the
  machine is included);
* hidden size {dim}, 4 heads, {vit_layers} ViT layers, {lm_layers} language layers, two 168 px tiles of 12x12 patches,
  36 image tokens a tile;
* {points:.0%} of the prompts carry two target points, the others say `Command: follow the road.`;
* {plain:.0%} ask for the waypoints without commentary, so that the action cannot rest on the text alone.

## How well it drives

{held_out} scenes that training never saw, the model writing its own text before it acts. ADE: mean distance to the
expert's points. Text: share of frames whose commentary is exactly the true cause's.

{table}

Text right by cause: {by_cause}.

With a uniform grey picture the route ADE is {blind_command:.2f} m for the command and {blind_points:.2f} m with target
points (waypoints only): the target points are read, but where there is a picture the model trusts it more.

## Read this before drawing conclusions

* The vision tower had help: for the first {vision_steps} steps it was trained alone, and later with weight
  {probe_weight}, by a linear probe that tells for each patch which of eleven categories it shows (road, marking, car,
  red light, person, ...). The probe stands in for InternViT's pre-training and is thrown away. It is never told which
  thing is the cause: a parked car and a lead car are both "car".
* A target point tells the route's shape. Relevance of lane markings for the route is meaningful only for prompts
  without target points.
* One training seed. Differences of a few points between methods on this model are noise.
"""


def score_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Scores of `evaluate` as a small Markdown table."""
    lines = ["| prompt | route ADE (m) | speed-waypoint ADE (m) | text right |", "|---|---|---|---|"]
    for name, s in scores.items():
        text = f"{s['text_right']:.1%}" if "text_right" in s else "-"
        lines.append(f"| {name} | {s['route_ade']:.3f} | {s['speed_ade']:.3f} | {text} |")
    return "\n".join(lines)


def write_readme(path: Path, recipe: Recipe, result: Mapping[str, Any]) -> None:
    """The checkpoint's README, every number in it measured by `train`."""
    overall = result["scores"]["overall"]
    by_cause = [f"{k.removeprefix('text_right_')} {v:.1%}" for k, v in overall.items() if k.startswith("text_right_")]
    path.write_text(
        _README.format(
            parameters=result["parameters"],
            megabytes=result["bytes"] / 1e6,
            variant=VARIANT,
            seed=recipe.seed,
            frames=recipe.frames,
            render_minutes=result["render_minutes"],
            steps=recipe.steps,
            batch=recipe.batch,
            train_minutes=result["train_minutes"],
            step_seconds=result["step_seconds"],
            blind_command=result["blind"]["command, waypoints only"]["route_ade"],
            blind_points=result["blind"]["target points, waypoints only"]["route_ade"],
            threads=recipe.threads,
            dim=recipe.dim,
            vit_layers=recipe.vit_layers,
            lm_layers=recipe.lm_layers,
            points=recipe.points_share,
            plain=recipe.plain_share,
            held_out=recipe.held_out,
            table=score_table(result["scores"]),
            by_cause=", ".join(by_cause).replace("_", " "),
            vision_steps=recipe.vision_steps,
            probe_weight=recipe.probe_weight,
        )
    )
