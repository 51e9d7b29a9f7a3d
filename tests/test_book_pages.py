"""The built book in Chromium, opened from disk: every page, its themes, its search, its print page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from book_pages import BOOK, mdbook_build
from browser import chromium, sync_api, visiting

expect = sync_api.expect
BACKGROUND = "getComputedStyle(document.documentElement).backgroundColor"
PRINTED = "getComputedStyle(document.documentElement).getPropertyValue('--bg')"
PAGES = sorted(
    str(file.relative_to(BOOK / "src").with_suffix(".html"))
    for file in (BOOK / "src").rglob("*.md")
    if file.name != "SUMMARY.md"
)


@pytest.fixture(name="browser", scope="module")
def browser_fixture() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(name="html", scope="module")
def html_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("html")
    assert mdbook_build(BOOK, target).returncode == 0
    return target


def test_every_page_opens_without_a_network_and_fits_a_narrow_screen(browser: Any, html: Path) -> None:
    """`visiting` fails on errors of a page, and on requests to other hosts."""
    with visiting(browser, f"{html.as_uri()}/", viewport={"width": 360, "height": 800}) as page:
        for name in (*PAGES, "index.html", "print.html"):
            page.goto((html / name).as_uri())
            expect(page.locator("main h1").first).to_be_visible()
            assert page.evaluate("document.scrollingElement.scrollWidth") <= 360, name


@pytest.mark.parametrize(("scheme", "colour"), [("light", "rgb(250, 249, 246)"), ("dark", "rgb(22, 24, 28)")])
def test_the_page_has_the_live_pages_colours(browser: Any, html: Path, scheme: str, colour: str) -> None:
    with visiting(browser, f"{html.as_uri()}/", color_scheme=scheme) as page:
        page.goto((html / "map.html").as_uri())
        assert page.evaluate(BACKGROUND) == colour
        page.emulate_media(media="print")
        assert page.evaluate(PRINTED) == "#faf9f6"


def test_the_menu_offers_a_light_and_a_dark_theme(browser: Any, html: Path) -> None:
    with visiting(browser, f"{html.as_uri()}/") as page:
        page.goto((html / "map.html").as_uri())
        page.locator("#mdbook-theme-toggle").click()
        shown = [one for one in page.locator("#mdbook-theme-list button").all() if one.is_visible()]
        ids = [one.get_attribute("id") for one in shown]
        assert ids == ["mdbook-theme-default_theme", "mdbook-theme-light", "mdbook-theme-navy"]
        shown[-1].click()
        assert page.evaluate(BACKGROUND) == "rgb(22, 24, 28)"


def test_a_reader_can_search_the_book_from_disk(browser: Any, html: Path) -> None:
    with visiting(browser, f"{html.as_uri()}/") as page:
        page.goto((html / "preface.html").as_uri())
        page.keyboard.press("s")
        page.keyboard.type("copy on write")
        expect(page.locator("#mdbook-searchresults li").first).to_be_visible()


def test_solutions_and_answers_are_folded(browser: Any, html: Path) -> None:
    with visiting(browser, f"{html.as_uri()}/") as page:
        page.goto((html / "week-3" / "day-1.html").as_uri())
        solution = page.locator("details.solution").first
        expect(solution.locator("code").last).not_to_be_visible()
        solution.locator("summary").click()
        expect(solution.locator("code").last).to_be_visible()
