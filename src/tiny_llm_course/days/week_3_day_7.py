"""Day 3.7: what `pdm run try` shows."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from inspect import iscoroutine
from typing import Any

from .shared import STORY, Lines

TRY_SECONDS = 120  # a limit, because a wrong engine may leave its clients waiting
MAX_ITERATIONS = 20  # a limit, because a wrong loop may never finish


def show() -> Lines:
    """Five clients of an engine that runs two sequences at once: one overtakes, one is cancelled."""
    from tiny_llm.errors import EngineDeadError
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    llm = LLM(num_blocks=32, max_num_seqs=2, enable_prefix_caching=False)
    llm.generate(STORY, SamplingParams(max_tokens=2), use_tqdm=False)  # the first pass warms up
    watched = _Watched(llm.core, ("cat", "dog", "fox", "owl", "wolf"))
    yield "the real model, 2 sequences at once: five clients send a request at the same moment, the wolf"
    yield "last. It has priority -1, so it overtakes every request that still waits; the cat may run already."
    yield "The owl has priority 1. The cat's client cancels after reading 12 tokens"
    start = time.perf_counter()
    try:
        clients = asyncio.run(_five_clients(llm.engine, watched))
    except EngineDeadError as error:  # the cause says more
        raise error.__cause__ or error from None
    for name, events, first in clients:
        tokens, said = sum(len(event.token_ids) for event in events), "".join(event.text for event in events)
        yield (
            f"  {name:4} first token after {1000 * first:5.0f} ms, {tokens:2} tokens, "
            f"{events[-1].finish_reason:6}: ...{' '.join(said.split())[:40]}"
        )
    seconds, steps = time.perf_counter() - start, len(watched.steps)
    yield f"in all, {steps} steps and {seconds:.1f} s"
    yield from (f"  {name:4} {line.rstrip()}" for name, line in watched.lines())
    yield "  # running; . waiting; blank: not submitted yet, or ended"
    held, more = watched.after_the_cancel("cat")
    yield f"the cat held {held} blocks when it was cancelled; steps that computed it afterwards: {more}"
    yield f"the error for a request while the engine drains: {watched.refused}"


def show_a() -> Lines:
    """Run the loop's iterations by hand in this thread, without an `Engine`: tasks in, events out."""
    stepped = _Stepped(("cat", "dog", "fox"))
    yield "the real model, and the loop without its thread: each line is one `run_once`. The fox's tokens"
    yield "cannot be decoded, the cat is cancelled, and then the engine drains"
    yield "     tasks                    active afterwards delivered"
    for number, tasks in enumerate(stepped.tasks(), 1):
        delivered = stepped.run_once(list(tasks.values()))
        yield f"  {number:2} {', '.join(tasks):24} {', '.join(stepped.loop.active):17} {delivered}".rstrip()
    times = stepped.loop.step_times
    core, text = (1000 * sum(getattr(one, kind) for one in times) for kind in ("core", "text"))
    yield f"{len(times)} steps took {core:.0f} ms in the core, and {text:.1f} ms to decode the tokens to text"
    refused = "no refusal" if stepped.loop.refusal is None else str(stepped.loop.refusal())
    yield f"the drain is {'over' if stepped.drained.done() else 'not over'}; a new request: {refused}"


class _Stepped:
    """A loop without a thread, and a request for each name."""

    def __init__(self, names: tuple[str, ...]) -> None:
        from tiny_llm.admission_control import AdmissionControl
        from tiny_llm.engine_core import EngineCore
        from tiny_llm.engine_loop import EngineLoop
        from tiny_llm.inbox import Inbox
        from tiny_llm.loader import load_model
        from tiny_llm.output_processor import RequestState
        from tiny_llm.paged_batch import PagedBatchManager
        from tiny_llm.sampling_params import SamplingParams

        model, tokenizer = (loaded := load_model(None)).model, loaded.tokenizer
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        self.requests = {}
        for name in names:
            prompt = f"{STORY}, there was a {name}"
            self.requests[name] = RequestState(name, prompt, tokenizer.encode(prompt), tokenizer, params)
        self.drained: Future[None] = Future()
        self._inbox, self._heard = Inbox(), list[str]()
        self.loop = EngineLoop(self._inbox, AdmissionControl(None, len(names)))
        manager = PagedBatchManager(32, 16, len(names), model=model)
        self._make_core = partial(EngineCore, manager, model.config.eos_token_ids)

    def tasks(self) -> Iterator[dict[str, Callable[[], None]]]:
        """Yield the tasks to post before each iteration, by displayed name, until no request is active."""
        yield {
            "begin": partial(self.loop.begin, self._make_core),
            "add cat": self._adding("cat"),
            "add dog": self._adding("dog"),
        }
        self.requests["fox"].push = _without_text
        yield {"add fox": self._adding("fox")}
        yield {"cancel cat": partial(self.loop.cancel, ["cat"])}
        yield {"drain": partial(self.loop.drain, None, self.drained)}
        for _ in range(MAX_ITERATIONS):
            if self.loop.active:
                yield {}

    def run_once(self, tasks: list[Callable[[], None]]) -> str:
        """Post tasks, run an iteration, and return the delivered events as text. Raises a task's error."""
        self._heard.clear()
        posted = [self._inbox.post(task) for task in (*tasks, _nothing)]
        self.loop.run_once()
        for answer in posted:
            answer.result(0)
        return "; ".join(self._heard)

    def _adding(self, name: str) -> Callable[[], None]:
        return partial(self.loop.add, [self.requests[name]], partial(self._hear, name))

    def _hear(self, name: str, items: list[Any]) -> None:
        """A listener that notes the type of an error, or an event's text and finish_reason."""
        for item in items:
            if isinstance(item, Exception):
                self._heard.append(f"{name} {type(item).__name__}")
            else:
                ended = f" ({item.finish_reason})" if item.finish_reason else ""
                self._heard.append(f"{name} {item.text!r}{ended}")


def _nothing() -> None:
    """A task for each iteration, so that a wrong loop that waits for a task does not wait forever."""


def _without_text(output: Any) -> Any:
    raise ArithmeticError("the tokenizer failed")


class _Watched:
    """Records in a core's thread which requests run and which wait in each step."""

    def __init__(self, core: Any, names: tuple[str, ...]) -> None:
        self.names = names
        self.steps: list[dict[str, str]] = []
        self.blocks: dict[str, int] = {}
        self.asked_at = 0
        self.refused = ""
        self._core, self._step = core, core.step
        core.step = self._watch

    def _watch(self) -> Any:
        self.steps.append({})  # counts a step from its start
        outputs, manager = self._step(), self._core.manager
        marks = {one.request_id: "." for one in manager.waiting}
        marks |= {one.request_id: "#" for one in (*manager.running, *outputs)}
        self.blocks |= {one.request_id: len(one.table.blocks) for one in manager.running}
        self.steps[-1] = marks
        return outputs

    def lines(self) -> Iterator[tuple[str, str]]:
        """For each name, a line with a character for each step."""
        every = -(-len(self.steps) // 80)
        for name in self.names:
            yield name, "".join(marks.get(name, " ") for marks in self.steps[::every])

    def after_the_cancel(self, name: str) -> tuple[int, int]:
        """A cancelled request's blocks, and the number of steps after the cancel that still contained it."""
        return self.blocks[name], sum(name in marks for marks in self.steps[self.asked_at :])


async def _five_clients(engine: Any, watched: _Watched) -> list[tuple[str, list[Any], float]]:
    """Each client's name, events and seconds to its first token; drains the engine at the end."""
    from tiny_llm.errors import EngineStoppingError
    from tiny_llm.sampling_params import SamplingParams

    async def client(name: str, priority: int) -> tuple[str, list[Any], float]:
        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, priority=priority)
        events, first, start = list[Any](), 0.0, time.perf_counter()
        stream = engine.generate(f"{STORY}, there was a {name}", params, request_id=name)
        if iscoroutine(stream):  # a blank has no yield, so this is a coroutine; awaiting raises its message
            await stream
        async for event in stream:
            first = first or time.perf_counter() - start
            events.append(event)
            if name == "cat" and len(events) == 12:
                watched.asked_at = len(watched.steps)
                engine.cancel(name)
        return name, events, first

    async with asyncio.timeout(TRY_SECONDS):
        tasks = [
            asyncio.create_task(client(name, {"wolf": -1, "owl": 1}.get(name, 0))) for name in watched.names
        ]
        await tasks[-1]
        drain = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        try:
            await client("late", 0)
        except EngineStoppingError as error:
            watched.refused = str(error)
        await drain
        return await asyncio.gather(*tasks)
