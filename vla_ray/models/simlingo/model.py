"""The SimLingo driving model on native transformers modules, correct for batches.

tiles -> InternViT -> pixel shuffle -> projector -> Qwen2 over [prompt with image tokens, generated text incl. EOS,
20 route queries, 10 speed queries] -> MLP heads -> per-step deltas -> cumulative sum (metres, x forward, y right).

One forward over the finished sequence gives the logits of every generated token, the trajectory, and one attention
set valid for both: the decoder is causal, so rows written earlier are what they were during generation.

Shape suffixes: B frames, T tiles of all frames, S image side, N tokens of a tile, H hidden size, P prompt length,
L full length (prompt + text + queries), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, InternVLVisionModel, Qwen2ForCausalLM

from vla_ray.models.simlingo.config import NUM_ROUTE_QUERIES, NUM_SPEED_QUERIES, SimLingoConfig

NUM_QUERIES = NUM_ROUTE_QUERIES + NUM_SPEED_QUERIES


class Projector(nn.Module):
    """InternVL's mlp1: LayerNorm, Linear, GELU (erf), Linear. Mixes channels, never tokens."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_size)  # eps 1e-5, unlike the blocks
        self.linear_1 = nn.Linear(in_size, out_size)
        self.linear_2 = nn.Linear(out_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(self.norm(x))))


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of B frames, left padded.

    Attributes:
        ids_BP: token ids; ids at or above the embedding table are placeholders.
        mask_BP: 1 where a token is, 0 where padding is.
        tile_counts: tiles of each frame; they follow each other in the tile axis.
        points_B: per frame the [2, 2] target points (metres) that fill its placeholder tokens, or None.
    """

    ids_BP: Tensor
    mask_BP: Tensor
    tile_counts: tuple[int, ...]
    points_B: tuple[Tensor | None, ...]

    @property
    def lengths(self) -> list[int]:
        return [int(n) for n in self.mask_BP.sum(1)]


@dataclass(frozen=True, slots=True)
class Decision:
    """The final pass over [prompt, text, queries], left padded to L.

    Attributes:
        hidden_BLH: after the last RMSNorm, in the compute dtype.
        route_B202: metres, cumulative, float32.
        speed_B102: positions every 0.25 s, metres, float32.
        starts: per frame the first column that is not padding; column starts[b] is its token 0.
        prompt_lengths, text_lengths: tokens of each frame (text includes EOS).
    """

    hidden_BLH: Tensor
    route_B202: Tensor
    speed_B102: Tensor
    starts: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    text_lengths: tuple[int, ...]

    def text_rows(self, b: int) -> slice:
        """Columns whose logits predict frame b's generated tokens: the one before each of them."""
        first = self.starts[b] + self.prompt_lengths[b] - 1
        return slice(first, first + self.text_lengths[b])

    def query_rows(self, head: str) -> slice:
        """Columns of the queries of a head ('route' or 'speed'); the same for every frame, as they come last."""
        length = self.hidden_BLH.shape[1]
        if head == "route":
            return slice(length - NUM_QUERIES, length - NUM_SPEED_QUERIES)
        return slice(length - NUM_SPEED_QUERIES, length)


class SimLingo(nn.Module):
    """Vision tower, projector, language model, queries and heads under one roof; see the module docstring."""

    def __init__(self, config: SimLingoConfig, placeholder_id: int) -> None:
        """Args: placeholder_id: id of `<TARGET_POINT>`, outside the embedding table."""
        super().__init__()
        self.config, self.placeholder_id = config, placeholder_id
        h = config.hidden_size
        self.vision = InternVLVisionModel(config.vision_config())
        shuffle = round(1 / config.downsample_ratio)
        self.projector = Projector(int(config.vision["hidden_size"]) * shuffle**2, h)
        self.language = Qwen2ForCausalLM(config.language_config())
        self.route_queries = nn.Parameter(0.02 * torch.randn(1, NUM_ROUTE_QUERIES, h))
        self.speed_queries = nn.Parameter(0.02 * torch.randn(1, NUM_SPEED_QUERIES, h))
        self.route_head = nn.Sequential(
            nn.Linear(h, 512), nn.SiLU(), nn.Linear(512, 256), nn.SiLU(), nn.Linear(256, 2, bias=False)
        )
        self.speed_head = nn.Sequential(nn.Linear(h, 256), nn.SiLU(), nn.Linear(256, config.speed_dim, bias=False))
        self.waypoint_encoder = nn.Sequential(
            nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, h)
        )

    @property
    def device(self) -> torch.device:
        return self.route_queries.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.projector.linear_1.weight.dtype

    def set_attention(self, name: str) -> None:
        """Choose the attention implementation of both towers ('eager', 'sdpa', or one registered with transformers)."""
        self.vision.set_attn_implementation(name)
        self.language.set_attn_implementation(name)

    def encode_tiles(self, pixels_T3SS: Tensor) -> Tensor:
        """Image tokens [T, N, H] of normalised tiles."""
        return self.encode_patches(self.embed_patches(pixels_T3SS))

    def embed_patches(self, pixels_T3SS: Tensor) -> Tensor:
        """CLS and patch embeddings [T, 1 + patches, C]: where a graph for attention gradients may start."""
        return self.vision.embeddings(pixels_T3SS.to(self.compute_dtype))

    def encode_patches(self, embeddings_TNC: Tensor) -> Tensor:
        """Image tokens [T, N, H] of embedded patches."""
        x = self.vision.layernorm(self.vision.encoder(embeddings_TNC).last_hidden_state)
        grid = self.config.patch_grid
        x = pixel_shuffle(x[:, 1:].unflatten(1, (grid, grid)), round(1 / self.config.downsample_ratio))
        return self.projector(x.flatten(1, 2))

    def embed_prompt(self, prompt: PromptBatch, tokens_TNH: Tensor, image_token_id: int) -> Tensor:
        """Prompt embeddings [B, P, H] with image tokens and target points in their places."""
        ids = prompt.ids_BP
        table = self.language.model.embed_tokens
        # Placeholder ids lie beyond the table and are overwritten below.
        x = table(ids.clamp_max(table.num_embeddings - 1))
        is_image = (ids == image_token_id).unsqueeze(-1)
        x = x.masked_scatter(is_image, tokens_TNH.to(x.dtype))
        is_point = ids == self.placeholder_id
        if is_point.any():
            points = torch.cat([p for p in prompt.points_B if p is not None]).to(self.device)
            encoded = self.waypoint_encoder(points.to(_dtype(self.waypoint_encoder))).to(x.dtype)
            x = x.masked_scatter(is_point.unsqueeze(-1), encoded)
        return x

    @torch.no_grad()
    def generate(self, embeds_BPH: Tensor, mask_BP: Tensor, eos_id: int, max_new_tokens: int = 100) -> list[list[int]]:
        """Greedy text for each frame, the EOS token included where it was reached, with a KV cache."""
        batch = embeds_BPH.shape[0]
        cache, mask, x = DynamicCache(config=self.language.config), mask_BP, embeds_BPH
        position = _positions(mask)
        text: list[list[int]] = [[] for _ in range(batch)]
        running = torch.ones(batch, dtype=torch.bool, device=mask.device)
        for _ in range(max_new_tokens):
            out = self.language.model(
                inputs_embeds=x, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            )
            token = self.language.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
            for row, (token_id, active) in enumerate(zip(token.tolist(), running.tolist(), strict=True)):
                if active:
                    text[row].append(token_id)
            running &= token != eos_id
            if not running.any():
                break
            # Rows that have ended go on writing into the void; their text is no longer recorded.
            x = self.language.model.embed_tokens(token)[:, None]
            mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
            position = position[:, -1:] + 1
        return text

    def decide(self, embeds_BPH: Tensor, mask_BP: Tensor, text: list[list[int]]) -> Decision:
        """One forward over [prompt, text, queries]: hidden states, route and speed waypoints of every frame."""
        prompt_lengths = tuple(int(n) for n in mask_BP.sum(1))
        text_lengths = tuple(len(t) for t in text)
        length = max(p + t for p, t in zip(prompt_lengths, text_lengths, strict=True)) + NUM_QUERIES
        queries = torch.cat([self.route_queries, self.speed_queries], 1)[0].to(embeds_BPH.dtype)
        rows, starts = [], []
        for b, ids in enumerate(text):
            words = self.language.model.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
            row = torch.cat([embeds_BPH[b, embeds_BPH.shape[1] - prompt_lengths[b] :], words, queries])
            starts.append(length - len(row))
            rows.append(nn.functional.pad(row, (0, 0, length - len(row), 0)))
        x = torch.stack(rows)
        mask = torch.ones(x.shape[:2], dtype=mask_BP.dtype, device=self.device)
        for b, start in enumerate(starts):
            mask[b, :start] = 0
        hidden = self.language.model(
            inputs_embeds=x, attention_mask=mask, position_ids=_positions(mask), use_cache=False
        ).last_hidden_state
        route, speed = self.trajectory(hidden[:, -NUM_QUERIES:])
        return Decision(hidden, route, speed, tuple(starts), prompt_lengths, text_lengths)

    def deltas(self, queries_B30H: Tensor) -> tuple[Tensor, Tensor]:
        """Per-step displacements [B,20,2] and [B,10,D] from the query features."""
        x = queries_B30H.to(_dtype(self.route_head))
        return self.route_head(x[:, :NUM_ROUTE_QUERIES]), self.speed_head(x[:, NUM_ROUTE_QUERIES:])

    def trajectory(self, queries_B30H: Tensor) -> tuple[Tensor, Tensor]:
        """Route [B,20,2] and speed waypoints [B,10,2] in metres: cumulative sums of the predicted steps.

        A model with `speed_dim` 1 predicts distances; they are laid along x, so that every consumer sees positions.
        """
        route, speed = (steps.cumsum(1) for steps in self.deltas(queries_B30H))
        return route, nn.functional.pad(speed, (0, 2 - speed.shape[-1]))

    def token_logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] (float32) of the token after each of these hidden states."""
        return self.language.lm_head(hidden_NH).float()


def pixel_shuffle(x_TGGC: Tensor, factor: int = 2) -> Tensor:
    """InternVL's pixel shuffle v2: token (r, c) holds patches (2r..2r+1, 2c..2c+1), row by row, in its channels."""
    t, g, _, c = x_TGGC.shape
    n = g // factor
    x = x_TGGC.view(t, n, factor, n, factor, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(t, n, n, factor * factor * c)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _positions(mask_BL: Tensor) -> Tensor:
    """Positions counted from the first real token, so that left padding changes nothing."""
    return (mask_BL.cumsum(1) - 1).clamp_min(0)
