"""A real headless Chromium, and synthetic reports to click through.

Where Chromium, chromedriver or selenium is missing the tests skip, visibly; with CI or VLA_RAY_REQUIRE_BROWSER set they
fail instead, so that no machine that should have run them can pass without.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vla_ray.data.camera import Camera
from vla_ray.data.tiles import TileGeometry
from vla_ray.explain.heatmap import HeatMap
from vla_ray.report.page import Figure, ShownFrame, ShownMap, ShownTarget, Table, write_page
from vla_ray.storage.files import Location

# No flag may make Chromium look for the network: the tests assert that nothing asks for it.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
METHODS = {
    "relevancy": "what raises the value",
    "signed": "both signs in one map",
    "rollout": "attention alone",
}
TARGETS = {"progress": "m", "curv_energy": "1/m^2"}
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


def missing(what: str) -> None:
    message = f"{what} is missing: install chromium, chromium-driver and selenium"
    if os.environ.get("CI") or os.environ.get("VLA_RAY_REQUIRE_BROWSER"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing("selenium")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser:
        missing("chromium")
    if not driver:
        missing("chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1440,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))  # a path: nothing looks for a driver
    chrome.get("about:blank")
    chrome.get_log("performance")  # of the browser's own start page
    yield chrome
    chrome.quit()


@dataclass
class Page:
    """A report in the browser, spoken to by what a person does and sees."""

    chrome: Any
    directory: Path
    expected_errors: list[str] = field(default_factory=list)  # parts of console lines that a test provokes
    asked: list[str] = field(default_factory=list)  # every URL that was requested

    def open(self, fragment: str = "") -> Page:
        self.chrome.get("about:blank")  # else only the fragment would change
        self.chrome.get(f"file://{self.directory}/index.html{fragment and '#' + fragment}")
        return self

    def js(self, script: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.chrome.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.chrome.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).get_attribute("textContent"))

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.chrome).send_keys(key).perform()

    def select(self, selector: str, value: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.find(selector)).select_by_value(value)

    def drag(self, selector: str, value: int) -> None:
        """Set a slider, with the event that moving it sends."""
        self.js(
            "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
            "s.dispatchEvent(new Event('input', {bubbles: true}));",
            selector,
            value,
        )

    def until(self, condition: Any, message: str) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.chrome, 10, poll_frequency=0.02).until(lambda _: condition(), message)

    def at(self, frame_id: str) -> Page:
        """Wait until this frame is shown, its maps included."""
        self.until(lambda: self.find("#view-frames").get_attribute("data-frame") == frame_id, f"{frame_id} to be shown")
        return self

    def pixels(self, panel: str = "a") -> str | None:
        """What is painted on the heat map, None if it is hidden. Reading it also shows that it is not tainted."""
        return self.js(
            "const c = document.querySelector(arguments[0]); return c.hidden ? null : c.toDataURL();",
            f"[data-panel={panel}] .heat",
        )

    def box(self, selector: str) -> dict[str, float]:
        return self.js(
            "const {left, top, width, height} = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return {left, top, width, height};",
            selector,
        )

    def hash(self, *parts: str) -> None:
        """Wait until the address holds all of these."""
        self.until(lambda: all(p in self.js("return location.hash") for p in parts), f"{parts} in the address")

    def files(self, folder: str) -> set[str]:
        """Names of the files of a folder of the report that the browser has asked for, since the test began."""
        self.read_log()
        return {url.rsplit("/", 1)[1] for url in self.asked if f"/{folder}/" in url}

    def read_log(self) -> None:
        for entry in self.chrome.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"])


def check(page: Page) -> None:
    """No errors, and nothing but files asked for."""
    errors = [e["message"] for e in page.chrome.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
    unexpected = [e for e in errors if not any(part in e for part in page.expected_errors)]
    assert not unexpected
    page.read_log()
    assert page.asked
    assert not [url for url in page.asked if not url.startswith(("file:///", "data:", "about:"))]


@pytest.fixture
def report(chrome: Any, small_report: Path) -> Iterator[Page]:
    page = Page(chrome, small_report)
    yield page
    check(page)


@pytest.fixture
def big(chrome: Any, big_report: Path) -> Iterator[Page]:
    page = Page(chrome, big_report)
    yield page
    check(page)


@pytest.fixture
def any_report(chrome: Any) -> Iterator[Any]:
    """A report from a directory of the test's own."""
    pages = []

    def at(directory: Path) -> Page:
        pages.append(Page(chrome, directory))
        return pages[-1]

    yield at
    for page in pages[-1:]:
        check(page)


# Synthetic reports ---------------------------------------------------------------------------------------------


def picture(path: Path, width: int, height: int, shade: int) -> Location:
    across = np.linspace(0, 200, width).astype(np.uint8)
    rgb = np.stack(
        np.broadcast_arrays(across, np.uint8(shade), np.linspace(50, 200, height).astype(np.uint8)[:, None]), -1
    )
    Image.fromarray(np.ascontiguousarray(rgb)).save(path)
    return Location.of(path)


def synthetic_frame(
    scene: str, number: int, image: Location | None, size: tuple[int, int], targets: dict[str, str], methods: list[str]
) -> ShownFrame:
    """A curve that closes with the frame's number, and maps whose maximum wanders to the right."""
    width, height = size
    geometry = TileGeometry(height, width, round(0.7 * height), 32, 64, ((0, 0, 32, 32), (32, 0, 64, 32)), False)
    rng = np.random.default_rng(number)
    x = np.arange(1.0, 21)
    route = np.stack([x, 0.01 * (number % 10) * x**2], axis=1)
    maps = []
    for target in targets:
        for method in methods:
            grid = rng.random((8, 16)).astype(np.float32)
            grid[3:5, number % 16] = 3  # more than 1 % of the cells: the scale
            signed = method == "signed"
            heat = HeatMap(grid - (0.5 if signed else 0.0), geometry)
            shares = {"image": 0.6, "text": 0.1, "prompt": 0.1, "queries": 0.2}
            maps.append(ShownMap(target, method, "signed" if signed else "positive", heat, shares))
    stem = f"frame_{number:04d}"
    values = {name: float(number) + i for i, name in enumerate(targets)}
    return ShownFrame(
        frame_id=f"{scene}/{stem}",
        scene=scene,
        stem=stem,
        image=image,
        text=f"Frame {number} says: keep going.",
        speed_mps=5.0 + number,
        route=route,
        speed_wps=route[:10] * 0.5,
        camera=Camera(),
        metrics={"curv_energy": 0.01 * number, "route_length": 20.0 - number % 7},
        targets=[ShownTarget(name, unit, values[name], "ok") for name, unit in targets.items()],
        maps=maps,
    )


def failed_frame(scene: str, number: int, targets: dict[str, str]) -> ShownFrame:
    base = synthetic_frame(scene, number, None, (200, 100), targets, [])
    reason = f"ImageError: {base.stem}.png is empty (0 bytes); restore the image or remove it"
    none = np.zeros((0, 2))
    failed = [ShownTarget(name, unit, None, "failed", reason) for name, unit in targets.items()]
    return ShownFrame(base.frame_id, scene, base.stem, None, "", 5.0, none, none, base.camera, {}, failed, [])


@pytest.fixture(scope="session")
def small_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes: `one` of six frames, of which 2 is degenerate for `progress` and 4 failed; `two`; a hostile one."""
    root = tmp_path_factory.mktemp("small")
    size, methods = (400, 200), list(METHODS)
    images = [picture(root / f"{i}.png", *size, 30 * i) for i in range(6)]
    one = [synthetic_frame("one", i, images[i], size, TARGETS, methods) for i in range(6)]
    standing = [ShownTarget("progress", "m", 0.0, "degenerate"), one[2].targets[1]]
    maps = [m for m in one[2].maps if m.target != "progress"]
    one[2] = ShownFrame(*(getattr(one[2], name) for name in ShownFrame.__slots__[:-2]), standing, maps)
    one[4] = failed_frame("one", 4, TARGETS)
    two = [synthetic_frame("two", i, images[i], size, TARGETS, methods) for i in range(3)]
    odd_name = 'a "b" <i>&\'%20 #?'
    odd = synthetic_frame(odd_name, 0, images[0], size, TARGETS, methods)
    odd = ShownFrame(*(getattr(odd, name) if name != "text" else HOSTILE for name in ShownFrame.__slots__))
    table = Table(
        "Faithfulness", HOSTILE, ["method", "early deletion"], [["relevancy", 2.0], ["random", 1.25], ["none", None]]
    )
    figure = Figure("Curves", "a note", (root / "1.png").read_bytes())
    scenes = [("one", one), ("two", two), (odd_name, [odd])]
    out = root / "report"
    facts = {"run": "demo", "note": HOSTILE}
    assert write_page(Location.of(out), f"Demo {HOSTILE}", facts, METHODS, scenes, [table], [figure]) == 10
    return out


@pytest.fixture(scope="session")
def big_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 frames in 4 scenes, three targets, two methods."""
    root = tmp_path_factory.mktemp("big")
    size = (96, 48)
    images = [picture(root / f"{i}.png", *size, 25 * i) for i in range(10)]
    targets = {**TARGETS, "brake_energy": "(m/s^2)^2"}

    def scene(name: str) -> tuple[str, list[ShownFrame]]:
        methods = ["relevancy", "signed"]
        return name, [synthetic_frame(name, i, images[i % 10], size, targets, methods) for i in range(250)]

    out = root / "report"
    scenes = (scene(f"scene_{s}") for s in range(4))
    assert write_page(Location.of(out), "Big", {}, METHODS, scenes) == 1000
    return out
