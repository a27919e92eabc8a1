"""The report of a policy, clicked through in a real browser, opened from disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vla_ray.data.tiles import TileGeometry
from vla_ray.explain.heatmap import HeatMap
from vla_ray.report.policy_page import RIGHT, WRONG, Figure, ShownMap, ShownSample, Table, write_policy_page
from vla_ray.storage.files import Location

LEFT, RIGHT_KEY, HOME, END = "\ue012", "\ue014", "\ue011", "\ue010"
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
KINDS = {"turn left": "turn left now", "landmark": "go to the red door", "forward": "go straight"}
STEPS = 4
FAILED, WITHOUT_PICTURE, FAN = 3, 4, 1


def shown(number: int, image: Location | None) -> ShownSample:
    """Errors grow with the number; the prediction goes straight on and the target to the left."""
    kind = list(KINDS)[number % 3]
    rng = np.random.default_rng(number)
    geometry = TileGeometry(96, 128, 96, 64, 64, ((0, 0, 64, 64),), False)
    maps = []
    for target in ("side", "lateral_offset"):
        for method in ("relevancy", "signed"):
            values = rng.random((4, 4)).astype(np.float32) * (1 + number) - (method == "signed")
            direction = "signed" if method == "signed" else "positive"
            maps.append(ShownMap(target, method, direction, HeatMap(values, geometry), {}))
    ahead = np.tile([1.0, 0.0], (STEPS, 1))
    return ShownSample(
        sample_id=f"halls/{number:05d}",
        number=number,
        instruction=f"{KINDS[kind]} {number}",
        kind=kind,
        dataset="halls",
        recording=f"r{number // 10}",
        image=image,
        predicted=ahead,
        target=ahead + [0.0, 0.1 * (1 + number)],
        scale_m=0.25,
        status="ok",
        metrics={"ade": 0.25 * (1 + number), "fde": 0.4 * (1 + number), "ade_m": 0.0625 * (1 + number),
                 "turn_side": WRONG if number % 2 else RIGHT, "confidence": 1 / (1 + number)},
        probability=ahead * 0 + 0.5,
        maps=maps,
    )  # fmt: skip


@pytest.fixture(scope="session")
def policy_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples: one with a fan, one that failed, one without a picture, one with a hostile instruction."""
    root = tmp_path_factory.mktemp("policy")
    Image.new("RGB", (128, 96), (90, 120, 150)).save(root / "picture.png")
    image = Location.of(root / "picture.png")
    samples = [shown(i, image) for i in range(12)]
    aside = np.tile([1.0, 0.5], (STEPS, 1))
    samples[FAN] = replace(samples[FAN], variants={"turn left": aside, HOSTILE: -aside})
    samples[FAILED] = replace(
        samples[FAILED], predicted=None, probability=None, metrics={}, maps=[], status="failed",
        error="ImageError: the picture is empty",
    )  # fmt: skip
    samples[WITHOUT_PICTURE] = replace(samples[WITHOUT_PICTURE], image=None)
    samples[-1] = replace(samples[-1], instruction=HOSTILE)
    tables = [Table("Metrics", HOSTILE, ["metric", "run"], [["ADE", 1.5]])]
    figures = [Figure("Errors", "", (root / "picture.png").read_bytes())]
    out = root / "report"
    methods = {"relevancy": "where it comes from", "signed": "with sign"}
    facts = {"run": "demo", "note": HOSTILE}
    write_policy_page(Location.of(out), f"Demo {HOSTILE}", facts, samples, tables, figures, methods, 1.0)
    return out


@pytest.fixture
def policy(any_report: Any, policy_report: Path) -> Any:
    return any_report(policy_report)


def at(page: Any, number: int) -> None:
    """Wait until this sample is shown, its trajectories included."""
    wanted = f"halls/{number:05d}"
    page.until(lambda: page.find("#view-samples").get_attribute("data-sample") == wanted, f"{wanted} to be shown")


def column(page: Any, name: str) -> list[str]:
    return page.js(
        "const t = document.querySelector('#table');"
        "const n = [...t.querySelectorAll('th')].findIndex(h => h.dataset.column === arguments[0]);"
        "return [...t.querySelectorAll('tr[data-row]')].map(r => r.children[n].textContent)",
        name,
    )


def type_into(page: Any, selector: str, text: str) -> None:
    field = page.find(selector)
    field.clear()
    field.send_keys(text)


def heat(page: Any) -> str | None:
    return page.js("const c = document.querySelector('#panel .heat'); return c.hidden ? null : c.toDataURL();")


def test_sort_and_go_on_in_the_order_of_the_table(policy: Any) -> None:
    policy.open()
    at(policy, 0)
    assert policy.text("#position") == "1 / 12"
    assert "waypoint spacings" in policy.text("header + .units")
    assert policy.find("#table tr[aria-current=true]").get_attribute("data-row") == "0"
    for _ in range(2):
        policy.click("th[data-column=ADE] button")
    assert column(policy, "ADE")[:2] == ["3.000", "2.750"]
    assert column(policy, "ADE")[-1] == "\u2013"  # who failed has no error, and goes last
    policy.press(HOME)
    at(policy, 11)
    policy.press(RIGHT_KEY)
    at(policy, 10)
    policy.press(LEFT)
    at(policy, 11)
    policy.press(END)
    at(policy, FAILED)
    policy.click("#previous")
    at(policy, 0)
    policy.click("#table tr[data-row='5']")
    at(policy, 5)
    assert policy.text("#position") == "7 / 12"
    policy.hash("sample=halls%2F00005")


def test_filters_by_kind_error_status_and_words(policy: Any) -> None:
    policy.open()
    at(policy, 0)
    policy.select("#kind-filter", "landmark")
    assert policy.text("#count") == "4 of 12 samples"
    at(policy, 1)  # the sample that was shown is not among them
    type_into(policy, "#range-min", "1")
    type_into(policy, "#range-max", "2")
    assert column(policy, "ADE") == ["1.250", "2.000"]
    policy.select("#range-by", "ade_m")
    assert policy.text("#count") == "no sample matches"
    policy.click("#clear")
    assert policy.text("#count") == "12 of 12 samples"
    type_into(policy, "#words", "DOOR halls/00007")
    assert column(policy, "instruction") == ["go to the red door 7"]
    policy.hash("words=DOOR+halls%2F00007")
    policy.click("#clear")
    policy.click("#counts [data-status=failed]")
    at(policy, FAILED)
    policy.open("status=failed&sample=halls%2F00003")
    assert policy.text("#count") == "1 of 12 samples"


def test_details_of_a_sample(policy: Any) -> None:
    policy.open("sample=halls%2F00001")
    at(policy, FAN)
    assert policy.text("#instruction") == "go to the red door 1"
    assert policy.text("[data-metric=ade]") == "0.500\u00a0units"
    assert policy.text("[data-metric=ade_m]") == "0.125\u00a0m"
    assert policy.text("[data-metric=turn_side]") == "wrong"
    assert policy.text("#steps tbody tr:last-child") == "41.000.001.000.200.500.500.80"
    assert "1 unit = 0.2500\u00a0m" in policy.text("#origin")
    names = policy.js("return [...document.querySelectorAll('.trajectory:not(.label)')].map(g => g.dataset.name)")
    assert names == ["straight ahead", "target", "turn left", HOSTILE, "predicted"]
    ends = policy.js(
        "return Object.fromEntries([...document.querySelectorAll('.trajectory:not(.label) .line')]"
        ".map(l => [l.parentNode.dataset.name, l.points[l.points.numberOfItems - 1]]).map(([n, p]) => [n, [p.x, p.y]]))"
    )
    (x0, y0), (left, up) = ends["predicted"], ends["turn left"]
    assert left < ends["target"][0] < x0  # left is left
    assert up == pytest.approx(y0)  # as far ahead
    assert ends[HOSTILE][1] > y0  # backwards is down
    policy.press("v")
    assert not policy.all(".trajectory.variant")


def test_relevance_is_switched_and_chosen(policy: Any) -> None:
    policy.open()
    at(policy, 0)
    first = heat(policy)
    assert first is not None
    policy.press("o")
    assert heat(policy) is None
    policy.click("#overlay")
    assert heat(policy) == first
    policy.select("#method", "signed")
    assert heat(policy) != first
    assert policy.text("#panel .direction") == "blue lowers the value, orange raises it"
    policy.press("M", "t")
    assert policy.find("#target").get_property("value") == "lateral_offset"
    policy.hash("target=lateral_offset", "method=relevancy")
    own = policy.text("#panel .high")
    policy.select("#scale", "all")
    assert policy.text("#panel .high") != own
    policy.drag("#opacity", 25)
    assert policy.find("#panel .heat").value_of_css_property("opacity") == "0.25"


def test_what_is_missing_is_said(policy: Any) -> None:
    policy.open("sample=halls%2F00003")
    at(policy, FAILED)
    assert policy.text("#notice") == "failed: ImageError: the picture is empty"
    assert not policy.all(".trajectory.predicted")
    assert policy.text("#birdseye .reason") == "no prediction: failed"
    assert not policy.all("#metrics dd")
    assert heat(policy) is None
    policy.press(RIGHT_KEY)
    at(policy, WITHOUT_PICTURE)
    assert policy.text("#no-photo") == "no picturenone was kept"
    assert policy.find("#no-photo").is_displayed()
    assert policy.all(".trajectory.predicted")


def test_text_from_data_is_text(policy: Any) -> None:
    policy.open("sample=halls%2F00011")
    at(policy, 11)
    assert policy.text("#instruction") == HOSTILE
    for view in ("results", "about", "samples"):
        policy.click(f"#tab-{view}")
    policy.press(HOME, RIGHT_KEY)
    at(policy, FAN)
    assert policy.js("return window.hacked") is None
    assert policy.text("#view-results .note") == HOSTILE


def test_without_targets_and_maps_their_controls_are_gone(any_report: Any, tmp_path: Path) -> None:
    samples = [replace(shown(i, None), target=None, maps=(), metrics={"confidence": 0.5}) for i in range(2)]
    write_policy_page(Location.of(tmp_path), "Log", {}, samples)
    page = any_report(tmp_path).open()
    at(page, 0)
    for hidden in ("#range-field", "#overlay", "#tab-results", "#dataset-field", "#fan-switch"):
        assert not page.find(hidden).is_displayed()
    assert not page.all("th[data-column=ADE]")
    assert page.text("#steps thead tr") == "predictedprobability"
    assert not page.all(".trajectory.target")


def test_a_report_of_no_samples(any_report: Any, tmp_path: Path) -> None:
    write_policy_page(Location.of(tmp_path), "Empty", {}, [])
    page = any_report(tmp_path).open()
    assert page.find("#view-samples").text == "This report holds no samples."
    page.press(RIGHT_KEY, END, "o", "t")
    page.click("#tab-about")
    assert page.find("#view-about").is_displayed()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (420, 900)])
def test_it_fits_the_window(policy: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    policy.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        policy.open("sample=halls%2F00001")
        at(policy, FAN)
        assert policy.js("return document.documentElement.scrollWidth") <= width
        if width > 1180:  # all at once, without scrolling
            assert policy.js("return document.documentElement.scrollHeight") <= height
        for part in ("#photo", "#birdseye svg", "#steps", "#instruction", "#words", "#tab-about"):
            box = policy.box(part)
            assert box["width"] > 0, part
            assert box["height"] > 0, part
            assert 0 <= box["left"] <= box["left"] + box["width"] <= width, part
    finally:
        policy.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
