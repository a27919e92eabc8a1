"""The report of heat maps, clicked through in a real browser, opened from disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_ray.data.camera import Camera
from vla_ray.report.page import write_page
from vla_ray.storage.files import Location

LEFT, RIGHT, UP, DOWN, HOME, END = "\ue012", "\ue014", "\ue013", "\ue015", "\ue011", "\ue010"
ENTER = "\ue007"
FIRST, ODD = "one/frame_0000", 'a "b" <i>&\'%20 #?'


# Columns and rows (in cells) of the first of the lightest pixels.
BRIGHTEST = """
const c = document.querySelector("[data-panel=a] .heat");
const {data} = c.getContext("2d").getImageData(0, 0, c.width, c.height);
let [best, at] = [-1, 0];
for (let i = 0; i < data.length; i += 4) {
  const light = data[i + 3] * (data[i] + data[i + 1]);
  if (light > best) [best, at] = [light, i / 4];
}
return [at % c.width / c.width * 16, Math.floor(at / c.width) / c.height * 8];
"""
CENTRES = """
return [...document.querySelectorAll(arguments[0])].map(c => [+c.getAttribute("cx"), +c.getAttribute("cy")]);
"""


# Moving around ---------------------------------------------------------------------------------------------------


def test_it_opens_at_the_first_frame(report: Any) -> None:
    report.open().at(FIRST)
    assert report.text("#frame-id") == FIRST
    assert report.text("#commentary") == "Frame 0 says: keep going."
    assert report.text("#frame-speed") == "5\u00a0m/s"
    assert report.text("#position") == "1 / 6"
    assert report.text("[data-panel=a] .value") == "0\u00a0m"
    assert [b.text for b in report.all("#scene-list .name")] == ["one", "two", ODD]
    photo = "document.querySelector('[data-panel=a] .photo')"
    report.until(lambda: report.js(f"return {photo}.complete && {photo}.naturalWidth") == 400, "the picture")
    assert report.find("#frame-slider").get_attribute("aria-label") == "Frame"


def test_slider_buttons_timeline_and_filmstrip_move(report: Any) -> None:
    report.open().at(FIRST)
    before = report.pixels()
    report.drag("#frame-slider", 3)
    report.at("one/frame_0003")
    assert report.pixels() != before
    report.click("#next")
    report.at("one/frame_0004")
    report.click("#previous")
    report.at("one/frame_0003")
    report.click("#filmstrip [data-number='1']")
    report.at("one/frame_0001")
    assert report.find("#filmstrip [aria-current=true]").get_attribute("data-number") == "1"
    report.js(
        "const b = document.getElementById('timeline').getBoundingClientRect();"
        "document.elementFromPoint(b.right - 1, b.top + 5).dispatchEvent("
        "new MouseEvent('click', {bubbles: true, clientX: b.right - 1, clientY: b.top + 5}))"
    )
    report.at("one/frame_0005")
    assert report.find("#frame-slider").get_property("value") == "5"


def test_keys_move_through_frames_and_scenes(report: Any) -> None:
    report.open().at(FIRST)
    report.press(RIGHT, RIGHT, LEFT)
    report.at("one/frame_0001")
    report.press(LEFT, LEFT, LEFT)
    report.at(FIRST)  # it does not leave the scene
    report.press(END)
    report.at("one/frame_0005")
    report.press(HOME, DOWN)
    report.at("two/frame_0000")
    assert report.find("#scene-list [aria-current=true]").get_attribute("data-scene") == "two"
    report.press(UP, UP)
    report.at(FIRST)
    report.click("#scene-list [data-scene=two]")
    report.at("two/frame_0000")
    report.press(RIGHT)  # a clicked control does not keep the keys
    report.at("two/frame_0001")


def test_space_plays_and_pauses(report: Any) -> None:
    report.open("scene=two&frame=frame_0001").at("two/frame_0001")
    report.press(" ")
    assert report.find("#play").get_attribute("aria-pressed") == "true"
    report.at("two/frame_0002")
    report.at("two/frame_0000")  # round and round
    report.press(" ")
    assert report.find("#play").get_attribute("aria-pressed") == "false"


def test_typing_in_a_filter_is_not_a_shortcut(report: Any) -> None:
    report.open("view=metrics")
    report.find("#metrics-filter").send_keys("osm")
    report.click("#tab-frames")
    report.at(FIRST)
    assert not report.find("#compare").is_selected()
    assert report.pixels() is not None


def test_help_lists_the_keys(report: Any) -> None:
    report.open().at(FIRST)
    report.press("?")
    assert report.find("#help").is_displayed()
    assert "side by side" in report.text("#help")
    report.press(RIGHT)
    report.press("?")
    assert not report.find("#help").is_displayed()
    report.click("#help-open")
    report.click("#help-close")
    report.at(FIRST)


# Maps ------------------------------------------------------------------------------------------------------------


def test_method_and_target_change_the_map(report: Any) -> None:
    report.open().at(FIRST)
    seen = [report.pixels()]
    report.select("[data-panel=a] .method", "signed")
    seen.append(report.pixels())
    assert report.text("[data-panel=a] .direction") == "blue lowers the value, orange raises it"
    assert report.text("[data-panel=a] .low").startswith("\u2212")
    assert report.text("[data-panel=a] .about-method") == "both signs in one map"
    report.select("[data-panel=a] .target", "curv_energy")
    seen.append(report.pixels())
    assert report.text("[data-panel=a] .value") == "1\u00a01/m\u00b2"
    report.press("m")
    assert report.find("[data-panel=a] .method").get_property("value") == "rollout"
    seen.append(report.pixels())
    report.press("t")
    assert report.find("[data-panel=a] .target").get_property("value") == "progress"
    seen.append(report.pixels())
    assert len(set(seen)) == 5
    report.press("M", "M")
    assert report.pixels() == seen[0]
    report.click("#targets [data-target=curv_energy]")
    assert report.find("#targets [data-target=curv_energy]").get_attribute("aria-pressed") == "true"


def test_the_brightest_cell_is_where_the_map_says(report: Any) -> None:
    """Frame n has its maximum in rows 3 and 4, column n of an 8 x 16 grid."""
    report.open("scene=one&frame=frame_0005").at("one/frame_0005")
    found = report.js(BRIGHTEST)
    assert 5 <= found[0] < 6
    assert 3 <= found[1] < 5


def test_the_map_covers_exactly_what_the_model_saw(report: Any) -> None:
    report.open().at(FIRST)
    photo, heat, blind = (report.box(f"[data-panel=a] .{name}") for name in ("photo", "heat", "blind"))
    assert photo["width"] / photo["height"] == pytest.approx(2, rel=0.01)
    assert (heat["left"], heat["top"], heat["width"]) == pytest.approx((photo["left"], photo["top"], photo["width"]))
    assert heat["height"] == pytest.approx(0.7 * photo["height"], abs=0.5)
    assert blind["top"] == pytest.approx(heat["top"] + heat["height"], abs=0.5)
    assert blind["height"] == pytest.approx(0.3 * photo["height"], abs=0.5)
    assert report.text("[data-panel=a] .blind") == "not seen by the model"


def test_overlay_and_opacity(report: Any) -> None:
    report.open().at(FIRST)
    opacity = "return getComputedStyle(document.querySelector('[data-panel=a] .heat')).opacity"
    assert report.js(opacity) == "0.8"
    report.press("-", "-")
    assert report.js(opacity) == "0.6"
    assert report.text("#opacity-value") == "60 %"
    report.press("+")
    assert report.js(opacity) == "0.7"
    report.drag("#opacity", 25)
    assert report.js(opacity) == "0.25"
    report.press("o")
    assert report.pixels() is None
    report.click("#overlay")
    assert report.pixels() is not None


def test_the_scale_is_the_scenes_or_the_frames(report: Any) -> None:
    report.open().at(FIRST)
    per_scene = report.text("[data-panel=a] .high")
    report.press(RIGHT)
    report.at("one/frame_0001")
    assert report.text("[data-panel=a] .high") == per_scene
    painted = report.pixels()
    report.press("n")
    assert report.find("#scale").get_property("value") == "frame"
    assert report.text("[data-panel=a] .high") != per_scene
    assert report.pixels() != painted
    report.hash("scale=frame")
    report.select("#scale", "scene")
    assert report.pixels() == painted


def test_side_by_side(report: Any) -> None:
    report.open().at(FIRST)
    assert not report.find("[data-panel=b]").is_displayed()
    report.press("s")
    assert report.find("[data-panel=b]").is_displayed()
    assert report.pixels("b") != report.pixels("a")
    a, b = report.box("[data-panel=a] .photo"), report.box("[data-panel=b] .photo")
    assert b["top"] == a["top"]
    assert b["left"] >= a["left"] + a["width"]
    report.select("[data-panel=b] .method", "relevancy")
    assert report.pixels("b") == report.pixels("a")
    left = report.pixels("a")
    report.select("[data-panel=b] .target", "curv_energy")
    assert report.pixels("b") != left
    assert report.pixels("a") == left
    assert len(report.all("#targets [aria-pressed=true]")) == 2
    assert len(report.all("#shares .bar")) == 2
    report.hash("target2=curv_energy", "method2=relevancy")
    report.click("#compare")
    assert not report.find("[data-panel=b]").is_displayed()


def test_the_plan_lies_in_the_picture_where_the_camera_puts_it(report: Any) -> None:
    report.open("scene=one&frame=frame_0003").at("one/frame_0003")
    x = np.arange(1.0, 21)
    expected = Camera().project(np.stack([x, 0.03 * x**2], axis=1), 400, 200)
    marks = report.js(CENTRES, "[data-panel=a] .paths circle")
    assert np.allclose(marks, expected, atol=0.06)
    assert report.find("[data-panel=a] .paths").get_dom_attribute("viewBox") == "0 0 400 200"
    assert len(report.all("[data-panel=a] .mark.speed")) == 10
    report.press("r")
    assert not report.all("[data-panel=a] .mark")
    report.click("#waypoints")
    assert report.all("[data-panel=a] .mark")


def test_birdseye_view_is_metric_with_forward_up_and_right_right(report: Any) -> None:
    report.open("scene=one&frame=frame_0005").at("one/frame_0005")
    dots = np.array(report.js(CENTRES, "#birdseye circle"))
    assert len(dots) == 20
    assert len(report.all("#birdseye path.mark.speed")) == 10
    metres = np.stack([0.05 * np.arange(1.0, 21) ** 2, -np.arange(1.0, 21)], axis=1)  # right, and down on the screen
    scale = (dots[-1] - dots[0]) / (metres[-1] - metres[0])
    assert scale[0] == pytest.approx(scale[1], rel=1e-6)
    assert scale[0] > 0
    assert np.allclose(dots - dots[0], (metres - metres[0]) * scale, atol=0.05)
    text = report.text("#birdseye")
    assert "forward (m)" in text
    assert "right (m)" in text
    assert "2 s" in text
    report.press(LEFT, LEFT)  # the same scale in another frame of the scene
    report.at("one/frame_0003")
    other = np.array(report.js(CENTRES, "#birdseye circle"))
    assert np.allclose(other[:, 1], dots[:, 1], atol=0.01)


def test_relevance_shares(report: Any) -> None:
    report.open().at(FIRST)
    widths = {e.get_attribute("data-part"): e.size["width"] for e in report.all("#shares .bar span")}
    assert list(widths) == ["image", "text", "prompt", "queries"]
    assert widths["image"] / sum(widths.values()) == pytest.approx(0.6, abs=0.01)
    assert "image 60 %" in report.text("#shares")


def test_what_lies_under_the_pointer(report: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    report.open().at(FIRST)
    heat = report.find("[data-panel=a] .heat")
    ActionChains(report.chrome).move_to_element(heat).perform()
    assert "% of the map" in report.text("[data-panel=a] .probe")
    ActionChains(report.chrome).move_to_element(report.find("[data-panel=a] .blind")).perform()
    assert report.text("[data-panel=a] .probe") == ""


# Frames without a map --------------------------------------------------------------------------------------------


def test_a_degenerate_target_has_a_badge_and_no_map(report: Any) -> None:
    report.open("scene=one&frame=frame_0002&target=progress").at("one/frame_0002")
    assert report.text("[data-panel=a] .notice") == "nothing to explain: progress = 0\u00a0m has no gradient"
    assert report.find("[data-panel=a] .notice").is_displayed()
    assert report.pixels() is None
    assert report.find("#targets [data-target=progress]").get_attribute("data-status") == "degenerate"
    report.press("t")
    assert not report.find("[data-panel=a] .notice").is_displayed()
    assert report.pixels() is not None


def test_a_failed_frame_says_why(report: Any) -> None:
    report.open("scene=one&frame=frame_0004").at("one/frame_0004")
    assert report.text("[data-panel=a] .notice").startswith("failed: ImageError: frame_0004.png is empty")
    assert report.pixels() is None
    assert "no picture" in report.find("[data-panel=a] .picture").text
    assert "no prediction" in report.text("#birdseye")
    assert "failed" in report.text("#filmstrip [data-number='4']")
    assert report.text("#scene-list [data-scene=one] .failed-count") == "1"
    report.click("#tab-failures")
    assert report.text("#failures-kinds") == "1 \u00d7 ImageError"
    cells = [c.text for c in report.all("#failures-table tr[data-row] td")]
    assert cells[:4] == ["one", "frame_0004", "all targets", "ImageError"]
    report.click("#tab-frames")
    report.press(HOME)
    report.at(FIRST)
    report.click("#tab-failures")
    report.click("#failures-table tr[data-row]")
    report.at("one/frame_0004")


def test_a_missing_data_file_is_said(any_report: Any, small_report: Path, tmp_path: Path) -> None:
    copy = tmp_path / "report"
    shutil.copytree(small_report, copy)
    (copy / "data/1.js").unlink()
    page = any_report(copy)
    page.expected_errors = ["data/1.js"]
    page.open().at(FIRST)
    page.press(DOWN)
    page.at("two/frame_0000")
    assert page.text("[data-panel=a] .notice").startswith("data/1.js cannot be read")
    page.press(UP)
    page.at(FIRST)
    assert page.pixels() is not None


def test_a_report_of_no_frames(any_report: Any, tmp_path: Path) -> None:
    write_page(Location.of(tmp_path), "Empty", {"run": "x"}, {}, [])
    page = any_report(tmp_path).open()
    assert page.find("#view-frames").text == "This report holds no frames."
    page.press(RIGHT, DOWN, "s", "m", "t", " ")
    page.click("#tab-metrics")
    assert page.text("#metrics-count") == "0 of 0 rows"
    assert not page.find("#tab-failures").is_displayed()
    assert not page.find("#tab-results").is_displayed()


def test_text_from_data_is_text(report: Any, small_report: Path) -> None:
    report.open().at(FIRST)
    report.press(DOWN, DOWN)
    report.at(f"{ODD}/frame_0000")
    assert report.text("#commentary").startswith("</script><script>")
    photo = "document.querySelector('[data-panel=a] .photo')"
    report.until(lambda: report.js(f"return {photo}.complete && {photo}.naturalWidth") == 400, "the picture")
    for view in ("metrics", "results", "about"):
        report.click(f"#tab-{view}")
    assert "</script><script>" in report.text("#facts")
    assert report.chrome.title.startswith("Demo </script>")
    assert report.js("return window.hacked") is None


# Address ---------------------------------------------------------------------------------------------------------


def test_the_address_keeps_the_view(report: Any) -> None:
    report.open("scene=two&frame=frame_0002&target=curv_energy&method=signed").at("two/frame_0002")
    assert report.find("[data-panel=a] .target").get_property("value") == "curv_energy"
    painted = report.pixels()
    report.press(LEFT, "m", "s")
    report.hash("frame=frame_0001", "method=rollout", "method2=")
    address = report.js("return location.hash")
    report.open(address[1:]).at("two/frame_0001")
    assert report.find("[data-panel=b]").is_displayed()
    report.js("location.hash = 'scene=two&frame=frame_0002&target=curv_energy&method=signed'")
    report.at("two/frame_0002")
    assert report.pixels() == painted
    report.click("#tab-about")
    report.hash("view=about")


def test_an_address_with_unknown_names_shows_what_it_can(report: Any) -> None:
    report.open("scene=two&frame=nothing&target=nothing&method=signed&view=nothing").at("two/frame_0000")
    assert report.find("[data-panel=a] .target").get_property("value") == "progress"
    assert report.find("[data-panel=a] .method").get_property("value") == "signed"


# Tables ----------------------------------------------------------------------------------------------------------


def column(page: Any, name: str, table: str = "#metrics-table") -> list[str]:
    return page.js(
        "const t = document.querySelector(arguments[0]);"
        "const n = [...t.querySelectorAll('th')].findIndex(h => h.dataset.column === arguments[1]);"
        "return [...t.querySelectorAll('tr[data-row]')].map(r => r.children[n].textContent)",
        table,
        name,
    )


def test_metrics_sort_filter_and_jump(report: Any) -> None:
    report.open().at(FIRST)
    report.click("#tab-metrics")
    assert report.text("#metrics-count") == "20 of 20 rows"
    assert report.text("th[data-column=speed] small") == "m/s"
    report.click("th[data-column=value] button")
    assert report.find("th[data-column=value]").get_attribute("aria-sort") == "ascending"
    ascending = column(report, "value")
    assert ascending[0] == "0"
    assert ascending[-2:] == ["\u2013", "\u2013"]  # nothing goes last
    report.click("th[data-column=value] button")
    assert column(report, "value")[:3] == ["6", "5", "4"]
    assert column(report, "value")[-2:] == ["\u2013", "\u2013"]
    report.click("th[data-column=value] button")
    assert column(report, "frame")[:3] == ["frame_0000", "frame_0000", "frame_0001"]
    report.select("#metrics-status", "failed")
    assert report.text("#metrics-count") == "2 of 20 rows"
    report.select("#metrics-status", "")
    report.find("#metrics-filter").send_keys("TWO frame_0001 curv")
    assert report.text("#metrics-count") == "1 of 20 rows"
    report.click("#metrics-table tr[data-row]")
    report.at("two/frame_0001")
    assert report.find("[data-panel=a] .target").get_property("value") == "curv_energy"


def test_a_row_opens_by_keyboard(report: Any) -> None:
    report.open("view=metrics")
    report.js("document.querySelectorAll('#metrics-table tr[data-row]')[3].focus()")
    report.press(ENTER)
    report.at("one/frame_0001")


def test_counts_by_status_lead_to_their_rows(report: Any) -> None:
    report.open().at(FIRST)
    assert [c.text for c in report.all("#counts .chip")] == ["17 ok", "1 degenerate", "2 failed"]
    report.click("#counts [data-status=degenerate]")
    assert column(report, "status") == ["degenerate"]
    assert report.text("#metrics-count") == "1 of 20 rows"


def test_results_and_about(report: Any) -> None:
    report.open().at(FIRST)
    report.click("#tab-results")
    assert column(report, "early deletion", "#result-0") == ["2.000", "1.250", "\u2013"]
    report.click("#result-0 th[data-column='early deletion'] button")
    assert column(report, "method", "#result-0") == ["random", "relevancy", "none"]
    figure = "document.querySelector('#view-results img')"
    report.until(lambda: report.js(f"return {figure}.complete && {figure}.naturalWidth") == 400, "the figure")
    report.click("#tab-about")
    assert report.text("#facts dt") == "run"
    assert "attention alone" in report.text("#methods")


# Size ------------------------------------------------------------------------------------------------------------


def test_a_thousand_frames_open_with_a_few_files(big: Any, big_report: Path) -> None:
    assert len(list((big_report / "data").iterdir())) == 16
    assert len(list((big_report / "images").rglob("*.jpg"))) == 1000
    big.open().at("scene_0/frame_0000")
    assert big.files("data") == {"0.js"}
    big.press(RIGHT, RIGHT)
    big.at("scene_0/frame_0002")
    assert big.files("data") == {"0.js"}
    assert 1 <= len(big.files("images/scene_0")) < 40
    assert len(big.all("#filmstrip button")) < 40
    big.drag("#frame-slider", 249)
    big.at("scene_0/frame_0249")
    assert big.pixels() is not None
    assert big.files("data") == {"0.js", "3.js"}
    for _ in range(3):
        big.press(DOWN, END)
    big.at("scene_3/frame_0249")
    assert big.text("#position") == "250 / 250"
    assert len(big.files("images/scene_3")) < 60
    assert len(big.files("data")) == 8


def test_three_thousand_rows_stay_out_of_the_document(big: Any) -> None:
    big.open("view=metrics")
    assert big.text("#metrics-count") == "3,000 of 3,000 rows"
    rows = big.all("#metrics-table tr[data-row]")
    assert 10 < len(rows) < 120
    assert big.find("#metrics-table table").get_attribute("aria-rowcount") == "3001"
    big.js("const s = document.querySelector('#metrics-table .table-scroll'); s.scrollTop = s.scrollHeight")
    big.until(lambda: column(big, "frame")[-1] == "frame_0249", "the last rows")
    assert len(big.all("#metrics-table tr[data-row]")) < 120
    big.click("th[data-column=value] button")
    big.click("th[data-column=value] button")
    assert column(big, "value")[0] == "251"
    big.find("#metrics-filter").send_keys("scene_2 frame_0107")
    assert big.text("#metrics-count") == "3 of 3,000 rows"
    big.click("#metrics-table tr[data-row]")
    big.at("scene_2/frame_0107")
    assert big.files("data") == {"9.js"}


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1440, 900), (1920, 1080), (800, 1000)])
def test_it_fits_the_window(report: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    report.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        report.open().at(FIRST)
        for key in ("", "s"):
            report.press(*key)
            assert report.js("return document.documentElement.scrollWidth") <= width
            if width > 1100:  # all at once, without scrolling
                assert report.js("return document.documentElement.scrollHeight") <= height
                for part in ("[data-panel=a] .photo", "#frame-slider", "#birdseye svg", "#play", "#compare"):
                    box = report.box(part)
                    assert box["width"] > 0
                    assert box["height"] > 0
                    assert 0 <= box["left"] <= box["left"] + box["width"] <= width, part
                    assert 0 <= box["top"] <= box["top"] + box["height"] <= height, part
    finally:
        report.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
