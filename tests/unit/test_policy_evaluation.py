"""Language tests by hand, and whole evaluations: all files, and none that a small or odd input can break."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vla_ray.data.cast.instructions import ATOMIC, KINDS, kind, opposite, side
from vla_ray.data.corridors.tasks import WORDS
from vla_ray.errors import DataError
from vla_ray.evaluation.policy.compare import compare_predictions
from vla_ray.evaluation.policy.drawing import ground
from vla_ray.evaluation.policy.evaluate import FIGURES, evaluate_predictions
from vla_ray.evaluation.policy.intervals import Resampler
from vla_ray.evaluation.policy.language import follows_language, retrieval
from vla_ray.evaluation.policy.predictions import Predictions, Variant
from vla_ray.evaluation.policy.report import length_bins
from vla_ray.report.policy_build import build_policy_report
from vla_ray.storage.location import Location

STEPS = 3
PATHS = {
    "go forward": [[1.0, 0.0]] * STEPS, "stop": [[0.0, 0.0]] * STEPS, "turn left": [[0.8, 0.6]] * STEPS,
    "turn right": [[0.8, -0.6]] * STEPS, "adjust left": [[1.0, 0.2]] * STEPS, "adjust right": [[1.0, -0.2]] * STEPS,
}  # fmt: skip


def make(directory: Path, texts: list[str], listens: bool = True) -> Predictions:
    """A policy that does exactly as it is told, or always goes forward; two samples of each picture."""
    target = np.array([PATHS[text] for text in texts])
    count = len(texts)

    def answer(commands: list[str]) -> np.ndarray:
        return np.array([PATHS[c if listens else "go forward"] for c in commands])

    other = [*texts[1:], texts[0]]
    contrary = [opposite(text) for text in texts]
    variants = {name: Variant((name,) * count, answer([name] * count)) for name in ATOMIC}
    variants["permuted"] = Variant(tuple(other), answer(other))
    variants["opposite"] = Variant(tuple(contrary), answer([str(c) for c in contrary]))
    predicted = answer(texts) + np.linspace(0, 0.02, count)[:, None, None]
    return Predictions(
        "run", Location.of(directory / "predictions.csv"), tuple(f"s{i}" for i in range(count)), tuple(texts),
        ("d",) * count, tuple(f"r{i // 2}" for i in range(count)), tuple(f"p{i // 2}" for i in range(count)),
        predicted, target, np.ones((count, STEPS), bool),
        np.full(count, 0.25), tuple(f"images/{i}.jpg" for i in range(count)), (None,) * count, 1.0, "the training data",
        np.linspace(1, 0.5, count)[:, None] * np.ones(2 * STEPS), np.ones((count, 2 * STEPS)), None, variants, {},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is nearly all of the time these tests take."""
    monkeypatch.setattr("vla_ray.evaluation.policy.drawing.DPI", 40)
    monkeypatch.setattr("vla_ray.evaluation.policy.trajectory_figures.COLUMNS", 2)
    monkeypatch.setattr("vla_ray.evaluation.policy.trajectory_figures.FANS", 1)


TEXTS = ["turn left", "turn right", "go forward", "stop", "adjust left", "adjust right", "turn right", "turn left"]


# Words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Stop here and wait", "stop"), ("turn left at the door", "turn left"), ("take the second right", "turn right"),
        ("the door on the left", "other"), ("move to the door on the left", "landmark"), ("go left", "turn left"),
        ("go to the left of the chair", "landmark"), ("move slightly left", "adjust"), ("follow the person", "forward"),
        ("move along the hallway", "forward"), ("move away from the wall", "landmark"), ("", "other"),
        ("go to the left door", "landmark"), ("turn right behind the chair", "turn right"),
    ],
)  # fmt: skip
def test_kinds(text: str, expected: str) -> None:
    assert kind(text) == expected


def test_kinds_of_the_corridors() -> None:
    expected = {"follow": "forward", "turn": "turn left", "door": "landmark", "color": "landmark", "pass": "landmark"}
    expected |= {"person": "landmark", "only door": "landmark"}
    for name, texts in WORDS.items():
        if name != "only turn":
            assert {kind(t.format(side="left", color="red")) for t in texts} == {expected.get(name, name)}
    assert {kind(text) for text in ATOMIC} < set(KINDS)


def test_opposites() -> None:
    assert opposite("turn left") == "turn right"
    assert opposite("Stop here") == "go forward"
    assert opposite("follow the corridor") == "stop"
    assert opposite("go to the red door") is None
    assert [side(t) for t in ("the left door", "turn right", "left, then right", "stop right before it")] == [
        1,
        -1,
        0,
        0,
    ]


# Language -------------------------------------------------------------------------------------------------------


def test_a_policy_that_listens(tmp_path: Path) -> None:
    p = make(tmp_path, TEXTS)
    found = follows_language(p, Resampler(p.groups))
    assert found is not None
    means = {name: e.mean for name, e in found.estimates.items()}
    for name in ("order", "stop_shrinks", "opposite_order", "opposite_side", "opposite_shorter", "retrieval"):
        assert means[name] == 1, name
    assert means["language_use"] > 0.9
    assert means["retrieval_permuted"] < 0.5
    ends = {name: np.array(path).sum(0) for name, path in PATHS.items()}
    apart = [np.linalg.norm(ends[a] - ends[b]) for i, a in enumerate(ATOMIC) for b in ATOMIC[i + 1 :]]
    assert means["divergence_end"] == pytest.approx(np.mean(apart))
    assert found.chance["order"] == pytest.approx(1 / 6)
    assert found.chance["stop_shrinks"] == pytest.approx(5 / 30), "of 30 ordered pairs, those that begin with stop"


def test_a_policy_that_does_not(tmp_path: Path) -> None:
    p = make(tmp_path, TEXTS, listens=False)
    p = replace(p, predicted=p.variants["permuted"].predicted)
    found = follows_language(p, Resampler(p.groups))
    assert found is not None
    means = {name: e.mean for name, e in found.estimates.items()}
    for name in ("stop_shrinks", "divergence_end", "language_use"):
        assert means[name] == 0, name
    for name in ("order", "opposite_order", "opposite_shorter"):
        assert means[name] == pytest.approx(found.chance[name]), f"{name}: equal ends are no wrong answer"
    assert found.p == 1
    assert "samples of a recording as independent" in found.tables[0].note


@pytest.mark.parametrize(
    ("left", "ahead", "right", "expected"),
    [(1, 0, -1, 1), (1, 1, -1, 1 / 2), (1, 0, 0, 1 / 2), (0, 0, 0, 1 / 6), (0, 1, 0, 0), (-1, 0, 1, 0), (0, 0, 1, 0)],
)
def test_ties_in_order_count_as_by_chance(
    tmp_path: Path, left: float, ahead: float, right: float, expected: float
) -> None:
    p = make(tmp_path, ["stop"])
    ends = {"turn left": left, "go forward": ahead, "turn right": right}
    p = replace(p, variants={n: Variant((n,), np.array([[[0, 0], [0, 0], [1.0, y]]])) for n, y in ends.items()})
    found = follows_language(p, Resampler(p.sample_id))
    assert found is not None
    assert found.estimates["order"].mean == pytest.approx(expected)


def test_retrieval_by_hand(tmp_path: Path) -> None:
    p = make(tmp_path, ["turn left", "turn right", "stop", "stop", "go forward", "turn left"])
    predicted = p.predicted.copy()
    predicted[1] = PATHS["turn left"]  # nearer to its partner's target
    predicted[4] = np.nan
    found = retrieval(p, predicted)
    np.testing.assert_array_equal(found, [1, 0, np.nan, np.nan, np.nan, 1])
    between = p.predicted.copy()
    between[:2] = PATHS["go forward"]
    assert retrieval(p, between)[:2].tolist() == [0.5, 0.5], "equally far from both"
    assert np.isnan(retrieval(replace(p, picture_hash=(None,) * 6), predicted)).all()


def test_retrieval_and_its_baseline_are_of_the_same_samples(tmp_path: Path) -> None:
    p = make(tmp_path, TEXTS)
    asked = p.variants["permuted"].predicted.copy()
    asked[2:] = np.nan
    variants = {"permuted": replace(p.variants["permuted"], predicted=asked)}
    found = follows_language(replace(p, variants=variants), Resampler(p.groups))
    assert found is not None
    assert found.estimates["retrieval"].frames == found.estimates["retrieval_permuted"].frames == 2
    none = {"permuted": replace(p.variants["permuted"], predicted=np.full_like(asked, np.nan))}
    alone = follows_language(replace(p, variants=none), Resampler(p.groups))
    assert alone is not None
    assert alone.estimates["retrieval"].frames == 8
    assert "retrieval_permuted" not in alone.estimates


def test_nothing_to_test_with(tmp_path: Path) -> None:
    p = replace(make(tmp_path, TEXTS), variants={}, recording=(None,) * 8, picture_hash=(None,) * 8)
    assert follows_language(p, Resampler(p.sample_id)) is None
    nothing = replace(p, valid=np.zeros_like(p.valid), predicted=np.full_like(p.predicted, np.nan))
    result = evaluate_predictions(nothing, Location.of(tmp_path / "out"), counterfactual=True)
    assert "python jobs/evaluate.py results=... counterfactual=true" in result.text


# Whole evaluations ----------------------------------------------------------------------------------------------


def test_all_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (32, 24), (40 * i, 90, 90)).save(tmp_path / "images" / f"{i}.jpg")
    out = tmp_path / "evaluation"
    p = make(tmp_path, TEXTS)
    failed = p.predicted.copy()
    failed[7] = np.nan
    result = evaluate_predictions(replace(p, predicted=failed), Location.of(out), counterfactual=True)
    assert {f.name for f in out.iterdir()} == {f.name for f in result.files}
    assert {f.name for f in result.files} >= set(FIGURES)
    for name in FIGURES:
        width, height = Image.open(out / name).size
        assert min(width, height) > 150, name
    assert "Evaluation Summary: MSE: 0.0001" in result.text
    assert "1 of 8 samples have no prediction" in result.text
    assert "2 of 8 pictures no longer exist" in result.text
    text = (out / "evaluation_report.txt").read_text()
    assert "deltas in waypoint spacings; metres = value * scale_m" in text
    assert "Success Rate (0.1): 1.0000" in text
    assert "straight" in text
    assert "By length of the instruction, words" in (out / "instruction_analysis.txt").read_text()
    document = json.loads((out / "metrics.json").read_text())
    assert document["scored"] == 7
    assert document["summary"][""]["ade"]["n"] == document["summary"]["stand still"]["ade"]["n"] == 7
    assert document["language"]["estimates"]["order"]["mean"] == 1
    rows = pq.read_table(out / "metrics.parquet")
    assert rows["status"].to_pylist() == ["ok"] * 7 + ["failed"]
    assert rows["ade"][7].as_py() is None
    assert rows["ade_stand_still"][0].as_py() == pytest.approx(2.0)
    assert result.confidence is not None
    assert {"Metrics", "Errors per step", "Error by confidence"} <= {t.title for t in result.tables}
    assert "against a coin" in result.tables[0].note
    assert "samples of a recording as independent" in result.tables[0].note
    assert rows["recording"].to_pylist() == list(p.recording)
    assert all(len(row) == len(t.columns) for t in result.tables for row in t.rows)


def test_the_best_of_draws_stands_beside_the_baselines(tmp_path: Path) -> None:
    p = make(tmp_path, TEXTS)
    draws = np.stack([p.target + 1, p.target + 0.1], axis=1)
    result = evaluate_predictions(replace(p, samples=draws), Location.of(tmp_path / "evaluation"))
    rows = {str(row[0]): row for row in result.tables[0].rows}
    (drawn,) = (row for label, row in rows.items() if label.startswith("minADE"))
    assert drawn[3:] == rows["ADE, units"][3:], "a baseline has one trajectory"
    assert str(drawn[2]).startswith("0.283")  # sqrt(2) * 0.1 * the mean of 1 .. 3


@pytest.mark.parametrize("what", ["one sample", "standing", "no targets", "nothing predicted", "padded"])
def test_odd_inputs(tmp_path: Path, what: str) -> None:
    p = make(tmp_path, TEXTS)
    if what == "one sample":
        p = p.take([0])
    if what == "standing":
        p = replace(p, target=np.zeros_like(p.target), predicted=np.zeros_like(p.target), median_step=0.0)
    if what == "no targets":
        p = replace(p, target=np.full_like(p.target, np.nan), valid=np.zeros_like(p.valid))
    if what == "nothing predicted":
        p = replace(p, predicted=np.full_like(p.predicted, np.nan), variants={}, error=("OutOfMemory",) * len(p))
    if what == "padded":
        p = replace(p, valid=np.array([[True, True, False]] * len(p)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "language_fan.png").write_bytes(b"of an earlier evaluation")
    result = evaluate_predictions(p, Location.of(tmp_path / "out"), counterfactual=what != "padded")
    assert (tmp_path / "out" / "language_fan.png").exists() == (what not in ("padded", "nothing predicted"))
    assert (result.summary is None) == (what in ("no targets", "nothing predicted"))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["samples"] == len(p)
    if what == "no targets":
        assert "no sample has both a prediction and a target (8 of 8 predicted)" in result.text
        assert (tmp_path / "out" / "trajectory_examples.png").exists()
    if what == "nothing predicted":
        assert "the first: OutOfMemory" in result.text


def test_text_and_numbers_from_elsewhere_can_be_drawn(tmp_path: Path) -> None:
    p = make(tmp_path, TEXTS)
    text = r"pay $5 \frac{ or $10"  # no formula
    far = p.predicted.copy()
    far[0] = [[1e6, 1e6]] * STEPS
    p = replace(p, name=text, instruction=(text,) * 8, predicted=far)
    evaluate_predictions(p, Location.of(tmp_path / "out"), counterfactual=True)
    found = compare_predictions([p, p], Location.of(tmp_path / "both"))
    assert text in found.names[0]


@pytest.mark.parametrize(("ahead", "aside"), [(1.0, 0.5), (8.0, 3.0), (8e6, 3.0), (8.0, 8e6)])
def test_axes_of_any_extent_have_few_ticks(ahead: float, aside: float) -> None:
    axes = Figure().subplots()
    ground(axes, -0.1 * ahead, ahead, aside)
    assert 1 <= len(axes.get_yticks()) <= 8
    assert 1 <= len(axes.get_xticks()) <= 8


def test_pictures_elsewhere_and_broken_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = ("/etc/x.png", "../x.png", "images/0.jpg", "notes.txt", *[None] * 4)
    (tmp_path / "notes.txt").write_bytes(b"secrets")
    result = evaluate_predictions(replace(make(tmp_path, TEXTS), image_path=paths), Location.of(tmp_path / "out"))
    assert "2 of 8 pictures are not followed to" in result.text
    assert "1 of 8 pictures no longer exist" in result.text
    page = build_policy_report(result).read_bytes().decode()
    assert "notes.txt is not a sound PNG or JPEG image" in page
    assert "secrets" not in page + caplog.text, "no content of a file that is no picture"
    assert '"d","r0"' in page.replace(", ", ","), "dataset and recording of a sample"


def test_bins_of_lengths() -> None:
    assert [(low, high, int(m.sum())) for low, high, m in length_bins(np.array([4, 4, 4]))] == [(4, 4, 3)]
    found = length_bins(np.array([1, 2, 3, 10, 11]))
    assert [(low, high) for low, high, _ in found] == [(1, 3), (10, 11)]
    assert sum(m.sum() for *_, m in found) == 5


# Comparison -----------------------------------------------------------------------------------------------------


def test_comparison(tmp_path: Path) -> None:
    p = make(tmp_path, TEXTS)
    worse = p.predicted.copy()
    worse[:, 0, 0] += 1.0  # every position after it is one unit too far
    worse[7] = np.nan
    other = replace(p, predicted=worse).take([7, 6, 5, 4, 3, 2, 1])
    found = compare_predictions([p, other], Location.of(tmp_path / "out"))
    assert found.samples == 6
    assert found.names == ("run (1)", "run (2)")
    own = found.summaries[0].mean("ade")
    assert found.differences["ade"][0].mean == pytest.approx(found.summaries[1].mean("ade") - own)
    assert 0.9 < found.differences["ade"][0].low <= found.differences["ade"][0].high < 1.1
    assert "6 common samples" in found.text
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"comparison.txt", "comparison.json", "comparison.png"}


def test_comparison_takes_what_the_sets_know(tmp_path: Path) -> None:
    p = make(tmp_path, TEXTS)
    p = replace(p, samples=p.predicted[:, None] + np.array([0.0, 0.5])[None, :, None, None])
    logs = replace(p, target=p.target * np.nan, valid=~p.valid, median_step=0.0, median_from="nothing")
    found = compare_predictions(
        [logs, replace(p, median_step=0.75, median_from="the split train")], Location.of(tmp_path)
    )
    assert "ahead by 0.75 units a step, the median of the split train" in found.tables[0].note
    straight = np.linalg.norm(np.cumsum([[0.75, 0.0]] * STEPS, 0) - np.cumsum(p.target, 1), axis=-1)
    assert found.summaries[0].mean("ade", "straight") == pytest.approx(straight.mean())
    assert found.summaries[1].mean("min_ade") == pytest.approx(found.summaries[1].mean("ade"))
    assert found.differences["min_ade"][0].mean == 0
    without = compare_predictions([p, replace(p, samples=None)], Location.of(tmp_path))
    assert "min_ade" not in without.differences
    assert without.summaries[0].mean("min_ade") is not None


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    p, out = make(tmp_path, TEXTS), Location.of(tmp_path / "out")
    with pytest.raises(DataError, match="Give two or more"):
        compare_predictions([p], out)
    with pytest.raises(DataError, match="other targets"):
        compare_predictions([p, replace(p, target=p.target + 1)], out)
    short = replace(p, predicted=p.predicted[:, :2], target=p.target[:, :2], valid=p.valid[:, :2])
    with pytest.raises(DataError, match="has 2 steps and"):
        compare_predictions([p, short], out)
    with pytest.raises(DataError, match="no sample was predicted by all"):
        compare_predictions([p, replace(p, predicted=p.predicted * np.nan)], out)
