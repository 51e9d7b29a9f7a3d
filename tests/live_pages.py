"""Fixtures and helpers for tests of the live page: a server with a small pool, a browser, and the page in it.

A test module imports the `..._fixture` functions to get the fixtures `llm`, `served`, `browser` and `page`.
They are module-scoped: `asyncio.run`, which later modules call, fails while Playwright's event loop runs.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from browser import chromium, sync_api, visiting
from served import Served, serving, until
from tiny_llm import LLM

expect = sync_api.expect
expect.set_options(timeout=30_000)
FRANCE = "What is the capital of France?"
STORY = "Tell me a very long story."
NUM_BLOCKS = 96
MINUTE = 60_000  # ms


@pytest.fixture(name="llm", scope="module")
def llm_fixture() -> LLM:
    return LLM(num_blocks=NUM_BLOCKS, max_num_seqs=16, max_num_waiting=64, preemption_mode="swap")


@pytest.fixture(name="served", scope="module")
def served_fixture(llm: LLM) -> Iterator[Served]:
    with serving(lambda: llm) as here:
        yield here


@pytest.fixture(name="browser", scope="module")
def browser_fixture() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(name="page")
def page_fixture(browser: Any, served: Served, llm: LLM) -> Iterator[Any]:
    with visiting(browser, served.url) as page:
        expect_connected(page)
        yield page
    until(lambda: is_idle(llm))


def expect_connected(page: Any) -> None:
    expect(page.locator("body")).to_have_attribute("data-live", "live", timeout=MINUTE)


def is_idle(llm: LLM) -> bool:
    return llm.engine.stats.num_running == 0 == llm.engine.stats.num_waiting


def send(page: Any, text: str, max_tokens: int = 200) -> None:
    page.fill("#max-tokens", str(max_tokens))
    page.fill("#question", text)
    page.press("#question", "Enter")


def expect_answered(page: Any) -> None:
    """Wait until the answer to the last question is complete."""
    expect(page.locator("#stop-chat")).to_be_hidden()


def start_load(page: Any) -> None:
    page.click("#load")
    expect(page.locator("#load")).to_have_text("Stop")


def stop_load(page: Any) -> None:
    page.click("#load")
    expect(page.locator("#load")).to_have_text("Load it")


def posted(page: Any) -> list[dict[str, Any]]:
    """The bodies that the page posts from now on."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
    return bodies


def cells(page: Any, kind: str) -> Any:
    return page.locator(f"#grid .cell.{kind}")


def expect_pool_of(page: Any, llm: LLM) -> None:
    """Wait until the engine is idle and the page shows the state that the engine reports."""
    until(lambda: is_idle(llm))
    expect(page.locator("#figure-running")).to_have_text("0")
    expect(page.locator("#behind")).to_have_text("")
    stats = llm.engine.stats
    for kind, count in (("free", stats.num_free_blocks), ("cached", stats.num_cached_blocks)):
        expect(cells(page, kind)).to_have_count(count)
    assert stats.num_free_blocks + stats.num_cached_blocks == NUM_BLOCKS
    expect(page.locator("#figure-preemptions")).to_have_text(str(stats.num_preemptions))


def pool_message(num_blocks: int, **others: Any) -> dict[str, Any]:
    """A `pool` message of `/live` for a pool whose blocks are all free."""
    names = ("running", "waiting", "swapped", "preemptions", "prefix_queries", "prefix_hits", "cached")
    stats = {**dict.fromkeys(names, 0), "free": num_blocks}
    return {
        **{"type": "pool", "t": 1.0, "num_blocks": num_blocks, "block_size": 16, "num_host_blocks": 0},
        **{"max_num_seqs": 64, "model": "m", "num_tables": 1, "stats": stats, "blocks": [], "sequences": []},
        **others,
    }


def as_events(*messages: dict[str, Any]) -> str:
    """Messages in the format of `/live`."""
    return "".join(f": still here\n\ndata: {json.dumps(message)}\n\n" for message in messages)


@contextmanager
def page_with_live(browser: Any, served: Served, body: str, status: int = 200) -> Iterator[Any]:
    """The page of a server whose `/live` answers with this body and then ends."""
    answers = {"**/live": {"status": status, "body": body}}
    with visiting(browser, served.url, fine=str(status), answers=answers) as page:
        yield page
