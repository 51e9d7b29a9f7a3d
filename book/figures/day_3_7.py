"""The figures of day 3.7: a request through the threads, its states, iterations, a client that leaves."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .drawing import Drawing

CAT, DOG, FOX = "blue", "orange", "violet"
LEFT, TASKS, STEP, DELIVER, GAP = 80, 54, 98, 60, 8  # of an iteration in a timeline, in pixels
ITERATION = TASKS + STEP + DELIVER + GAP


def _sequence() -> Drawing:
    """One request: posted during a step, queued between two steps, computed, delivered."""
    drawing = Drawing(
        720,
        520,
        "One request through the threads",
        "The client posts a task to the inbox while a step runs, and gets a future at once. After the step "
        "the loop runs the task, which queues the request in the core, and the future is done. The loop "
        "makes a step, adds the event to the outbox, and delivers it: the listener passes it to the client.",
    )
    client, inbox, loop, core, outbox = 96, 258, 392, 520, 646
    drawing.box(12, 12, 172, 496, "zone")
    drawing.box(326, 12, 382, 496, "zone")
    drawing.label(98, 34, "the client's thread", "head", "middle")
    drawing.label(517, 34, "the engine's thread", "head", "middle")
    names = ((client, "client"), (inbox, "inbox"), (loop, "EngineLoop"), (core, "core"), (outbox, "outbox"))
    for x, name in names:
        drawing.line((x, 84), (x, 496), "grid")
        drawing.cell(x - 50, 48, 100, 32, "teal" if name == "inbox" else "panel", name)
    drawing.cell(core - 26, 92, 52, 66, DOG, "step")
    drawing.arrow([(client, 112), (inbox - 2, 112)])
    drawing.label(192, 106, "post", "small")
    drawing.arrow([(inbox, 136), (client + 2, 136)], dashed=True)
    drawing.label(192, 130, "future", "small")
    drawing.label(inbox + 8, 152, "the task", "small")
    drawing.label(inbox + 8, 168, "waits", "small")
    _message(drawing, loop, inbox, 196, "run", dashed=False)
    drawing.arrow([(inbox, 218), (loop - 2, 218)], dashed=True)
    drawing.label(inbox + 8, 212, "add", "small")
    _message(drawing, loop, core, 242, "request.begin", dashed=False)
    drawing.arrow([(loop, 268), (client + 2, 268)], dashed=True)
    drawing.label(192, 262, "the future is done", "small")
    _message(drawing, loop, core - 26, 302, "step", dashed=False)
    drawing.cell(core - 26, 292, 52, 72, f"{DOG} {CAT}", "step")
    drawing.arrow([(core - 26, 350), (loop + 2, 350)], dashed=True)
    drawing.label(loop + 24, 344, "outputs", "small")
    _message(drawing, loop, outbox, 386, "an event", dashed=False)
    _message(drawing, loop, outbox, 416, "deliver", dashed=False)
    drawing.arrow([(outbox, 446), (client + 2, 446)], dashed=True)
    drawing.label(loop + 10, 440, "listener(events): call_soon_threadsafe", "small")
    drawing.cell(client - 50, 462, 100, 30, CAT, "yield event")
    drawing.line((loop - 44, 184), (loop - 44, 456))
    drawing.line((loop - 44, 184), (loop - 36, 184))
    drawing.line((loop - 44, 456), (loop - 36, 456))
    drawing.label(loop - 36, 476, "one iteration", "small")
    return drawing


def _message(drawing: Drawing, start: float, end: float, y: float, text: str, dashed: bool) -> None:
    """Draw an arrow between two lifelines with its text above the start of the arrow's left half."""
    tip = end - 2 if end > start else end + 2
    drawing.arrow([(start, y), (tip, y)], dashed)
    drawing.label(start + 12 if end > start else end + 24, y - 6, text, "small")


def _life() -> Drawing:
    """The states of a request, and its five ends."""
    drawing = Drawing(
        720,
        362,
        "The life of a request",
        "A submitted request waits in the inbox, then in the queue of the core, then it runs. It may be "
        "preempted, which brings it back to the queue. It ends as finished, aborted, failed or rejected. If "
        "the loop itself raises, every request that has not ended gets an EngineDeadError.",
    )
    drawing.box(16, 56, 150, 62, "panel", ["submitted", "a task in the inbox"])
    drawing.box(242, 56, 150, 62, "panel", ["queued", "waits in the core"])
    drawing.box(468, 56, 100, 62, CAT, ["running", "in the steps"])
    drawing.box(620, 56, 92, 62, "green", ["finished", "usage"])
    drawing.arrow([(166, 87), (240, 87)])
    drawing.label(203, 79, "add", "small", "middle")
    drawing.arrow([(392, 87), (466, 87)])
    drawing.label(429, 79, "admitted", "small", "middle")
    drawing.arrow([(568, 87), (618, 87)])
    drawing.arrow([(518, 56), (518, 30), (317, 30), (317, 54)])
    drawing.label(418, 22, "preempted (day 3.6)", "small", "middle")
    drawing.box(16, 216, 190, 66, "panel", ["rejected", "an error from submit", "or from its future"])
    drawing.box(
        242, 216, 214, 66, "panel", ["aborted", "event “abort” with usage;", "blocks free before the step"]
    )
    drawing.box(492, 216, 190, 66, "panel", ["failed", "RequestFailedError;", "the others go on"])
    drawing.arrow([(91, 118), (91, 214)])
    drawing.label(99, 158, "too many wait,", "small")
    drawing.label(99, 174, "invalid, draining", "small")
    drawing.arrow([(330, 118), (330, 214)])
    drawing.arrow([(490, 118), (490, 148), (346, 148), (346, 214)])
    drawing.label(354, 168, "cancelled, client left,", "small")
    drawing.label(354, 184, "deadline, engine stopped", "small")
    drawing.arrow([(546, 118), (546, 214)])
    drawing.label(554, 158, "its step or its", "small")
    drawing.label(554, 174, "text raised", "small")
    drawing.box(
        16, 300, 666, 54, "panel", ["engine dead", "the loop raised: every request gets an EngineDeadError"]
    )
    return drawing


class _Iteration(NamedTuple):
    """An iteration of a timeline: its tasks, the sequences of its step, and what it delivers, with hues."""

    tasks: Sequence[str]
    step: Sequence[tuple[str, str]]
    delivered: Sequence[tuple[str, str]]


def _iterations() -> Drawing:
    """Three iterations: tasks are posted at any time, and run between two steps."""
    drawing = Drawing(
        740,
        330,
        "Three iterations of the loop",
        "The tasks that add the cat and the dog run before the first step. The fox's task is posted during "
        "that step and runs before the second, in which the fox fails. The cat's cancellation is posted "
        "during the second step and runs before the third, which computes only the dog.",
    )
    lines = (
        _Iteration(
            ("add cat,", "add dog"),
            ((CAT, "cat"), (DOG, "dog")),
            ((CAT, "cat ' named'"), (DOG, "dog ' named'")),
        ),
        _Iteration(
            ("add fox",),
            ((CAT, "cat"), (DOG, "dog"), (FOX, "fox")),
            ((CAT, "cat ' A'"), (DOG, "dog ' Max'"), (FOX, "fox RequestFailedError")),
        ),
        _Iteration(
            ("cancel", "cat"),
            ((DOG, "dog"),),
            ((CAT, "cat '' (abort)"), (DOG, "dog ' who'")),
        ),
    )
    drawing.label(12, 46, "other", "small")
    drawing.label(12, 62, "threads", "small")
    drawing.label(12, 150, "engine", "small")
    drawing.label(12, 252, "listeners", "small")
    posted = (LEFT, LEFT + TASKS + 34, LEFT + ITERATION + TASKS + 50)
    for place, (one, x) in enumerate(zip(lines, posted, strict=True)):
        left = LEFT + place * ITERATION
        drawing.box(x, 24, 78, 26 + 15 * (len(one.tasks) - 1), "panel")
        for row, text in enumerate(one.tasks):
            drawing.label(x + 39, 41 + 15 * row, text, "chip", "middle")
        bottom = 50 + 15 * (len(one.tasks) - 1)
        drawing.arrow(
            [(x + TASKS / 2, bottom), (x + TASKS / 2, 84), (left + TASKS / 2, 84), (left + TASKS / 2, 110)]
        )
        _iteration(drawing, left, 112, one)
    return drawing


def _iteration(drawing: Drawing, left: float, y: float, one: _Iteration) -> None:
    """Draw an iteration: its tasks, its step with the computed sequences, and its delivered items below."""
    drawing.cell(left, y, TASKS, 66, "teal" if one.tasks else "free", "tasks" if one.tasks else "none")
    drawing.box(left + TASKS + 2, y, STEP - 4, 66, "zone")
    drawing.label(left + TASKS + STEP / 2, y - 6, "step", "note", "middle")
    for row, (hue, name) in enumerate(one.step):
        drawing.cell(left + TASKS + 8, y + 5 + 20 * row, STEP - 16, 18, hue, name)
    drawing.cell(left + TASKS + STEP, y, DELIVER, 66, "teal", "deliver")
    x = left + TASKS + STEP + DELIVER / 2
    drawing.arrow([(x, y + 66), (x, y + 98)])
    for row, (hue, text) in enumerate(one.delivered):
        drawing.chip(left + 4, y + 102 + 26 * row, ITERATION - 16, hue, text)


def _leaving() -> Drawing:
    """A client leaves during a step: its blocks are free before the next one."""
    drawing = Drawing(
        740,
        330,
        "A client that leaves",
        "The cat's client reads one event and leaves during the second step. Its finally clause posts "
        "forget. The second step still computes the cat. The third iteration begins with forget, which "
        "frees the cat's two blocks, and its step computes only the dog.",
    )
    both = ((CAT, "cat"), (DOG, "dog"))
    lines = (
        _Iteration(("add",), both, ()),
        _Iteration((), both, ()),
        _Iteration(("forget",), ((DOG, "dog"),), ()),
    )
    drawing.label(12, 52, "cat's client", "small")
    drawing.label(12, 172, "engine", "small")
    drawing.label(12, 282, "cat's", "small")
    drawing.label(12, 298, "blocks", "small")
    waits, reads = LEFT + ITERATION - 20, 92
    drawing.cell(LEFT, 34, waits - LEFT - 4, 30, "free", "await next()")
    drawing.cell(waits, 34, reads, 30, CAT, "event 1")
    drawing.cell(waits + reads + 4, 34, 116, 30, CAT, "break; finally")
    for place, one in enumerate(lines):
        _strip(drawing, LEFT + place * ITERATION, 134, one)
    delivered = LEFT + TASKS + STEP + DELIVER / 2
    drawing.arrow([(delivered, 134), (delivered, 96), (waits + 20, 96), (waits + 20, 66)])
    left = waits + reads + 62
    third = LEFT + 2 * ITERATION + TASKS / 2
    drawing.arrow([(left, 64), (left, 90), (third, 90), (third, 132)])
    drawing.label((left + third) / 2 + 8, 84, "post(forget)", "small", "middle")
    second = LEFT + ITERATION + TASKS + STEP + DELIVER / 2
    drawing.label(second, 220, "not read", "note", "middle")
    end = LEFT + 2 * ITERATION + TASKS
    drawing.cell(LEFT + TASKS, 272, end - LEFT - TASKS - 2, 32, CAT, "held: 2 blocks")
    drawing.cell(end, 272, STEP + DELIVER, 32, "free", "free")
    return drawing


def _strip(drawing: Drawing, left: float, y: float, one: _Iteration) -> None:
    """Draw an iteration without what it delivers."""
    drawing.cell(left, y, TASKS, 66, "teal" if one.tasks else "free", one.tasks[0] if one.tasks else "")
    drawing.box(left + TASKS + 2, y, STEP - 4, 66, "zone")
    drawing.label(left + TASKS + STEP / 2, y - 6, "step", "note", "middle")
    for row, (hue, name) in enumerate(one.step):
        drawing.cell(left + TASKS + 8, y + 8 + 26 * row, STEP - 16, 22, hue, name)
    drawing.cell(left + TASKS + STEP, y, DELIVER, 66, "teal", "deliver")


FIGURES: dict[str, Callable[[], Drawing]] = {
    "sequence": _sequence,
    "life": _life,
    "iterations": _iterations,
    "leaving": _leaving,
}
