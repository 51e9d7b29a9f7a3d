"""A browser for tests: the system's Chromium, and pages that fail the test on any error.

Tests that import this module are skipped if Playwright or Chromium is missing.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("Chromium is not installed", allow_module_level=True)

OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a headless browser."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visiting(
    browser: Any,
    url: str,
    *,
    fine: str = "(?!)",
    answers: Mapping[str, dict[str, Any]] | None = None,
    **options: Any,
) -> Iterator[Any]:
    """Open a page in a new context. Errors on the page and requests to other hosts fail the test.

    fine: a pattern of errors that are expected. answers: responses by address, given instead of the server's.
    options: of the context.
    """
    errors: list[str] = []
    options = {"viewport": {"width": 1280, "height": 800}, **options}
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(f"{error.message}\n{error.stack}"))
        page.on("request", lambda sent: errors.append(sent.url) if not is_local(sent.url, url) else None)
        for address, answer in (answers or {}).items():
            page.route(address, _answering(answer))
        page.goto(url)
        yield page
    assert not [error for error in errors if not re.search(fine, error)]


def _answering(answer: dict[str, Any]) -> Callable[[Any], None]:
    return lambda route: route.fulfill(**answer)


def is_local(address: str, url: str) -> bool:
    """Whether an address is on the server at `url`, the file at `url`, or a data URL."""
    return address == url or address.startswith((f"{url.rstrip('/')}/", "data:"))
