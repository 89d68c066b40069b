"""The page in a browser: opened from disk in headless Chromium, walked by keyboard, on a wide and a narrow screen."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spalf.core.recipe import Plan
from spalf.engine.atlas import Atlas
from spalf.report import RunRecord, pack, page, search

from .conftest import HOSTILE, data_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver on PATH: the page is not opened"
    ),
]
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync hide-scrollbars"
)
READY = "return document.body.dataset.ready"


class Browser:
    """A page from disk in Chromium, and what it said on its console."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.path = Path()

    def screen(self, width: int, height: int, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})

    def open(self, path: Path, view: str = "") -> None:
        self.path = path
        self.driver.get("about:blank")
        self.driver.get(path.as_uri() + view)
        self.until(READY)

    def ask(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, seconds: float = 20.0) -> Any:
        """What a script gives as soon as it gives something."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.ask(script)
            if found:
                return found
            time.sleep(0.02)
        raise AssertionError(f"still nothing after {seconds} s: {script}")

    def go(self, view: str) -> None:
        self.ask("delete document.body.dataset.ready; location.hash = arguments[0]", view)
        self.until(READY)

    def type(self, text: str) -> None:
        """Keys to whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(text).perform()

    def said(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("pages")

    def write(text: str) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.html"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def small(plan: Plan, record: RunRecord, seen: Atlas, write: Callable[[str], Path]) -> Path:
    return write(page("toy", data_of(plan, record), pack(seen)))


@pytest.fixture
def opened(browser: Browser, small: Path) -> Browser:
    browser.screen(1280, 900)
    browser.open(small)
    return browser


VIEWS = ["#/run", "#/features", "#/features/3", "#/features/100", "#/evaluation", "#/plan"]


@pytest.mark.parametrize("screen", [(1280, 900, False), (1280, 900, True), (360, 740, False)])
def test_every_view_opens_in_silence_and_fits(browser: Browser, small: Path, screen: tuple[int, int, bool]) -> None:
    browser.screen(*screen)
    for view in VIEWS:
        browser.open(small, view)
        assert browser.said() == []
        assert browser.ask("return document.documentElement.scrollWidth") <= screen[0], view
        assert len(browser.ask("return document.getElementById('main').innerText")) > 100
        assert browser.ask("return document.title").startswith("toy")


def test_dark_and_light(browser: Browser, small: Path) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    browser.screen(1280, 900, dark=True)
    browser.open(small)
    dark = browser.ask(ground)
    browser.screen(1280, 900)
    light = browser.ask(ground)
    assert dark != light
    button = "document.getElementById('theme')"
    browser.ask(f"{button}.click()")
    assert browser.ask(f"return {button}.dataset.theme") == "light"
    browser.ask(f"{button}.click()")
    assert browser.ask(ground) == dark
    browser.ask(f"{button}.click()")
    assert browser.ask(ground) == light


def test_the_run_is_told(opened: Browser) -> None:
    text = opened.ask("return document.getElementById('main').innerText")
    assert "faithfulness" in text
    assert "not met" in text
    assert HOSTILE[0] in text, "a note is text"
    titles = opened.ask("return [...document.querySelectorAll('.chart b')].map((b) => b.textContent)")
    wanted = "L0 R\u00b2 Violations Multipliers Penalties Thresholds Bandwidths Objective Loss novel"
    assert set(wanted.split()) <= set(titles)
    assert opened.ask("return document.querySelectorAll('.chart path.curve[d^=M]').length") >= 10
    assert opened.ask("return [...document.querySelectorAll('text.phase')].map((t) => t.textContent)")[:2] == [
        "fit",
        "causal",
    ]


def test_the_cursor_moves_by_keys_in_all_charts(opened: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    opened.ask("document.querySelector('svg.plot').focus()")
    opened.type(Keys.HOME + Keys.ARROW_RIGHT)
    shown = opened.ask("return [...document.querySelectorAll('.at')].map((e) => e.textContent)")
    assert set(shown) == {"step 20"}
    assert opened.ask("return document.querySelector('.chart output').textContent") == "8"


def test_a_range_of_steps(opened: Browser) -> None:
    opened.ask("document.querySelectorAll('.segments button')[2].click()")
    assert opened.ask(
        "return [...new Set([...document.querySelectorAll('text.phase')].map((t) => t.textContent))]"
    ) == ["causal"]
    opened.ask("document.querySelectorAll('.segments button')[0].click()")


def test_the_evaluation_has_intervals_and_a_front(opened: Browser) -> None:
    opened.go("#/evaluation")
    text = opened.ask("return document.getElementById('main').innerText")
    assert "0.2 to 0.3125" in text
    assert "over 17 documents" in text
    assert opened.ask("return document.querySelectorAll('.frontier circle').length") == 6
    assert opened.ask("return document.querySelectorAll('.frontier .whisker').length") == 1
    assert opened.ask("return document.querySelectorAll('.frontier .own').length") == 2


def test_the_plan_is_told(opened: Browser, plan: Plan) -> None:
    opened.go("#/plan")
    rows = opened.ask("return [...document.querySelectorAll('table.plain tbody th')].map((e) => e.textContent)")
    assert rows == [d.path for d in plan.derived]
    assert 'name = "toy"' in opened.ask("return document.querySelector('pre').textContent")


def listed(browser: Browser) -> list[int]:
    """Ids in the part of the list that is drawn."""
    found: list[int] = browser.ask("return [...document.querySelectorAll('.item')].map((e) => Number(e.id.slice(4)))")
    return found


def test_search_finds_a_feature(opened: Browser, seen: Atlas) -> None:
    opened.go("#/features")
    assert listed(opened)[:5] == [f.id for f in search(seen)][:5]
    opened.type("/" + HOSTILE[0])
    wanted = [f.id for f in search(seen, HOSTILE[0])]
    assert set(listed(opened)) <= set(wanted)
    assert len(listed(opened)) > 0
    assert opened.ask("return document.querySelector('.count').textContent").startswith(f"{len(wanted)} of 256")
    assert opened.ask("return document.title") != "hacked"
    assert opened.said() == []
    opened.ask("document.getElementById('search').select()")
    opened.type("nothing has this text")
    assert listed(opened) == []
    assert opened.ask("return document.querySelector('.finder .lead').hidden") is False


def test_a_number_is_found_first(opened: Browser) -> None:
    opened.go("#/features")
    opened.type("/137")
    assert listed(opened)[0] == 137


def test_sorts_and_strata(opened: Browser, seen: Atlas) -> None:
    opened.go("#/features")
    choose = """
        const [label, value] = arguments;
        const labels = [...document.querySelectorAll('.controls label')];
        const select = labels.find((l) => l.firstChild.textContent === label).lastChild;
        select.value = value; select.dispatchEvent(new Event('change'));"""
    for sort in ("id", "token", "focus", "peak", "likeness", "drift", "stratum"):
        opened.ask(choose, "sort by", sort)
        wanted = [f.id for f in search(seen, sort=sort)][:5]
        if sort in ("id", "stratum", "token"):
            assert listed(opened)[:5] == wanted, sort
        else:  # the page has three digits
            assert len({*listed(opened)[:6]} & {*wanted}) >= 3, sort
    opened.ask(choose, "stratum", "1")
    anchored = {f.id for f in seen.features if f.stratum == "anchored"}
    assert anchored.isdisjoint(listed(opened))
    opened.ask(choose, "show", "silent")
    silent = {f.id for f in seen.features if f.stratum == "free" and not f.fired}
    assert set(listed(opened)) <= silent


def test_arrow_keys_walk_the_list_and_the_address_follows(opened: Browser, seen: Atlas) -> None:
    from selenium.webdriver.common.keys import Keys

    opened.go("#/features")
    opened.ask("document.querySelector('.box').focus()")
    order = [f.id for f in search(seen)]
    opened.type(Keys.ARROW_DOWN)
    opened.until(f"return location.hash === '#/features/{order[0]}'")
    opened.type(Keys.ARROW_DOWN + Keys.ARROW_DOWN)
    opened.until(f"return location.hash === '#/features/{order[2]}'")
    assert opened.ask("return document.querySelector('[aria-selected=true]').id") == f"item{order[2]}"
    assert opened.ask("return document.activeElement.className") == "box", "the list keeps the focus"
    assert (
        opened.ask("return document.querySelector('.box').getAttribute('aria-activedescendant')") == f"item{order[2]}"
    )
    opened.type(Keys.END)
    opened.until(f"return location.hash === '#/features/{order[-1]}'")
    assert order[-1] in listed(opened)
    opened.type(Keys.ENTER)
    assert opened.ask("return document.activeElement.id") == "feature"


def test_a_feature_is_told(opened: Browser, seen: Atlas) -> None:
    f = max((f for f in seen.features if f.anchored), key=lambda f: f.fired)
    assert f.anchored is not None
    opened.go(f"#/features/{f.id}")
    text = opened.ask("return document.getElementById('feature').innerText")
    for wanted in (
        "Anchored to",
        "Drift",
        "Strongest contexts",
        "Fires on",
        "Promotes",
        "Suppresses",
        "Fires together",
    ):
        assert wanted in text
    marks = opened.ask("return [...document.querySelectorAll('mark.peak')].map((m) => m.style.getPropertyValue('--a'))")
    assert len(marks) == len(f.places)
    assert marks[0] == "100%"
    assert opened.ask("return document.querySelectorAll('mark').length") >= len(marks)
    link = opened.ask("return document.querySelector('.bars a').getAttribute('href')")
    assert link == f"#/features/{f.neighbours[0][0]}"


def test_a_context_opens(opened: Browser, seen: Atlas) -> None:
    f = max(seen.features, key=lambda f: f.fired)
    opened.go(f"#/features/{f.id}")
    before = opened.ask("return document.querySelector('.tokens').textContent.length")
    opened.ask("document.querySelector('.more').click()")
    whole = "".join(seen.text[v] for v in seen.sequences[f.places[0].sequence])
    shown = opened.ask("return document.querySelector('.tokens').textContent")
    assert len(shown) > before
    assert shown.replace("\u23ce", "") == whole
    assert opened.ask("return document.querySelector('.more').getAttribute('aria-expanded')") == "true"


@pytest.mark.parametrize("view", ["#/features/99999", "#/nonsense", "#/features/x"])
def test_an_address_that_leads_nowhere(opened: Browser, view: str) -> None:
    opened.go(view)
    assert opened.said() == []
    if view == "#/features/99999":
        assert "There is no feature 99999" in opened.ask("return document.getElementById('feature').innerText")


def test_on_a_phone_the_list_and_the_feature_take_turns(browser: Browser, small: Path) -> None:
    browser.screen(360, 740)
    browser.open(small, "#/features")
    seen = "return ['.finder', '.reader'].map((s) => document.querySelector(s).offsetParent !== null)"
    assert browser.ask(seen) == [True, False]
    browser.ask("document.querySelector('.item').click()")
    browser.until("return location.hash.length > '#/features/'.length")
    browser.until("return document.querySelector('.reader').offsetParent !== null")
    assert browser.ask(seen) == [False, True]
    browser.ask("document.querySelector('.back').click()")
    browser.until("return document.querySelector('.finder').offsetParent !== null")


def test_four_thousand_features_stay_quick(
    browser: Browser, plan: Plan, record: RunRecord, many: Atlas, write: Callable[[str], Path]
) -> None:
    browser.screen(1280, 900)
    browser.open(write(page("wide", data_of(plan, record), pack(many))), "#/features")
    assert browser.ask("return document.querySelectorAll('.item').length") < 60, "only what is seen is drawn"
    browser.ask("const box = document.querySelector('.box'); box.scrollTop = box.scrollHeight")
    browser.until("return document.querySelector('[aria-posinset=\"4096\"]')")
    took = browser.ask(
        """
        const search = document.getElementById('search'), begin = performance.now();
        search.value = 'token31'; search.dispatchEvent(new Event('input'));
        return performance.now() - begin;"""
    )
    assert took < 3000
    assert 0 < browser.ask("return document.querySelectorAll('.item').length") < 60


def test_a_page_without_features(browser: Browser, plan: Plan, record: RunRecord, write: Callable[[str], Path]) -> None:
    browser.screen(1280, 900)
    browser.open(write(page("bare", data_of(plan, record), None)), "#/features")
    assert browser.ask("return [...document.querySelectorAll('#views a')].map((a) => a.textContent)") == [
        "Run",
        "Evaluation",
        "Plan",
    ]
    assert browser.ask(READY) == "run"
    assert browser.said() == []


def test_a_run_that_has_only_begun(browser: Browser, plan: Plan, write: Callable[[str], Path]) -> None:
    browser.screen(1280, 900)
    bare = RunRecord(directory=Path("run"), metrics=(), summary={}, recipe="")
    browser.open(write(page("young", data_of(plan, bare), None)))
    assert "has not ended" in browser.ask("return document.getElementById('main').innerText")
    for view in ("#/evaluation", "#/plan"):
        browser.go(view)
    assert browser.said() == []
