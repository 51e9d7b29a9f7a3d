"""The figures of "Operating it": where each option and metric belongs, and three states of a server."""

from collections.abc import Callable

from .drawing import Drawing

OPTION, METRIC = "orange", "blue"
CLIENTS = 16
POOL = 24  # blocks of a pool as drawn


def _knobs() -> Drawing:
    """The way of a request through the engine, with the options and metrics at each place."""
    drawing = Drawing(
        772,
        506,
        "Options and metrics of a server",
        "A request passes admission, which max_num_waiting limits; the queue, counted by "
        "num_requests_waiting and request_queue_time; the slots, limited by max_num_seqs and counted by "
        "num_requests_running; and steps, limited by max_num_batched_tokens, made faster by threads and "
        "activation_bits, and counted by iteration_tokens and inter_token_latency. Steps write to the KV "
        "pool, which num_blocks and block_size size and kv_cache_usage_perc measures. With some "
        "preemption_mode, a running request returns to the queue; its blocks may be swapped to the host. "
        "time_to_first_token covers everything from admission to the end of a step.",
    )
    _span(drawing, 20, 756, 14, "time_to_first_token")
    _place(drawing, (16, 54, 152, 188), "admission", ["max_num_waiting"], [])
    drawing.label(92, 142, "too many wait: 429", "small", "middle")
    _place(drawing, (194, 54, 168, 188), "queue", [], ["num_requests_waiting", "request_queue_time"])
    _place(drawing, (388, 54, 168, 188), "slots", ["max_num_seqs"], ["num_requests_running"])
    steps = ["max_num_batched_tokens", "threads", "activation_bits"]
    _place(drawing, (582, 54, 178, 188), "step", steps, ["iteration_tokens", "inter_token_latency"])
    for left in (168, 362, 556):
        drawing.arrow([(left, 104), (left + 26, 104)])
    drawing.arrow([(716, 242), (716, 342)])
    drawing.label(706, 282, "writes keys", "small", "end")
    drawing.label(706, 298, "and values", "small", "end")
    drawing.arrow([(278, 342), (278, 242)], dashed=True)
    drawing.label(290, 262, "preempted", "small")
    drawing.chip(290, 272, 134, OPTION, "preemption_mode")
    drawing.chip(290, 300, 134, METRIC, "num_preemptions")
    drawing.arrow([(472, 342), (472, 242)])
    drawing.label(484, 290, "blocks", "small")
    _place(drawing, (194, 342, 566, 152), "KV pool", [], [])
    for place in range(POOL):
        kind = "green" if place < 11 else "teal" if place < 17 else "free"
        drawing.cell(208 + 22 * place, 376, 20, 26, kind)
    drawing.label(208 + 11 * 11, 420, "held by requests", "small", "middle")
    drawing.label(208 + 22 * 14, 420, "cached, idle", "small", "middle")
    drawing.label(208 + 22 * 20.5, 420, "free", "small", "middle")
    drawing.chip(208, 432, 150, METRIC, "kv_cache_usage_perc")
    drawing.chip(428, 432, 150, METRIC, "prefix_cache_hits")
    drawing.chip(208, 462, 92, OPTION, "num_blocks")
    drawing.chip(308, 462, 92, OPTION, "block_size")
    drawing.chip(428, 462, 186, OPTION, "enable_prefix_caching")
    _place(drawing, (16, 342, 152, 152), "host", ["swap_space"], [])
    drawing.arrow([(194, 388), (168, 388)], dashed=True)
    drawing.arrow([(168, 408), (194, 408)], dashed=True)
    return drawing


def _place(
    drawing: Drawing,
    area: tuple[float, float, float, float],
    name: str,
    options: list[str],
    metrics: list[str],
) -> None:
    """Draw a part of the engine with its options, then its metrics, as labels below each other."""
    x, y, width, height = area
    drawing.box(x, y, width, height, "zone", [name])
    chips = [*((OPTION, one) for one in options), *((METRIC, one) for one in metrics)]
    for place, (hue, text) in enumerate(chips):
        drawing.chip(x + 4, y + 40 + 28 * place, width - 8, hue, text)


def _span(drawing: Drawing, left: float, right: float, y: float, text: str) -> None:
    """Draw a bracket above what a time covers, with the metric's name."""
    drawing.line((left, y + 28), (left, y + 10))
    drawing.line((left, y + 10), (right, y + 10))
    drawing.line((right, y + 10), (right, y + 28))
    drawing.chip((left + right) / 2 - 90, y, 180, METRIC, text)


def _states() -> Drawing:
    """Enough memory, a full pool, a queue for slots: clients and pool."""
    drawing = Drawing(
        720,
        268,
        "Three states of a server",
        "Enough memory: all 16 clients run, and an eighth of the pool is in use. A full pool: seven clients "
        "run, nine wait, and all blocks are in use. A queue for slots: four clients run, twelve wait, and "
        "one block of the pool is in use.",
    )
    states = (
        ("enough memory", 16, 3, ("waiting: 0", "usage: low", "preemptions: constant")),
        ("a full pool", 7, POOL, ("waiting: above 0", "usage: high, up to 1", "preemptions: grow")),
        ("a queue for slots", 4, 1, ("waiting: above 0", "usage: low", "preemptions: constant")),
    )
    for place, (name, running, held, texts) in enumerate(states):
        x = 12 + 238 * place
        drawing.box(x, 12, 220, 244, "zone")
        drawing.label(x + 110, 36, name, "head", "middle")
        for client in range(CLIENTS):
            left, top = x + 14 + 24 * (client % 8), 52 + 26 * (client // 8)
            drawing.cell(left, top, 22, 22, "green" if client < running else "free")
        drawing.label(x + 14, 122, f"{running} run, {CLIENTS - running} wait", "small")
        for block in range(POOL):
            drawing.cell(x + 14 + 8 * block, 138, 7, 26, "blue" if block < held else "free")
        for row, text in enumerate(texts):
            drawing.label(x + 14, 194 + 20 * row, text, "text")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"knobs": _knobs, "states": _states}
