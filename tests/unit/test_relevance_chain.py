"""The chain from scalar to patches: folded online, it equals the matrices of stored payloads, frame by frame."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vla_ray.attention import IMPLEMENTATION
from vla_ray.data.tiles import TileGeometry
from vla_ray.explain.chain import STRENGTH, cross_projector, patch_groups, seed_of
from vla_ray.explain.folds import FOLDS
from vla_ray.explain.matrices import relevance_of
from vla_ray.models.simlingo import load_model, load_processor
from vla_ray.models.simlingo.config import read_config
from vla_ray.stages.payloads import build_payload
from vla_ray.stages.visit import Visit
from vla_ray.stages.work import FrameRef
from vla_ray.targets import Spline, parse_targets

KINDS = ("positive", "negative", "signed")
TARGETS = (
    *parse_targets("action", ["curv_energy", "longitudinal_progress"]),
    *parse_targets("text", text_token_strategy=["max"]),
)


@pytest.fixture(scope="module")
def driver(repo: Any) -> Any:
    root = repo / "checkpoints/simlingo-tiny"
    config = read_config(root / ".hydra/config.yaml")
    processor = load_processor(config)
    model = load_model(config, root / "checkpoints/epoch=013.ckpt/pytorch_model.pt", processor.placeholder_id)
    model.set_attention(IMPLEMENTATION)
    frames = []
    for scene, points in (("red_light", None), ("lead_car", ((10.0, 0.0), (25.0, 0.5)))):
        rgb = np.asarray(Image.open(repo / f"datasets/demo_drive/{scene}/images/frame_0003.png").convert("RGB"))
        rgb = rgb[:, :150] if scene == "lead_car" else rgb  # one tile, so that batches are ragged
        tiles, geometry = processor.tiler(rgb)
        prompt = processor.prompt(len(tiles), 5.0, points)
        frames.append((tiles, geometry, prompt))
    return model, processor, frames


def visit(driver: Any, *which: int, folds: Any = None) -> Visit:
    model, processor, frames = driver
    return Visit(model, processor, [frames[i][0] for i in which], [frames[i][2] for i in which], folds=folds)


def payload(driver: Any, v: Visit, target: Any, b: int, frame: int, level: str) -> dict[str, Any]:
    geometry: TileGeometry = driver[2][frame][1]
    explained = v.explain(target, Spline(), keep_graph=True)
    ref = FrameRef("s/f", "s", "f", "/f.png", 5.0)
    return build_payload(level, v, explained, b, ref, geometry, driver[1], Spline(), torch.float32)


def from_matrices(content: dict[str, Any], kind: str, config: Any) -> tuple[Tensor, Tensor]:
    """Language row [L] and patches [tiles, patches] by full products, from a full or reduced payload alone."""
    seed, spans = content["meta"]["seed"], content["meta"]["spans"]

    rows = torch.zeros(1, spans["speed_queries"][1])
    rows[0, seed["rows"]] = seed["weights"]
    language_blocks = [e[0] for name, e in content["attention"].items() if name.startswith("language")]
    hops = sum(rows[0] @ (e["attn"] * e["grad"]).abs().mean(1)[0] for e in language_blocks)
    scale = STRENGTH / float(hops.sum())  # one hop moves STRENGTH of the seed

    def reduced_heads(entry: dict[str, Any]) -> Tensor:
        a = entry["attn"] * entry["grad"] * scale
        return {"positive": a.clamp_min(0), "negative": (-a).clamp_min(0), "signed": a}[kind].mean(1)

    def chain(tower: str, rows: Tensor) -> Tensor:
        blocks = [e[0] for name, e in content["attention"].items() if name.startswith(tower)]
        total = torch.eye(blocks[0]["shape"][-1]).expand(blocks[0]["shape"][0], -1, -1)
        for entry in blocks:
            total = total + reduced_heads(entry) @ total
        return torch.einsum("bi,bij->bj", rows, total)

    language = chain("language", rows)[0]
    first, last = spans["image"]
    groups = patch_groups(config.patch_grid, 2)
    vision = chain("vision", cross_projector(language[first:last].view(-1, len(groups)), groups))
    return language, vision[:, 1:]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_online_equals_full_products_of_the_recorded_matrices(driver: Any, target: Any) -> None:
    recorded, folded = visit(driver, 0, 1), visit(driver, 0, 1, folds=tuple(FOLDS))
    for b in (0, 1):
        full = payload(driver, recorded, target, b, b, "full")
        online = payload(driver, folded, target, b, b, "relevance")["relevance"]
        for kind in KINDS:
            language, patches = from_matrices(full, kind, driver[1].config)
            fold = f"relevancy_{kind}"
            for ours, expected in ((online["language"][fold], language), (online["patches"][fold], patches)):
                assert ours.shape == expected.shape
                assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-4, (b, kind)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_fold_is_the_same_from_every_payload_level(driver: Any, target: Any) -> None:
    recorded, folded = visit(driver, 0, 1), visit(driver, 0, 1, folds=tuple(FOLDS))
    for b in (0, 1):
        online = relevance_of(payload(driver, folded, target, b, b, "relevance"), tuple(FOLDS))
        for level, tolerance in (("full", 1e-4), ("reduced", 1e-3)):
            stored = relevance_of(payload(driver, recorded, target, b, b, level), tuple(FOLDS))
            for part, ours in online.to_dict().items():
                theirs = stored.to_dict()[part]
                assert set(ours) == set(theirs)
                for fold in ours:
                    # Signed from float16 is a difference of two maps, exact to the size of these, not of what is left.
                    signs = ("positive", "negative") if level == "reduced" else ("signed",)
                    sizes = online.language if part == "language" else online.patches
                    size = max(float(sizes[fold.replace("signed", sign)].abs().max()) for sign in signs)
                    error = (ours[fold] - theirs[fold]).abs().max() / size
                    assert float(error) < tolerance, (b, level, part, fold)


def test_batched_equals_single(driver: Any) -> None:
    together = visit(driver, 0, 1, folds=tuple(FOLDS))
    for b in (0, 1):
        alone = visit(driver, b, folds=tuple(FOLDS))
        for target in TARGETS:
            many = payload(driver, together, target, b, b, "relevance")["relevance"]
            one = payload(driver, alone, target, 0, b, "relevance")["relevance"]
            for fold in FOLDS:
                error = (many["patches"][fold] - one["patches"][fold]).abs().max() / one["patches"][fold].abs().max()
                assert float(error) < 1e-4, (b, target.name, fold)


def test_a_payload_is_small_and_holds_no_matrix(driver: Any, tmp_path: Any) -> None:
    from vla_ray.storage import payload as payload_file
    from vla_ray.storage.files import Location

    content = payload(driver, visit(driver, 0, folds=tuple(FOLDS)), TARGETS[0], 0, 0, "relevance")
    assert "attention" not in content
    assert payload_file.save(Location.of(tmp_path / "a.pt"), content) < 100_000


def test_a_map_does_not_depend_on_the_unit_of_the_scalar() -> None:
    hidden, gradient = torch.randn(5, 8), torch.randn(5, 8)
    one, thousand = seed_of(hidden, gradient), seed_of(hidden, 1000 * gradient)
    assert torch.allclose(one.weights, thousand.weights, atol=1e-6)
    assert float(one.weights.sum()) == pytest.approx(1)
    assert thousand.grad_rms == pytest.approx(1000 * one.grad_rms, rel=1e-5)
    nothing = seed_of(hidden, torch.zeros(5, 8))
    assert float(nothing.weights.abs().sum()) == nothing.grad_rms == 0


def test_crossing_the_projector_keeps_mass_and_place() -> None:
    groups = patch_groups(4, 2)
    assert groups.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    seed = cross_projector(torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 4.0, 0.0, 0.0]]), groups)
    assert seed.shape == (2, 17)
    assert seed.sum(1).tolist() == [3, 4]
    assert seed[0, 0] == 0, "the CLS token is dropped by the projector"
    assert seed[1, 1:].nonzero().squeeze(1).tolist() == [2, 3, 6, 7]


def test_a_visit_is_freed_at_once(driver: Any) -> None:
    """Its graph is gigabytes on a real model; waiting for the garbage collector would be running out of memory."""
    gc.disable()
    try:
        for folds in (None, tuple(FOLDS)):
            v = visit(driver, 0, folds=folds)
            for target in TARGETS:
                v.explain(target, Spline(), keep_graph=True)
            alive = weakref.ref(v)
            del v
            assert alive() is None, folds
    finally:
        gc.enable()


def test_one_hop_moves_strength_times_the_seed_whatever_the_unit(driver: Any) -> None:
    full = payload(driver, visit(driver, 0), TARGETS[1], 0, 0, "full")
    louder = {**full, "meta": {**full["meta"], "seed": {**full["meta"]["seed"]}}, "attention": {}}
    louder["meta"]["seed"]["grad_rms"] *= 1e3
    for name, (entry,) in full["attention"].items():
        louder["attention"][name] = [{**entry, "grad": entry["grad"] * 1e3}]
    quiet, loud = (relevance_of(p, ("relevancy_negative",)) for p in (full, louder))
    for part, rows in quiet.to_dict().items():
        for fold, row in rows.items():
            assert torch.allclose(row, loud.to_dict()[part][fold], rtol=1e-4, atol=1e-9)
    # With a faint strength only the first hop is left: positive and negative together move that share of the seed.
    faint = relevance_of(full, ("relevancy_positive", "relevancy_negative"), strength=1e-3)
    moved = sum(float(row.sum()) - 1 for row in faint.language.values())
    assert moved == pytest.approx(1e-3, rel=0.02)
    shares = quiet.shares("relevancy_negative", full["meta"]["spans"], _seed(full))
    assert set(shares) == {"image", "text", "prompt", "queries"}
    assert sum(shares.values()) == pytest.approx(1)


def _seed(content: dict[str, Any]) -> Tensor:
    row = torch.zeros(content["meta"]["spans"]["speed_queries"][1])
    row[content["meta"]["seed"]["rows"]] = content["meta"]["seed"]["weights"]
    return row


def whole_chain(v: Visit, explained: Any, processor: Any) -> tuple[Tensor, Tensor]:
    """Relevancy of the first frame by full products of its recorded matrices, in the model's own precision."""

    def matrices(tower: str) -> list[Tensor]:
        names = [name for name in v.probabilities if name.startswith(tower)]
        return [(v.probabilities[n].detach() * explained.gradients[n]).clamp_min(0).mean(1) for n in names]

    def first_hop(weights: Tensor) -> Tensor:
        names = [name for name in v.probabilities if name.startswith("language")]
        return sum(
            weights @ (v.probabilities[n].detach() * explained.gradients[n]).abs().mean(1)[0] for n in names
        ).sum()  # type: ignore[union-attr]

    def chain(tower: str, rows: Tensor, scale: Tensor) -> Tensor:
        layers = matrices(tower)
        total = torch.eye(layers[0].shape[-1], dtype=rows.dtype).expand(len(layers[0]), -1, -1)
        for a in layers:
            total = total + scale * a @ total
        return torch.einsum("bi,bij->bj", rows, total)

    dtype = next(iter(v.probabilities.values())).dtype
    rows = torch.zeros(1, v.decision.hidden_BLH.shape[1], dtype=dtype)
    rows[0, explained.rows[0]] = explained.seeds[0].weights.to(dtype)
    scale = STRENGTH / first_hop(rows[0])
    language = chain("language", rows, scale)
    groups = patch_groups(processor.config.patch_grid, 2)
    image = torch.tensor([i for i, t in enumerate(v.prompts[0].ids) if t == processor.image_token_id])
    seed = cross_projector(language[0, image].view(-1, len(groups)), groups)
    return language, chain("vision", seed, scale)


@pytest.fixture(scope="module")
def golden_driver(golden: Any) -> Any:
    root = golden / "simlingo_a"
    config = read_config(root / "checkpoint_root/.hydra/config.yaml", root / "pretrained/InternVL2-tiny-a", None)
    processor = load_processor(config)
    checkpoint = root / "checkpoint_root/checkpoints/epoch=013.ckpt/pytorch_model.pt"
    model = load_model(config, checkpoint, processor.placeholder_id)
    model.set_attention(IMPLEMENTATION)
    rgb = np.random.default_rng(0).integers(0, 255, (180, 360, 3), np.uint8)
    tiles, geometry = processor.tiler(rgb)
    return model, processor, [(tiles, geometry, processor.prompt(len(tiles), 5.0))]


def exact_norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon))


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
@pytest.mark.parametrize("which", ["tiny", "golden"])
def test_the_whole_chain_in_both_precisions(
    request: pytest.FixtureRequest, which: str, precision: str, tolerance: float
) -> None:
    driver = request.getfixturevalue("golden_driver" if which == "golden" else "driver")
    model = copy.deepcopy(driver[0]).to(getattr(torch, precision))
    for module in model.modules():
        if type(module).__name__ == "Qwen2RMSNorm":  # rounds to float32 whatever the model is
            module.forward = functools.partial(exact_norm, module)  # type: ignore[method-assign]
    same = (model, *driver[1:])
    recorded = visit(same, 0)
    folded = Visit(
        model, driver[1], [driver[2][0][0]], [driver[2][0][2]], folds=("relevancy_positive",), texts=recorded.texts
    )
    for target in TARGETS[:2]:
        full = recorded.explain(target, Spline(), keep_graph=True)
        online = folded.explain(target, Spline(), keep_graph=True).relevance
        language, vision = whole_chain(recorded, full, driver[1])
        for ours, expected in ((online["language"], language), (online["vision"], vision)):
            row = ours["relevancy_positive"]
            assert float((row - expected).abs().max() / expected.abs().max()) < tolerance, target.name
