"""The pool on the live page: what a load shows, how its steps are replayed, and how large pools are drawn.

Oracle: the engine itself.
"""

import re
import time
from typing import Any

import pytest

from browser import visiting
from guessing import guessing_llm
from live_pages import (  # noqa: F401 (fixtures)
    FRANCE,
    MINUTE,
    NUM_BLOCKS,
    STORY,
    as_events,
    browser_fixture,
    cells,
    expect,
    expect_answered,
    expect_connected,
    expect_pool_of,
    is_idle,
    llm_fixture,
    page_fixture,
    page_with_live,
    pool_message,
    posted,
    send,
    served_fixture,
    start_load,
    stop_load,
)
from served import Served, serving, until
from tiny_llm import LLM

COUNT_ANNOUNCEMENTS = """() => {
  globalThis.announcements = 0;
  const observer = new MutationObserver(() => { announcements += 1; });
  for (const region of document.querySelectorAll("[aria-live], [role=status], [role=log]")) {
    observer.observe(region, { childList: true, characterData: true, subtree: true });
  }
}"""


def test_guessed_tokens_are_counted_if_the_engine_speculates(page: Any, browser: Any) -> None:
    expect(page.locator("#figure-guesses")).to_be_hidden()
    llm = guessing_llm(num_blocks=NUM_BLOCKS)
    with serving(lambda: llm) as here, visiting(browser, here.url) as other:
        expect_connected(other)
        send(other, "Repeat these words: one two three four five six seven eight nine ten eleven twelve.", 60)
        expect_answered(other)
        right = llm.engine.stats.drafts.num_accepted_tokens
        wrong = llm.engine.stats.drafts.num_draft_tokens - right
        assert right > 0
        expect(other.locator("#figure-guesses")).to_have_text(f"{right} accepted")
        expect(other.locator("#figure-guesses + dd")).to_have_text(f"{wrong} rejected")


def test_a_load_shows_shared_blocks_copies_and_preemption_in_every_round(page: Any, llm: LLM) -> None:
    start = time.monotonic()
    page.evaluate(COUNT_ANNOUNCEMENTS)
    start_load(page)
    expect(page.locator("#pace input[value='5']")).to_be_checked()
    expect(page.locator("#demo-note")).to_have_text("Repeats until you stop it.")
    expect(page.locator("#grid .cell.shared").filter(has_text=re.compile("[45]")).first).to_be_visible()
    shared = page.locator("#grid .cell.shared").first
    assert "shared by" in shared.get_attribute("aria-label")
    page.check("#pace input[value='real']")
    for kind in ("hit", "copied", "forked", "preempted", "swapped_out", "swapped_in"):
        expect(page.locator(f"#log [data-kind='{kind}']").first).to_be_attached(timeout=MINUTE)
    assert int(page.inner_text("#figure-hits").rstrip("%")) > 10
    until(lambda: page.locator("#log [data-kind='ended']").count() > 6)  # six sequences a round
    stop_load(page)
    expect_pool_of(page, llm)
    assert page.inner_text("#demo-note") == ""
    assert page.evaluate("announcements") < 10 + (time.monotonic() - start) / 8  # to screen readers


def test_a_prefix_hit_is_shown_before_the_copy_that_it_causes(page: Any) -> None:
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
    assert set(marked) == set(re.findall(r"block (\d+).* copied to (\d+)", copied.inner_text())[0])
    page.hover("#chat-title")
    expect(page.locator("#grid [data-marked]")).to_have_count(0)


def test_the_grid_does_not_move_while_block_tables_change(browser: Any, served: Served) -> None:
    with visiting(browser, served.url, viewport={"width": 1000, "height": 800}) as page:
        expect_connected(page)
        grid, chips = page.locator("#grid"), page.locator("#block-table .chip")
        page.check("#pace input[value='0']")
        boxes = [grid.bounding_box()]
        for question, num_chips in ((f"{STORY} It begins: {'once upon a time, ' * 120}", 30), (STORY, 1)):
            page.click("#new-chat")
            send(page, question, 16)
            expect_answered(page)
            until(lambda count=num_chips: page.click("#one-step") or chips.count() > count)
            boxes.append(grid.bounding_box())
            page.click("#catch-up")
            expect(chips).to_have_count(0)
            boxes.append(grid.bounding_box())
    first, *later = boxes  # a long table moves it once
    assert later == later[:1] * 4
    assert first["y"] < later[0]["y"]


def test_stop_cancels_the_load(page: Any, llm: LLM) -> None:
    cancelled: list[str] = []
    page.on("requestfailed", lambda request: cancelled.append(request.failure))
    start_load(page)
    expect(page.locator("#requests tr").first).to_be_visible()
    stop_load(page)
    expect_pool_of(page, llm)
    assert cancelled
    assert set(cancelled) == {"net::ERR_ABORTED"}
    expect(page.locator("#requests tr")).to_have_count(0)
    expect(page.locator("#pace input[value='real']")).to_be_checked()  # as before the load
    assert page.inner_text("#demo-note") == ""


def test_a_load_keeps_the_selected_speed(page: Any) -> None:
    page.check("#pace input[value='1']")
    start_load(page)
    expect(page.locator("#requests tr").first).to_be_visible()
    expect(page.locator("#pace input[value='1']")).to_be_checked()
    stop_load(page)
    expect(page.locator("#pace input[value='1']")).to_be_checked()
    expect(page.locator("#behind")).to_have_text("")


NUM_REQUESTS = 4  # of a round of the load
ROUND_PAUSE = 1.5  # seconds; three times as long as between two rounds
SHOW_AS = """(isHidden) => {
  Object.defineProperty(document, "hidden", { configurable: true, get: () => isHidden });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def expect_no_new_round(page: Any, llm: LLM, bodies: list[dict[str, Any]]) -> None:
    def is_between_rounds() -> bool:
        page.wait_for_timeout(50)  # `bodies` grows only while the browser is waited for
        return len(bodies) % NUM_REQUESTS == 0 and is_idle(llm)

    until(is_between_rounds)
    count = len(bodies)
    page.wait_for_timeout(1000 * ROUND_PAUSE)
    assert len(bodies) == count


def expect_new_round(page: Any, bodies: list[dict[str, Any]]) -> None:
    count = len(bodies)
    until(lambda: page.wait_for_timeout(50) or len(bodies) > count)


def test_a_load_waits_until_the_page_has_shown_its_last_round(page: Any, llm: LLM) -> None:
    bodies = posted(page)
    page.check("#pace input[value='0']")
    start_load(page)
    expect(page.locator("#behind")).to_contain_text("behind")
    page.wait_for_timeout(1000)  # the round has started
    expect_no_new_round(page, llm, bodies)
    assert len(bodies) == NUM_REQUESTS
    page.check("#pace input[value='real']")
    expect_new_round(page, bodies)
    stop_load(page)


def test_a_load_starts_no_round_in_a_hidden_tab(page: Any, llm: LLM) -> None:
    bodies = posted(page)
    page.check("#pace input[value='real']")
    start_load(page)
    expect(page.locator("#requests tr").first).to_be_visible()
    page.evaluate(SHOW_AS, True)
    expect_no_new_round(page, llm, bodies)
    page.evaluate(SHOW_AS, False)
    expect_new_round(page, bodies)
    stop_load(page)


def test_leaving_the_page_stops_the_load(page: Any, llm: LLM) -> None:
    bodies = posted(page)
    start_load(page)
    expect(page.locator("#requests tr").first).to_be_visible()
    page.goto("about:blank")
    until(lambda: is_idle(llm))
    assert len(bodies) <= NUM_REQUESTS
    page.go_back()
    expect_connected(page)
    expect(page.locator("#load")).to_have_text("Load it")
    expect(page.locator("#requests tr")).to_have_count(0)


def test_a_slow_page_says_how_far_behind_it_is_and_catches_up(page: Any, llm: LLM) -> None:
    page.check("#pace input[value='0']")
    send(page, STORY, 40)
    expect_answered(page)
    until(lambda: is_idle(llm))
    expect(page.locator("#behind")).to_have_text("40 steps behind; the engine runs at full speed")
    assert cells(page, "own").count() == 0
    page.click("#one-step")
    expect(page.locator("#behind")).to_have_text(re.compile("^39 steps behind"))
    expect(cells(page, "own").first).to_be_visible()
    page.check("#pace input[value='5']")
    expect(page.locator("#behind")).to_have_text(re.compile("^[12][0-9] steps behind"))
    page.check("#pace input[value='0']")
    behind = int(page.inner_text("#behind").split()[0])
    expect(page.locator("#requests td.number").nth(2)).to_have_text(str(40 - behind))  # a token a step
    page.click("#catch-up")
    expect_pool_of(page, llm)


@pytest.mark.parametrize(
    ("num_blocks", "used", "num_drawn", "rest"),
    [
        (64, [], 64, ""),
        (1448, [], 96, "and 1,352 more free blocks"),
        (1448, [500], 512, "and 936 more free blocks"),
        (20_000, [19_000, 3], 4096, "and 15,904 more blocks, 1 of them in use"),
    ],
)
def test_a_large_pool_is_drawn_up_to_its_highest_used_block(
    browser: Any, served: Served, num_blocks: int, used: list[int], num_drawn: int, rest: str
) -> None:
    message = pool_message(num_blocks, blocks=[[block, 0, True] for block in used])
    with page_with_live(browser, served, as_events(message)) as page:
        expect(page.locator("#more")).to_have_text(rest)
        expect(page.locator("#grid .cell")).to_have_count(num_drawn)
        expect(page.locator("#pool-size")).to_contain_text(f"{num_blocks:,} blocks, each for")
        expect(page.locator("#load")).to_be_enabled()


def test_a_load_says_that_a_large_pool_never_runs_out(browser: Any, served: Served, llm: LLM) -> None:
    with page_with_live(browser, served, as_events(pool_message(5000))) as page:
        start_load(page)
        expect(page.locator("#demo-note")).to_contain_text("Preemption needs a smaller pool")
        command = page.locator("#demo-note code")
        expect(command).to_have_text("tiny-llm serve --demo")
        assert command.evaluate("command => command.getClientRects().length") == 1  # no break inside --demo
        stop_load(page)
    until(lambda: is_idle(llm))
