"""What a page shows in place of an interactive figure without JavaScript: a few of its steps."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from tiny_llm_ref.sampler import draw, keep_min_p, keep_top_k, keep_top_p

from . import sampling_data
from .beam_frames import frames
from .blocks import CELL, GAP, Block, legend, slotted_block, table
from .drawing import Drawing
from .timeline_frames import Recorder


class _Step(NamedTuple):
    """A step of the block table's story: what happens, the tables by name, and the blocks in use."""

    what: str
    tables: dict[str, Sequence[int]]
    blocks: dict[int, tuple[Block, str]]


HUES = {"A": "blue", "B": "orange"}
STEPS = (
    _Step(
        "B is a fork of A: one more reference to each block",
        {"A": [0, 1], "B": [0, 1]},
        {
            0: (Block("blue orange", note="2 refs"), "a0 a1 a2 a3"),
            1: (Block("blue orange", note="2 refs"), "a4 a5"),
        },
    ),
    _Step(
        "B appends 1 token: block 1 is copied to block 2 first",
        {"A": [0, 1], "B": [0, 2]},
        {
            0: (Block("blue orange", note="2 refs"), "a0 a1 a2 a3"),
            1: (Block("blue", note="1 ref"), "a4 a5"),
            2: (Block("orange", note="1 ref, copy of 1"), "a4 a5 b6"),
        },
    ),
    _Step(
        "A releases its blocks: block 1 has no holder left",
        {"B": [0, 2]},
        {
            0: (Block("orange", note="1 ref"), "a0 a1 a2 a3"),
            2: (Block("orange", note="1 ref"), "a4 a5 b6"),
        },
    ),
)


def _block_table() -> Drawing:
    """A fork, a copy on write and a release, with the tokens in each block."""
    drawing = Drawing(
        640,
        372,
        "Fork, copy on write and release",
        "B, a fork of A, holds A's blocks 0 and 1. When B appends a token, block 1 is copied to block 2. "
        "When A ends, block 1 is free.",
    )
    for row, (what, tables, blocks) in enumerate(STEPS):
        y = 20 + row * 124
        drawing.label(2, y, what, "text")
        for line, (name, ids) in enumerate(tables.items()):
            table(drawing, 2, y + 18 + line * 36, name, HUES[name], ids)
        x = 210.0
        for block_id in range(4):
            block, texts = blocks.get(block_id, (Block(), ""))
            slots = [*texts.split(), *[""] * 4][:4]
            x = slotted_block(drawing, x, y + 30, block_id, block, slots)
    return drawing


SYSTEM = ["you", "are", "a", "helpful", "assistant", ".", "explain", "what"]
PROMPTS = (
    [*SYSTEM, "a", "kv", "cache", "is", "."],
    [*SYSTEM, "a", "block", "table", "is", ",", "please", "."],
)


def _prefix_cache() -> Drawing:
    """Two prompts with the same first blocks, and the pool after the first one has ended."""
    drawing = Drawing(
        640,
        504,
        "A prefix cache",
        "Prompt A is computed, and its full blocks 0, 1 and 2 are cached. Prompt B begins with the same "
        "eight tokens: it shares blocks 0 and 1. After A has ended, block 2 is idle.",
    )
    first, second = (_hashes(tokens) for tokens in PROMPTS)
    drawing.label(2, 16, "prompt A: nothing is cached", "small")
    _prompt(drawing, 26, PROMPTS[0], [("blue", f"{one}", "miss") for one in first])
    drawing.label(2, 218, "prompt B: the first two blocks have the same hashes", "small")
    hits = [("green", second[place], f"hit: block {place}") for place in range(2)]
    _prompt(drawing, 228, PROMPTS[1], [*hits, ("orange", second[2], "miss")])
    drawing.label(2, 424, "the pool after A has ended: block 2 is idle", "small")
    in_use = {0: second[0], 1: second[1], 4: second[2]}
    blocks = {block: ("orange", text, "2 refs") for block, text in in_use.items()}
    blocks |= {2: ("panel", first[2], "evict next"), 5: ("orange", "not full", "1 ref")}
    for block in range(8):
        drawing.label(2 + block * 66 + 31, 442, str(block), "note", "middle")
        drawing.cell(2 + block * 66, 448, 62, 50, *blocks.get(block, ("free",)))
    return drawing


def _prompt(drawing: Drawing, y: float, tokens: Sequence[str], full: Sequence[tuple[str, str, str]]) -> None:
    """Draw a prompt in blocks of four tokens. full: style, hash and verdict of each full block."""
    for row in range(-(-len(tokens) // 4)):
        style, text, note = full[row] if row < len(full) else ("free", "-", "not full")
        top = y + row * 44
        drawing.cell(2, top, 92, 36, style, text, note)
        if row:
            drawing.line((48, top - 8), (48, top))
        x = 102.0
        for token in tokens[4 * row : 4 * row + 4]:
            width = 7.2 * len(token) + 10
            drawing.cell(x, top + 5, width, 26, style, token)
            x += width + 2


def _hashes(tokens: Sequence[str]) -> list[str]:
    """Return the first 4 hexadecimal digits of each full block's hash, as in `interactive/prefix.js`."""
    parent, shown = 0, []
    for start in range(0, len(tokens) - 3, 4):
        text = "\n".join([str(parent), *tokens[start : start + 4]])
        parent = 0x811C9DC5
        for byte in text.encode():
            parent = (parent ^ byte) * 0x01000193 % 2**32
        shown.append(f"{parent >> 16:04x}")
    return shown


MEMORIES = (
    ("Contiguous", "6 blocks for each request at once, most of them empty; E and D wait", "AAA___CC____"),
    ("Dynamic", "adjacent blocks: 5 are free, but not 4 side by side, so D waits", "AAA...CCEE.."),
    ("Paged", "D takes any 4 of the free blocks", "AAADDDCCEED."),
)
REQUESTS = {"A": "blue", "C": "green", "D": "violet", "E": "teal", "_": "zone", ".": "free"}


def _allocation() -> Drawing:
    """Three memories of 12 blocks: A, C and E need 3, 2 and 2 blocks, and D, which arrives, needs 4."""
    drawing = Drawing(
        640,
        356,
        "Three ways to allocate",
        "Contiguous: A and C have six blocks each, most of them empty; E and D wait. Dynamic: five blocks "
        "are free, but not four side by side, and D waits. Paged: D uses four of the scattered free blocks.",
    )
    for row, (name, what, blocks) in enumerate(MEMORIES):
        y = 16 + row * 108
        drawing.label(2, y, name, "name")
        drawing.label(110, y, what, "small")
        for place, text in enumerate(blocks):
            x = 2 + place * (CELL + GAP)
            drawing.label(x + CELL / 2, y + 18, str(place), "note", "middle")
            drawing.cell(x, y + 24, CELL, CELL, REQUESTS[text], text.strip("_."))
    legend(drawing, 2, 342, {"blue": "a request's block", "zone": "reserved, empty", "free": "free"})
    return drawing


SAMPLED_ROWS = 14


def _sampling() -> Drawing:
    """A real distribution with min-p 0.05, top-k 12 and top-p 0.8, and one draw."""
    drawing = Drawing(
        680,
        430,
        "Sampling",
        "The likeliest next tokens after a prompt. min-p removes those that are too unlikely, top-k all "
        "after the twelfth, and top-p the last of these. One of the others is drawn.",
    )
    prompt = sampling_data.data()["prompts"][1]
    own = sorted(prompt["likeliest"])
    logits = [logit for _, _, logit in own] + [logit for logit, n in prompt["tail"] for _ in range(n)]
    start = mx.array(logits)
    after_min_p = keep_min_p(start, 0.05)
    after_top_k = keep_top_k(after_min_p, 12)
    last = keep_top_p(after_top_k, 0.8)
    drawn = int(draw(last, 1, 0))
    texts = [text.replace(" ", "\u2423") for _, text, _ in own]
    shares = [_shares(row)[: len(own)] for row in (start, after_min_p, after_top_k, last)]
    looks = ["orange" if place == drawn else "blue" for place in range(len(own))]
    drawing.label(2, 16, f"after {prompt['prompt']!r}: min-p 0.05, then top-k 12, then top-p 0.8", "small")
    order = sorted(range(len(own)), key=lambda place: -shares[0][place])[:SAMPLED_ROWS]
    for row, place in enumerate(order):
        y = 28 + row * 22
        step = max(step for step, row_shares in enumerate(shares) if row_shares[place] > 0)
        removed = step < len(shares) - 1
        drawing.label(2, y + 12.5, texts[place], "chip")
        bar = max(1.0, 420 * shares[step][place] / max(shares[-1]))
        drawing.cell(116, y, bar, 16, "free" if removed else looks[place])
        number = ("min-p", "top-k", "top-p")[step] if removed else f"{shares[-1][place]:.1%}"
        drawing.label(620, y + 12.5, number, "chip", "end")
    x, y = 2.0, 28 + SAMPLED_ROWS * 22 + 18
    drawing.label(2, y - 6, "in the order of the ids", "small")
    for text, share, look in zip(texts, shares[-1], looks, strict=True):
        if share > 0:
            fits = 7.4 * len(text) < 618 * share - 6
            drawing.cell(x, y, 618 * share, 30, look, text if fits else "")
            x += 618 * share
    legend(
        drawing, 2, 416, {"blue": "possible", "free": "removed", "orange": "drawn, with seed 1 at index 0"}
    )
    return drawing


def _shares(logits: mx.array) -> list[float]:
    return [float(share) for share in np.array(mx.softmax(logits))]


HUE_CYCLE = ("blue", "orange", "green", "violet", "teal", "rose")


def _beams() -> Drawing:
    """Two frames of the search with three beams: a prune and a fork, then the copy on write."""
    drawing = Drawing(
        640,
        516,
        "Beams that share blocks",
        "A beam without a successor is pruned, and another is forked: the two share all blocks. When both "
        "append a token, one of them copies the block that is not full.",
    )
    for place, frame in enumerate(frames()["3"][3:5]):
        top = 16 + place * 260
        what = ("beam 1 is pruned, beam 3 is a fork of beam 0", "each beam appends a token")[place]
        drawing.label(2, top, what, "text")
        hues = _holders(frame["beams"])
        for row, (beam, _, _, blocks) in enumerate(frame["beams"]):
            y, x = top + 12 + row * 50, 80.0
            drawing.label(2, y + 26, f"beam {beam}", "name")
            for block in blocks:
                drawing.cell(x, y, 148, 44, hues[block], frame["contents"][block], f"block {block}")
                x += 152
        for block in range(8):
            x, y = 80 + block * (CELL + GAP), top + 182
            refs = len(hues.get(block, "").split())
            drawing.label(x + CELL / 2, y - 4, str(block), "note", "middle")
            note = f"{refs} ref{'s' if refs > 1 else ''}" if refs else ""
            filled = f"{len(frame['contents'][block].split())}/4" if refs else ""
            drawing.cell(x, y, CELL, CELL, hues.get(block, "free"), filled, note)
    return drawing


def _holders(beams: Sequence[Sequence[Any]]) -> dict[int, str]:
    """The hues of the beams that hold each block, in one string."""
    hues: dict[int, str] = {}
    for _, hue, _, blocks in sorted(beams, key=lambda beam: int(beam[0])):
        for block in blocks:
            hues[block] = f"{hues.get(block, '')} {HUE_CYCLE[hue]}".strip()
    return hues


LOOKS = {"w": "free", "q": "free", "x": "free", "h": "zone", "o": "zone"}
SIGNS = {"x": "\u00d7", "o": "↓", "s": "↑", "d": "•"}


def _timeline() -> Drawing:
    """One recorded run, from its first step to its last: preemption with recomputing."""
    drawing = Drawing(
        760,
        262,
        "A timeline of continuous batching",
        "Five requests with 8 tokens per step and 16 blocks. Prompts are computed in chunks beside the "
        "decodes. A request is preempted when the blocks run out, waits, and is computed again.",
    )
    run = Recorder("recompute", 8, 16).record()
    for step in range(len(run["used"])):
        drawing.label(56 + step * 21 + 10, 14, str(step + 1), "note", "middle")
    for row, (name, cells) in enumerate(run["rows"].items()):
        y = 24 + row * 40
        drawing.label(2, y + 20, name, "name")
        for step, cell in enumerate(cells.split()):
            if cell == "-":
                continue
            numbers = [int(number) for number in cell[1:].strip("!").split(",") if number]
            text = SIGNS.get(cell[0], str(numbers[1] - numbers[0]) if cell[0] in "pr" else "")
            style = LOOKS.get(cell[0], HUE_CYCLE[row]) + (" rose" if cell[0] == "r" else "")
            drawing.cell(56 + step * 21, y, 19, 32, style, text)
    entries = {"blue": "n: tokens of a prompt; •: decode", "blue rose": "n: computed again"}
    legend(drawing, 2, 246, {**entries, "free": "waits; \u00d7: preempted"})
    return drawing


RADIUS = 46  # pixels, of a dial


def dial(drawing: Drawing, x: float, y: float, key: float, query: float) -> None:
    """Draw a pair as two hands, which point to the right at angle 0 and turn counterclockwise."""
    drawing.ring(x, y, RADIUS)
    for hue, angle, length in (("orange", key, RADIUS - 14), ("blue", query, RADIUS - 2)):
        drawing.curve([(x, y), (x + length * math.cos(angle), y - length * math.sin(angle))], hue)


def _rotary() -> Drawing:
    """A key and a query that are 2 apart, at positions 3 and 5 and at 10 and 12."""
    drawing = Drawing(
        640,
        368,
        "Four pairs that turn with the position",
        "A head of 8 numbers with base 100. From positions 3 and 5 to positions 10 and 12 both hands of each "
        "dial turn, the first pair by far the most. The angle between the two hands stays the same.",
    )
    frequencies = [100 ** (-2 * pair / 8) for pair in range(4)]
    for row, key in enumerate((3, 10)):
        y = 16 + row * 166
        drawing.label(2, y, f"key at position {key}, query at position {key + 2}", "text")
        for pair, frequency in enumerate(frequencies):
            x = 80 + pair * 156
            dial(drawing, x, y + 62, key * frequency, (key + 2) * frequency)
            share = f"{math.cos(2 * frequency):.2f}".replace("-", "\N{MINUS SIGN}")
            drawing.label(x, y + 128, f"pair {pair} adds {share}", "small", "middle")
    legend(drawing, 2, 358, {"orange": "key", "blue": "query"})
    score = sum(math.cos(2 * frequency) for frequency in frequencies)
    drawing.label(180, 358, f"the score is {score:.2f} in both rows", "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {
    "sampling": _sampling,
    "block_table": _block_table,
    "prefix_cache": _prefix_cache,
    "allocation": _allocation,
    "beams": _beams,
    "timeline": _timeline,
    "rotary": _rotary,
}
