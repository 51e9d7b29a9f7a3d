"""Checks every link, anchor, picture and script of the built book: what a page names must exist on disk."""

from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ADDRESSES = {"a": "href", "img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src"}
OUTSIDE = {"https", "mailto", "data"}
LOADING = {"img", "script", "link", "source", "iframe"}  # a page must not load these from the network
GENERATED = {"print.html", "toc.html"}  # mdBook's own: the chapters' links, once more


def link_problems(html: Path) -> list[str]:
    """A line for each mistake in the pages of a folder."""
    pages = [page for page in sorted(html.rglob("*.html")) if page.name not in GENERATED]
    return [f"{page.relative_to(html)}: {problem}" for page in pages for problem in _problems(page, html)]


def _problems(page: Path, html: Path) -> list[str]:
    found = _read(page)
    twice = [name for name, count in Counter(found.ids).items() if count > 1]
    problems = [f"the id {name!r} is used twice" for name in twice]
    for tag, address in found.addresses:
        problems += _address_problems(tag, address, page, html)
    return problems


def _address_problems(tag: str, address: str, page: Path, html: Path) -> list[str]:
    parts = urlsplit(address)
    if parts.scheme in OUTSIDE:
        return [f"{address} is loaded from the network"] if tag in LOADING and parts.scheme != "data" else []
    if parts.scheme or parts.netloc:
        return [f"{address} is not https"]
    target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
    if not target.is_file():
        return [f"{address} does not exist"]
    if not target.is_relative_to(html.resolve()):
        return [f"{address} is outside of the book"]
    if parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in _read(target).ids:
        return [f"{address}: {target.name} has no such anchor"]
    return []


class _Page(HTMLParser):
    """The ids and the addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the element's id and its address."""
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            elif name == ADDRESSES.get(tag) and value is not None:
                self.addresses.append((tag, value))


@cache
def _read(page: Path) -> _Page:
    parsed = _Page()
    parsed.feed(page.read_text(encoding="utf-8"))
    return parsed
