"""The figure of a token's path from a prompt to an event, through the one thread that owns every array."""

from collections.abc import Callable
from typing import NamedTuple

from .drawing import Drawing

CALLER, ENGINE = 20, 340  # left edges of the two columns
STEP_X, STEP_WIDTH = 372, 436
CROSSING = (
    "Many threads and event loops may call.",
    "Only messages and events pass",
    "between the threads, never arrays.",
)


class Stage(NamedTuple):
    """A stage of a step: its name, its data, and the classes and functions that implement it."""

    name: str
    on: str
    style: str
    lines: tuple[str, ...]


STAGES = (
    Stage(
        "schedule",
        "integers",
        "blue",
        (
            "PageScheduler: admit by pages, adopt cached prefixes,",
            "share_budget; BlockTable.append_tokens;",
            "evict or preempt if blocks are short",
        ),
    ),
    Stage(
        "run",
        "arrays",
        "orange",
        (
            "KVPool.copy_blocks, pack_batch, then Model;",
            "PagedContext.attend in each layer: write, then read",
        ),
    ),
    Stage(
        "sample",
        "each row by itself",
        "violet",
        ("adjust_logits, sample_token: by the request's", "parameters, seed and output index"),
    ),
    Stage(
        "commit",
        "integers",
        "blue",
        (
            "append the token; finished sequences release their",
            "blocks; a beam search advances: its new beams are",
            "forks of the previous beams",
        ),
    ),
)


def draw() -> str:
    """Return the figure as SVG."""
    return drawing().svg()


def drawing() -> Drawing:
    """Return the figure."""
    figure = Drawing(
        860,
        760,
        "A token's path through tiny-llm",
        "The caller's thread turns a prompt into token ids and posts a task to the inbox. The engine's "
        "thread admits the request, then steps: schedule, run, sample, commit. A step's tokens become text "
        "and go through the outbox to the caller's listener.",
    )
    figure.box(CALLER, 16, 270, 728, "zone")
    figure.label(CALLER + 16, 42, "the caller's thread", "head")
    figure.box(ENGINE, 16, 500, 728, "zone")
    figure.label(ENGINE + 16, 42, "the engine's thread: owns every array", "head")
    _draw_request(figure)
    _draw_step(figure)
    _draw_answer(figure)
    return figure


def _draw_request(figure: Drawing) -> None:
    """Draw the path from the prompt to the waiting queue."""
    boxes = (
        (58, 59, ["prompt", "text, token ids or messages"]),
        (151, 59, ["Tokenizer, ChatTemplate", "encode to token ids"]),
        (244, 59, ["LLM, Engine", "check parameters and length"]),
    )
    for y, height, lines in boxes:
        figure.box(CALLER + 16, y, 238, height, "panel", lines)
    figure.arrow([(155, 117), (155, 149)])
    figure.arrow([(155, 210), (155, 242)])
    figure.box(STEP_X, 58, STEP_WIDTH, 59, "panel", ["EngineLoop", "run the inbox's tasks, then one step"])
    figure.box(
        STEP_X,
        151,
        STEP_WIDTH,
        59,
        "panel",
        ["BatchManager.add_request", "admission: reject a request that can never run"],
    )
    figure.arrow([(590, 117), (590, 149)])
    figure.arrow([(274, 273), (315, 273), (315, 87), (STEP_X - 2, 87)], dashed=True)
    figure.label(315, 290, "inbox", "small", "middle")
    for row, line in enumerate(CROSSING):
        figure.label(CALLER + 16, 470 + 18 * row, line, "small")


def _draw_step(figure: Drawing) -> None:
    """Draw the loop of `EngineCore.step`."""
    figure.arrow([(590, 210), (590, 242)])
    figure.label(600, 231, "waiting, then running", "small")
    figure.box(STEP_X - 16, 244, STEP_WIDTH + 32, 400, "panel")
    figure.label(STEP_X, 268, "EngineCore.step", "name")
    y = 282.0
    for stage in STAGES:
        height = 42 + 17 * len(stage.lines) - 8
        figure.box(STEP_X, y, STEP_WIDTH - 26, height, stage.style, [stage.name, *stage.lines])
        figure.label(STEP_X + STEP_WIDTH - 40, y + 23, stage.on, "small", "end")
        y += height + 14
        if stage is not STAGES[-1]:
            figure.arrow([(590, y - 14), (590, y - 2)])
    figure.arrow([(782, 582), (808, 582), (808, 324), (784, 324)])


def _draw_answer(figure: Drawing) -> None:
    """Draw the path from the step's tokens back to the caller."""
    figure.arrow([(590, 644), (590, 664)])
    figure.box(
        STEP_X,
        666,
        STEP_WIDTH,
        59,
        "panel",
        ["RequestState, Detokenizer", "tokens to text; stop strings end it"],
    )
    figure.box(CALLER + 16, 666, 238, 59, "panel", ["listener", "RequestEvent: text, usage"])
    figure.arrow([(STEP_X, 696), (276, 696)], dashed=True)
    figure.label(314, 688, "outbox", "small", "middle")


FIGURES: dict[str, Callable[[], Drawing]] = {"path": drawing}
