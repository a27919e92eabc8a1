"""The bundled checkpoint drives scenes it never saw, within the bounds that its README states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vla_ray.data.synthetic import drive, expert, render, target_points
from vla_ray.models.simlingo import Processor, SimLingo, load_model, load_processor
from vla_ray.models.simlingo.config import read_config
from vla_ray.models.simlingo.processing import normalise
from vla_ray.training.tiny_driver.data import PROMPTS, answer, prompt, render_frames
from vla_ray.training.tiny_driver.files import CHECKPOINT_PATH, CONFIG_PATH
from vla_ray.training.tiny_driver.recipe import TRAINING_SEEDS_FROM
from vla_ray.training.tiny_driver.report import evaluate


@pytest.fixture(scope="module")
def driver(repo: Path) -> tuple[Processor, SimLingo]:
    root = repo / "checkpoints/simlingo-tiny"
    config = read_config(root / CONFIG_PATH)
    processor = load_processor(config)
    return processor, load_model(config, root / CHECKPOINT_PATH, processor.placeholder_id)


def test_held_out_frames(driver: tuple[Processor, SimLingo], tmp_path: Path) -> None:
    processor, model = driver
    seeds = range(5_000, 5_048)
    assert max(seeds) < TRAINING_SEEDS_FROM
    scores = evaluate(model, processor, render_frames(seeds, model.config, tmp_path / "tiles.npy", workers=0))
    for name in (*PROMPTS, "overall"):
        assert scores[name]["route_ade"] < 0.5, name
        assert scores[name]["speed_ade"] < 0.5, name
    assert scores["overall"]["text_right"] > 0.9


def test_target_points_steer(driver: tuple[Processor, SimLingo]) -> None:
    """Mirrored target points on the same straight road move the end of the route to their side."""
    processor, model = driver
    scene = next(drive(1, 1, "clear", curve=False))
    tiles, _ = processor.tiler(render(scene)[0])
    ends = []
    for side in (-1.0, 1.0):
        points = torch.tensor([[10.0, side * 1.5], [19.0, side * 5.5]])
        ends.append(_act(driver, tiles, scene.speed, points)[0][-1, 1])
    straight = _act(driver, tiles, scene.speed, torch.from_numpy(target_points(scene)))[0][-1, 1]
    assert ends[0] < straight < ends[1]
    assert model.training is False


def test_a_red_light_stops_it_and_a_clear_road_does_not(driver: tuple[Processor, SimLingo]) -> None:
    for cause in ("red_light", "clear"):
        *_, scene = drive(12, 4, cause, curve=False)
        tiles, _ = driver[0].tiler(render(scene)[0])
        _, waypoints, text = _act(driver, tiles, scene.speed, None)
        assert text == answer(cause, True)
        assert abs(waypoints[-1, 0] - expert(scene).speed_waypoints[-1, 0]) < 1.5


def _act(
    driver: tuple[Processor, SimLingo], tiles: np.ndarray, speed: float, points: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, str]:
    processor, model = driver
    asked = prompt(processor, speed, points, True)
    ready = processor.batch([asked], [len(tiles)])
    with torch.no_grad():
        embeds = model.embed_prompt(ready, model.encode_tiles(normalise(tiles)), processor.image_token_id)
        text = model.generate(embeds, ready.mask_BP, processor.eos_id, 24)
        decision = model.decide(embeds, ready.mask_BP, text)
    return decision.route_B202[0], decision.speed_B102[0], processor.decode(text[0]).strip()
