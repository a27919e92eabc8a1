"""The notebook's few lines: what the README shows runs, and says the same as the stages it is made of."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from vla_ray.errors import CheckpointError, ConfigError, ImageError, StorageError, TargetError
from vla_ray.policy import Frame, SimLingo, explain


@pytest.fixture(scope="module")
def policy(repo: Path) -> SimLingo:
    return SimLingo.load(repo / "checkpoints/simlingo-tiny/checkpoints/epoch=013.ckpt/pytorch_model.pt")


@pytest.fixture(scope="module")
def red_light(repo: Path) -> Frame:
    return Frame(repo / "datasets/demo_drive/red_light/images/frame_0003.png", speed_mps=5.0)


def test_the_readme_example_runs(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    (example,) = [b for b in blocks if "vla_ray.policy" in b]
    for folder in ("checkpoints", "datasets"):
        (tmp_path / folder).symlink_to(repo / folder)
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(example, scope)
    found = scope["found"]
    assert "red traffic light" in found.prediction.text  # type: ignore[attr-defined]
    assert (tmp_path / "outputs/red_light.png").stat().st_size > 10_000


def test_the_map_points_at_the_light(policy: SimLingo, red_light: Frame, repo: Path) -> None:
    from PIL import Image

    from vla_ray.explain.faithfulness.localisation import localise

    found = explain(policy, red_light, target="longitudinal_progress")
    labels = np.asarray(Image.open(repo / "datasets/demo_drive/red_light/truth/masks/frame_0003.png"))
    assert found.map is not None
    place = localise(found.map.values, labels == 1, found.map.geometry)
    assert place is not None
    assert place.pointing == 1
    assert place.lift > 5
    assert found.direction == "negative"
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.value == pytest.approx(found.prediction.scalars["longitudinal_progress"])
    picture = found.map.on_picture()
    assert picture.shape == (224, 448)
    assert np.isnan(picture[-1]).all()
    assert not np.isnan(picture[0]).any()


@pytest.mark.parametrize("method", ["relevancy_lm", "rollout", "gradient_x_input", "lrp"])
@pytest.mark.parametrize("target", ["curv_energy", "text_max"])
def test_methods_and_targets(policy: SimLingo, red_light: Frame, method: str, target: str) -> None:
    found = explain(policy, red_light, target=target, method=method)
    assert found.map is not None
    assert np.isfinite(found.map.values).all()
    assert found.map.total > 0
    assert found.unit == ("logit" if target == "text_max" else "1/m^2")
    assert found.overlay().size[0] >= 448


def test_strength_changes_relevancy_and_nothing_else(policy: SimLingo, red_light: Frame) -> None:
    def ranks(method: str, strength: float) -> np.ndarray:
        found = explain(policy, red_light, "brake_energy", method, strength).map
        assert found is not None
        return found.values / found.values.sum()

    assert np.abs(ranks("relevancy", 0.2) - ranks("relevancy", 3.0)).max() > 0.01
    assert np.abs(ranks("rollout", 0.2) - ranks("rollout", 3.0)).max() < 1e-7


def test_pixels_without_anything_known(policy: SimLingo) -> None:
    rgb = np.full((120, 200, 3), 128, np.uint8)
    assert len(policy.predict(Frame(rgb)).route) == 20
    assert explain(policy, rgb, target="forward_speed").prediction.text


def test_refusals(policy: SimLingo, red_light: Frame, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="Did you mean 'curv_energy'"):
        explain(policy, red_light, target="curv_enrgy")
    with pytest.raises(TargetError, match="unknown text_token_strategy 'best'"):
        explain(policy, red_light, target="text_best")
    with pytest.raises(ConfigError, match="give one method"):
        explain(policy, red_light, method="original_raw")
    with pytest.raises(ConfigError, match="give one method"):
        explain(policy, red_light, method="relevancy,rollout")
    with pytest.raises(StorageError, match="no such file"):
        explain(policy, tmp_path / "missing.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match="not a PNG or JPEG"):
        explain(policy, tmp_path / "broken.png")
    with pytest.raises(CheckpointError):
        SimLingo.load(tmp_path / "missing/pytorch_model.pt")
