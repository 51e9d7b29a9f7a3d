"""The chat on the live page: questions, answers, figures, errors, and what a reload keeps."""

import json
import re
from typing import Any

from browser import visiting
from live_pages import (  # noqa: F401 (fixtures)
    FRANCE,
    NUM_BLOCKS,
    STORY,
    browser_fixture,
    expect,
    expect_answered,
    expect_connected,
    expect_pool_of,
    is_idle,
    llm_fixture,
    page_fixture,
    posted,
    send,
    served_fixture,
)
from served import Served, until
from tiny_llm import LLM


def contents(bodies: list[dict[str, Any]]) -> list[list[str]]:
    """The texts of the messages in each request."""
    return [[message["content"] for message in body["messages"]] for body in bodies]


def test_a_question_is_answered_and_timed(page: Any) -> None:
    send(page, FRANCE)
    expect(page.locator(".message.assistant")).to_contain_text("The capital of France is Paris.")
    expect(page.locator("#chat-figures")).to_contain_text("8 tokens")
    figures = page.inner_text("#chat-figures")
    assert [part.split(" ")[-1] for part in figures.split(" · ")] == ["s", "tokens/s", "tokens"]
    assert 0 < float(figures.split()[1]) < 30
    expect(page.locator("#announcer")).to_contain_text("Paris")


def test_a_chat_continues_until_a_new_one_is_started(page: Any) -> None:
    bodies = posted(page)
    for number, is_new in ((1, False), (2, False), (3, True)):
        if is_new:
            page.click("#new-chat")
        send(page, f"Say {number}.", 4)
        expect_answered(page)
    roles = [[message["role"] for message in body["messages"]] for body in bodies]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"]]
    assert not any("temperature" in body for body in bodies), "the model's own value applies"


def answer_with(page: Any, *deltas: str) -> None:
    """Let the server's next answers be a stream of these texts."""
    chunks = [
        {"id": "x", "choices": [{"index": 0, "delta": {"content": d}, "finish_reason": None}]} for d in deltas
    ]
    chunks.append({"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    headers = {"X-Request-Id": "x", "Content-Type": "text/event-stream"}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, headers=headers))


def test_an_answer_is_rendered_as_markdown_and_sent_back_as_it_was(page: Any) -> None:
    bodies = posted(page)
    pieces = ["Use **add", "**:\n\n```python\nadd(1", ", 2)\n```\n\n- <b>one</b>\n- [x](https://example.com)"]
    answer_with(page, *pieces)
    send(page, "How do I *add*?")
    expect(page.locator(".message.assistant pre code")).to_have_text("add(1, 2)")
    expect(page.locator(".message.assistant strong")).to_have_text("add")
    expect(page.locator(".message.assistant li").first).to_have_text("<b>one</b>")
    expect(page.locator(".message.assistant a")).to_have_attribute("rel", "noopener noreferrer")
    expect(page.locator(".message.user")).to_contain_text("How do I *add*?")  # as it was written
    expect_answered(page)
    send(page, "And now?")
    expect_answered(page)
    assert contents(bodies)[1] == ["How do I *add*?", "".join(pieces), "And now?"]


def test_a_chat_survives_a_reload_until_a_new_one_is_started(page: Any) -> None:
    bodies = posted(page)
    send(page, FRANCE)
    expect_answered(page)
    page.reload()
    expect_connected(page)
    expect(page.locator(".message.user")).to_contain_text(FRANCE)
    expect(page.locator(".message.assistant")).to_contain_text("The capital of France is Paris.")
    send(page, "Say 1.", 4)
    expect_answered(page)
    assert contents(bodies)[1] == [FRANCE, "The capital of France is Paris.", "Say 1."]
    page.click("#new-chat")
    page.reload()
    expect_connected(page)
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#messages .hint")).to_be_visible()
    assert page.evaluate("localStorage.length") == 0  # a closed tab leaves nothing


def test_a_reload_during_an_answer_keeps_its_first_part(page: Any, llm: LLM) -> None:
    bodies = posted(page)
    send(page, STORY, 800)
    answer = page.locator(".message.assistant .markdown")
    expect(answer).to_contain_text(re.compile(r"(\w+\W+){8}"))
    page.reload()
    expect_connected(page)
    until(lambda: is_idle(llm))
    expect(answer).to_contain_text(re.compile(r"(\w+\W+){8}"))
    send(page, "Say 1.", 4)
    expect_answered(page)
    assert [len(texts) for texts in contents(bodies)] == [1, 3]


def test_a_reload_before_an_answer_keeps_the_question_in_its_field(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that never comes
    send(page, STORY)
    expect(page.locator("#stop-chat")).to_be_visible()
    page.reload()
    expect(page.locator("#question")).to_have_value(STORY)
    expect(page.locator(".message")).to_have_count(0)


def test_another_tab_has_its_own_chat(page: Any, browser: Any, served: Served) -> None:
    send(page, FRANCE)
    expect_answered(page)
    other = page.context.new_page()
    other.goto(served.url)
    expect_connected(other)
    expect(other.locator(".message")).to_have_count(0)


AT_THE_END = """() => {
  const { scrollHeight, scrollTop, clientHeight } = document.querySelector("#messages");
  return scrollHeight - scrollTop - clientHeight <= 1;
}"""


def wait_for_more_lines(page: Any) -> None:
    """Wait until the conversation has grown by a few lines."""
    height = "document.querySelector('#messages').scrollHeight"
    before = page.evaluate(height)
    until(lambda: page.evaluate(height) > before + 60)


def test_the_conversation_follows_an_answer_unless_the_reader_scrolled_up(
    browser: Any, served: Served, llm: LLM
) -> None:
    with visiting(browser, served.url, viewport={"width": 1000, "height": 620}) as page:
        expect_connected(page)
        messages = page.locator("#messages")
        page.locator("#chat-figures").evaluate("line => { line.style.width = '2rem'; }")  # it wraps
        send(page, STORY, 1200)
        until(lambda: messages.evaluate("list => list.scrollTop") > 100)
        assert page.evaluate(AT_THE_END)
        messages.evaluate("list => { list.scrollTop = 20; }")
        wait_for_more_lines(page)
        assert messages.evaluate("list => list.scrollTop") == 20
        messages.evaluate("list => { list.scrollTop = list.scrollHeight; }")
        wait_for_more_lines(page)
        assert page.evaluate(AT_THE_END)
        page.click("#stop-chat")
        expect(page.locator(".message .end")).to_have_text("stopped")
        assert page.evaluate(AT_THE_END)
        messages.evaluate("list => { list.scrollTop = 0; }")
        send(page, FRANCE, 1)  # a new question scrolls to its answer
        expect(page.locator(".message .end")).to_have_count(2)
        assert page.evaluate(AT_THE_END)
    until(lambda: is_idle(llm))


def test_a_rejected_question_returns_to_its_field_and_leaves_the_conversation(
    browser: Any, served: Served
) -> None:
    figures = "#chat-figures"
    with visiting(browser, served.url, fine="400") as page:
        bodies = posted(page)
        expect_connected(page)
        send(page, FRANCE)
        expect(page.locator(figures)).to_contain_text("8 tokens")
        expect_answered(page)  # until then, sending does nothing
        send(page, STORY, 16 * NUM_BLOCKS)
        refusal = page.locator(".message.refusal")
        expect(refusal).to_contain_text("exceed the context of 1536: lower “Max tokens”, or start a new chat")
        expect(page.locator("#question")).to_have_value(STORY)
        expect(page.locator("#messages .message")).to_have_count(3)
        expect(page.locator(".message.user")).to_have_text([re.compile(re.escape(FRANCE))])
        expect(page.locator(figures)).to_have_text("")
        send(page, "Say 1.", 4)
        expect(page.locator(figures)).to_contain_text("tokens")
        expect_answered(page)
        expect(refusal).to_have_count(0)
        expect(page.locator(".message.assistant")).to_have_count(2)
    answer = "The capital of France is Paris."
    assert contents(bodies) == [[FRANCE], [FRANCE, answer, STORY], [FRANCE, answer, "Say 1."]]


def test_a_temperature_may_have_any_number_of_decimals(page: Any) -> None:
    bodies = posted(page)
    page.fill("#temperature", "0.75")
    send(page, FRANCE, 4)
    expect(page.locator("#chat-figures")).to_contain_text("tokens")
    assert [body["temperature"] for body in bodies] == [0.75]


def test_an_answer_takes_blocks_and_returns_them(page: Any, llm: LLM) -> None:
    send(page, STORY, 1000)
    expect(page.locator("#grid [aria-label*='request A']").nth(3)).to_be_visible()
    expect(page.locator("#requests tr")).to_have_count(1)
    expect(page.locator("#requests")).to_contain_text("chat")
    expect(page.locator("#block-table")).to_contain_text("Block table of A")
    count = "document.querySelectorAll('{}').length"
    arrows, chips = page.evaluate(f"[{count.format('#arrows path')}, {count.format('#block-table .chip')}]")
    assert arrows == chips > 3
    page.click("#stop-chat")
    expect(page.locator(".message .end")).to_have_text("stopped")
    expect_pool_of(page, llm)
    expect(page.locator("#requests tr")).to_have_count(0)
    expect(page.locator("#arrows path")).to_have_count(0)
