"""Faithfulness measures on models whose truth is known: linear, one patch, constant; and once on the bundled driver."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vla_ray.data.synthetic import read_truth
from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import TargetError
from vla_ray.explain.faithfulness import (
    Moved,
    average,
    between_targets,
    dependence,
    depends_on_image,
    evaluate_maps,
    localise,
    mean_map,
    nuisance,
    perturbed_tiles,
    random_maps,
    randomisation_stages,
    randomise_,
    similarity,
    spearman,
    temporal_consistency,
)
from vla_ray.explain.faithfulness.curves import STEPS
from vla_ray.explain.faithfulness.dependence import PERTURBATIONS
from vla_ray.explain.faithfulness.grid import coverage, on_grid
from vla_ray.explain.perturb import Probe, blurred, canvas, canvas_grid
from vla_ray.explain.question import Answer, Question
from vla_ray.explain.references import occlusion
from vla_ray.models.simlingo import SimLingo, load_model, load_processor
from vla_ray.models.simlingo.config import read_config
from vla_ray.models.simlingo.processing import normalise
from vla_ray.targets import Spline, parse_targets

SIDE = 24
SHAPE = (12, 24)  # 288 cells of 2 px, as many as the tiny driver's canvas has patches
CELLS = SHAPE[0] * SHAPE[1]
# The picture is 40 high, of which 28 rows are kept; a cell is 7/3 x 2 picture pixels.
GEOMETRY = TileGeometry(40, 48, 28, 24, 48, ((0, 0, 24, 24), (24, 0, 48, 24)), thumbnail=False)


def linear(coefficients: np.ndarray) -> Probe:
    """Hiding cells S moves every point sideways by the sum of their coefficients, in metres."""
    weights = torch.from_numpy(coefficients).double()

    def ask(pixels: Tensor) -> Answer:
        whole = torch.cat([pixels[:, 0, 0], pixels[:, 1, 0]], -1).double()
        y = (torch.nn.functional.avg_pool2d(whole[:, None], 2)[:, 0] * weights).sum((1, 2))
        sideways = torch.stack([torch.zeros_like(y), y], -1)[:, None]
        ahead = torch.stack([torch.arange(20.0), torch.zeros(20)], -1).double()
        return Answer(ahead + sideways, ahead[:10] + sideways, y)

    return Probe(ask, torch.ones(2, 3, SIDE, SIDE), torch.zeros(2, 3, SIDE, SIDE), GEOMETRY)


def positive(seed: int = 0) -> np.ndarray:
    # Not the generator that breaks ties in the curves, or a flat map would be ordered like these.
    values = np.random.default_rng([seed, 1]).random(SHAPE) ** 4
    return values / values.sum()


def one_patch(row: int = 5, column: int = 7, metres: float = 2.0) -> np.ndarray:
    values = np.zeros(SHAPE)
    values[row, column] = metres
    return values


def scores_of(found: Any, name: str) -> Any:
    scores = found.curves[name].scores
    assert scores is not None
    return scores


# Curves


def test_curves_of_a_linear_model_are_sums_of_its_coefficients() -> None:
    truth = positive()
    found = evaluate_maps(linear(truth), {"oracle": truth, "worst": -truth}, "speed", SHAPE)
    counts = np.unique([round(q * CELLS) for q in STEPS])
    assert found.forwards == 2 + 2 * 2 * (len(counts) - 2)
    assert (found.shape, found.excluded) == (SHAPE, False)
    assert found.all_hidden_m == pytest.approx(1)
    assert (found.scalar, found.all_hidden_scalar) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    down = np.concatenate([[0], np.sort(truth.ravel())[::-1].cumsum()])
    up = np.concatenate([[0], np.sort(truth.ravel()).cumsum()])
    curve = found.curves["oracle"]
    np.testing.assert_allclose(curve.shares, counts / CELLS)
    np.testing.assert_allclose(curve.deleted_m, down[counts], atol=1e-6)
    np.testing.assert_allclose(curve.kept_m, 1 - down[counts], atol=1e-6)
    np.testing.assert_allclose(curve.scalar_change, -down[counts], atol=1e-6)
    np.testing.assert_allclose(found.curves["worst"].deleted_m, up[counts], atol=1e-6)

    def early(sums: np.ndarray) -> float:
        x = np.unique([*(c / CELLS for c in counts if c / CELLS < 0.08), 0.08])
        return float(np.trapezoid(np.interp(x, counts / CELLS, sums[counts]), x) / 0.08)

    def auc(sums: np.ndarray) -> float:
        return float(np.trapezoid(sums[counts], counts / CELLS))

    oracle, worst = scores_of(found, "oracle"), scores_of(found, "worst")
    assert oracle.early == pytest.approx(early(down), abs=1e-5)
    assert worst.early == pytest.approx(early(up), abs=1e-5)
    assert oracle.deletion_auc == pytest.approx(auc(down), abs=1e-5)
    assert oracle.lerf_auc == pytest.approx(1 - auc(down), abs=1e-5)
    assert oracle.insertion_auc == pytest.approx(auc(down), abs=1e-5)
    assert oracle.gap == pytest.approx(2 * auc(down) - 1, abs=1e-5)
    eraser = np.interp([0.01, 0.05, 0.1, 0.2, 0.5], counts / CELLS, down[counts]).mean()
    assert oracle.comprehensiveness == pytest.approx(eraser, abs=1e-5)
    assert oracle.sufficiency == pytest.approx(1 - eraser, abs=1e-5)
    assert oracle.flip_auc == pytest.approx(auc(down), abs=1e-5)
    assert oracle.flip_mean == pytest.approx(-auc(down), abs=1e-5)
    assert worst.gap == pytest.approx(2 * auc(up) - 1, abs=1e-5)


def test_the_oracle_beats_random_maps_of_its_own_statistics_and_the_prior() -> None:
    truth = positive()
    others = [positive(seed) for seed in range(1, 6)]
    maps = {"oracle": truth, "prior": mean_map(others)}
    maps |= {f"random {k}": m for k, m in enumerate(random_maps(truth, 5))}
    found = evaluate_maps(linear(truth), maps, "speed", SHAPE)
    chance = average([scores_of(found, f"random {k}") for k in range(5)])
    assert chance is not None
    oracle, prior = scores_of(found, "oracle"), scores_of(found, "prior")
    for name in ("early", "deletion_auc", "insertion_auc", "gap", "comprehensiveness", "flip_auc"):
        assert getattr(oracle, name) > max(getattr(chance, name), getattr(prior, name)) + 0.1, name
    assert oracle.sufficiency < chance.sufficiency - 0.1
    assert chance.gap == pytest.approx(0, abs=0.1)


def test_one_patch() -> None:
    truth = one_patch()
    found = evaluate_maps(linear(truth), {"oracle": truth, "worst": -truth}, "route", SHAPE)
    assert found.all_hidden_m == pytest.approx(2, abs=1e-3)
    # The first step hides one cell and loses half of it to the trapezoid.
    assert scores_of(found, "oracle").early == pytest.approx(1 - 0.5 / CELLS / 0.08, abs=1e-3)
    assert scores_of(found, "oracle").gap > 0.99
    assert scores_of(found, "worst").early == 0
    assert scores_of(found, "worst").gap == pytest.approx(-0.9, abs=0.01)  # its step is found to within the last tenth


def test_a_constant_model_is_excluded_and_nothing_is_nan() -> None:
    found = evaluate_maps(linear(np.zeros(SHAPE)), {"a": positive(), "flat": np.ones(SHAPE)}, "speed", SHAPE)
    assert found.excluded
    assert found.all_hidden_m == 0
    for curve in found.curves.values():
        assert curve.scores is None
        assert not curve.deleted_m.any()
        assert not curve.kept_m.any()
    assert "NaN" not in json.dumps(dataclasses.asdict(found), default=lambda a: a.tolist())
    barely = evaluate_maps(linear(one_patch(metres=0.09)), {"a": positive()}, "speed", SHAPE)
    assert barely.excluded
    assert not evaluate_maps(linear(one_patch(metres=0.11)), {"a": positive()}, "speed", SHAPE).excluded


def test_a_scalar_that_never_moves_has_no_flip_score() -> None:
    probe = linear(one_patch())

    def fixed(pixels: Tensor) -> Answer:
        answer = probe.ask(pixels)
        return Answer(answer.route, answer.speed, torch.zeros_like(answer.scalar))

    found = evaluate_maps(dataclasses.replace(probe, ask=fixed), {"a": one_patch()}, "speed", SHAPE)
    assert scores_of(found, "a").flip_auc is None
    assert scores_of(found, "a").flip_mean == 0
    mixed = average([scores_of(found, "a"), scores_of(evaluate_maps(probe, {"a": one_patch()}, "speed", SHAPE), "a")])
    assert mixed is not None
    assert mixed.flip_auc == pytest.approx(1 - 0.5 / CELLS, abs=1e-3)


def test_coarse_maps_are_repeated_and_ties_broken_by_the_seed() -> None:
    coarse = np.random.default_rng(3).random((6, 12))
    fine = coarse.repeat(2, 0).repeat(2, 1)
    probe = linear(positive())
    found = evaluate_maps(probe, {"coarse": coarse, "fine": fine}, "speed", SHAPE)
    assert found.curves["coarse"].scores == found.curves["fine"].scores
    again = evaluate_maps(probe, {"coarse": coarse}, "speed", SHAPE)
    other = evaluate_maps(probe, {"coarse": coarse}, "speed", SHAPE, seed=1)
    assert again.curves["coarse"].scores == found.curves["coarse"].scores
    assert other.curves["coarse"].scores != found.curves["coarse"].scores
    flat = evaluate_maps(probe, {"flat": np.zeros(SHAPE)}, "speed", SHAPE)
    assert scores_of(flat, "flat").gap == pytest.approx(0, abs=0.1)  # random order, not reading order


def test_every_grid_from_small_to_full_size_has_whole_steps() -> None:
    for shape in ((4, 8), (12, 24), (32, 64)):
        found = evaluate_maps(linear(one_patch()), {"a": np.random.default_rng(0).random(shape)}, "speed", shape)
        shares = found.curves["a"].shares
        assert shares[0] == 0
        assert shares[-1] == 1
        assert (np.diff(shares) > 0).all()


def test_a_map_that_is_not_finite_is_named() -> None:
    bad = positive()
    bad[3, 3] = np.nan
    with pytest.raises(TargetError, match=r"map 'x': the map has 1 of 288 values"):
        evaluate_maps(linear(positive()), {"good": positive(), "x": bad}, "speed", SHAPE)


# Baselines and grids


def test_random_maps_keep_the_values_and_their_neighbours() -> None:
    truth = one_patch() + np.roll(one_patch(), 1, 1)
    rolled = random_maps(truth, 8)
    assert len({m.tobytes() for m in rolled}) > 1
    for m in rolled:
        assert not np.array_equal(m, truth)
        assert sorted(m.ravel()) == sorted(truth.ravel())
        assert np.array_equal(np.roll(m, 1, 1) * m > 0, np.roll(m > 0, 1, 1) & (m > 0))
    assert all(np.array_equal(a, b) for a, b in zip(rolled, random_maps(truth, 8), strict=True))
    values = positive()
    (shuffled,) = random_maps(values, 1, how="blocks")
    assert not np.array_equal(shuffled, values)
    blocks = {values[r : r + 4, c : c + 4].tobytes() for r in range(0, 12, 4) for c in range(0, 24, 4)}
    assert {shuffled[r : r + 4, c : c + 4].tobytes() for r in range(0, 12, 4) for c in range(0, 24, 4)} == blocks
    odd = np.random.default_rng(0).random((5, 9))
    assert np.array_equal(random_maps(odd, 1, how="blocks")[0][4], odd[4])


def test_mean_map_gives_every_frame_the_same_weight() -> None:
    a, b = one_patch(0, 0, 5.0), one_patch(1, 1, 0.1)
    prior = mean_map([a, b - one_patch(2, 2)])
    assert (prior[0, 0], prior[1, 1], prior[2, 2]) == (0.5, 0.5, 0)
    assert not mean_map([np.zeros(SHAPE)]).any()
    with pytest.raises(TargetError, match="at least one"):
        mean_map([])


def test_on_grid() -> None:
    coarse = np.array([[1.0, 2.0]])
    assert on_grid(coarse, (2, 4)).tolist() == [[1, 1, 2, 2]] * 2
    assert on_grid(np.ones((4, 4)), (2, 2)).tolist() == [[4, 4], [4, 4]]
    with pytest.raises(TargetError, match="shape"):
        on_grid(np.ones(4), (2, 2))


# Localisation


def mask_of_cell(row: int, column: int) -> np.ndarray:
    """The picture's pixels whose centre lies in this cell."""
    mask = np.zeros((40, 48), bool)
    y, x = np.nonzero(np.ones((28, 48)))
    inside = ((y + 0.5) * 12 / 28 // 1 == row) & (x // 2 == column)
    mask[y[inside], x[inside]] = True
    return mask


def test_coverage_respects_the_crop_and_shares_pixels_between_cells() -> None:
    mask = np.zeros((40, 48), bool)
    mask[:14, :24] = True
    covered = coverage(mask, GEOMETRY, SHAPE)
    assert covered.dtype == np.float32
    np.testing.assert_allclose(covered[:6, :12], 1, atol=1e-6)
    assert covered.sum() == pytest.approx(72)
    mask[:] = False
    mask[0, 0] = True
    assert coverage(mask, GEOMETRY, SHAPE)[0, 0] == pytest.approx(1 / (7 / 3 * 2))
    mask[:] = False
    mask[28:] = True
    assert not coverage(mask, GEOMETRY, SHAPE).any()


def test_one_patch_is_pointed_at() -> None:
    mask = np.zeros((40, 48), bool)
    mask[7:14, 14:20] = True  # cells 3-5 x 7-9, exactly
    found = localise(one_patch(4, 8), mask, GEOMETRY)
    assert found is not None
    assert found.area == pytest.approx(9 / CELLS)
    assert found.mass == pytest.approx(1)
    assert found.lift == pytest.approx(CELLS / 9)
    assert (found.pointing, found.ties) == (1, 1)
    assert found.touched == pytest.approx(9 / CELLS)
    assert found.near_area == pytest.approx(25 / CELLS)
    assert found.near_mass == 1
    # One of nine cells is right; the other 8 places are drawn from 287 equal cells, of which 8 are touched.
    assert found.rank_accuracy == pytest.approx((1 + 8 * 8 / 287) / 9)
    beside = localise(one_patch(2, 6), mask, GEOMETRY)  # diagonal neighbour
    assert beside is not None
    assert (beside.mass, beside.lift, beside.near_mass, beside.pointing) == (0, 0, 1, 1)
    far = localise(one_patch(1, 6), mask, GEOMETRY)
    assert far is not None
    assert (far.near_mass, far.pointing) == (0, 0)


def test_a_uniform_map_gets_exactly_chance_and_so_does_one_without_mass() -> None:
    mask = mask_of_cell(4, 8)
    for values in (np.ones(SHAPE), np.zeros(SHAPE), -positive()):
        found = localise(values, mask, GEOMETRY)
        assert found is not None
        assert found.lift == pytest.approx(1)
        assert found.near_mass == pytest.approx(found.near_area)
        assert found.pointing == pytest.approx(found.near_area)
        assert found.rank_accuracy == pytest.approx(found.touched)
        assert found.ties == CELLS


def test_signed_maps_are_scored_by_their_positive_part() -> None:
    mask = mask_of_cell(4, 8)
    assert localise(one_patch(4, 8) - positive(), mask, GEOMETRY) == localise(
        np.clip(one_patch(4, 8) - positive(), 0, None), mask, GEOMETRY
    )


def test_empty_masks_have_no_score_and_wrong_ones_are_refused() -> None:
    empty = np.zeros((40, 48), bool)
    assert localise(positive(), empty, GEOMETRY) is None
    assert nuisance(positive(), empty, GEOMETRY) is None
    empty[28:] = True  # only where nothing was seen
    assert localise(positive(), empty, GEOMETRY) is None
    with pytest.raises(TargetError, match=r"mask is 20 x 24, the picture 40 x 48"):
        localise(positive(), np.ones((20, 24), bool), GEOMETRY)
    with pytest.raises(TargetError, match="not finite"):
        localise(np.full(SHAPE, np.inf), mask_of_cell(0, 0), GEOMETRY)


def test_nuisance_is_the_mass_on_distractors() -> None:
    mask = np.zeros((40, 48), bool)
    mask[:28, :12] = True  # a quarter
    values = np.zeros(SHAPE)
    values[0, 0], values[0, 20] = 1, 3
    found = nuisance(values, mask, GEOMETRY)
    assert found is not None
    assert (found.ratio, found.area, found.lift) == (pytest.approx(0.25), pytest.approx(0.25), pytest.approx(1))


# Similarity, targets, time


def test_spearman_averages_ties_and_knows_constants() -> None:
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2, 3], [1, 2, 2, 3]) == pytest.approx(5 / 6)  # ranks 1.5 1.5 3 4 and 1 2.5 2.5 4
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_similarity_of_targets() -> None:
    a, b = positive(0), positive(1)
    found = between_targets({"curv_energy": a, "progress": b, "text_max": 3 * a})
    assert set(found) == {("curv_energy", "progress"), ("curv_energy", "text_max"), ("progress", "text_max")}
    same, other = found["curv_energy", "text_max"], found["curv_energy", "progress"]
    assert (same.spearman, same.overlap, same.top_overlap) == (pytest.approx(1), pytest.approx(1), 1)
    assert other.spearman is not None
    assert abs(other.spearman) < 0.2
    assert other.overlap is not None
    assert other.overlap < 0.6
    flat = similarity(np.zeros(SHAPE), a)
    assert (flat.spearman, flat.overlap, flat.top_overlap) == (None, None, 0)
    assert similarity(np.zeros(SHAPE), np.zeros(SHAPE)).top_overlap is None
    sparse = similarity(one_patch(0, 0), one_patch(1, 1))
    assert (sparse.overlap, sparse.top_overlap) == (0, 0)
    assert similarity(np.ones((6, 12)) * [[1] * 6 + [2] * 6], np.ones(SHAPE) * [[1] * 12 + [2] * 12]).overlap == 1


def test_maps_that_follow_a_moving_thing_are_consistent_in_time() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((20, *SHAPE))
    smooth = np.stack([base[t : t + 4].mean(0) for t in range(16)])  # neighbours share three of four fields
    paths = np.zeros((16, 10, 2))
    paths[8:, :, 0] = 1.0
    found = temporal_consistency(list(smooth), paths)
    assert found.reason is None
    assert found.consistency is not None
    assert found.consistency > 0.4
    assert found.change_m == tuple([0.0] * 7 + [1.0] + [0.0] * 7)
    assert found.calm_pairs == 14
    assert found.calm == pytest.approx(found.consistency, abs=0.05)
    fixed = temporal_consistency([positive()] * 6, np.zeros((6, 10, 2)))
    assert (fixed.consecutive, fixed.consistency, fixed.jitter) == (pytest.approx(1), pytest.approx(0), 0)
    noise = temporal_consistency(list(base), np.zeros((20, 10, 2)))
    assert noise.consistency == pytest.approx(0, abs=0.05)


def test_scenes_too_short_for_time_say_why() -> None:
    one = temporal_consistency([positive()], np.zeros((1, 10, 2)))
    assert (one.consistency, one.consecutive, one.jitter) == (None, None, None)
    assert one.reason is not None
    assert "one frame" in one.reason
    two = temporal_consistency([positive()] * 2, np.zeros((2, 10, 2)))
    assert (two.consecutive, two.consistency) == (pytest.approx(1), None)
    assert two.reason is not None
    assert "two frames" in two.reason
    flat = temporal_consistency([np.zeros(SHAPE)] * 4, np.zeros((4, 10, 2)))
    assert flat.consistency is None
    assert flat.reason is not None
    assert "vary" in flat.reason
    assert temporal_consistency([], np.zeros((0, 10, 2))).reason is not None


def test_a_long_scene_draws_its_other_pairs() -> None:
    maps = [np.random.default_rng(t).random((3, 4)) for t in range(300)]
    first = temporal_consistency(maps, np.zeros((300, 10, 2)))
    assert first == temporal_consistency(maps, np.zeros((300, 10, 2)))
    assert first.others == pytest.approx(0, abs=0.05)


# Visual dependence


def test_perturbed_tiles_are_what_their_names_say() -> None:
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    geometry = TileGeometry(48, 96, 48, 48, 96, ((0, 0, 48, 48), (48, 0, 96, 48), (0, 0, 96, 48)), thumbnail=True)
    other = 255 - tiles
    found = perturbed_tiles(tiles, geometry, other)
    assert tuple(found) == PERTURBATIONS
    assert all(t.shape == tiles.shape and t.dtype == np.uint8 for t in found.values())
    whole = canvas(tiles, geometry)
    assert np.array_equal(canvas(found["mirrored"], geometry), whole[:, ::-1])
    assert found["blank"].reshape(-1, 3).std(0).max() == 0
    mixed = canvas(found["shuffled"], geometry)
    assert not np.array_equal(mixed, whole)

    def squares(x: np.ndarray) -> set[bytes]:
        return {x[r : r + 6, c : c + 6].tobytes() for r in range(0, 48, 6) for c in range(0, 96, 6)}

    assert squares(mixed) == squares(whole)
    assert np.array_equal(found["swapped"], other)
    for name in ("mirrored", "shuffled"):  # the thumbnail shows the changed canvas
        small = Image.fromarray(canvas(found[name], geometry)).resize((48, 48), Image.Resampling.BICUBIC)
        assert np.array_equal(found[name][2], np.asarray(small))
    assert "swapped" not in perturbed_tiles(tiles, geometry)
    with pytest.raises(TargetError, match="same size"):
        perturbed_tiles(tiles, geometry, other[:2])


def test_dependence_and_its_verdict() -> None:
    probe = linear(one_patch())  # 2 m if the patch is hidden
    bright, dark = torch.ones(2, 3, SIDE, SIDE), torch.zeros(2, 3, SIDE, SIDE)
    moved = dependence(probe.ask, bright, {"blank": dark, "mirrored": bright.flip(-1)})
    assert moved["blank"].route_m == pytest.approx(2, abs=1e-3)
    assert moved["blank"].speed_m == pytest.approx(2)
    assert moved["blank"].scalar_change == pytest.approx(-2)
    assert moved["mirrored"].speed_m == 0
    verdict = depends_on_image(moved, "speed")
    assert (verdict.depends, verdict.by, verdict.threshold_m) == (True, "blank", 0.1)
    blind = dependence(linear(np.zeros(SHAPE)).ask, bright, {"blank": dark, "mirrored": dark})
    assert not depends_on_image(blind, "route").depends
    assert "does not depend" in str(depends_on_image(blind, "route"))
    only_route = {"blank": Moved(route_m=1.0, speed_m=0.0, scalar_change=0.0)}
    assert depends_on_image(only_route, "route").depends
    assert not depends_on_image(only_route, "speed").depends


# On the bundled driver


@pytest.fixture(scope="module")
def driver(repo: Path) -> tuple[Any, SimLingo]:
    root = repo / "checkpoints/simlingo-tiny"
    config = read_config(root / ".hydra/config.yaml")
    processor = load_processor(config)
    return processor, load_model(config, root / "checkpoints/epoch=013.ckpt/pytorch_model.pt", processor.placeholder_id)


def test_the_bundled_driver_stops_for_the_light_and_not_for_a_random_place(
    driver: tuple[Any, SimLingo], repo: Path
) -> None:
    processor, model = driver
    scene = repo / "datasets/demo_drive/red_light"
    rgb, another = (
        np.asarray(Image.open(s / "images/frame_0005.png").convert("RGB")) for s in (scene, scene.parent / "curve")
    )
    speed = [json.loads(line)["speed_mps"] for line in (scene / "frames.jsonl").read_text().splitlines()][5]
    truth = read_truth(scene)["frame_0005"]
    tiles, geometry = processor.tiler(rgb)
    asked = processor.prompt(len(tiles), speed)
    pixels, baseline = normalise(tiles), normalise(blurred(tiles, geometry))
    with torch.no_grad():
        batch = processor.batch([asked], [len(tiles)])
        embeds = model.embed_prompt(batch, model.encode_tiles(pixels), processor.image_token_id)
        (text,) = model.generate(embeds, batch.mask_BP, processor.eos_id, 24)
    (target,) = parse_targets("action", "longitudinal_progress")
    question = Question(model, processor, asked, text, target, Spline())
    probe, shape = Probe(question, pixels, baseline, geometry, batch=32), canvas_grid(geometry, model.config.patch_grid)
    assert shape == SHAPE
    hidden = occlusion(probe, target.head, shape, window=4, stride=4)
    cause = coverage(truth.masks["cause"], geometry, shape)
    randoms = {f"random {k}": m for k, m in enumerate(random_maps(cause, 2))}
    found = evaluate_maps(probe, {"occlusion": hidden.displacement, "cause": cause, **randoms}, target.head, shape)
    assert not found.excluded
    chance = average([scores_of(found, name) for name in randoms])
    assert chance is not None
    assert scores_of(found, "cause").early > chance.early + 0.3
    assert scores_of(found, "occlusion").early > chance.early + 0.3
    where = localise(hidden.displacement, truth.masks["cause"], geometry)
    assert where is not None
    assert where.pointing > 0.5  # a window of 16 equal cells
    assert where.lift > 3
    changed = perturbed_tiles(tiles, geometry, processor.tiler(another)[0])
    moved = dependence(question, pixels, {name: normalise(t) for name, t in changed.items()})
    assert depends_on_image(moved, target.head).depends
    assert moved["swapped"].speed_m > 1


def test_randomisation_goes_from_the_heads_to_the_pixels_and_forgets_everything(driver: tuple[Any, SimLingo]) -> None:
    model = copy.deepcopy(driver[1])
    stages = randomisation_stages(model, group=2)
    assert [s.name for s in stages] == [
        "heads", "language 1-2", "language 0", "projector", "vision 1-2", "vision 0",
    ]  # fmt: skip
    seen: list[int] = []
    for stage in stages:
        for part in stage.parts:
            seen += [id(p) for p in ([part] if isinstance(part, torch.nn.Parameter) else part.parameters())]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())  # each exactly once
    before = {name: p.clone() for name, p in model.named_parameters()}
    for stage in stages:
        randomise_(stage.parts, seed=1)
    for name, parameter in model.named_parameters():
        old = before[name]
        if ("norm" in name and name.endswith("weight")) or "lambda_" in name:
            torch.testing.assert_close(parameter, old.mean().expand_as(old))
            continue
        assert abs(np.corrcoef(parameter.flatten(), old.flatten())[0, 1]) < 6 / math.sqrt(old.numel()), name
        if old.numel() > 1000:
            assert float(parameter.std() / old.std()) == pytest.approx(1, abs=0.2), name
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    assert bool(torch.isfinite(model.encode_tiles(pixels)).all())


def test_randomising_a_stage_leaves_the_others_and_repeats(driver: tuple[Any, SimLingo]) -> None:
    first, second = copy.deepcopy(driver[1]), copy.deepcopy(driver[1])
    for model in (first, second):
        randomise_(randomisation_stages(model)[0].parts, seed=3)
    for (name, a), b, old in zip(first.named_parameters(), second.parameters(), driver[1].parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, old) != name.startswith(("route_head", "speed_head", "language.lm_head")), name


def test_a_tied_head_is_randomised_with_the_word_embeddings(driver: tuple[Any, SimLingo]) -> None:
    model = copy.deepcopy(driver[1])
    model.language.lm_head.weight = model.language.model.embed_tokens.weight
    stages = randomisation_stages(model)
    assert model.language.lm_head not in stages[0].parts
    assert model.language.model.embed_tokens in stages[1].parts
