"""The figures of "Inside the kernels": weights, activations, instructions, tiles, partitions, threads."""

from collections.abc import Callable, Sequence

from .blocks import legend
from .drawing import Drawing

PRODUCTS, FLOATS = 8, 4  # instructions for one row and one group with activations of 8 bits
UNPACKING = 14  # for one group, whatever the number of rows


def _record() -> Drawing:
    """A record of 16 outputs x 32 inputs: one output's bytes, then mask, products, scale and bias."""
    drawing = Drawing(
        720,
        452,
        "A record of packed weights",
        "A record has 16 scales, 16 biases and four lines of 64 bytes. In each line output 2 has "
        "bytes 8 to 11. "
        "A mask gives four weights of every output; a product instruction multiplies them by four "
        "activations.",
    )
    drawing.label(16, 22, "one tile: a record for each group of 32 inputs", "name")
    for place, text in enumerate(("group 0", "group 1", "...", "last group")):
        drawing.cell(16 + place * 112, 34, 108, 28, "blue" if place == 1 else "panel", text)
    drawing.line((128, 64), (16, 104))
    drawing.line((236, 64), (704, 104))
    parts = (
        ("16 scales", 92, "violet"),
        ("16 biases", 92, "violet"),
        *((f"line {n}", 124, "blue") for n in range(4)),
    )
    x = 16.0
    for text, width, hue in parts:
        drawing.cell(x, 106, width, 28, hue, text)
        x += width + 2
    for text, left in (("32 bytes", 62), ("32 bytes", 156)):
        drawing.label(left, 150, text, "note", "middle")
    drawing.label(454, 150, "64 bytes each: inputs 0-7, 8-15, 16-23, 24-31", "note", "middle")
    drawing.line((204, 158), (16, 186))
    drawing.line((328, 158), (704, 186))
    for output in range(16):
        left = 16 + output * 43
        chosen = output == 2
        drawing.cell(left, 188, 41, 26, "orange" if chosen else "panel", f"o{output}")
    drawing.label(16, 232, "line 0: four bytes for each of 16 outputs, 64 bytes, one register", "small")
    for byte in range(4):
        left = 16 + byte * 92
        drawing.cell(left, 256, 44, 30, "rose", f"q{byte + 4}")
        drawing.cell(left + 44, 256, 44, 30, "orange", f"q{byte}")
        drawing.label(left + 44, 302, f"byte {8 + byte}", "note", "middle")
    drawing.label(396, 270, "output 2: bytes 8 to 11", "text")
    drawing.label(396, 288, "high half: inputs 4-7, low half: inputs 0-3", "small")
    steps = (
        ("& 0x0f", "q0 q1 q2 q3", "a mask: four weights of each output"),
        (">> 4, & 0x0f", "q4 q5 q6 q7", "a shift and a mask: the next four"),
        ("product", "I += q0 x0 + q1 x1 + q2 x2 + q3 x3", "the same x for all outputs"),
        ("after 8 products", "acc += a (s I + b S)", "floats, once for each group"),
    )
    for row, (name, result, what) in enumerate(steps):
        y = 318 + row * 32
        hue = ("orange", "rose", "teal", "violet")[row]
        drawing.cell(16, y, 128, 26, "panel", name)
        drawing.cell(150, y, 280, 26, hue, result)
        drawing.label(444, y + 18, what, "small")
    return drawing


def _bands() -> Drawing:
    """Rounded activations of eight rows: groups of one band in memory."""
    drawing = Drawing(
        720,
        296,
        "A band of rounded activations",
        "Eight rows form a band. In memory group 0 of all eight rows comes first, then group 1 of "
        "all rows. The "
        "kernel reads the band from left to right while it reads the records of a tile.",
    )
    hues = ("blue", "teal", "green")
    drawing.label(16, 22, "eight rows, three groups", "name")
    for row in range(8):
        y = 34 + row * 19
        drawing.label(16, y + 13, f"row {row}", "note")
        for group, hue in enumerate(hues):
            drawing.cell(64 + group * 62, y, 60, 17, hue, f"g{group}")
    drawing.label(300, 22, "one group: 32 integers, and", "name")
    drawing.cell(300, 36, 250, 28, "blue", "x0 x1 x2 ... x31")
    drawing.cell(554, 36, 50, 28, "violet", "a")
    drawing.cell(606, 36, 50, 28, "violet", "S")
    drawing.label(300, 84, "a: the scale, S: the sum of the integers", "small")
    drawing.label(300, 118, "16 bits: the middle two of four exchanged", "small")
    for place, text in enumerate(("x0", "x2", "x1", "x3", "x4", "x6", "x5", "x7")):
        drawing.cell(300 + place * 45, 128, 43, 26, "orange" if place % 4 in (1, 2) else "panel", text)
    drawing.label(16, 214, "in memory: band 0", "name")
    width = 27
    for group, hue in enumerate(hues):
        for row in range(8):
            drawing.cell(16 + (group * 8 + row) * (width + 1.4), 226, width, 28, hue, str(row))
        left = 16 + group * 8 * (width + 1.4)
        drawing.label(left + 4 * (width + 1.4), 274, f"group {group} of rows 0-7", "note", "middle")
    return drawing


def _bar(drawing: Drawing, y: float, name: str, parts: Sequence[tuple[float, str]]) -> None:
    """A bar of instructions for each row: a part for each kind."""
    unit = 19.0
    drawing.label(16, y + 18, name, "text")
    x = 140.0
    for count, hue in parts:
        drawing.cell(x, y, count * unit - 2, 28, hue, f"{count:g}")
        x += count * unit
    drawing.label(x + 6, y + 19, f"{sum(count for count, _ in parts):g}", "small")


def _sharing() -> Drawing:
    """Instructions for a row, a group and 16 outputs, with one, two and eight rows at a time."""
    drawing = Drawing(
        720,
        184,
        "Instructions for each row",
        "One row and one group of 32 inputs need 8 products and 4 float operations. Unpacking takes 14 "
        "instructions for one row, 7 for each of two rows, 1.75 for each of eight.",
    )
    drawing.label(16, 22, "instructions for one row, one group and 16 outputs (8-bit activations)", "head")
    for place, rows in enumerate((1, 2, 8)):
        name = "1 row" if rows == 1 else f"{rows} rows share"
        parts = ((PRODUCTS, "teal"), (FLOATS, "violet"), (UNPACKING / rows, "orange"))
        _bar(drawing, 38 + place * 38, name, parts)
    entries = {"teal": "integer products", "violet": "float operations", "orange": "unpacking, shared"}
    legend(drawing, 16, 172, entries)
    return drawing


def _tile() -> Drawing:
    """Keys and values of 32 positions from pages: keys transposed, values not."""
    drawing = Drawing(
        720,
        388,
        "A tile of keys and values",
        "Positions 32 to 63 are in blocks 9 and 4. Their keys become an array D by 32, so one "
        "register has the "
        "same component of many positions. Their values stay 32 by D, so one register has many components.",
    )
    drawing.label(16, 22, "two blocks, one head", "name")
    for place, (block, hue) in enumerate((("block 9", "blue"), ("block 4", "teal"))):
        y = 36 + place * 92
        drawing.cell(16, y, 168, 84, "zone")
        drawing.label(24, y + 18, block, "small")
        drawing.cell(24, y + 26, 152, 22, hue, f"keys of {32 + 16 * place}-{47 + 16 * place}")
        drawing.cell(24, y + 53, 152, 22, hue, f"values of {32 + 16 * place}-{47 + 16 * place}")
    drawing.label(250, 22, "keys, transposed: [D, 32]", "name")
    drawing.label(496, 22, "values: [32, D]", "name")
    for row in range(6):
        y = 36 + row * 24
        for half, own in enumerate(("blue", "teal")):
            drawing.cell(
                250 + half * 100, y, 98, 22, "orange" if row == 2 else own, f"d={row}" if half == 0 else ""
            )
    for row in range(6):
        y = 36 + row * 24
        own = "rose" if row == 4 else ("blue" if row < 3 else "teal")
        position = (32, 33, 34, 48, 49, 50)[row]
        drawing.cell(496, y, 200, 22, own, f"position {position}")
    drawing.label(250, 200, "a register: one component of", "small")
    drawing.label(250, 217, "16 (AVX-512) or 8 positions", "small")
    drawing.label(496, 200, "a register: 16 or 8 components", "small")
    drawing.label(496, 217, "of one position", "small")
    drawing.arrow([(188, 92), (246, 92)])
    drawing.label(16, 254, "up to 3 rows (token, query head) at a time, for each tile:", "name")
    steps = (
        ("scores", "s[i] = scale * sum over d of q[d] * keys[d][i]", "orange"),
        ("weights", "m = max(m, s), w[i] = exp(s[i] - m), l += sum of w", "violet"),
        ("mix", "o[d] = o[d] * decay + sum over i of w[i] * values[i][d]", "rose"),
    )
    for place, (name, text, hue) in enumerate(steps):
        y = 268 + place * 38
        drawing.cell(16, y, 90, 30, "panel", name)
        drawing.cell(112, y, 584, 30, hue, text)
    return drawing


def _partitions() -> Drawing:
    """A token at position 300: its tiles, its partitions, and the merge by one item or by several."""
    drawing = Drawing(
        720,
        346,
        "Partitions and their merge",
        "A token at position 300 attends to 301 positions in ten tiles and three partitions. One "
        "thread computes "
        "and merges all, or three threads compute one each, and the results are merged in the same order.",
    )
    unit, left = 1.7, 16
    drawing.label(left, 22, "positions 0 to 300, tiles of 32, partitions of 128", "name")
    for tile in range(10):
        end = min(32 * tile + 32, 301)
        hue = ("blue", "teal", "green")[tile // 4]
        drawing.cell(left + 32 * tile * unit, 36, (end - 32 * tile) * unit - 2, 26, hue, str(tile))
    for number, (first, last) in enumerate(((0, 128), (128, 256), (256, 301))):
        middle = left + (first + last) / 2 * unit
        drawing.label(middle, 82, f"partition {number}", "note", "middle")
    drawing.label(548, 54, "300 is in tile 9", "small")
    for row, (title, names) in enumerate(
        (
            ("many rows: one item computes all partitions", ("A", "A", "A")),
            ("one long sequence: three items", ("A", "B", "C")),
        )
    ):
        y = 104 + row * 120
        drawing.label(left, y + 14, title, "text")
        for number, thread in enumerate(names):
            hue = ("blue", "teal", "green")[number]
            drawing.cell(left + number * 130, y + 26, 122, 40, hue, "m, l, o", f"thread {thread}")
        drawing.cell(left + 400, y + 26, 130, 40, "violet", "merge in order", "0, then 1, then 2")
        drawing.arrow([(left + 384, y + 46), (left + 396, y + 46)])
        drawing.arrow([(left + 532, y + 46), (left + 556, y + 46)])
        drawing.cell(left + 560, y + 26, 120, 40, "orange", "o / l", "the output")
        drawing.label(
            left, y + 88, ("in its working memory", "through memory that all threads see")[row], "small"
        )
    drawing.label(left, 336, "The numbers are equal to the last bit.", "small")
    return drawing


def _division() -> Drawing:
    """A step with few rows, and one with many: what each of two threads computes."""
    drawing = Drawing(
        720,
        400,
        "How two threads divide a block",
        "Few rows: both threads compute half of the outputs of every matrix and wait for each "
        "other after each "
        "loop. Many rows: each thread computes chunks of 32 rows from the norm to the down "
        "projection and waits "
        "only before and after attention.",
    )
    stages = ("norm", "qkv", "write", "attention", "o", "norm", "gate, up", "gating", "down")
    widths = (56, 66, 56, 96, 50, 56, 84, 70, 66)
    drawing.label(16, 22, "few rows: all threads share every matrix", "name")
    x = 90.0
    for stage, width in zip(stages, widths, strict=True):
        is_matrix = stage in ("qkv", "o", "gate, up", "down")
        for thread, hue in enumerate(("blue", "orange")):
            drawing.cell(
                x, 52 + thread * 34, width - 10, 28, hue if is_matrix or stage == "attention" else "panel"
            )
        drawing.label(x + (width - 10) / 2, 44, stage, "note", "middle")
        if stage != "down":
            drawing.line((x + width - 5, 48), (x + width - 5, 118))
        x += width
    for thread in range(2):
        drawing.label(16, 71 + thread * 34, f"thread {thread}", "small")
    drawing.label(90, 138, "a vertical line: every thread waits until the loop is complete", "small")
    drawing.label(16, 182, "many rows: each thread computes chunks", "name")
    groups = (
        (90, 158, "norm, qkv, write"),
        (264, 100, "attention"),
        (380, 312, "o, norm, gate, up, gating, down"),
    )
    for left, width, text in groups:
        drawing.label(left + width / 2, 206, text, "note", "middle")
        for thread, hue in enumerate(("blue", "orange")):
            y = 214 + thread * 34
            count = 1 if text == "attention" else 4
            part = width / count
            for place in range(count):
                chunk = place * 2 + thread
                label = "" if count == 1 else (f"chunk {chunk}" if part > 60 else str(chunk))
                drawing.cell(left + place * part, y, part - 3, 28, hue, label)
    for x in (256, 372):
        drawing.line((x, 210), (x, 282))
    for thread in range(2):
        drawing.label(16, 233 + thread * 34, f"thread {thread}", "small")
    drawing.label(16, 316, "one chunk of 32 rows, in one thread's cache:", "text")
    buffers = (
        ("hidden, normed", 130, "teal"),
        ("gates: 32 x 3,072 floats", 330, "violet"),
        ("fed", 160, "teal"),
    )
    x = 16.0
    for text, width, hue in buffers:
        drawing.cell(x, 328, width, 28, hue, text)
        x += width + 4
    drawing.label(16, 382, "the embedded model: hidden size 576, gates and their values 2 x 1,536", "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {
    "record": _record,
    "bands": _bands,
    "sharing": _sharing,
    "tile": _tile,
    "partitions": _partitions,
    "division": _division,
}
