# SPDX-License-Identifier: Apache-2.0
"""The pages in a real browser, at the widths of a phone, a tablet and a desk, light and dark.

`make test-pages` brings the browser. Where there is none, these tests fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image, ImageColor

from prereg_kernels.checkup.report.style import THEMES
from tests.pages.made import checkup_pages, report_page

pytestmark = pytest.mark.pages
NAMES = ("two", "plain", "report")
WIDTHS = (390, 768, 1280)
each = pytest.mark.parametrize("name", NAMES)


class Opened(NamedTuple):
    """A page in the browser, and what its console said."""

    page: Any
    errors: list[str]

    def at(self, width: int, scheme: str = "light") -> Any:
        """The page in that width and colour scheme, all of it unfolded."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(color_scheme=scheme)
        self.page.evaluate("for (const x of document.querySelectorAll('details')) x.open = true")
        return self.page


def executable() -> str:
    """The browser: Debian's, or the one that CHROMIUM names."""
    found = shutil.which(os.environ.get("CHROMIUM") or "chromium")
    assert found, "expected a Chromium: make test-pages installs Debian's, or CHROMIUM names one"
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    return {**checkup_pages(place), "report": report_page(place / "report")}


@pytest.fixture(scope="module")
def opened(browser: Any, files: dict[str, Path]) -> Callable[[str], Opened]:
    """Opens a page, once."""
    there: dict[str, Opened] = {}

    def open_page(name: str) -> Opened:
        if name not in there:
            page, errors = browser.new_page(), []
            page.on("console", lambda message: errors.append(message.text))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("requestfailed", lambda request: errors.append(request.url[:80]))
            page.goto(files[name].as_uri())
            there[name] = Opened(page, errors)
        return there[name]

    return open_page


@each
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", THEMES)
def test_fits_and_everybody_can_read_it(
    opened: Callable[[str], Opened], name: str, width: int, scheme: str
) -> None:
    """axe-core finds nothing, the console is empty, and nothing makes the page scroll sideways."""
    import axe_playwright_python

    page = opened(name).at(width, scheme)
    wide = page.evaluate(
        """[...document.querySelectorAll('body *')].filter(x => !x.closest('.scroll, pre')
            && x.getBoundingClientRect().right > innerWidth).map(x => x.outerHTML.slice(0, 99))"""
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width, wide
    assert wide == []
    # the page has no script of its own, and axe-core stays once it is there
    if page.evaluate("typeof axe") == "undefined":
        page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 10
    assert [(x["id"], x["nodes"][0]["html"]) for x in found["violations"]] == []
    assert opened(name).errors == []


@each
@pytest.mark.parametrize("scheme", THEMES)
def test_pictures_are_on_the_page_s_ground(
    opened: Callable[[str], Opened], name: str, scheme: str
) -> None:
    page = opened(name).at(1280, scheme)
    pictures = page.locator("img").all()
    assert len(pictures) >= 10
    ground = ImageColor.getrgb(THEMES[scheme]["ground"])
    for picture in pictures:
        assert picture.evaluate("x => x.complete && x.naturalWidth") > 100
        shot = Image.open(BytesIO(picture.screenshot())).convert("RGB")
        assert shot.getpixel((shot.width // 2, 1)) == ground, picture.get_attribute("alt")


@each
def test_charts_are_large_on_a_phone(opened: Callable[[str], Opened], name: str) -> None:
    """A panel is as wide as the screen; what is whole keeps the size of its letters."""
    page = opened(name).at(390)
    for picture in page.locator(".panels img").all():
        assert picture.bounding_box()["width"] > 340
    for picture in page.locator(".scroll img").all():
        width = picture.evaluate("x => x.naturalWidth")
        assert picture.bounding_box()["width"] >= 0.55 * width


@each
def test_the_keyboard_scrolls(opened: Callable[[str], Opened], name: str) -> None:
    """What is wider than a phone moves by the arrow keys once it has the focus."""
    page = opened(name).at(390)
    moved = 0
    for area in page.locator(".scroll, pre").all():
        if area.evaluate("x => x.scrollWidth > x.clientWidth"):
            area.focus()
            page.keyboard.press("ArrowRight")
            page.wait_for_function("x => x.scrollLeft > 0", arg=area.element_handle())
            moved += 1
    assert moved >= 2


def test_without_a_browser_these_tests_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    with pytest.raises(AssertionError, match="expected a Chromium"):
        executable()
