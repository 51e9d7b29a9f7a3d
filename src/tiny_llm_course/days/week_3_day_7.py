"""Day 3.7: what `pdm run try` shows."""

import asyncio
import time
from collections.abc import Iterator
from inspect import iscoroutine
from typing import Any

from .shared import STORY, Lines

TRY_SECONDS = 120  # a guard: an engine that is not right yet may leave its clients waiting


def show() -> Lines:
    """Five clients of one engine that runs two sequences: which wait, which overtakes, which is cancelled."""
    from tiny_llm.errors import EngineDeadError
    from tiny_llm.llm import LLM
    from tiny_llm.sampling_params import SamplingParams

    llm = LLM(num_blocks=32, max_num_seqs=2, enable_prefix_caching=False)
    llm.generate(STORY, SamplingParams(max_tokens=2), use_tqdm=False)  # the first pass warms up
    watched = _Watched(llm.core, ("cat", "dog", "fox", "owl", "wolf"))
    yield "the real model, 2 sequences at once: five clients ask at the same moment, the wolf last. It has"
    yield "priority -1, so it overtakes all that wait; no request runs yet when all are queued. The owl has"
    yield "priority 1. The client of the cat cancels when it has read 12 tokens"
    start = time.perf_counter()
    try:
        clients = asyncio.run(_five_clients(llm.engine, watched))
    except EngineDeadError as error:  # what it has died of says more
        raise error.__cause__ or error from None
    for name, events, first in clients:
        tokens, said = sum(len(event.token_ids) for event in events), "".join(event.text for event in events)
        yield (
            f"  {name:4} first token after {1000 * first:5.0f} ms, {tokens:2} tokens, "
            f"{events[-1].finish_reason:6}: ...{' '.join(said.split())[:40]}"
        )
    seconds, steps = time.perf_counter() - start, len(watched.steps)
    yield f"all of it took {steps} steps, {seconds:.1f} s"
    yield from (f"  {name:4} {line.rstrip()}" for name, line in watched.lines())
    yield "  #: runs. .: waits"
    held, more = watched.after_the_cancel("cat")
    yield f"the cat held {held} blocks when it was cancelled; further steps that computed it: {more}"
    yield f"a client that comes while the engine drains: {watched.refused}"


class _Watched:
    """Which requests run and which wait in each step of a core, seen from within its thread."""

    def __init__(self, core: Any, names: tuple[str, ...]) -> None:
        self.names = names
        self.steps: list[dict[str, str]] = []
        self.blocks: dict[str, int] = {}
        self.asked_at = 0
        self.refused = ""
        self._core, self._step = core, core.step
        core.step = self._watch

    def _watch(self) -> Any:
        self.steps.append({})  # it has begun
        outputs, manager = self._step(), self._core.manager
        marks = {one.request_id: "." for one in manager.waiting}
        marks |= {one.request_id: "#" for one in (*manager.running, *outputs)}
        self.blocks |= {one.request_id: len(one.table.blocks) for one in manager.running}
        self.steps[-1] = marks
        return outputs

    def lines(self) -> Iterator[tuple[str, str]]:
        """A line of signs for each name."""
        every = -(-len(self.steps) // 80)
        for name in self.names:
            yield name, "".join(marks.get(name, " ") for marks in self.steps[::every])

    def after_the_cancel(self, name: str) -> tuple[int, int]:
        """How many blocks it had, and how many steps that began after it was cancelled computed it."""
        return self.blocks[name], sum(name in marks for marks in self.steps[self.asked_at :])


async def _five_clients(engine: Any, watched: _Watched) -> list[tuple[str, list[Any], float]]:
    """Each client's name, events and seconds to its first token; at the end the engine is drained."""
    from tiny_llm.errors import EngineStoppingError
    from tiny_llm.sampling_params import SamplingParams

    async def client(name: str, priority: int) -> tuple[str, list[Any], float]:
        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, priority=priority)
        events, first, start = list[Any](), 0.0, time.perf_counter()
        stream = engine.generate(f"{STORY}, there was a {name}", params, request_id=name)
        if iscoroutine(stream):  # without a yield it is no iterator yet, and says what is missing
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
