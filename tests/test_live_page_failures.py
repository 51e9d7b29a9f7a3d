"""The live page when something is missing: the key, the server, the connection, or the pool."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from browser import visiting
from live_pages import (  # noqa: F401 (fixtures)
    FRANCE,
    NUM_BLOCKS,
    STORY,
    browser_fixture,
    cells,
    expect,
    expect_connected,
    is_idle,
    llm_fixture,
    page_with_live,
    send,
    served_fixture,
    start_load,
    stop_load,
)
from served import Served, serving, until
from tiny_llm import LLM
from tiny_llm_server import ServerConfig


def test_a_server_with_a_key_asks_for_it(browser: Any) -> None:
    small = LLM(num_blocks=NUM_BLOCKS)
    with (
        serving(lambda: small, ServerConfig(api_keys=("secret",))) as here,
        visiting(browser, here.url, fine="401") as page,
    ):
        expect(page.locator("#key-field")).to_be_visible()
        send(page, FRANCE)
        page.fill("#key-field", "wrong")
        page.press("#key-field", "Enter")
        wrong = "The server rejected this key. Enter another one:"
        expect(page.locator("#key label")).to_have_text(wrong)
        assert page.inner_text(".top").split("\n") == ["tiny-llm", wrong, "Use this key"]
        says = "says => [getComputedStyle(says).color, says.getClientRects().length]"
        assert page.locator("#key [data-prompt]").evaluate(says) == ["rgb(154, 52, 18)", 1]  # --warn, a line
        page.fill("#key-field", "secret")
        page.press("#key-field", "Enter")
        expect_connected(page)
        expect(page.locator("#messages")).to_contain_text("Paris")
        expect(page.locator("#key")).to_be_hidden()
        page.reload()
        expect_connected(page)
        assert page.evaluate("localStorage.length") == 0


def test_a_load_without_a_connection_stops_and_says_why(browser: Any, served: Served, llm: LLM) -> None:
    tried: list[str] = []

    def lose(route: Any) -> None:
        tried.append(route.request.url)
        route.abort()

    with visiting(browser, served.url, fine="ERR_FAILED") as page:
        expect_connected(page)
        page.route("**/v1/chat/completions", lose)
        for number in (1, 2):
            page.click("#load")
            note = "The load has stopped: the connection to the server is lost"
            expect(page.locator("#demo-note")).to_have_text(note)
            expect(page.locator("#load")).to_have_text("Load it")
            assert len(tried) == number
        page.unroute("**/v1/chat/completions")
        start_load(page)
        expect(page.locator("#requests tr").first).to_be_visible()
        expect(page.locator("#demo-note")).to_have_text("Repeats until you stop it.")
        stop_load(page)
    until(lambda: is_idle(llm))


@contextmanager
def process(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server from the command line."""
    command = [sys.executable, "-m", "tiny_llm_cli", "serve", "--port", str(port), "--num-blocks", "96"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as started:
        try:
            yield started
        finally:
            started.kill()


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def test_the_page_reconnects_after_the_server_was_killed(browser: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url, fine = f"http://127.0.0.1:{port}", "ERR_CONNECTION|ERR_INCOMPLETE|ERR_EMPTY|503"
    with process(port) as first:
        until(lambda: listens(port))
        with visiting(browser, url, fine=fine) as page:
            expect_connected(page)
            send(page, STORY, 500)
            expect(cells(page, "own").nth(3)).to_be_visible()
            first.kill()
            expect(page.locator(".message .end")).to_have_text(
                "incomplete: the connection to the server is lost"
            )
            expect(page.locator("#status")).to_contain_text("lost")
            expect(page.locator("#send")).to_be_visible()
            with process(port):
                expect_connected(page)
                expect(cells(page, "free")).to_have_count(NUM_BLOCKS)
                page.click("#new-chat")
                send(page, FRANCE)
                expect(page.locator("#messages")).to_contain_text("Paris")
                expect(cells(page, "cached").first).to_be_visible()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [(404, None, "--no-live"), (400, "no_blocks", "dense"), (503, "loading", "Trying")],
)
def test_a_server_without_the_stream_still_chats(
    browser: Any, served: Served, status: int, code: str | None, message: str
) -> None:
    error = {"error": {"message": "no", "type": "x", "param": None, "code": code}}
    with page_with_live(browser, served, json.dumps(error), status) as page:
        expect(page.locator("#status")).to_contain_text(message)
        expect(page.locator("#load")).to_be_disabled()
        send(page, FRANCE)
        expect(page.locator("#messages")).to_contain_text("Paris")
