"""The engine's thread and its faces: whoever asks, in whatever thread, gets what the core alone gives.

Oracle: `EngineCore`, stepped by hand in this thread. `Held` cores let a test decide when a step begins.
"""

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.delivery import AsyncListener, Item, events_of
from tiny_llm.engine_core import EngineCore
from tiny_llm.kv_context import KVContext
from tiny_llm.model import Model

from promises import check_all_returned, policies
from tiny_llm import (
    DuplicateRequestError,
    Engine,
    EngineConfig,
    EngineDeadError,
    EngineStoppingError,
    PagedBatchManager,
    QueueFullError,
    RequestEvent,
    RequestFailedError,
    RequestTooLargeError,
    SamplingParams,
    SamplingParamsError,
    WrongThreadError,
)
from tiny_llm_checkpoints.gguf_tokenizer import byte_level_bpe
from tiny_llm_checkpoints.tokenizer import Detokenizer, Tokenizer
from tiny_model import EOS, VOCAB, random_prompt, tiny_model

SECONDS = 60  # a guard against hanging, not a speed that is asked for
BYTES = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
TOKENIZER = Tokenizer(byte_level_bpe(BYTES[:VOCAB], [], "smollm"))
POISON = 1  # a token that nobody else has, or ever gets
LONG = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)


class Said(NamedTuple):
    """What one completion was given."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str | None


def make_core(model: Model | None = None, blocks: int = 60) -> EngineCore:
    """Small enough for preemption, chunks and shared prefixes to happen in a crowd."""
    mx.eval([layer.self_attn.inv_freq for layer in tiny_model().layers])
    manager = PagedBatchManager(
        blocks, 4, 8, model=model or tiny_model(), max_batched_tokens=24, policies=policies(True, prefix=True)
    )
    return EngineCore(manager, (EOS,))


def make_engine(core: Callable[[], EngineCore] = make_core, **options: Any) -> Engine:
    mx.eval([layer.self_attn.inv_freq for layer in tiny_model().layers])  # evaluated arrays cross threads
    return Engine(core, TOKENIZER, VOCAB, EngineConfig(**{"max_num_seqs": 8, **options}))


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine that every test leaves without a request and without a page."""
    engine = make_engine()
    yield engine
    engine.stop()
    check_all_returned(engine.core.manager)


class Held:
    """Makes a core wait before each step until it is let: `step()` lets one, `let_go()` all."""

    def __init__(self, engine: Engine) -> None:
        self._permits, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self._free = False
        core, step = engine.core, engine.core.step

        def held() -> Any:
            self.begun.release()
            if not self._free:
                assert self._permits.acquire(timeout=SECONDS)
            return step()

        core.step = held  # type: ignore[method-assign]

    def wait(self) -> None:
        """Return when the core is about to take a step."""
        assert self.begun.acquire(timeout=SECONDS)

    def step(self) -> None:
        """Let one step happen."""
        self._permits.release()

    def let_go(self) -> None:
        """Hold nobody any more."""
        self._free = True
        self._permits.release()


@pytest.fixture
def held(engine: Engine) -> Iterator[Held]:
    held = Held(engine)
    yield held
    held.let_go()


def crowd(size: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that partly begin alike, of many lengths, with parameters of every kind."""
    draw, common = random.Random(seed), random_prompt(13, seed)
    kinds = (
        {"temperature": 0.0},
        {"n": 2, "seed": 5},
        {"seed": 6, "logprobs": 0},
        {"seed": 7, "top_k": 9, "logprobs": 2},
        {"temperature": 0.0, "stop": [TOKENIZER.decode([50]), TOKENIZER.decode([60])]},
    )
    return [
        (
            common[: draw.randrange(14)] + random_prompt(draw.randint(1, 30), 100 * seed + i),
            SamplingParams(max_tokens=draw.randint(1, 20), **kinds[i % len(kinds)]),  # type: ignore[arg-type]
        )
        for i in range(size)
    ]


def by_core(prompt: list[int], params: SamplingParams) -> list[Said]:
    """The oracle: a core of its own, stepped here; stop strings are looked for in the text of all tokens."""
    core = make_core()
    core.add_request("alone", prompt, params)
    given: dict[str, list[Any]] = {}
    reasons: dict[str, str | None] = {}
    while core.has_work:
        for output in core.step():
            if output.seq_id in reasons:
                continue
            given.setdefault(output.seq_id, []).append(output)
            text = TOKENIZER.decode([one.token for one in given[output.seq_id]])
            reason = "stop" if any(stop in text for stop in params.stop_strings) else output.finish_reason
            if reason is not None:
                reasons[output.seq_id] = reason
    return [
        Said(
            tuple(one.token for one in given[seq_id]),
            tuple(one.logprobs.logprob for one in given[seq_id] if one.logprobs is not None),
            reasons[seq_id],
        )
        for seq_id in sorted(given)
    ]


def said(events: list[RequestEvent]) -> list[Said]:
    """What each completion was given."""
    found = []
    for index in range(1 + max(event.index for event in events)):
        own = [event for event in events if event.index == index]
        logprobs = [
            entry[token].logprob
            for event in own
            for token, entry in zip(event.token_ids, event.logprobs or (), strict=False)
        ]
        tokens = tuple(token for event in own for token in event.token_ids)
        found.append(Said(tokens, tuple(logprobs), own[-1].finish_reason))
    return found


async def heard(
    engine: Engine, prompt: Any, params: SamplingParams | None = None, **more: Any
) -> list[RequestEvent]:
    return [event async for event in engine.generate(prompt, params, **more)]


def hear(engine: Engine, prompt: Any, params: SamplingParams = LONG) -> list[RequestEvent]:
    """The same for a thread."""
    request, deliveries = engine.request(prompt, params), SimpleQueue[list[Item]]()
    engine.submit([request], deliveries.put).result(SECONDS)
    heard = []
    while not heard or heard[-1].usage is None:
        heard += events_of(deliveries.get(timeout=SECONDS))
    return heard


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in an event loop of its own; nothing may hang."""

    async def guarded() -> Any:
        async with asyncio.timeout(SECONDS):
            return await main

    return asyncio.run(guarded())


async def begun(engine: Engine, held: Held, **more: Any) -> tuple[Any, RequestEvent]:
    """A request that has given its first event; the next step has begun, and is held."""
    events = engine.generate(random_prompt(5, 1), LONG, **more)
    first = asyncio.create_task(anext(events))  # type: ignore[arg-type]
    await asyncio.to_thread(held.wait)
    held.step()
    await asyncio.to_thread(held.wait)
    return events, await first


# ---- what comes out ----


def test_fifty_clients_at_once_get_what_each_gets_alone(engine: Engine) -> None:
    requests = crowd(50, seed=1)

    async def main() -> list[list[RequestEvent]]:
        return await asyncio.gather(*(heard(engine, prompt, params) for prompt, params in requests))

    for (prompt, params), events in zip(requests, run(main()), strict=True):
        assert said(events) == by_core(prompt, params)
        assert [event.usage is not None for event in events] == [False] * (len(events) - 1) + [True]


def test_the_texts_of_the_events_add_up_to_the_text_of_the_tokens(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    events = run(heard(engine, "abc", params))
    tokens = [token for event in events for token in event.token_ids]
    assert len(tokens) == 20
    assert "".join(event.text for event in events) == TOKENIZER.decode(tokens)


def test_a_stop_string_ends_its_completion_before_the_next_step(engine: Engine, held: Held) -> None:
    """Oracle: the text of the tokens that come without it."""
    free = by_core([20, 21], LONG)[0].tokens
    stop = TOKENIZER.decode(list(free[2:4]))
    assert TOKENIZER.decode(list(free[:4])).find(stop) == 2
    deliveries: SimpleQueue[list[Item]] = SimpleQueue()
    params = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True, stop=stop)
    request = engine.request([20, 21], params)
    engine.submit([request], deliveries.put).result(SECONDS)
    for _ in range(4):
        held.wait()
        held.step()
    while not request.finished:
        deliveries.get(timeout=SECONDS)
    engine.call(lambda: check_all_returned(engine.core.manager))
    [completion] = request.output.outputs
    assert (completion.token_ids, completion.stop_reason) == (free[:4], stop)
    assert completion.text + stop == TOKENIZER.decode(list(free[:4]))


def test_the_last_event_has_what_the_request_took(engine: Engine) -> None:
    prompt, params = random_prompt(13, 3), SamplingParams(n=2, max_tokens=5, seed=1, ignore_eos=True)
    first, second = (run(heard(engine, prompt, params))[-1].usage for _ in range(2))
    assert (first.prompt_tokens, first.completion_tokens, first.num_cached_tokens) == (13, 10, 0)
    assert second.num_cached_tokens == 12, "all but the last token, which must give logits"
    assert first.metrics.arrival <= first.metrics.first_token <= first.metrics.finished


def test_prompt_logprobs_come_once_with_the_first_event(engine: Engine) -> None:
    params = SamplingParams(n=2, seed=1, max_tokens=3, prompt_logprobs=0, ignore_eos=True)
    events = run(heard(engine, [20, 21, 22], params))
    assert [event.prompt_logprobs is not None for event in events] == [True] + [False] * 5
    assert [entry and list(entry) for entry in events[0].prompt_logprobs] == [None, [21], [22]]


def test_a_listener_gets_all_that_a_step_has_for_its_requests_at_once(engine: Engine) -> None:
    deliveries: SimpleQueue[list[Item]] = SimpleQueue()
    params = SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True)
    requests = [engine.request(random_prompt(4, seed), params) for seed in (1, 2)]
    engine.submit(requests, deliveries.put).result(SECONDS)
    steps = [deliveries.get(timeout=SECONDS) for _ in range(4)]
    assert [len(step) for step in steps] == [6] * 4
    assert deliveries.empty()


def test_a_beam_search_ends_with_one_event(engine: Engine) -> None:
    """Oracle: the core's own search."""
    prompt, params = random_prompt(9, 1), BeamSearchParams(beam_width=3, max_tokens=6)
    core = make_core()
    expected = core.add_beam_search("alone", prompt, params)
    while expected.beams:
        core.step()
    deliveries: SimpleQueue[list[Item]] = SimpleQueue()
    search = engine.search(prompt, params)
    engine.submit([search], deliveries.put).result(SECONDS)
    [event] = deliveries.get(timeout=SECONDS)
    assert isinstance(event, RequestEvent)
    assert event.usage is not None
    assert [one.tokens[9:] for one in search.output.sequences] == [
        ended.hypothesis.tokens for ended in expected.ended
    ]


# ---- leaving and cancelling ----


def test_requests_cancelled_at_random_moments_leave_the_others_alone(engine: Engine) -> None:
    requests, draw = crowd(40, seed=2), random.Random(3)

    async def client(number: int) -> list[RequestEvent] | None:
        prompt, params = requests[number]
        if number % 2:
            return await heard(engine, prompt, params)
        async with aclosing(engine.generate(prompt, params)) as events:
            for _ in range(draw.randrange(6)):
                await anext(events, None)
            return None

    async def main() -> list[list[RequestEvent] | None]:
        return await asyncio.gather(*(client(number) for number in range(len(requests))))

    for (prompt, params), events in zip(requests, run(main()), strict=True):
        assert events is None or said(events) == by_core(prompt, params)
    engine.call(lambda: check_all_returned(engine.core.manager))


async def _break(events: AsyncGenerator[RequestEvent, None], go: asyncio.Event) -> None:
    async for _ in events:
        await go.wait()
        break


async def _close(events: AsyncGenerator[RequestEvent, None], go: asyncio.Event) -> None:
    await anext(events)
    await go.wait()
    await events.aclose()


async def _raise(events: AsyncGenerator[RequestEvent, None], go: asyncio.Event) -> None:
    with suppress(ZeroDivisionError):
        async for _ in events:
            await go.wait()
            raise ZeroDivisionError


async def _be_cancelled(events: AsyncGenerator[RequestEvent, None], go: asyncio.Event) -> None:
    task = asyncio.create_task(anext(events))  # type: ignore[arg-type]
    await task
    task = asyncio.create_task(anext(events))  # type: ignore[arg-type]
    await go.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [_break, _close, _raise, _be_cancelled])
def test_who_leaves_is_cancelled_before_the_next_step(
    engine: Engine, held: Held, leave: Callable[..., Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        go = asyncio.Event()
        leaving = asyncio.create_task(leave(engine.generate(random_prompt(5, 1), LONG), go))
        await asyncio.to_thread(held.wait)
        held.step()
        await asyncio.to_thread(held.wait)  # the first event is out, and the second step has begun
        go.set()
        await leaving
        for _ in range(10):  # an iterator that was dropped is closed by the event loop
            await asyncio.sleep(0)
        held.step()
        await asyncio.to_thread(engine.call, lambda: check_all_returned(engine.core.manager))

    run(main())
    assert not held.begun.acquire(blocking=False), "a step was taken for somebody who had left"


def test_who_leaves_while_the_engine_is_busy_was_never_there(engine: Engine, held: Held) -> None:
    async def main() -> None:
        first = asyncio.create_task(heard(engine, [20, 21], LONG))
        await asyncio.to_thread(held.wait)
        second = asyncio.create_task(heard(engine, [22, 23], LONG, request_id="second"))
        await asyncio.sleep(0.01)
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        held.let_go()
        await asyncio.to_thread(engine.call, lambda: check_all_returned(engine.core.manager))

    run(main())


def test_an_iterator_that_is_never_begun_asks_for_nothing(engine: Engine) -> None:
    async def main() -> None:
        engine.generate([20], LONG)
        await asyncio.sleep(0)

    run(main())
    assert engine.call(lambda: engine.core.has_work) is False


def test_a_cancelled_request_ends_with_abort_and_its_pages_are_back(engine: Engine, held: Held) -> None:
    async def main() -> list[RequestEvent]:
        events, first = await begun(engine, held, request_id="mine")
        cancelled = engine.cancel("mine")
        held.step()
        await asyncio.wrap_future(cancelled)
        assert engine.stats.num_running == 0
        return [first] + [event async for event in events]

    events = run(main())
    assert [event.finish_reason for event in events] == [None, None, "abort"]
    assert events[-1].usage.completion_tokens == 2
    engine.cancel("nobody").result(SECONDS)


def test_forgetting_a_request_spares_the_next_one_of_that_name(engine: Engine) -> None:
    deliveries: SimpleQueue[list[Item]] = SimpleQueue()
    old, new = (engine.request([20, 21], LONG, request_id="name") for _ in range(2))
    engine.submit([old], deliveries.put).result(SECONDS)
    engine.forget([old])
    engine.submit([new], deliveries.put).result(SECONDS)
    engine.forget([old])
    while not new.finished:
        deliveries.get(timeout=SECONDS)
    assert new.output.outputs[0].finish_reason == "length"


def test_nobody_waits_for_a_slow_reader_and_it_misses_nothing(engine: Engine) -> None:
    async def main() -> tuple[list[RequestEvent], list[RequestEvent]]:
        slow = engine.generate(random_prompt(5, 1), LONG)
        first = await anext(slow)
        quick = await heard(engine, [30, 31], LONG)
        return [first] + [event async for event in slow], quick

    slow, quick = run(main())
    assert said(slow) == by_core(random_prompt(5, 1), LONG)
    assert said(quick) == by_core([30, 31], LONG)


def test_a_listener_that_raises_loses_its_requests_and_nobody_else(engine: Engine) -> None:
    def broken(items: list[Item]) -> None:
        raise OSError("gone")

    deliveries: SimpleQueue[list[Item]] = SimpleQueue()
    lost, kept = engine.request([20, 21], LONG), engine.request([22, 23], LONG)
    engine.submit([lost], broken).result(SECONDS)
    engine.submit([kept], deliveries.put).result(SECONDS)
    while not kept.finished:
        deliveries.get(timeout=SECONDS)
    assert lost.output.outputs[0].finish_reason == "abort"
    assert len(lost.output.outputs[0].token_ids) == 1


def test_the_requests_of_a_closed_event_loop_are_cancelled(engine: Engine) -> None:
    async def listener() -> AsyncListener:
        return AsyncListener()

    request = engine.request([20, 21], LONG)
    engine.submit([request], run(listener())).result(SECONDS)
    while not request.finished:
        time.sleep(0.001)
    assert request.output.outputs[0].finish_reason == "abort"


# ---- the door ----


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], {}, ValueError, "no tokens"),
        ([VOCAB], {}, ValueError, f"token id {VOCAB} is outside the vocabulary"),
        ([-1], {}, ValueError, "token id -1"),
        ("\ud800", {}, ValueError, "lone surrogate"),
        ([20], {"stop_token_ids": [999]}, SamplingParamsError, "^stop_token_ids must be in the .*, not 999"),
        ([20], {"logit_bias": {999: 1.0}}, SamplingParamsError, "^logit_bias must be in the .*, not 999"),
        ([20], {"n": 9}, RequestTooLargeError, "n = 9"),
        ([20] * 100, {"max_tokens": 100}, RequestTooLargeError, "exceed the context of 128"),
    ],
)
def test_what_cannot_run_is_refused_to_whoever_asks(
    engine: Engine, prompt: Any, params: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(heard(engine, prompt, SamplingParams(**params)))
    with pytest.raises(error, match=message):
        engine.submit([engine.request(prompt, SamplingParams(**params))], print).result(SECONDS)


def test_an_id_in_use_is_refused_and_its_owner_goes_on(engine: Engine, held: Held) -> None:
    async def main() -> None:
        events, first = await begun(engine, held, request_id="mine")
        second = asyncio.create_task(heard(engine, [20], LONG, request_id="mine"))
        await asyncio.sleep(0.01)
        held.let_go()
        with pytest.raises(DuplicateRequestError, match="'mine'"):
            await second
        assert said([first] + [event async for event in events]) == by_core(random_prompt(5, 1), LONG)
        await heard(engine, [20], SamplingParams(max_tokens=1), request_id="mine")

    run(main())


def test_requests_are_submitted_together_or_not_at_all(engine: Engine) -> None:
    deliveries: SimpleQueue[list[Item]] = SimpleQueue()
    requests = [engine.request([20] * length, LONG) for length in (1, 0, 1)]
    with pytest.raises(ValueError, match="no tokens"):
        engine.submit(requests, deliveries.put).result(SECONDS)
    engine.call(lambda: check_all_returned(engine.core.manager))
    assert deliveries.empty()


def test_a_full_queue_refuses_at_once_with_the_figures() -> None:
    engine = make_engine(max_num_seqs=2, max_num_waiting=3)
    held = Held(engine)
    params = SamplingParams(max_tokens=2, n=2, ignore_eos=True)

    async def main() -> None:
        running = asyncio.create_task(heard(engine, [20], params))
        await asyncio.to_thread(held.wait)
        held.step()
        await asyncio.to_thread(held.wait)  # it has both seats
        waiting = [asyncio.create_task(heard(engine, [20 + i], params)) for i in range(3)]
        await asyncio.sleep(0.01)
        before = time.monotonic()
        with pytest.raises(QueueFullError, match="3 requests wait and 3 may"):
            await heard(engine, [20], params)
        assert time.monotonic() - before < SECONDS / 2, "it waited for the step"
        held.let_go()
        await asyncio.gather(running, *waiting)
        await heard(engine, [20], params)

    run(main())
    engine.stop()


def test_a_request_does_not_wait_while_seats_are_free() -> None:
    engine = make_engine(max_num_seqs=3, max_num_waiting=1)
    held, params = Held(engine), SamplingParams(max_tokens=1)

    def submit(number: int) -> Future[None]:
        return engine.submit([engine.request([20], params) for _ in range(number)], lambda items: None)

    with pytest.raises(QueueFullError, match="no room for 5 more"):
        submit(5)
    submit(1)
    held.wait()
    submit(3)  # three seats, and one waits; none of them has been served yet
    with pytest.raises(QueueFullError, match="1 requests wait and 1 may"):
        submit(1)
    held.let_go()
    engine.start_draining().result(SECONDS)
    engine.stop()


def test_free_seats_are_no_use_while_pages_are_short() -> None:
    engine = make_engine(lambda: make_core(blocks=6), max_num_waiting=1)
    held, params = Held(engine), SamplingParams(max_tokens=7, ignore_eos=True)

    def submit(seed: int) -> Future[None]:
        return engine.submit([engine.request(random_prompt(16, seed), params)], lambda items: None)

    submit(1).result(SECONDS)  # 16 tokens each, where 24 fit
    held.wait()
    second = submit(2)  # while a step is held: it is queued before the next one
    for _ in range(2):
        held.step()
        held.wait()
    second.result(SECONDS)
    assert (engine.stats.num_running, engine.stats.num_waiting) == (1, 1)
    with pytest.raises(QueueFullError, match="1 requests wait and 1 may"):
        engine.submit([engine.request([20], params)], print)
    held.let_go()
    engine.start_draining().result(SECONDS)
    engine.stop()


def test_requests_that_were_refused_or_cancelled_do_not_wait() -> None:
    engine = make_engine(max_num_seqs=1, max_num_waiting=2)
    for _ in range(9):
        with pytest.raises(ValueError, match="no tokens"):
            engine.submit([engine.request([])], print).result(SECONDS)
    for _ in range(3):
        requests = [engine.request([20], LONG) for _ in range(3)]
        engine.submit(requests, lambda items: None).result(SECONDS)
        engine.forget(requests)
    assert said(hear(engine, [20])) == by_core([20], LONG)
    engine.stop()


# ---- faults ----


class Poisoned:
    """The tiny model, which fails in any pass that has one token in it."""

    def __init__(self) -> None:
        self.config = tiny_model().config

    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        if POISON in tokens[0].tolist():
            raise ArithmeticError("poison")
        return tiny_model()(tokens, context)


def test_a_request_that_fails_fails_alone() -> None:
    engine = make_engine(lambda: make_core(Poisoned()))  # type: ignore[arg-type]
    requests = crowd(12, seed=4)
    requests[5] = ([*random_prompt(6, 1), POISON], LONG)

    async def main() -> list[Any]:
        clients = (heard(engine, *request, request_id=f"c{i}") for i, request in enumerate(requests))
        return await asyncio.gather(*clients, return_exceptions=True)

    outcomes = run(main())
    failed = outcomes.pop(5)
    assert isinstance(failed, RequestFailedError)
    assert (failed.request_id, type(failed.__cause__)) == ("c5", ArithmeticError)
    del requests[5]
    for (prompt, params), events in zip(requests, outcomes, strict=True):
        assert said(events) == by_core(prompt, params)
    engine.stop()
    check_all_returned(engine.core.manager)


def test_a_text_that_cannot_be_made_fails_its_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, broken = Detokenizer.push, []

    def raising(self: Detokenizer, token_id: int) -> str:
        if self in broken:
            raise ArithmeticError("no text")
        return push(self, token_id)

    monkeypatch.setattr(Detokenizer, "push", raising)
    deliveries: SimpleQueue[list[Item]] = SimpleQueue()
    short = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    bad, good = engine.request([20, 21], LONG), engine.request([20, 21], short)
    broken.extend(completion._detokenizer for completion in bad._completions.values())
    engine.submit([bad, good], deliveries.put).result(SECONDS)
    items = deliveries.get(timeout=SECONDS)
    [error] = [item for item in items if isinstance(item, RequestFailedError)]
    assert (error.request_id, type(error.__cause__)) == (bad.request_id, ArithmeticError)
    while not good.finished:
        deliveries.get(timeout=SECONDS)
    assert good.output.outputs[0].token_ids == by_core([20, 21], short)[0].tokens
    engine.call(lambda: check_all_returned(engine.core.manager))


def test_when_the_engine_dies_everybody_hears_of_it() -> None:
    engine, begun, die = make_engine(), threading.Event(), threading.Event()

    def dying() -> Any:
        begun.set()
        assert die.wait(SECONDS)
        raise SystemError("unforeseen")

    engine.core.step = dying  # type: ignore[method-assign]

    async def main() -> None:
        first = asyncio.create_task(heard(engine, [20], LONG))
        await asyncio.to_thread(begun.wait, SECONDS)
        waiting = [first, asyncio.create_task(heard(engine, [21], LONG)), asyncio.create_task(engine.drain())]
        called = asyncio.create_task(asyncio.to_thread(engine.call, lambda: None))
        await asyncio.sleep(0.02)
        die.set()
        outcomes = await asyncio.gather(*waiting, called, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineDeadError] * 4
        assert {type(outcome.__cause__) for outcome in outcomes} == {SystemError}
        with pytest.raises(EngineDeadError, match="SystemError: unforeseen"):
            await heard(engine, [20], LONG)
        with pytest.raises(EngineDeadError):
            await engine.drain()

    run(main())
    with pytest.raises(EngineDeadError):
        engine.call(lambda: None)
    with pytest.raises(EngineDeadError):
        engine.cancel("a").result(SECONDS)
    assert isinstance(engine.refusal, EngineDeadError)
    engine.stop()


def test_a_core_that_cannot_be_made_is_told_to_the_maker() -> None:
    def broken() -> EngineCore:
        raise MemoryError("no room")

    others = set(threading.enumerate())  # an engine of an earlier test may not be collected yet
    with pytest.raises(MemoryError, match="no room"):
        make_engine(broken)
    for thread in set(threading.enumerate()) - others:
        thread.join(SECONDS)
        assert not thread.is_alive()


# ---- the end ----


def test_draining_serves_who_is_there_and_refuses_who_comes(engine: Engine, held: Held) -> None:
    async def main() -> list[RequestEvent]:
        client = asyncio.create_task(heard(engine, [20, 21], LONG))
        await asyncio.to_thread(held.wait)
        drains = [asyncio.create_task(engine.drain()) for _ in range(2)]
        await asyncio.sleep(0.01)
        held.step()
        await asyncio.to_thread(held.wait)
        with pytest.raises(EngineStoppingError, match="draining"):
            await heard(engine, [20], LONG)
        assert not any(drain.done() for drain in drains)
        held.let_go()
        await asyncio.gather(*drains)
        assert engine.stats.num_running == 0
        await engine.drain()
        return await client

    assert said(run(main())) == by_core([20, 21], LONG)
    engine.start_draining().result(SECONDS)
    assert isinstance(engine.refusal, EngineStoppingError)


def test_a_drain_cancels_those_who_take_too_long(engine: Engine, held: Held) -> None:
    async def main() -> list[RequestEvent]:
        client = asyncio.create_task(heard(engine, [20, 21], LONG))
        await asyncio.to_thread(held.wait)
        drain = asyncio.create_task(engine.drain(1.5))
        await asyncio.sleep(0.01)
        held.step()
        await asyncio.to_thread(held.wait)
        await asyncio.sleep(1.6)
        held.step()
        await drain
        return await client

    events = run(main())
    assert (events[-1].finish_reason, events[-1].usage.completion_tokens) == ("abort", 2)


def test_a_drain_that_nobody_waits_for_any_more_goes_on(engine: Engine, held: Held) -> None:
    async def main() -> None:
        client = asyncio.create_task(heard(engine, [20, 21], SamplingParams(max_tokens=3, ignore_eos=True)))
        await asyncio.to_thread(held.wait)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.drain(), 0.01)
        held.let_go()
        assert len(await client) == 3
        await engine.drain()

    run(main())


def test_stopping_cancels_and_refuses(engine: Engine, held: Held) -> None:
    async def main() -> list[RequestEvent]:
        events, first = await begun(engine, held)
        stops = [asyncio.create_task(asyncio.to_thread(engine.stop)) for _ in range(2)]
        while engine.refusal is None:
            await asyncio.sleep(0.01)
            held.step()
        await asyncio.gather(*stops)
        with pytest.raises(EngineStoppingError, match="stopped"):
            await heard(engine, [20], LONG)
        await engine.drain()
        return [first] + [event async for event in events]

    assert run(main())[-1].finish_reason == "abort"
    with pytest.raises(EngineStoppingError):
        engine.submit([engine.request([20])], print)
    with pytest.raises(EngineStoppingError):
        engine.call(int)
    assert not engine._thread.is_alive()


def test_a_block_ends_with_the_engine() -> None:
    async def main() -> Engine:
        async with make_engine() as engine:
            await anext(engine.generate([20, 21], LONG))
        return engine

    engine = run(main())
    assert not engine._thread.is_alive()
    check_all_returned(engine.core.manager)


def test_a_forgotten_engine_frees_its_arrays_and_ends_its_thread() -> None:
    def live_bytes() -> int:
        gc.collect()
        return mx.get_active_memory()

    make_core()
    before = live_bytes()
    engine = make_engine(lambda: make_core(Poisoned(), blocks=4000))  # type: ignore[arg-type]
    size = engine.core.manager.capacity.nbytes
    assert size > 10**6
    assert live_bytes() > before + 0.9 * size
    run(heard(engine, [20, 21], LONG))
    gc.collect()  # asyncio's own cycles
    with pytest.raises(RequestTooLargeError):
        engine.submit([engine.request([20] * 999, LONG)], print).result(SECONDS)
    with pytest.raises(RequestFailedError):
        hear(engine, [20, POISON])
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0)
    engine.call(int)  # by now its thread has let go of the error, and of whoever was told
    thread, gone = engine._thread, weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert gone() is None, "something holds it"
        assert not thread.is_alive()
        assert mx.get_active_memory() < before + size // 100
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["return", "sys.exit(3)", "raise KeyboardInterrupt"])
def test_a_program_may_end_while_a_request_runs(how: str) -> None:
    """A thread that the interpreter cuts off in the middle of a step would abort the process."""
    program = f"""
import sys
from test_engine import LONG, make_engine
def main():
    engine = make_engine()
    engine.submit([engine.request([20 + i], LONG) for i in range(20)], lambda items: None).result()
    while not engine.stats.num_running: pass
    {how}
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    codes = {"return": 0, "sys.exit(3)": 3, "raise KeyboardInterrupt": -2}
    assert ended.returncode == codes[how], ended.stderr.decode()
    assert ended.stdout == b""
    assert how.startswith("raise") or ended.stderr == b""


# ---- threads ----


def test_two_event_loops_share_one_engine(engine: Engine) -> None:
    requests = crowd(12, seed=5)

    def client(part: int) -> list[list[RequestEvent]]:
        async def main() -> list[list[RequestEvent]]:
            return await asyncio.gather(*(heard(engine, *request) for request in requests[part::2]))

        return run(main())

    with ThreadPoolExecutor(2) as pool:
        for part, answers in enumerate(pool.map(client, range(2))):
            expected = [by_core(*request) for request in requests[part::2]]
            assert [said(events) for events in answers] == expected


def test_everything_that_touches_an_array_runs_in_one_thread(engine: Engine) -> None:
    threads = set()
    manager, model = engine.core.manager, engine.core.manager._model

    def watched(*args: Any) -> mx.array:
        threads.add(threading.current_thread())
        return model(*args)

    watched.config = model.config  # type: ignore[attr-defined]
    manager._model = watched
    run(heard(engine, [20, 21], LONG))
    manager._model = model
    assert threads == {engine.call(threading.current_thread)}
    assert threading.main_thread() not in threads


def test_a_function_runs_between_two_steps_and_gives_its_value_or_its_error(engine: Engine) -> None:
    assert engine.call(lambda: engine.call(threading.current_thread)).name == "tiny-llm-engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0)
    assert len(run(heard(engine, [20], SamplingParams(max_tokens=3, ignore_eos=True)))) == 3


def test_whoever_asks_how_full_it_is_never_waits_for_a_step(engine: Engine, held: Held) -> None:
    requests = [engine.request([20], LONG), engine.request([21], LONG)]
    engine.submit(requests, lambda items: None).result(SECONDS)
    held.wait()
    assert (engine.stats.num_running, engine.stats.num_waiting, engine.step_times) == (0, 2, ())
    held.step()
    held.wait()
    assert (engine.stats.num_running, engine.stats.num_waiting) == (2, 0)
    [times] = engine.step_times
    assert times.core > 0
    assert times.text > 0


def test_a_core_that_is_stepped_by_hand_is_left_alone(engine: Engine) -> None:
    core = engine.core
    engine.call(lambda: core.add_request("by hand", [20, 21], LONG))
    assert len(engine.call(core.step)) == 1
    time.sleep(0.02)
    assert engine.call(lambda: len(core.manager.sequence("by hand").outputs)) == 1
    engine.call(lambda: core.cancel("by hand"))


def test_an_idle_engine_takes_no_time(engine: Engine) -> None:
    run(heard(engine, [20], LONG))
    clock = time.pthread_getcpuclockid(engine._thread.ident)
    before = time.clock_gettime(clock)
    time.sleep(0.3)
    assert time.clock_gettime(clock) - before < 0.01


def test_a_future_that_nobody_waits_for_any_more_does_no_harm(engine: Engine, held: Held) -> None:
    engine.submit([engine.request([20], LONG)], lambda items: None).result(SECONDS)
    held.wait()
    posted: list[Future[Any]] = [engine.cancel("a"), engine.start_draining()]
    assert all(future.cancel() for future in posted)
    held.let_go()
    engine.stop()


# ---- hostile callers ----


class Fatal(BaseException):
    """Like a panic of a library in Rust: no `Exception`."""


class Mute(Exception):
    """An error that cannot be told."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Listening:
    """Keeps what it hears, and is like every other in every other way."""

    def __init__(self) -> None:
        self.heard: list[Item] = []
        self.ended = threading.Event()

    def __call__(self, items: list[Item]) -> None:
        self.heard += items
        if any(isinstance(item, Exception) or item.usage is not None for item in items):
            self.ended.set()


class Equal(Listening):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


class Unhashable(Listening):
    __hash__ = None  # type: ignore[assignment]


class Hostile(Listening):
    def _refuse(self, *_: object) -> Any:
        raise Fatal

    __eq__ = __hash__ = __bool__ = __len__ = __repr__ = _refuse  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Listening, Equal, Unhashable, Hostile])
def test_every_listener_gets_its_own_whatever_it_is_equal_to(engine: Engine, kind: type[Listening]) -> None:
    listeners = [kind() for _ in range(3)]
    requests = [engine.request([20 + place], LONG) for place in range(3)]
    for request, listener in zip(requests, listeners, strict=True):
        engine.submit([request], listener).result(SECONDS)
    for request, listener in zip(requests, listeners, strict=True):
        assert listener.ended.wait(SECONDS)
        events = events_of(listener.heard)
        assert {event.request_id for event in events} == {request.request_id}
        assert said(events) == by_core(list(request.prompt_token_ids), LONG)


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), Fatal(), Mute()]
)
def test_a_listener_or_watcher_that_raises_anything_hurts_only_itself(
    engine: Engine, held: Held, error: BaseException
) -> None:
    def raising(_: object) -> None:
        raise error

    calls: list[object] = []

    def watching(change: object) -> None:
        calls.append(change)
        if len(calls) > 1:
            raise error

    engine.submit([engine.request([20], LONG)], raising).result(SECONDS)
    held.let_go()
    engine.watch_blocks(watching)
    good = said(hear(engine, [21]))
    engine.call(lambda: check_all_returned(engine.core.manager))
    with pytest.raises(type(error)):
        engine.call(lambda: raising(None))
    with pytest.raises(type(error)):
        engine.watch_blocks(raising)
    assert good == said(hear(engine, [21])) == by_core([21], LONG)
    assert len(calls) == 2


def test_a_watcher_that_watches_twice_is_told_twice_until_each_ends(engine: Engine) -> None:
    heard: list[object] = []
    first, second = (engine.watch_blocks(heard.append) for _ in range(2))
    heard.clear()
    first().result(SECONDS)
    hear(engine, [20])
    assert heard
    second().result(SECONDS)
    heard.clear()
    hear(engine, [20])
    assert not heard


def test_what_a_callback_of_a_future_raises_or_sets_hurts_nobody(engine: Engine, held: Held) -> None:
    def raising(_: object) -> None:
        raise Fatal

    engine.submit([engine.request([20], LONG)], lambda items: None).result(SECONDS)
    held.wait()
    for future in (engine.cancel("x"), engine.start_draining(), engine._inbox.post(int)):
        future.add_done_callback(raising)
    own = engine._inbox.post(int)
    own.set_result(5)
    held.let_go()
    engine.stop()
    assert not isinstance(engine.refusal, EngineDeadError)


@pytest.mark.parametrize("error", [Fatal(), Mute(), SystemExit(3)])
def test_a_step_that_raises_anything_fails_only_its_request(error: BaseException) -> None:
    class Panicking(Poisoned):
        def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
            if POISON in tokens[0].tolist():
                raise error
            return super().__call__(tokens, context)

    engine = make_engine(lambda: make_core(Panicking()))  # type: ignore[arg-type]
    good = Listening()
    engine.submit([engine.request([21], LONG)], good).result(SECONDS)
    with pytest.raises(RequestFailedError) as failed:
        hear(engine, [20, POISON])
    assert failed.value.__cause__ is error
    assert good.ended.wait(SECONDS)
    assert said(events_of(good.heard)) == by_core([21], LONG)
    engine.stop()
    check_all_returned(engine.core.manager)


# ---- one completion of several ----


def broken_after(monkeypatch: pytest.MonkeyPatch, error: BaseException, num_tokens: int) -> list[Detokenizer]:
    """Detokenizers that raise when they are given one token more than so many: those in the list."""
    push, broken, pushed = Detokenizer.push, list[Detokenizer](), dict[int, int]()

    def raising(self: Detokenizer, token_id: int) -> str:
        pushed[id(self)] = pushed.get(id(self), 0) + 1
        if self in broken and pushed[id(self)] > num_tokens:
            raise error
        return push(self, token_id)

    monkeypatch.setattr(Detokenizer, "push", raising)
    return broken


@pytest.mark.parametrize("error", [ArithmeticError("no text"), Fatal("panic"), Mute()])
def test_a_completion_that_fails_leaves_its_siblings_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Oracle: the same request undisturbed."""
    params = SamplingParams(n=3, seed=5, max_tokens=9, logprobs=1, ignore_eos=True)
    expected = by_core([20, 21], params)
    broken = broken_after(monkeypatch, error, 4)
    request, listener = engine.request([20, 21], params), Listening()
    broken.append(list(request._completions.values())[1]._detokenizer)
    engine.submit([request], listener).result(SECONDS)
    assert listener.ended.wait(SECONDS)
    events = events_of(listener.heard)
    first, failed, last = said(events)
    assert (first, last) == (expected[0], expected[2])
    assert failed == (expected[1].tokens[:4], expected[1].logprobs[:4], "error")
    [told] = [event.error for event in events if event.error is not None]
    assert told == ("Mute" if isinstance(error, Mute) else str(error))
    output = request.output.outputs[1]
    assert (output.token_ids, output.finish_reason, output.error) == (failed.tokens, "error", told)
    assert len(output.logprobs or ()) == 4
    assert output.cumulative_logprob == sum(failed.logprobs)
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 9 + 4 + 9
    engine.call(lambda: check_all_returned(engine.core.manager))


def test_a_request_fails_as_a_whole_when_its_last_completion_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = broken_after(monkeypatch, ArithmeticError("no text"), 2)
    request, listener = engine.request([20, 21], SamplingParams(n=2, seed=1, ignore_eos=True)), Listening()
    broken.extend(completion._detokenizer for completion in request._completions.values())
    engine.submit([request], listener).result(SECONDS)
    assert listener.ended.wait(SECONDS)
    *events, failed = listener.heard
    assert isinstance(failed, RequestFailedError)
    assert [event.finish_reason for event in events_of(events)] == [None, None, None, None, "error"]
    engine.call(lambda: check_all_returned(engine.core.manager))


# ---- requests that come twice ----


def test_a_request_is_served_once(engine: Engine, held: Held) -> None:
    request, search = (
        engine.request([20], LONG),
        engine.search([20], BeamSearchParams(beam_width=2, max_tokens=3)),
    )
    for one in (request, search):
        with pytest.raises(DuplicateRequestError):
            engine.submit([one, one], lambda items: None).result(SECONDS)
    engine.submit([request, search], lambda items: None).result(SECONDS)
    other = make_engine()
    again = [engine.submit([one], lambda items: None) for one in (request, search)]
    for one in (request, search):
        with pytest.raises(DuplicateRequestError, match="submitted before"):
            other.submit([one], lambda items: None).result(SECONDS)
    held.let_go()
    for future in again:
        with pytest.raises(DuplicateRequestError, match="submitted before"):
            future.result(SECONDS)
    engine.start_draining().result(SECONDS)
    for one in (request, search):
        with pytest.raises(DuplicateRequestError, match="submitted before: make a new one"):
            other.submit([one], lambda items: None).result(SECONDS)
    other.stop()
    check_all_returned(other.core.manager)


def test_what_was_refused_with_others_may_come_again(engine: Engine) -> None:
    good, bad, listener = engine.request([20], LONG), engine.request([]), Listening()
    with pytest.raises(ValueError, match="no tokens"):
        engine.submit([good, bad], listener).result(SECONDS)
    engine.submit([good], listener).result(SECONDS)
    assert listener.ended.wait(SECONDS)
    assert said(events_of(listener.heard)) == by_core([20], LONG)


# ---- the engine's own thread ----


async def _first(events: AsyncGenerator[RequestEvent, None]) -> RequestEvent:
    return await anext(events)


WAITING_CALLS: dict[str, Callable[[Engine], object]] = {
    "Engine.generate": lambda engine: asyncio.run(_first(engine.generate([20], LONG))),
    "Engine.drain": lambda engine: asyncio.run(engine.drain()),
    "result()": lambda engine: engine.submit([engine.request([20], LONG)], lambda items: None).result(),
    "exception()": lambda engine: engine.cancel("x").exception(5.0),
    "result() ": lambda engine: engine.start_draining().result(),
}


@pytest.mark.parametrize("call", WAITING_CALLS)
@pytest.mark.parametrize("where", ["listener", "watcher", "call", "callback"])
def test_a_call_that_would_wait_for_itself_raises_at_once(call: str, where: str) -> None:
    engine, raised = make_engine(), SimpleQueue[BaseException]()

    def misuse(*_: object) -> None:
        try:
            WAITING_CALLS[call](engine)
        except BaseException as error:
            raised.put(error)

    if where == "listener":
        engine.submit([engine.request([20], SamplingParams(max_tokens=1))], misuse).result(SECONDS)
    elif where == "watcher":
        engine.watch_blocks(misuse)
    elif where == "call":
        engine.call(misuse)
    else:
        gate = threading.Event()
        engine._inbox.post(gate.wait)
        engine.cancel("x").add_done_callback(misuse)  # not done yet: it is called in the engine's thread
        gate.set()
    error = raised.get(timeout=SECONDS)
    assert isinstance(error, WrongThreadError), error
    assert call.strip() in str(error)
    assert "would wait for itself" in str(error)
    engine.stop()


def test_what_does_not_wait_works_in_the_engines_own_thread(engine: Engine) -> None:
    done, listener = threading.Event(), Listening()

    def chain(items: list[Item]) -> None:
        assert engine.call(lambda: engine.stats.num_running) >= 0
        engine.cancel("nobody")
        engine.submit([engine.request([21], LONG)], listener)
        assert not engine._inbox.post(int).done()
        with pytest.raises(TimeoutError):
            engine._inbox.post(int).result(0)
        done.set()

    engine.submit([engine.request([20], SamplingParams(max_tokens=1))], chain).result(SECONDS)
    assert done.wait(SECONDS)
    assert listener.ended.wait(SECONDS)
    assert said(events_of(listener.heard)) == by_core([21], LONG)
    engine.call(engine.stop)
    engine._thread.join(SECONDS)
    assert not engine._thread.is_alive()


# ---- many ----


def test_thousands_are_queued_by_many_threads_and_cancelled() -> None:
    """Measured with lists that were searched: 155 s to queue 16,000 and 42 s to cancel them."""
    engine = make_engine()
    held, params, began = Held(engine), SamplingParams(max_tokens=2), time.monotonic()
    first = engine.request([20], params)
    engine.submit([first], lambda items: None).result(SECONDS)
    held.wait()

    def client(number: int) -> list[str]:
        requests = [engine.request([20 + number], params, f"{number}-{i}") for i in range(1000)]
        futures = [engine.submit([request], Equal()) for request in requests]
        held.let_go()
        for future in futures:
            future.result(SECONDS)
        return [request.request_id for request in requests]

    with ThreadPoolExecutor(8) as pool:
        names = [name for part in pool.map(client, range(8)) for name in part]
    for future in [engine.cancel(name) for name in names]:
        future.result(SECONDS)
    engine.call(lambda: check_all_returned(engine.core.manager))
    assert time.monotonic() - began < SECONDS
    engine.stop()
