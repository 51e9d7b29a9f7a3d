"""The live page by keyboard, by screen reader, in both colour schemes, and at all window sizes.

Oracle: WCAG's formula for contrast.
"""

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
    expect_pool_of,
    is_idle,
    llm_fixture,
    page_fixture,
    send,
    served_fixture,
    start_load,
    stop_load,
)
from served import Served, until
from tiny_llm import LLM

FOCUSED = """() => {
  const { id, value, dataset, ariaLabel, tagName } = document.activeElement;
  return id || value || dataset.block || ariaLabel || tagName;
}"""


def test_everything_can_be_reached_by_keyboard(page: Any, llm: LLM) -> None:
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
    expect_pool_of(page, llm)


def test_the_table_of_a_selected_request_stays_in_view(page: Any) -> None:
    start_load(page)
    second = page.locator("#requests tr").nth(1)
    second.locator("button").focus()
    page.keyboard.press("Enter")
    name = second.locator("button").inner_text()
    page.focus("#load")
    expect(second.locator("button")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#block-table")).to_contain_text(f"Block table of {name}")
    chips = page.locator("#block-table .chip")
    expect(chips.nth(10)).to_be_visible()
    shown = [text.split("→") for text in chips.all_text_contents()]
    assert [int(logical) for logical, _ in shown] == list(range(len(shown)))
    pointed = page.locator("#grid [data-pointed]")
    assert {int(block) for _, block in shown} == set(
        pointed.evaluate_all("cells => cells.map(cell => Number(cell.dataset.block))")
    )
    page.keyboard.press("Escape")
    expect(page.locator("#load")).to_have_text("Load it")


NAMELESS = """() => {
  const named = (e) => (e.ariaLabel || (e.labels && [...e.labels].map(l => l.textContent).join(" "))
    || [e.getAttribute("aria-labelledby")].map(id => id && document.getElementById(id).textContent)[0]
    || e.textContent || "").trim();
  const controls = "button, input, textarea, [tabindex], section, [role=region], [role=grid], .cell";
  const nameless = (e) => !named(e) && !e.closest(".legend");
  return [...document.querySelectorAll(controls)].filter(nameless).map(e => e.outerHTML);
}"""


def test_every_control_and_every_block_has_a_name(page: Any) -> None:
    start_load(page)
    expect(cells(page, "shared").first).to_be_visible()
    assert page.evaluate(NAMELESS) == []
    labels = page.locator("#grid .cell").evaluate_all("cells => cells.map(cell => cell.ariaLabel)")
    assert [int(label.split(":")[0].removeprefix("block ")) for label in labels] == list(range(NUM_BLOCKS))
    heads = page.locator("#grid [role='columnheader']").all_text_contents()
    assert heads == [f"+{column}" for column in range(16)]
    stop_load(page)


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
        expect_connected(page)
        send(page, FRANCE)
        start_load(page)
        expect(cells(page, "shared").first).to_be_visible()
        page.check("#pace input[value='0']")
        measured = page.evaluate(CONTRASTS)
        assert len(measured) > 100
        assert {what: ratio for what, ratio in measured if ratio < 4.5} == {}
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(250, 249, 246)") == (scheme == "light")
        stop_load(page)
    until(lambda: is_idle(llm))


WIDTHS = """(kind) => ["html", "#scroll", "#requests-list", "#log-list"]
  .map((part) => document.querySelector(part)[kind])"""


@pytest.mark.parametrize("width", [360, 700, 1000, 1280])
def test_nothing_overflows_sideways(browser: Any, served: Served, llm: LLM, width: int) -> None:
    with visiting(browser, served.url, viewport={"width": width, "height": 800}) as page:
        expect_connected(page)
        start_load(page)
        expect(cells(page, "shared").first).to_be_visible()
        widths = [page.evaluate(WIDTHS, kind) for kind in ("scrollWidth", "clientWidth")]
        assert widths[0] == widths[1]
        stop_load(page)
    until(lambda: is_idle(llm))


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1280, 640), (1024, 700)])
def test_a_wide_window_shows_the_pool_and_all_requests(
    browser: Any, served: Served, llm: LLM, width: int, height: int
) -> None:
    with visiting(browser, served.url, viewport={"width": width, "height": height}) as page:
        expect_connected(page)
        start_load(page)
        requests = page.locator("#requests tr")
        expect(requests).to_have_count(6)
        page.check("#pace input[value='0']")
        assert page.evaluate("document.documentElement.scrollHeight") == height  # one page
        for last, below in (
            (page.locator("#grid .cell").last, page.locator(".legend").bounding_box()["y"]),
            (requests.last, bottom(page.locator("#requests-list"))),
        ):
            assert bottom(last) <= below
        stop_load(page)
    until(lambda: is_idle(llm))


def bottom(element: Any) -> float:
    box = element.bounding_box()
    return float(box["y"] + box["height"])


@pytest.mark.parametrize(("width", "height"), [(800, 600), (360, 640), (390, 844)])
def test_a_narrow_window_shows_the_load_and_the_pool_first(
    browser: Any, served: Served, llm: LLM, width: int, height: int
) -> None:
    with visiting(browser, served.url, viewport={"width": width, "height": height}) as page:
        expect_connected(page)
        assert bottom(page.locator("#load")) < height
        start_load(page)
        expect(page.locator("#requests tr")).to_have_count(6)
        assert bottom(page.locator("#grid .cell").nth(24)) < height  # without scrolling
        assert page.evaluate("document.documentElement.scrollTop") == 0
        assert bottom(page.locator(".pool")) <= page.locator(".chat").bounding_box()["y"]
        stop_load(page)
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED) in ("load", "real")  # the same order by keyboard
    until(lambda: is_idle(llm))


def test_a_window_that_becomes_narrow_keeps_the_focus_and_the_question(page: Any) -> None:
    page.fill("#question", FRANCE)
    for width in (800, 1280, 800, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        first = "pool" if width < 1000 else "chat"
        expect(page.locator(f"main > .panel:first-child.{first}")).to_have_count(1)
        expect(page.locator("#question")).to_be_focused()
    expect(page.locator("#question")).to_have_value(FRANCE)


COUNT_ANIMATIONS = """() => {
  globalThis.started = 0;
  const animate = Element.prototype.animate;
  Element.prototype.animate = function (...how) { started += 1; return animate.apply(this, how); };
  for (const name of ["transitionrun", "animationstart"]) {
    document.addEventListener(name, () => { started += 1; });
  }
}"""


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_if_reduced_motion_is_preferred(
    browser: Any, served: Served, llm: LLM, motion: str
) -> None:
    with visiting(browser, served.url, reduced_motion=motion) as page:
        expect_connected(page)
        page.evaluate(COUNT_ANIMATIONS)
        send(page, STORY, max_tokens=64)
        until(lambda: llm.engine.stats.num_running > 0)
        until(lambda: is_idle(llm))
        expect(page.locator("#requests tr")).to_have_count(0)
        if motion == "reduce":
            assert page.evaluate("started") == 0
        else:
            until(lambda: page.evaluate("started") > 0)
