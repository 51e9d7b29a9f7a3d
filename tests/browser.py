"""A browser for tests: the system's Chromium, and pages that nothing goes wrong on.

Tests that need it are skipped where Playwright or Chromium is missing.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="there is no playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no chromium", allow_module_level=True)

OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window."""
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
    """A page in a context of its own. Whatever it complains of fails the test, and so does another host.

    fine: a pattern of what it may complain of. answers: by address, what comes without asking the server.
    options: of the context.
    """
    complaints: list[str] = []
    options = {"viewport": {"width": 1280, "height": 800}, **options}
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(f"{error.message}\n{error.stack}"))
        page.on(
            "request", lambda asked: complaints.append(asked.url) if not at_home(asked.url, url) else None
        )
        for address, answer in (answers or {}).items():
            page.route(address, _answering(answer))
        page.goto(url)
        yield page
    assert not [said for said in complaints if not re.search(fine, said)]


def _answering(answer: dict[str, Any]) -> Callable[[Any], None]:
    return lambda route: route.fulfill(**answer)


def at_home(address: str, url: str) -> bool:
    """Whether an address is the server's own, or no address at all."""
    return address.startswith((f"{url.rstrip('/')}/", "data:"))
