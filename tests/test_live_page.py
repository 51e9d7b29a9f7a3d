"""The live page as people use it, in a real browser: by pointer, by keyboard, in the dark, on a telephone.

Oracles: the engine itself, and WCAG's formula for contrast.
"""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from browser import chromium, sync_api, visiting
from served import Served, serving, until
from tiny_llm import LLM
from tiny_llm_server import ServerConfig

expect = sync_api.expect
expect.set_options(timeout=20_000)
FRANCE = "What is the capital of France?"
STORY = "Tell me a very long story."
NUM_BLOCKS = 96
A_MINUTE = 60_000


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(num_blocks=NUM_BLOCKS, max_num_seqs=16, max_num_waiting=64, preemption_mode="swap")


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Served]:
    with serving(lambda: llm) as here:
        yield here


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, served: Served, llm: LLM) -> Iterator[Any]:
    with visiting(browser, served.url) as page:
        connected(page)
        yield page
    until(lambda: is_idle(llm))


def connected(page: Any) -> None:
    expect(page.locator("body")).to_have_attribute("data-live", "live", timeout=30_000)


def is_idle(llm: LLM) -> bool:
    return llm.engine.stats.num_running == 0 == llm.engine.stats.num_waiting


def send(page: Any, text: str, max_tokens: int = 200) -> None:
    page.fill("#max-tokens", str(max_tokens))
    page.fill("#question", text)
    page.press("#question", "Enter")


def posted(page: Any) -> list[dict[str, Any]]:
    """What the page posts from now on."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda asked: bodies.append(asked.post_data_json) if asked.post_data else None)
    return bodies


def cells(page: Any, kind: str) -> Any:
    return page.locator(f"#grid .cell.{kind}")


def show_engine(page: Any, llm: LLM) -> None:
    """The page shows what the engine says of itself, which has come to rest."""
    until(lambda: is_idle(llm))
    expect(page.locator("#figure-running")).to_have_text("0")
    expect(page.locator("#behind")).to_have_text("")
    stats = llm.engine.stats
    for kind, count in (("free", stats.num_free_blocks), ("cached", stats.num_cached_blocks)):
        expect(cells(page, kind)).to_have_count(count)
    assert stats.num_free_blocks + stats.num_cached_blocks == NUM_BLOCKS
    expect(page.locator("#figure-preemptions")).to_have_text(str(stats.num_preemptions))


# The chat, and the pool beside it.


def test_a_question_is_answered_and_timed(page: Any) -> None:
    send(page, FRANCE)
    expect(page.locator(".message.assistant")).to_contain_text("The capital of France is Paris.")
    expect(page.locator("#chat-figures")).to_contain_text("8 tokens")
    said = page.inner_text("#chat-figures")
    assert [part.split(" ")[-1] for part in said.split(" · ")] == ["s", "tokens/s", "tokens"]
    assert 0 < float(said.split()[1]) < 30
    expect(page.locator("#announcer")).to_contain_text("Paris")


def test_a_chat_goes_on_and_begins_anew(page: Any) -> None:
    bodies = posted(page)
    for number, clicks in ((1, False), (2, False), (3, True)):
        if clicks:
            page.click("#new-chat")
        send(page, f"Say {number}.", 4)
        expect(page.locator("#stop-chat")).to_be_hidden()
    roles = [[message["role"] for message in body["messages"]] for body in bodies]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"]]
    assert {body["temperature"] for body in bodies} == {0}


AT_THE_END = """() => {
  const { scrollHeight, scrollTop, clientHeight } = document.querySelector("#messages");
  return scrollHeight - scrollTop - clientHeight <= 1;
}"""


def longer(page: Any) -> None:
    """Wait until the conversation has become longer by a few lines."""
    height = "document.querySelector('#messages').scrollHeight"
    before = page.evaluate(height)
    until(lambda: page.evaluate(height) > before + 60)


def test_who_scrolls_up_stays_there_and_who_reads_the_end_too(browser: Any, served: Served, llm: LLM) -> None:
    with visiting(browser, served.url, viewport={"width": 1000, "height": 620}) as page:
        connected(page)
        messages = page.locator("#messages")
        page.locator("#chat-figures").evaluate("line => { line.style.width = '2rem'; }")  # it wraps
        send(page, STORY, 800)
        until(lambda: messages.evaluate("list => list.scrollTop") > 100)
        assert page.evaluate(AT_THE_END)
        messages.evaluate("list => { list.scrollTop = 20; }")
        longer(page)
        assert messages.evaluate("list => list.scrollTop") == 20
        messages.evaluate("list => { list.scrollTop = list.scrollHeight; }")
        longer(page)
        assert page.evaluate(AT_THE_END)
        page.click("#stop-chat")
        expect(page.locator(".message .end")).to_have_text("stopped")
        assert page.evaluate(AT_THE_END)
        messages.evaluate("list => { list.scrollTop = 0; }")
        send(page, FRANCE, 1)  # who asks wants to see the answer
        expect(page.locator(".message .end")).to_have_count(2)
        assert page.evaluate(AT_THE_END)
    until(lambda: is_idle(llm))


def test_a_refused_question_goes_back_and_is_forgotten(browser: Any, served: Served) -> None:
    figures = "#chat-figures"
    with visiting(browser, served.url, fine="400") as page:
        bodies = posted(page)
        connected(page)
        send(page, FRANCE)
        expect(page.locator(figures)).to_contain_text("8 tokens")
        send(page, STORY, 16 * NUM_BLOCKS)
        refusal = page.locator(".message.refusal")
        expect(refusal).to_contain_text("exceed the context of 1536: lower “Max tokens”, or begin a new chat")
        expect(page.locator("#question")).to_have_value(STORY)
        expect(page.locator("#messages .message")).to_have_count(3)
        expect(page.locator(".message.user")).to_have_text([re.compile(re.escape(FRANCE))])
        expect(page.locator(figures)).to_have_text("")
        send(page, "Say 1.", 4)
        expect(page.locator(figures)).to_contain_text("tokens")
        expect(page.locator("#stop-chat")).to_be_hidden()
        expect(refusal).to_have_count(0)
        expect(page.locator(".message.assistant")).to_have_count(2)
    said = [[message["content"] for message in body["messages"]] for body in bodies]
    answer = "The capital of France is Paris."
    assert said == [[FRANCE], [FRANCE, answer, STORY], [FRANCE, answer, "Say 1."]]


def test_a_temperature_may_have_any_decimals(page: Any) -> None:
    bodies = posted(page)
    page.fill("#temperature", "0.75")
    send(page, FRANCE, 4)
    expect(page.locator("#chat-figures")).to_contain_text("tokens")
    assert [body["temperature"] for body in bodies] == [0.75]


def test_blocks_are_taken_while_it_answers_and_given_back(page: Any, llm: LLM) -> None:
    send(page, STORY, 400)
    expect(page.locator("#grid [aria-label*='request A']").nth(3)).to_be_visible()
    expect(page.locator("#requests tr")).to_have_count(1)
    expect(page.locator("#requests")).to_contain_text("chat")
    expect(page.locator("#block-table")).to_contain_text("Block table of A")
    count = "document.querySelectorAll('{}').length"
    arrows, chips = page.evaluate(f"[{count.format('#arrows path')}, {count.format('#block-table .chip')}]")
    assert arrows == chips > 3
    page.click("#stop-chat")
    expect(page.locator(".message .end")).to_have_text("stopped")
    show_engine(page, llm)
    expect(page.locator("#requests tr")).to_have_count(0)
    expect(page.locator("#arrows path")).to_have_count(0)


COUNT_SAID = """() => {
  globalThis.said = 0;
  const observer = new MutationObserver(() => { said += 1; });
  for (const region of document.querySelectorAll("[aria-live], [role=status], [role=log]")) {
    observer.observe(region, { childList: true, characterData: true, subtree: true });
  }
}"""


def test_a_load_shows_sharing_copies_and_preemption_and_ends_as_the_engine_does(page: Any, llm: LLM) -> None:
    page.evaluate(COUNT_SAID)
    page.check("#pace input[value='5']")
    page.click("#load")
    expect(page.locator("#grid .cell.shared").filter(has_text=re.compile("[45]")).first).to_be_visible()
    shared = page.locator("#grid .cell.shared").first
    assert "shared by" in shared.get_attribute("aria-label")
    page.check("#pace input[value='real']")
    for kind in ("hit", "copied", "forked", "preempted", "swapped_out", "swapped_in"):
        expect(page.locator(f"#log [data-kind='{kind}']").first).to_be_attached(timeout=A_MINUTE)
    assert int(page.inner_text("#figure-hits").rstrip("%")) > 10
    expect(page.locator("#load")).not_to_have_attribute("aria-disabled", "true", timeout=A_MINUTE)
    show_engine(page, llm)
    assert page.inner_text("#demo-note") == ""
    assert page.locator("#log [data-kind='ended']").count() == 6
    assert page.evaluate("said") < 10  # what is read out to those who do not see it


def test_a_prefix_hit_is_told_before_the_copy_that_it_causes(page: Any) -> None:
    for question in (FRANCE, "What is the capital of Italy, and what is that of Spain?"):
        page.click("#new-chat")
        send(page, question, 4)
        expect(page.locator("#chat-figures")).to_contain_text("4 tokens")
    expect(page.locator("#log [data-kind='ended']")).to_have_count(2)
    lines = page.locator("#log li:not([data-kind='evicted'])")
    kinds = lines.evaluate_all("lines => lines.map(line => line.dataset.kind)")
    assert kinds[: kinds.index("admitted")] == ["ended", "copied", "hit"]  # the newest is on top
    copied = page.locator("#log [data-kind='copied']").first
    copied.hover()
    marked = page.locator("#grid [data-marked]").evaluate_all(
        "cells => cells.map(cell => cell.dataset.block)"
    )
    assert set(marked) == set(re.findall(r"block (\d+),.* copied to (\d+)", copied.inner_text())[0])
    page.hover("#chat-title")
    expect(page.locator("#grid [data-marked]")).to_have_count(0)


def test_the_grid_stays_where_it_is_while_tables_change(browser: Any, served: Served) -> None:
    with visiting(browser, served.url, viewport={"width": 1000, "height": 800}) as page:
        connected(page)
        grid, chips = page.locator("#grid"), page.locator("#block-table .chip")
        page.check("#pace input[value='0']")
        boxes = [grid.bounding_box()]
        for question, most in ((f"{STORY} It begins: {'once upon a time, ' * 120}", 30), (STORY, 1)):
            page.click("#new-chat")
            send(page, question, 16)
            expect(page.locator("#stop-chat")).to_be_hidden()
            until(lambda most=most: page.click("#one-step") or chips.count() > most)
            boxes.append(grid.bounding_box())
            page.click("#catch-up")
            expect(chips).to_have_count(0)
            boxes.append(grid.bounding_box())
    low, *high = boxes
    assert high == high[:1] * 4
    assert low["y"] < high[0]["y"]


def test_stop_cancels_the_load(page: Any, llm: LLM) -> None:
    cancelled: list[str] = []
    page.on("requestfailed", lambda asked: cancelled.append(asked.failure))
    page.click("#load")
    expect(page.locator("#requests tr").first).to_be_visible()
    page.click("#stop")
    show_engine(page, llm)
    assert cancelled
    assert set(cancelled) == {"net::ERR_ABORTED"}
    expect(page.locator("#requests tr")).to_have_count(0)
    expect(page.locator("#load")).not_to_have_attribute("aria-disabled", "true")


def test_a_slow_page_says_how_far_behind_it_is_and_catches_up(page: Any, llm: LLM) -> None:
    page.check("#pace input[value='0']")
    send(page, STORY, 40)
    expect(page.locator("#stop-chat")).to_be_hidden()
    until(lambda: is_idle(llm))
    expect(page.locator("#behind")).to_have_text("paused, 40 steps behind")
    assert cells(page, "own").count() == 0
    page.click("#one-step")
    expect(page.locator("#behind")).to_have_text("paused, 39 steps behind")
    expect(cells(page, "own").first).to_be_visible()
    page.check("#pace input[value='5']")
    expect(page.locator("#behind")).to_have_text(re.compile("^[12][0-9] steps behind"))
    page.check("#pace input[value='0']")
    expect(page.locator("#behind")).to_have_text(re.compile("^paused"))
    behind = int(page.inner_text("#behind").split()[1])
    expect(page.locator("#requests td.number").nth(2)).to_have_text(str(40 - behind))  # a token a step
    page.click("#catch-up")
    show_engine(page, llm)


# Without a pointer, without sight, without much room.


FOCUSED = """() => {
  const { id, value, dataset, ariaLabel, tagName } = document.activeElement;
  return id || value || dataset.block || ariaLabel || tagName;
}"""


def test_the_keyboard_alone_is_enough(page: Any, llm: LLM) -> None:
    stops: list[str] = []
    while not stops or stops[-1] not in ("BODY", *stops[:-1]):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(FOCUSED))
    controls = [
        "new-chat",
        "messages",
        "question",
        "temperature",
        "max-tokens",
        "send",
        "load",
        "stop",
        "real",
    ]
    assert stops[: len(controls)] == controls
    assert stops[len(controls) :][:3] == ["one-step", "catch-up", "0"]  # the grid is one stop: block 0
    assert stops[len(controls) + 3 :] == ["requests-list", "log-list", "BODY"]
    page.focus("#grid [tabindex='0']")
    for key, block in (("ArrowRight", 1), ("ArrowDown", 17), ("End", 31), ("ArrowLeft", 30), ("Home", 16)):
        page.keyboard.press(key)
        expect(page.locator(f"#grid [data-block='{block}']")).to_be_focused()
    expect(page.locator("#grid [tabindex='0']")).to_have_count(1)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")  # stays at the edge
    expect(page.locator("#grid [data-block='0']")).to_be_focused()
    expect(page.locator("#detail")).to_contain_text("Block 0:")
    page.focus("#question")
    page.keyboard.type("Tell me")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a very long story.")
    expect(page.locator("#question")).to_have_value("Tell me\na very long story.")
    page.keyboard.press("Enter")
    expect(cells(page, "own").nth(2)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".message .end")).to_have_text("stopped")
    show_engine(page, llm)


def test_a_request_that_is_chosen_keeps_its_table_in_sight(page: Any) -> None:
    page.check("#pace input[value='5']")
    page.click("#load")
    second = page.locator("#requests tr").nth(1)
    second.locator("button").focus()
    page.keyboard.press("Enter")
    name = second.locator("button").inner_text()
    page.focus("#stop")
    expect(second.locator("button")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#block-table")).to_contain_text(f"Block table of {name}")
    chips = page.locator("#block-table .chip")
    expect(chips.nth(10)).to_be_visible()
    told = [text.split("→") for text in chips.all_text_contents()]
    assert [int(logical) for logical, _ in told] == list(range(len(told)))
    pointed = page.locator("#grid [data-pointed]")
    assert {int(block) for _, block in told} == set(
        pointed.evaluate_all("cells => cells.map(cell => Number(cell.dataset.block))")
    )
    page.keyboard.press("Escape")
    page.click("#catch-up")


NAMELESS = """() => {
  const named = (e) => (e.ariaLabel || (e.labels && [...e.labels].map(l => l.textContent).join(" "))
    || [e.getAttribute("aria-labelledby")].map(id => id && document.getElementById(id).textContent)[0]
    || e.textContent || "").trim();
  const controls = "button, input, textarea, [tabindex], section, [role=region], [role=grid], .cell";
  const nameless = (e) => !named(e) && !e.closest(".legend");
  return [...document.querySelectorAll(controls)].filter(nameless).map(e => e.outerHTML);
}"""


def test_every_control_and_every_block_has_a_name(page: Any) -> None:
    page.click("#load")
    expect(cells(page, "shared").first).to_be_visible()
    assert page.evaluate(NAMELESS) == []
    labels = page.locator("#grid .cell").evaluate_all("cells => cells.map(cell => cell.ariaLabel)")
    assert [int(label.split(":")[0].removeprefix("block ")) for label in labels] == list(range(NUM_BLOCKS))
    heads = page.locator("#grid [role='columnheader']").all_text_contents()
    assert heads == [f"+{column}" for column in range(16)]
    page.click("#stop")


CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => rgba(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    const colour = getComputedStyle(e).backgroundColor;
    return rgba(colour)[3] === 255 ? colour : behind(e.parentElement);
  };
  const make = (className) => {
    const made = Object.assign(document.createElement("span"), {className, textContent: "A1"});
    made.style.transition = "none";
    document.querySelector("#grid").append(made);
    return made;
  };
  const hues = [...Array(12).keys()].flatMap(h => [make(`cell own h${h}`), make(`name h${h}`)]);
  const texts = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility()
    && !e.closest(".hidden") && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  const all = [...new Set([...hues, ...texts])].map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    return [`${e.tagName}.${e.className} ${e.textContent.trim().slice(0, 20)}`,
            (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
  hues.forEach(e => e.remove());
  return all;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_labels_are_legible(browser: Any, served: Served, llm: LLM, scheme: str) -> None:
    with visiting(browser, served.url, color_scheme=scheme, reduced_motion="reduce") as page:
        connected(page)
        page.check("#pace input[value='5']")
        send(page, FRANCE)
        page.click("#load")
        expect(cells(page, "shared").first).to_be_visible()
        page.check("#pace input[value='0']")
        measured = page.evaluate(CONTRASTS)
        assert len(measured) > 100
        assert {what: ratio for what, ratio in measured if ratio < 4.5} == {}
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(250, 249, 246)") == (scheme == "light")
        page.click("#stop")
    until(lambda: is_idle(llm))


WIDTHS = """(kind) => ["html", "#scroll", "#requests-list", "#log-list"]
  .map((part) => document.querySelector(part)[kind])"""


@pytest.mark.parametrize("width", [360, 700, 1000, 1280])
def test_nothing_is_cut_off_at_the_side(browser: Any, served: Served, llm: LLM, width: int) -> None:
    with visiting(browser, served.url, viewport={"width": width, "height": 800}) as page:
        connected(page)
        page.click("#load")
        expect(cells(page, "shared").first).to_be_visible()
        widths = [page.evaluate(WIDTHS, kind) for kind in ("scrollWidth", "clientWidth")]
        assert widths[0] == widths[1]
        page.click("#stop")
    until(lambda: is_idle(llm))


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1280, 640), (1024, 700)])
def test_a_wide_window_shows_the_pool_and_all_requests(
    browser: Any, served: Served, llm: LLM, width: int, height: int
) -> None:
    with visiting(browser, served.url, viewport={"width": width, "height": height}) as page:
        connected(page)
        page.check("#pace input[value='5']")
        page.click("#load")
        requests = page.locator("#requests tr")
        expect(requests).to_have_count(6)
        page.check("#pace input[value='0']")
        assert page.evaluate("document.documentElement.scrollHeight") == height  # one page
        for last, below in (
            (page.locator("#grid .cell").last, page.locator(".legend").bounding_box()["y"]),
            (requests.last, bottom(page.locator("#requests-list"))),
        ):
            assert bottom(last) <= below
        page.click("#stop")
        page.click("#catch-up")
    until(lambda: is_idle(llm))


def bottom(element: Any) -> float:
    box = element.bounding_box()
    return float(box["y"] + box["height"])


COUNT_ANIMATIONS = """() => {
  globalThis.started = 0;
  const animate = Element.prototype.animate;
  Element.prototype.animate = function (...how) { started += 1; return animate.apply(this, how); };
  for (const name of ["transitionrun", "animationstart"]) {
    document.addEventListener(name, () => { started += 1; });
  }
}"""


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_where_that_is_not_wanted(browser: Any, served: Served, llm: LLM, motion: str) -> None:
    with visiting(browser, served.url, reduced_motion=motion) as page:
        connected(page)
        page.evaluate(COUNT_ANIMATIONS)
        send(page, STORY, max_tokens=64)
        until(lambda: llm.engine.stats.num_running > 0)
        until(lambda: is_idle(llm))
        expect(page.locator("#requests tr")).to_have_count(0)
        if motion == "reduce":
            assert page.evaluate("started") == 0
        else:
            page.wait_for_function("started > 0")


# What may go wrong.


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
        wrong = "This key is not one of the server's. Another one:"
        expect(page.locator("#key label")).to_have_text(wrong)
        assert page.inner_text(".top").split("\n") == ["tiny-llm", wrong, "Use this key"]
        says = "says => [getComputedStyle(says).color, says.getClientRects().length]"
        assert page.locator("#key [data-says]").evaluate(says) == ["rgb(154, 52, 18)", 1]  # --warn, a line
        page.fill("#key-field", "secret")
        page.press("#key-field", "Enter")
        connected(page)
        expect(page.locator("#messages")).to_contain_text("Paris")
        expect(page.locator("#key")).to_be_hidden()
        page.reload()
        connected(page)
        assert page.evaluate("localStorage.length") == 0


def test_a_load_without_a_connection_tries_once_and_says_so(browser: Any, served: Served, llm: LLM) -> None:
    tried: list[str] = []

    def lose(route: Any) -> None:
        tried.append(route.request.url)
        route.abort()

    with visiting(browser, served.url, fine="ERR_FAILED") as page:
        connected(page)
        page.route("**/v1/chat/completions", lose)
        for number in (1, 2):
            page.click("#load")
            expect(page.locator("#demo-note")).to_have_text(
                "Not all could run: the connection to the server is lost"
            )
            expect(page.locator("#load")).not_to_have_attribute("aria-disabled", "true")
            assert len(tried) == number
        page.unroute("**/v1/chat/completions")
        page.click("#load")
        expect(page.locator("#requests tr").first).to_be_visible()
        expect(page.locator("#demo-note")).to_have_text("")
        page.click("#stop")
    until(lambda: is_idle(llm))


@contextmanager
def process(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server from the command line."""
    command = [sys.executable, "-m", "tiny_llm_cli", "serve", "--port", str(port), "--num-blocks", "96"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as started:
        try:
            yield started
        finally:
            started.kill()


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def test_the_page_survives_the_death_of_the_server(browser: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url, fine = f"http://127.0.0.1:{port}", "ERR_CONNECTION|ERR_INCOMPLETE|ERR_EMPTY|503"
    with process(port) as first:
        until(lambda: listens(port))
        with visiting(browser, url, fine=fine) as page:
            connected(page)
            send(page, STORY, 500)
            expect(cells(page, "own").nth(3)).to_be_visible()
            first.kill()
            expect(page.locator(".message .end")).to_have_text(
                "broken off: the connection to the server is lost"
            )
            expect(page.locator("#status")).to_contain_text("lost")
            expect(page.locator("#send")).to_be_visible()
            with process(port):
                connected(page)
                expect(cells(page, "free")).to_have_count(NUM_BLOCKS)
                page.click("#new-chat")
                send(page, FRANCE)
                expect(page.locator("#messages")).to_contain_text("Paris")
                expect(cells(page, "cached").first).to_be_visible()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(404, None, "--no-live"), (400, "no_blocks", "dense"), (503, "loading", "Trying")],
)
def test_a_server_without_the_stream_still_chats(
    browser: Any, served: Served, status: int, code: str | None, said: str
) -> None:
    error = {"error": {"message": "no", "type": "x", "param": None, "code": code}}
    with browser_at(browser, served, json.dumps(error), status) as page:
        expect(page.locator("#status")).to_contain_text(said)
        expect(page.locator("#load")).to_be_disabled()
        send(page, FRANCE)
        expect(page.locator("#messages")).to_contain_text("Paris")


@contextmanager
def browser_at(browser: Any, served: Served, live: str, status: int = 200) -> Iterator[Any]:
    """The page of a server whose `/live` says this, and ends."""
    answers = {"**/live": {"status": status, "body": live}}
    with visiting(browser, served.url, fine=str(status), answers=answers) as page:
        yield page


def pool_message(num_blocks: int, **others: Any) -> dict[str, Any]:
    """A `pool` message of a pool in which all is free."""
    names = ("running", "waiting", "swapped", "preemptions", "prefix_queries", "prefix_hits", "cached")
    stats = {**dict.fromkeys(names, 0), "free": num_blocks}
    return {
        **{"type": "pool", "t": 1.0, "num_blocks": num_blocks, "block_size": 16, "num_host_blocks": 0},
        **{"max_num_seqs": 64, "model": "m", "num_tables": 1, "stats": stats, "blocks": [], "sequences": []},
        **others,
    }


def sent(*messages: dict[str, Any]) -> str:
    """Messages as `/live` sends them."""
    return "".join(f": still here\n\ndata: {json.dumps(message)}\n\n" for message in messages)


@pytest.mark.parametrize(
    ("num_blocks", "used", "drawn", "said"),
    [
        (64, [], 64, ""),
        (1448, [], 96, "and 1,352 more free blocks"),
        (1448, [500], 512, "and 936 more free blocks"),
        (20_000, [19_000, 3], 4096, "and 15,904 more blocks, 1 of them in use"),
    ],
)
def test_a_large_pool_is_drawn_as_far_as_it_was_used(
    browser: Any, served: Served, num_blocks: int, used: list[int], drawn: int, said: str
) -> None:
    message = pool_message(num_blocks, blocks=[[block, 0, True] for block in used])
    with browser_at(browser, served, sent(message)) as page:
        expect(page.locator("#more")).to_have_text(said)
        expect(page.locator("#grid .cell")).to_have_count(drawn)
        expect(page.locator("#pool-size")).to_contain_text(f"{num_blocks:,} blocks; each holds")
        expect(page.locator("#load")).to_be_enabled()


def test_a_load_says_that_a_large_pool_never_runs_out(browser: Any, served: Served, llm: LLM) -> None:
    with browser_at(browser, served, sent(pool_message(5000))) as page:
        page.click("#load")
        expect(page.locator("#demo-note")).to_contain_text("tiny-llm serve --demo")
        page.click("#stop")
    until(lambda: is_idle(llm))


# Modules that know nothing of the page.

POOL = """async (messages) => {
  const { Pool } = await import("/page/pool.js");
  const pool = new Pool();
  pool.reset(messages[0]);
  const changes = messages.slice(1).map((step) => pool.step(step));
  return {
    blocks: [...pool.blocks].map(([block, { holders, kept }]) => [block, holders, kept]),
    holders: [...pool.blocks.keys()].map((block) => pool.holdersOf(block).map(({ id }) => id)),
    sequences: [...pool.sequences.keys()], reached: pool.reached,
    preempted: changes.map((c) => c.preempted.map(({ id }) => id)), tokens: changes.map((c) => c.tokens),
    copies: changes.flatMap((c) => c.copies.map(({ from, to, holder }) => [from, to, holder.id])),
  };
}"""


def sequence(seq_id: str, *blocks: int, **others: Any) -> dict[str, Any]:
    counts = {"prompt": 20, "outputs": 0, "computed": 0, "cached": 0, "forks": 0, "host_blocks": 0}
    tables = [{"first": 0, "blocks": blocks}]
    return {"id": seq_id, "request": seq_id[:1], "state": "running", **counts, "tables": tables, **others}


def step(events: list[Any], sequences: list[Any], ended: list[str], t: float = 2.0) -> dict[str, Any]:
    return {"t": t, "events": events, "sequences": sequences, "ended": ended, "stats": {}}


def test_the_pool_follows_the_steps(page: Any) -> None:
    told = page.evaluate(
        POOL,
        [
            pool_message(8, blocks=[[5, 0, True]]),
            step(
                [["allocated", 1, 1, None], ["cached", 1, 1, None], ["allocated", 2, 1, None]],
                [sequence("a/0", 1, 2, outputs=1)],
                [],
            ),
            step(
                [["copied", 3, 1, 2], ["shared", 1, 2, None], ["allocated", 3, 1, None]],
                [sequence("a/1", 1, 3, outputs=2), {**sequence("a/0", outputs=3), "tables": None}],
                [],
            ),
            step(
                [
                    ["swapped_out", 3, 0, 0],
                    ["released", 1, 1, None],
                    ["freed", 3, 0, None],
                    ["evicted", 5, 0, None],
                ],
                [sequence("a/1", state="waiting", outputs=2, host_blocks=1)],
                [],
            ),
            step([["shared", 1, 2, None]], [sequence("b/0", 1)], []),
            step([["released", 1, 1, None], ["freed", 2, 0, None]], [], ["a/0"]),
        ],
    )
    assert told["blocks"] == [[1, 1, True]]
    assert told["holders"] == [["b/0"]]
    assert told["sequences"] == ["a/1", "b/0"]
    assert told["preempted"] == [[], [], ["a/1"], [], []]
    assert told["tokens"] == [1, 4, 0, 0, 0]
    assert told["copies"] == [[2, 3, "a/1"]]
    assert told["reached"] == 6


PLAYBACK = """async () => {
  const { Playback } = await import("/page/playback.js");
  const playback = new Playback();
  const take = (now) => playback.due(now).length;
  playback.push(Array(100).fill({}));
  const real = take(0);
  playback.pace = 5;
  playback.push(Array(100).fill({}));
  const slow = [1000, 1100, 1200, 1400, 99_000].map(take);
  const one = playback.one().length;
  playback.pace = 0;
  const paused = take(200_000);
  const behind = playback.behind;
  return { real, slow, one, paused, behind, rest: playback.catchUp().length, end: playback.behind };
}"""


def test_steps_are_shown_at_their_pace(page: Any) -> None:
    told = page.evaluate(PLAYBACK)
    assert told["real"] == 100
    assert told["slow"] == [4, 0, 1, 1, 4]  # a tab that was asleep has not saved up for more
    assert (told["one"], told["paused"]) == (1, 0)
    assert told["behind"] == told["rest"] == 89
    assert told["end"] == 0


LABELS = """async () => {
  const { Labels } = await import("/page/labels.js");
  const labels = new Labels();
  const all = [...Array(28).keys()].map((i) => ({ request: `r${i}`, id: `r${i}` }));
  all.forEach((sequence) => labels.add(sequence));
  const names = all.map((sequence) => labels.of(sequence));
  labels.end(all[1], all.filter((sequence) => sequence !== all[1]));
  const forked = ["f/1", "f/0"].map((id) => ({ request: "f", id }));
  forked.forEach((sequence) => labels.add(sequence));
  return { names, forked: forked.map((sequence) => labels.of(sequence)), letter: labels.letter(forked[1]) };
}"""


def test_requests_have_letters_of_their_own(page: Any) -> None:
    told = page.evaluate(LABELS)
    assert told["names"] == [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "AA", "AB"]
    assert told["forked"] == [f"{told['letter']}2", f"{told['letter']}1"]
    assert told["letter"] not in told["names"][:1] + told["names"][2:]
