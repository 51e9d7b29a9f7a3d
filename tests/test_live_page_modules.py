"""The modules of the live page that work without the page: Markdown, the saved chat, pool, replay, labels."""

from typing import Any

import pytest

from live_pages import (  # noqa: F401 (fixtures)
    browser_fixture,
    llm_fixture,
    page_fixture,
    pool_message,
    served_fixture,
)

MARKDOWN = """async ([text, pieces]) => {
  const { Markdown } = await import("/page/markdown.js");
  const element = document.createElement("div");
  const markdown = new Markdown(element);
  for (const length of pieces) markdown.show(text.slice(0, length));
  markdown.show(text);
  return element.innerHTML;
}"""


def markdown(page: Any, text: str, *pieces: int) -> str:
    """The HTML of a text, after its first `pieces` characters have been shown, as in a stream."""
    html: str = page.evaluate(MARKDOWN, [text, pieces])
    return html


BULLETS = "<ul><li>b<ul><li>c</li></ul></li></ul>"


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one\ntwo\n\n\nthree", "<p>one⏎two</p><p>three</p>"),
        ("# A\n## B #1\n###### C\ntext", "<h4>A</h4><h5>B #1</h5><h6>C</h6><p>text</p>"),
        ("**a** and *b*", "<p><strong>a</strong> and <em>b</em></p>"),
        ("__a__ and _b_", "<p><strong>a</strong> and <em>b</em></p>"),
        ("**a *b* `c`**", "<p><strong>a <em>b</em> <code>c</code></strong></p>"),
        ("2 * 3 * 4, a_b_c, **open, *open", "<p>2 * 3 * 4, a_b_c, **open, *open</p>"),
        (r"\*a\* \_b\_ `\*`", r"<p>*a* _b_ <code>\*</code></p>"),
        ("`a**b**` ``c`d`` `open", "<p><code>a**b**</code> <code>c`d</code> `open</p>"),
        ("`` ` `` ` a `", "<p><code>`</code> <code>a</code></p>"),
        ("- a\n- b\n  more\n\n- c", "<ul><li>a</li><li>b⏎more</li><li>c</li></ul>"),
        ("1. a\n   - b\n     - c\n2. d", f"<ol><li>a{BULLETS}</li><li>d</li></ol>"),
        ("1. a\n- b\n2. c", '<ol><li>a</li></ol><ul><li>b</li></ul><ol start="2"><li>c</li></ol>'),
        ("Steps:\n1. a\nIn\n2024. was", "<p>Steps:</p><ol><li>a</li></ol><p>In⏎2024. was</p>"),
        ("---\ntext\n***", "<hr><p>text</p><hr>"),
        ("```python\nif a < b:\n    **c**\n```\nd", "<pre><code>if a &lt; b:⏎    **c**</code></pre><p>d</p>"),
        ("1. a\n   ```\n   x\n     y\n   ```\n2. b", "<ol><li>a</li></ol><pre><code>x⏎  y</code></pre>"
         '<ol start="2"><li>b</li></ol>'),
        ("~~~\n```\n~~~~", "<pre><code>```</code></pre>"),
        ("```\nopen\n\n# b", "<pre><code>open⏎⏎# b</code></pre>"),
        ("", ""),
    ],
)  # fmt: skip
def test_markdown_becomes_elements(page: Any, text: str, html: str) -> None:
    assert markdown(page, text).replace("\n", "⏎").replace(' start="1"', "") == html


LINK = '<a href="{0}" title="{0}" target="_blank" rel="noopener noreferrer">a <em>b</em></a>'


@pytest.mark.parametrize(
    ("address", "html"),
    [
        ("https://example.com/x?y=1", LINK.format("https://example.com/x?y=1")),
        ("HTTP://example.com", LINK.format("http://example.com/")),
        ("javascript:alert(1)", "[a <em>b</em>](javascript:alert(1))"),  # brackets in an address: not a link
        ("javascript:alert`1`", "<span>a <em>b</em></span>"),
        ("JaVaScRiPt:alert`1`", "<span>a <em>b</em></span>"),
        ("data:text/html,x", "<span>a <em>b</em></span>"),
        ("//example.com", "<span>a <em>b</em></span>"),
        ("https://[", "<span>a <em>b</em></span>"),
    ],
)
def test_only_web_addresses_become_links(page: Any, address: str, html: str) -> None:
    assert markdown(page, f"[a *b*]({address})") == f"<p>{html}</p>"


HOSTILE = [
    "<script>globalThis.broken = 1</script>",
    "<img src=x onerror='globalThis.broken = 1'>",
    '**<svg onload=globalThis.broken=1>** `<b>` [<i>](https://example.com/"onmouseover=globalThis.broken=1)',
    "```\n</code></pre><script>globalThis.broken = 1</script>\n```",
    "# <iframe srcdoc='<script>top.broken = 1</script>'>",
    "- <a href='javascript:globalThis.broken=1'>x</a>",
    "![x](javascript:globalThis.broken=1) ![x](https://example.com/pixel.png)",
]
TAGS = """async (text) => {
  const { Markdown } = await import("/page/markdown.js");
  const element = document.createElement("div");
  document.body.append(element);
  new Markdown(element).show(text);
  const tags = [...element.querySelectorAll("*")].map(({ localName }) => localName);
  const names = [...element.querySelectorAll("*")].flatMap((e) => e.getAttributeNames());
  element.querySelectorAll("a").forEach((a) => a.dispatchEvent(new MouseEvent("mouseover")));
  return { tags, names, broken: globalThis.broken ?? null, text: element.textContent };
}"""


@pytest.mark.parametrize("text", HOSTILE)
def test_html_in_an_answer_stays_text(page: Any, text: str) -> None:
    rendered = page.evaluate(TAGS, text)
    assert set(rendered["tags"]) <= {"p", "strong", "code", "pre", "h4", "ul", "li", "a", "span"}
    assert set(rendered["names"]) <= {"href", "title", "target", "rel"}
    assert rendered["broken"] is None
    assert "<" in rendered["text"] or text.startswith("![")


@pytest.mark.parametrize(
    "text",
    [
        "x" * 300_000,
        "*a " * 50_000,
        "**" * 100_000,
        "[" * 100_000,
        "`" * 100_000 + "a",
        "".join(f"a{'`' * count}" for count in range(400)),
        "# " + " " * 100_000 + "x",
        "- " * 50_000 + "x",
        "".join(f"{' ' * depth}- x\n" for depth in range(0, 2000, 2)),
        "> " * 50_000,
        "```\n" * 20_001,
        "\n" * 200_000 + "- a" + "\n" * 100_000,
        "_*_*" * 1990,
    ],
    ids=lambda text: repr(text[:6]),
)
def test_hostile_text_is_rendered_in_bounded_time_and_depth(page: Any, text: str) -> None:
    timed = """async (text) => {
      const { Markdown } = await import("/page/markdown.js");
      const element = document.createElement("div");
      const start = performance.now();
      new Markdown(element).show(text);
      const depth = (node) => 1 + Math.max(0, ...[...new Set([...node.children].slice(-50))].map(depth));
      return { ms: performance.now() - start, depth: depth(element), length: element.textContent.length };
    }"""
    rendered = page.evaluate(timed, text)
    assert rendered["ms"] < 3000  # a quadratic renderer takes minutes; these take less than 0.2 s
    assert rendered["depth"] < 20


def test_a_stream_ends_in_the_same_elements_as_the_whole_text(page: Any) -> None:
    text = "# A\n\nSome **bold** text.\n\n1. one\n   ```py\n   x = 1\n   ```\n2. two `x`\n\n---\nEnd [x](https://a.b/)."
    assert markdown(page, text, *range(len(text))) == markdown(page, text)
    assert markdown(page, text, len(text), 9, 30) == markdown(page, text)


def test_a_growing_answer_keeps_the_elements_of_its_complete_blocks(page: Any) -> None:
    kept = page.evaluate("""async () => {
      const { Markdown } = await import("/page/markdown.js");
      const element = document.createElement("div");
      const markdown = new Markdown(element);
      markdown.show("# A\\n\\nfirst\\n\\nsec");
      const before = [...element.children];
      markdown.show("# A\\n\\nfirst\\n\\nsecond\\n\\nthird");
      return [...element.children].map((node) => before.includes(node));
    }""")
    assert kept == [True, True, False, False]


SAVED = """async ([value, messages]) => {
  const { load, save } = await import("/page/saved_chat.js");
  if (value !== null) sessionStorage.setItem("tiny-llm chat", value);
  if (messages !== null) save(messages, "draft");
  return load();
}"""


@pytest.mark.parametrize(
    "value",
    ["", "null", "7", "{", "[]", '{"messages": 1, "question": ""}', '{"messages": [{}], "question": ""}',
     '{"messages": [{"role": "system", "content": "x"}], "question": ""}', '{"messages": []}'],
)  # fmt: skip
def test_a_saved_chat_that_is_not_valid_is_ignored(page: Any, value: str) -> None:
    assert page.evaluate(SAVED, [value, None]) == {"messages": [], "question": ""}


def test_a_saved_chat_is_bounded_and_starts_with_a_question(page: Any) -> None:
    messages = [{"role": ["user", "assistant"][i % 2], "content": f"{i:05}" * 8000} for i in range(11)]
    saved = page.evaluate(SAVED, [None, messages])
    assert saved == {"messages": messages[-5:], "question": "draft"}
    saved = page.evaluate(SAVED, [None, messages[:-1]])
    assert saved["messages"] == messages[-5:-1]
    assert page.evaluate(SAVED, [None, [{"role": "user", "content": "x" * 200_001}]])["messages"] == []


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


def test_the_page_shows_the_pool_as_each_step_leaves_it(page: Any) -> None:
    state = page.evaluate(
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
    assert state["blocks"] == [[1, 1, True]]
    assert state["holders"] == [["b/0"]]
    assert state["sequences"] == ["a/1", "b/0"]
    assert state["preempted"] == [[], [], ["a/1"], [], []]
    assert state["tokens"] == [1, 4, 0, 0, 0]
    assert state["copies"] == [[2, 3, "a/1"]]
    assert state["reached"] == 6


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


def test_steps_are_shown_at_the_selected_pace(page: Any) -> None:
    state = page.evaluate(PLAYBACK)
    assert state["real"] == 100
    assert state["slow"] == [4, 0, 1, 1, 4]  # a tab that was asleep does not catch up all at once
    assert (state["one"], state["paused"]) == (1, 0)
    assert state["behind"] == state["rest"] == 89
    assert state["end"] == 0


LABELS = """async () => {
  const { Labels } = await import("/page/labels.js");
  const labels = new Labels();
  const all = [...Array(28).keys()].map((i) => ({ request: `r${i}`, id: `r${i}` }));
  all.forEach((sequence) => labels.add(sequence));
  const names = all.map((sequence) => labels.of(sequence));
  labels.finish(all[1], all.filter((sequence) => sequence !== all[1]));
  const forked = ["f/1", "f/0"].map((id) => ({ request: "f", id }));
  forked.forEach((sequence) => labels.add(sequence));
  return { names, forked: forked.map((sequence) => labels.of(sequence)), letter: labels.letter(forked[1]) };
}"""


def test_active_requests_have_different_letters(page: Any) -> None:
    state = page.evaluate(LABELS)
    assert state["names"] == [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "AA", "AB"]
    assert state["forked"] == [f"{state['letter']}2", f"{state['letter']}1"]
    assert state["letter"] not in state["names"][:1] + state["names"][2:]
