"""The golden checkpoint through the whole pipeline: what is on disk equals what the original code computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_ray.config import CaptureConfig, ModelConfig
from vla_ray.pipelines.capture import capture
from vla_ray.schema import KINEMATIC_COLUMNS
from vla_ray.storage import payload as payload_file
from vla_ray.storage.files import Location

pytestmark = pytest.mark.ray

METRICS = ("curv_energy", "acc_energy", "longitudinal_progress")
FRAMES = ("frame_0000", "frame_0001", "frame_0002")  # two tiles; no target points; one tile
OUTPUT, GRADIENT = 1e-4, 1e-3  # of the reference's largest value

Payloads = dict[tuple[str, str], dict[str, Any]]  # by (stem, target)
Run = Callable[..., tuple[list[dict[str, Any]], Payloads]]


def assert_close(actual: Any, expected: Any, tolerance: float, what: str) -> None:
    actual, expected = (np.asarray(x, dtype=np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:g}"


@pytest.fixture(scope="module")
def run(
    golden: Path, golden_model: ModelConfig, configure: Callable[..., CaptureConfig], rows: Any, tmp_path_factory: Any
) -> Run:
    """Capture the golden scene; metrics rows and payloads."""

    def capture_golden(**settings: Any) -> tuple[list[dict[str, Any]], Payloads]:
        output_dir = tmp_path_factory.mktemp("golden")
        scene = str(golden / "simlingo_a/scene")
        settings = {"model": golden_model, "scene_dir": scene, "payload": "full", **settings}
        assert capture(configure(output_dir, **settings)) == 0
        table = rows(output_dir / "r")
        files = {(r["tag"], r["target"]): Location.of(output_dir / "r" / r["payload_path"]) for r in table}
        return table, {key: payload_file.load(file) for key, file in files.items()}

    return capture_golden


@pytest.fixture(scope="module")
def action(run: Run) -> tuple[list[dict[str, Any]], Payloads]:
    return run(kinematic_metric=list(METRICS))


@pytest.fixture(scope="module")
def text(run: Run) -> tuple[list[dict[str, Any]], Payloads]:
    return run(explain_mode="text", text_token_strategy=["max", "last", "index"], text_token_index=0)


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict[str, dict[str, np.ndarray]]:
    return {stem: dict(np.load(golden / f"simlingo_a/expected/{stem}.npz")) for stem in FRAMES}


@pytest.fixture(scope="module")
def summary(golden: Path) -> dict[str, dict[str, Any]]:
    frames = json.loads((golden / "simlingo_a/expected/summary.json").read_text())["frames"]
    return dict(zip(FRAMES, frames, strict=True))


def cam(content: dict[str, Any], block: str) -> torch.Tensor:
    """Mean over heads of max(A * dA, 0), with the batch axis only for tiles."""
    entry = content["attention"][block][0]
    mean = (entry["attn"] * entry["grad"]).clamp_min(0).mean(1)
    return mean if block.startswith("vision") else mean[0]


def test_every_payload_is_whole(action: Any, expected: Any, summary: Any) -> None:
    _, payloads = action
    assert set(payloads) == {(stem, metric) for stem in FRAMES for metric in METRICS}
    for (stem, metric), content in payloads.items():
        e = expected[stem]
        assert_close(content["outputs"]["pred_route"], e["pred_route"], OUTPUT, f"{stem} route")
        assert_close(content["outputs"]["pred_speed_wps"], e["pred_speed_wps"], OUTPUT, f"{stem} speed")
        assert content["text_outputs"]["token_ids"] == e["generated_ids"].tolist()
        assert content["text_outputs"]["decoded_text"] == summary[stem]["language"]
        assert content["outputs"]["language"] == [summary[stem]["language"]]
        scores = np.take_along_axis(e["generation_logits"], e["generated_ids"][:, None], 1)[:, 0]
        assert_close(content["text_outputs"]["token_scores"], scores, OUTPUT, f"{stem} token scores")
        assert content["meta"]["target"] == content["target_info"]["kinematic_metric"] == metric
        assert len(content["attention"]) == 6
        for block, entries in content["attention"].items():
            attention = entries[0]["attn"] if block.startswith("vision") else entries[0]["attn"][0]
            assert_close(attention, e[f"attn/{block}"], OUTPUT, f"{stem} {block}")
            assert entries[0]["grad"].shape == entries[0]["attn"].shape
            assert entries[0]["shape"] == list(entries[0]["attn"].shape)


@pytest.mark.parametrize("metric", METRICS)
def test_action_gradients(action: Any, expected: Any, metric: str) -> None:
    _, payloads = action
    for stem in FRAMES:
        keys = [k for k in expected[stem] if k.startswith(f"cam/{metric}/")]
        assert keys
        for key in keys:
            block = key.rpartition("/")[2]
            assert_close(cam(payloads[stem, metric], block), expected[stem][key], GRADIENT, f"{stem} {key}")


def test_text_gradients(text: Any, expected: Any) -> None:
    _, payloads = text
    assert {target for _, target in payloads} == {"text_max", "text_last", "text_0"}
    for stem in FRAMES:
        for target in ("text_max", "text_last"):
            for key in (k for k in expected[stem] if k.startswith(f"cam/{target}/")):
                block = key.rpartition("/")[2]
                assert_close(cam(payloads[stem, target], block), expected[stem][key], OUTPUT, f"{stem} {key}")
    reference = expected["frame_0000"]  # of this frame token 0 was explained, one head at a time
    for key in (k for k in reference if k.startswith("grad/text_index/")):
        block = key.rpartition("/")[2]
        gradient = payloads["frame_0000", "text_0"]["attention"][block][0]["grad"]
        if block.startswith("language"):  # the original stopped at the token; later rows have no gradient
            size = reference[key].shape[-1]
            assert float(gradient[0, :, size:].abs().max()) == 0
            gradient = gradient[0, :, :size, :size]
        assert_close(gradient, reference[key], OUTPUT, key)


def test_metrics_rows(action: Any, summary: Any) -> None:
    rows, payloads = action
    assert [(r["tag"], r["target"]) for r in rows] == sorted(payloads)
    for row in rows:
        frame, content = summary[row["tag"]], payloads[row["tag"], row["target"]]
        assert row["status"] == "ok"
        assert row["frame_id"] == f"scene/{row['tag']}"
        assert row["attempt"] == 1
        assert row["error"] is None
        for name in KINEMATIC_COLUMNS:
            if name in frame["scalars"]:
                assert row[name] == pytest.approx(frame["scalars"][name], rel=1e-3, abs=1e-6), name
        assert row["target_scalar"] == row[row["target"]] == content["target_scalar"]
        assert row["text"] == frame["language"]
        assert row["num_tiles"] == content["meta"]["num_patch_views"]
        assert row["num_generated_tokens"] == len(content["text_outputs"]["token_ids"])
        end = content["outputs"]["pred_route"][0, -1].tolist()
        assert [row["route_end_x"], row["route_end_y"]] == end
        assert min(row[c] for c in ("decode_s", "generate_s", "forward_s", "backward_s", "write_s")) > 0


def test_text_rows(text: Any, summary: Any) -> None:
    rows, payloads = text
    for row in rows:
        assert row["mode"] == "text"
        scores = payloads[row["tag"], row["target"]]["text_outputs"]["token_scores"]
        index = {"text_max": int(np.argmax(scores)), "text_last": len(scores) - 1, "text_0": 0}[row["target"]]
        assert row["target_scalar"] == pytest.approx(scores[index], rel=1e-6)


def test_file_names(action: Any, text: Any) -> None:
    names = {(r["tag"], r["target"]): Path(r["payload_path"]).name for r in action[0] + text[0]}
    assert names["frame_0000", "curv_energy"] == "frame_0000_action_curv_energy.pt"
    assert names["frame_0002", "text_0"] == "frame_0002_text_text_0.pt"
    assert len(set(names.values())) == len(names) == 18


def test_reduced_is_the_reduction_of_full(run: Run, action: Any) -> None:
    _, full = action
    rows, reduced = run(payload="reduced", kinematic_metric=["curv_energy", "acc_energy"])
    assert all(r["payload_bytes"] for r in rows)
    for (stem, metric), content in reduced.items():
        reference = full[stem, metric]
        rms = reference["meta"]["seed"]["grad_rms"]
        assert content["meta"]["seed"]["grad_rms"] == pytest.approx(rms, rel=1e-4)
        assert content["meta"]["payload"] == "reduced"
        for block, entries in content["attention"].items():
            entry, what = entries[0], f"{stem} {metric} {block}"
            whole = reference["attention"][block][0]
            assert entry["cam"].dtype == entry["attn_mean"].dtype == torch.float16
            assert_close(entry["attn_mean"], whole["attn"].mean(1), 1e-3, what)
            mean = (whole["attn"] * whole["grad"]).clamp_min(0).mean(1) / rms
            assert_close(entry["cam"].float() * entry["cam_scale"], mean, 1e-3, what)
        assert content["target_info"] == reference["target_info"]
        assert content["text_outputs"]["token_ids"] == reference["text_outputs"]["token_ids"]
        assert_close(content["outputs"]["pred_route"], reference["outputs"]["pred_route"], 1e-6, f"{stem} route")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_payload_dtype(run: Run, action: Any, dtype: str) -> None:
    _, full = action
    _, payloads = run(payload_dtype=dtype, limit=1)
    (content,) = payloads.values()
    reference = full["frame_0000", "curv_energy"]
    assert content["outputs"]["pred_route"].dtype == torch.float32
    for block, entries in content["attention"].items():
        for name in ("attn", "grad"):
            assert entries[0][name].dtype == getattr(torch, dtype)
            tolerance = {"float16": 1e-3, "bfloat16": 1e-2}[dtype]
            # Of each value, not of the largest: gradients of 1e-6 must survive float16 as far as its range allows.
            whole = reference["attention"][block][0][name]
            assert_close(entries[0][name].float(), whole, tolerance, f"{block} {name}")
