"""The report, in a browser: what it shows, that it can be zoomed, that it needs nothing from elsewhere."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from hf_flerm import FLeRMConfig, RateProfile
from hf_flerm.show.report import report
from tests.shared.training import gpt2, make_trainer, recorded

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


@dataclass
class Opened:
    """A page, what its console said and what it asked the network for."""

    page: Page
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def figure(self, index: int, expression: str) -> object:
        return self.page.evaluate(f"document.getElementById('picture-{index}').{expression}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no Chromium here: install one, or run `playwright install chromium`.")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, profile: RateProfile, folder: Path) -> Opened:
    file = folder / "report.html"
    file.write_text(report(profile), encoding="utf-8")
    found = Opened(browser.new_page())
    found.page.on("console", lambda message: found.console.append(f"{message.type}: {message.text}"))
    found.page.on("pageerror", lambda error: found.console.append(f"error: {error}"))
    found.page.on("dialog", lambda dialog: (found.console.append("dialog"), dialog.dismiss()))
    found.page.on("request", lambda request: found.requests.append(request.url))
    found.page.goto(file.as_uri(), wait_until="load")
    found.page.wait_for_selector(".plot-container .main-svg")
    return found


@pytest.fixture(scope="module")
def matched(tmp_path_factory: pytest.TempPathFactory) -> RateProfile:
    folder = tmp_path_factory.mktemp("matched")
    trainer = make_trainer(folder, gpt2(width=32), FLeRMConfig("match", recorded(folder, gpt2())))
    trainer.train()
    return trainer.rate_profile


def test_it_opens_alone_and_shows_every_rate(browser: Browser, matched: RateProfile, tmp_path: Path) -> None:
    found = opened(browser, matched, tmp_path)
    assert found.console == []
    assert found.requests == [(tmp_path / "report.html").as_uri()]
    headings = found.page.locator("h2").all_text_contents()
    assert headings == ["Rates over training", "Layers", "Tensors", "Learning-rate multipliers", "Rates in numbers"]
    shown = found.figure(2, "data[0].customdata")
    assert shown == [matched.rates[name].tolist() for name in matched.names]
    scales = matched.metadata["matching"]["scales"]
    lines = found.figure(3, "data.filter(trace => trace.mode != 'markers').map(trace => trace.y)")
    assert sorted(scale for line in lines for scale in line) == pytest.approx(sorted(map(math.exp, scales.values())))


def test_it_zooms_and_tells_what_is_under_the_pointer(browser: Browser, matched: RateProfile, tmp_path: Path) -> None:
    found = opened(browser, matched, tmp_path)
    page = found.page
    plot = page.locator("#picture-0 .nsewdrag").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    before = found.figure(0, "layout.xaxis.range")
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.75 * box["height"], steps=5)
    page.mouse.up()
    page.wait_for_function(
        "before => document.getElementById('picture-0').layout.xaxis.range[0] != before", arg=before[0]
    )
    width = before[1] - before[0]
    expected = [before[0] + 0.25 * width, before[0] + 0.75 * width]
    assert found.figure(0, "layout.xaxis.range") == pytest.approx(expected, abs=0.02 * width)

    heat_map = page.locator("#picture-2 .nsewdrag").first
    heat_map.scroll_into_view_if_needed()
    heat_map.hover(position={"x": 5, "y": 5})
    page.wait_for_selector("#picture-2 .hoverlayer .hovertext")
    name, rate = matched.names[0], matched.rates[matched.names[0]][0]
    assert page.locator("#picture-2 .hoverlayer .hovertext").text_content() == f"{name}step 0rate {rate:.3g}"
    assert found.console == []


def test_texts_of_a_profile_are_only_text(browser: Browser, tmp_path: Path) -> None:
    metadata = {"model": HOSTILE, "kinds": {"w": HOSTILE}, "training_arguments": {"lr_scheduler_type": HOSTILE}}
    image = "<img src=x onerror=alert(1)>"
    profile = RateProfile([0, 2], {"w": [1.0, 2.0], image: [0.0, 0.0]}, metadata)
    found = opened(browser, profile, tmp_path)
    assert found.console == []
    assert found.page.locator("img").count() == 0
    assert HOSTILE in (found.page.locator("h1").text_content() or "")
    assert image in (found.page.locator("#picture-1").text_content() or "")


@pytest.mark.parametrize("steps", [[], [3]])
def test_short_profiles_have_a_report_too_and_the_same_one_twice(steps: list[int]) -> None:
    profile = RateProfile(steps, {"w": [0.0] * len(steps)})
    assert report(profile) == report(RateProfile(steps, {"w": [0.0] * len(steps)}))
    assert json.dumps("picture-0") in report(profile)
