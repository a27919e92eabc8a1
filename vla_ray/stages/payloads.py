"""What a capture stores per frame and target: the original `.pt` layout, a reduced one, or relevance itself.

full:    attention[block] = [{attn, grad, shape}]: probabilities and raw gradients of every head, as existing notebooks
         read them ("vision_block_i" [tiles, heads, N, N], "language_block_i" [1, heads, L, L]).
reduced: attention[block] = [{attn_mean, cam, cam_scale, cam_negative, cam_negative_scale, shape}]: means over heads of
         A, of relu(A * dA) and of relu(-A * dA), float16, with dA divided by `meta.seed.grad_rms`. `cam * cam_scale` is
         the value: the scale, a power of two, keeps small numbers out of float16's subnormals.
relevance: no matrix; relevance.{language [L], patches [tiles, patches], cls [tiles]} per fold (explain/folds.py).

All carry in `meta` what a map needs later: token spans, tile boxes, crop, seed weights, the gradient's RMS. Sequence
positions count from the frame's first token; padding is cut away.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vla_ray.data.scenes import FrameRef
from vla_ray.data.tiles import TileGeometry
from vla_ray.models.simlingo import Processor, SimLingoConfig
from vla_ray.models.simlingo.config import NUM_ROUTE_QUERIES, NUM_SPEED_QUERIES
from vla_ray.schema import PAYLOAD_SCHEMA_VERSION
from vla_ray.stages.visit import Explained, Visit
from vla_ray.targets import ChosenToken, Spline, target_info


class NonFiniteTarget(ArithmeticError):  # noqa: N818 - its name is the error_type of a row
    """A target's value or gradient is infinite or not a number: there is nothing to explain, and nothing to store."""


def build_payload(
    level: str,
    visit: Visit,
    explained: Explained,
    b: int,
    frame: FrameRef,
    geometry: TileGeometry,
    processor: Processor,
    spline: Spline,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The payload of frame `b` of a visit, for one target; CPU tensors and primitives only.

    Args:
        dtype: of attention and gradients at level `full`; `reduced` is float16 by definition.

    Raises:
        NonFiniteTarget: a gradient is not finite, or overflows `dtype`.
    """
    d, text = visit.decision, visit.texts[b]
    scores = [float(s) for s in visit.scores[b].detach()]
    strings = processor.token_strings(text)
    token_index = explained.tokens[b]
    token = None if token_index is None else ChosenToken(token_index, text[token_index], strings[token_index])
    seed, start = explained.seeds[b], d.starts[b]
    language = processor.decode(text)
    return {
        "tag": frame.stem,
        "image_path": frame.image,
        "input_speed_mps": float(frame.speed_mps),
        "mode": explained.target.mode,
        "meta": {
            **_picture_meta(processor.config, geometry),
            "schema_version": PAYLOAD_SCHEMA_VERSION,
            "payload": level,
            "frame_id": frame.frame_id,
            "target": explained.target.name,
            "spans": token_spans(visit, processor, b),
            # Rows the scalar reads, their weights |<h, dy/dh>| and signed scores, and the RMS of dy/dh over them, by
            # which a map is freed from the unit of the scalar.
            "seed": {
                "rows": list(range(explained.rows[b].start - start, explained.rows[b].stop - start)),
                "weights": seed.weights.cpu(),
                "scores": seed.scores.cpu(),
                "grad_rms": seed.grad_rms,
            },
            "degenerate": explained.is_degenerate(b),
            "prompt": visit.prompts[b].text,
            "prompt_ids": list(visit.prompts[b].ids),
        },
        "target_scalar": float(explained.scalar_B[b]),
        "target_info": target_info(explained.target, spline, token),
        "outputs": {
            "pred_speed_wps": _stored(d.speed_B102[b : b + 1], torch.float32, "pred_speed_wps"),
            "pred_route": _stored(d.route_B202[b : b + 1], torch.float32, "pred_route"),
            "language": [language],
        },
        "text_outputs": {
            "token_ids": list(text),
            "token_scores": scores,
            "token_strings": strings,
            "decoded_text": language,
        },
        **(
            {"relevance": _relevance(visit, explained, b)}
            if level == "relevance"
            else {"attention": _attention(level, visit, explained, b, seed.grad_rms, dtype)}
        ),
    }


def _picture_meta(config: SimLingoConfig, geometry: TileGeometry) -> dict[str, Any]:
    return {
        "original_height": geometry.height,
        "original_width": geometry.width,
        "num_patch_views": geometry.num_tiles,
        "num_image_tokens_per_patch": config.tokens_per_tile,
        "num_total_image_tokens": geometry.num_tiles * config.tokens_per_tile,
        "frames": 1,
        "tiles": {
            "kept_height": geometry.kept_height,
            "canvas_height": geometry.canvas_height,
            "canvas_width": geometry.canvas_width,
            "boxes": [list(box) for box in geometry.boxes],  # left, top, right, bottom on the canvas
            "thumbnail": geometry.thumbnail,
            "patch_grid": config.patch_grid,
            "token_grid": config.token_grid,
        },
    }


def token_spans(visit: Visit, processor: Processor, b: int) -> dict[str, list[int]]:
    """[first, one past the last] position of each part of frame b's sequence."""
    prompt, text = visit.decision.prompt_lengths[b], visit.decision.text_lengths[b]
    image = [i for i, token in enumerate(visit.prompts[b].ids) if token == processor.image_token_id]
    queries = prompt + text
    return {
        "prompt": [0, prompt],
        "image": [image[0], image[-1] + 1],
        "text": [prompt, queries],
        "route_queries": [queries, queries + NUM_ROUTE_QUERIES],
        "speed_queries": [queries + NUM_ROUTE_QUERIES, queries + NUM_ROUTE_QUERIES + NUM_SPEED_QUERIES],
    }


def _relevance(visit: Visit, explained: Explained, b: int) -> dict[str, Any]:
    parts = visit.relevance(explained, b).to_dict()
    kept = {
        part: {fold: _stored(row, torch.float32, f"{fold} relevance") for fold, row in rows.items()}
        for part, rows in parts.items()
    }
    return {"strength": visit.strength, **kept}


def _attention(
    level: str, visit: Visit, explained: Explained, b: int, grad_rms: float, dtype: torch.dtype
) -> dict[str, list[dict[str, Any]]]:
    start, blocks = visit.decision.starts[b], {}
    for name, probabilities in visit.probabilities.items():
        gradient = explained.gradients[name]
        if name.startswith("vision"):
            attn, grad = probabilities[visit.tile_slices[b]], gradient[visit.tile_slices[b]]
        else:
            attn, grad = probabilities[b : b + 1, :, start:, start:], gradient[b : b + 1, :, start:, start:]
        if level == "full":
            entry: dict[str, Any] = {
                "attn": _stored(attn, dtype, name),
                "grad": _stored(grad, dtype, f"the gradient of {name}"),
            }
        else:
            entry = _reduced(attn, grad, grad_rms, name)
        blocks[name] = [{**entry, "shape": list(attn.shape)}]
    return blocks


def _reduced(attn_BHQK: Tensor, grad_BHQK: Tensor, grad_rms: float, name: str) -> dict[str, Any]:
    attn_BHQK = attn_BHQK.detach().float()
    weighted = attn_BHQK * grad_BHQK.float() / (grad_rms or 1.0)
    entry: dict[str, Any] = {"attn_mean": _stored(attn_BHQK.mean(1), torch.float16, name)}
    for key, sign in (("cam", 1), ("cam_negative", -1)):
        cam = (sign * weighted).clamp_min(0).mean(1)
        top = float(cam.max())
        if not math.isfinite(top):
            raise NonFiniteTarget(f"the gradient of {name} is not finite")
        scale = 2.0 ** math.floor(math.log2(top)) if top > 0 else 1.0
        entry |= {key: _stored(cam / scale, torch.float16, f"the gradient of {name}"), f"{key}_scale": scale}
    return entry


def _stored(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not bool(torch.isfinite(x := x.detach().to(dtype)).all()):
        raise NonFiniteTarget(f"{name} is not finite in {str(dtype).removeprefix('torch.')}")
    # A copy: saving a view would write the whole batch's storage with it.
    return x.to(device="cpu", copy=True).contiguous()


def estimate_bytes(level: str, config: SimLingoConfig, dtype: torch.dtype, num_folds: int = 3) -> int:
    """Bytes of one payload with the most tiles and a usual commentary (17 tokens), for the check before a run."""
    num_tiles = config.max_tiles + config.use_thumbnail
    vision, language = config.vision, config.language
    tokens = config.patch_grid**2 + 1
    length = 35 + num_tiles * config.tokens_per_tile + 17 + NUM_ROUTE_QUERIES + NUM_SPEED_QUERIES
    vision_matrices = int(vision["num_hidden_layers"]) * num_tiles * tokens**2
    language_matrices = int(language["num_hidden_layers"]) * length**2
    if level == "relevance":
        return 4 * num_folds * (length + num_tiles * tokens) + 20_000
    if level == "full":
        elements = vision_matrices * int(vision["num_attention_heads"])
        elements += language_matrices * int(language["num_attention_heads"])
        return 2 * elements * dtype.itemsize
    return 3 * (vision_matrices + language_matrices) * torch.float16.itemsize
