"""The tiny driver's recipe: what it writes is what the ordinary loader loads, and training lowers the loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_ray.data.synthetic import CAUSES, Kind, render
from vla_ray.models.simlingo import load_model, load_processor
from vla_ray.models.simlingo.config import read_config
from vla_ray.models.simlingo.processing import ADDED_TOKENS, make_tiler, normalise
from vla_ray.training.tiny_driver.data import (
    CATEGORIES,
    PROMPTS,
    answer,
    frame_scene,
    patch_categories,
    prompt,
    render_frames,
)
from vla_ray.training.tiny_driver.files import CHECKPOINT_PATH, CONFIG_PATH, VARIANT
from vla_ray.training.tiny_driver.recipe import Recipe, build, evaluate, export, fit, train
from vla_ray.training.tiny_driver.report import score_table

SMALL = Recipe(frames=8, held_out=4, steps=1, vision_steps=0, batch=4, workers=0, threads=1, vit_layers=1, lm_layers=1)


def test_exported_files_give_the_model_back(tmp_path: Path) -> None:
    processor, model = build(tmp_path, SMALL)
    frames = render_frames(range(8), model.config, tmp_path / "tiles.npy", workers=0)
    fit(model, processor, frames, SMALL)
    model.set_attention("sdpa")
    export(model, tmp_path)

    config = read_config(tmp_path / CONFIG_PATH)
    again = load_processor(config)
    loaded = load_model(config, tmp_path / CHECKPOINT_PATH, again.placeholder_id)
    assert again.placeholder_id >= int(config.language["vocab_size"])
    outputs = []
    for m, p in ((model, processor), (loaded, again)):
        prompts = [prompt(p, 5.3, frames.points[0], True), prompt(p, 0.0, None, False)]
        ready = p.batch(prompts, [2, 2])
        with torch.no_grad():
            tokens = m.encode_tiles(normalise(np.array(frames.tiles[:2]).reshape(-1, 168, 168, 3)))
            embeds = m.embed_prompt(ready, tokens, p.image_token_id)
            outputs.append((embeds, m.decide(embeds, ready.mask_BP, [[p.eos_id], [p.eos_id]])))
    # The language model is stored as float16, as in the released file.
    torch.testing.assert_close(outputs[0][0], outputs[1][0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(outputs[0][1].route_B202, outputs[1][1].route_B202, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(outputs[0][1].speed_B102, outputs[1][1].speed_B102, atol=5e-3, rtol=5e-3)


def test_layout_and_dtypes_are_the_released_ones(tmp_path: Path, golden: Path) -> None:
    _, model = build(tmp_path, SMALL)
    state = torch.load(export(model, tmp_path), weights_only=True)
    reference = json.loads((golden / "simlingo_a/expected/checkpoint_keys.json").read_text())
    one_layer = {k for k in reference if ".layers.1." not in k and ".layers.2." not in k}
    assert set(state) == one_layer
    assert {k: str(v.dtype) for k, v in state.items()} == {
        k: "torch." + reference[k][1].removeprefix("torch.") for k in one_layer
    }
    theirs = golden / "simlingo_a/pretrained/InternVL2-tiny-a"
    ours = tmp_path / "pretrained" / VARIANT
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}


def test_tokenizer_knows_the_texts_and_not_the_run_time_tokens(tmp_path: Path) -> None:
    processor, _ = build(tmp_path, SMALL)
    saved = json.loads((tmp_path / "pretrained" / VARIANT / "tokenizer.json").read_text())
    assert not {t["content"] for t in saved["added_tokens"]} & set(ADDED_TOKENS)
    for cause in CAUSES:
        ids = processor.tokenizer(answer(cause, True), add_special_tokens=False)["input_ids"]
        assert processor.decode(ids) == answer(cause, True)
        assert len(ids) < 14
    ids = prompt(processor, 7.25, torch.zeros(2, 2), True).ids
    assert ids.count(processor.placeholder_id) == 2
    assert ids.count(processor.image_token_id) == 72
    assert "7.2 m/s" in processor.decode(ids)


def test_categories_follow_the_ids_and_are_blind_to_the_cause(tmp_path: Path) -> None:
    _, model = build(tmp_path, SMALL)
    rgb, _ = render(frame_scene(1))
    _, geometry = make_tiler(model.config)(rgb)
    ids = np.zeros((224, 448), np.uint8)
    ids[:80, 224:] = Kind.LEAD_CAR
    seen = patch_categories(ids, geometry, model.config.patch_size)
    car = next(i for i, group in enumerate(CATEGORIES) if Kind.LEAD_CAR in group)
    assert seen.shape == (2, 144, len(CATEGORIES))
    assert not seen[0].any()
    assert seen[1, :72, car].all()
    assert not seen[1, 96:].any()
    ids[ids == Kind.LEAD_CAR] = Kind.PARKED_CAR
    np.testing.assert_array_equal(patch_categories(ids, geometry, model.config.patch_size), seen)


@pytest.mark.slow
def test_rendering_in_processes_gives_the_same_frames(tmp_path: Path) -> None:
    _, model = build(tmp_path, SMALL)
    here = render_frames(range(3), model.config, tmp_path / "a.npy", workers=0)
    there = render_frames(range(3), model.config, tmp_path / "b.npy", workers=1)
    np.testing.assert_array_equal(here.tiles, there.tiles)
    for field in ("route", "speed_waypoints", "points", "speed", "cause", "categories"):
        torch.testing.assert_close(getattr(here, field), getattr(there, field))


def test_train_writes_everything_and_reports_every_prompt(tmp_path: Path) -> None:
    result = train(tmp_path / "out", SMALL)
    assert set(result["scores"]) == {*PROMPTS, "overall"}
    table = score_table(result["scores"])
    assert len(table.splitlines()) == 2 + len(PROMPTS) + 1
    readme = (tmp_path / "out/README.md").read_text()
    assert table in readme
    assert f"{result['blind']['command, waypoints only']['route_ade']:.2f} m" in readme
    assert "category" in readme or "categories" in readme
    assert (tmp_path / "out" / CHECKPOINT_PATH).stat().st_size == result["bytes"]


@pytest.mark.slow
def test_a_short_training_lowers_the_loss_and_repeats(tmp_path: Path) -> None:
    recipe = replace(SMALL, frames=48, steps=120, vision_steps=20, batch=12, warmup_steps=20)
    results = []
    for _ in range(2):
        processor, model = build(tmp_path, recipe)
        frames = render_frames(range(48), model.config, tmp_path / "tiles.npy", workers=0)
        before = evaluate(model, processor, frames)["overall"]
        history = [{k: v for k, v in part.items() if k != "seconds"} for part in fit(model, processor, frames, recipe)]
        results.append((before, history, evaluate(model, processor, frames)["overall"]))
    before, history, after = results[0]
    assert history[-1]["probe"] < history[0]["probe"]
    assert after["route_ade"] < 0.8 * before["route_ade"]
    assert after["speed_ade"] < 0.8 * before["speed_ade"]
    assert results[0] == results[1]
