"""The engine's thread and its faces: whoever asks, in whatever thread, gets what the core alone gives.

What comes out, who leaves or is cancelled, and who is refused at the door. Oracle: `EngineCore`, stepped by
hand in this thread. `Held` cores let a test decide when a step begins.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import aclosing, suppress
from queue import SimpleQueue
from typing import Any

import pytest
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.delivery import AsyncListener, Item

from promises import check_all_returned
from tiny_llm import (
    DuplicateRequestError,
    Engine,
    QueueFullError,
    RequestEvent,
    RequestTooLargeError,
    SamplingParams,
    SamplingParamsError,
)
from tiny_model import VOCAB, random_prompt
from toy_engine import (
    LONG,
    SECONDS,
    TOKENIZER,
    Held,
    begun,
    by_core,
    crowd,
    engine,
    hear,
    heard,
    held,
    make_core,
    make_engine,
    run,
    said,
)

__all__ = ["engine", "held"]


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
        with pytest.raises(QueueFullError, match="3 requests wait and max_num_waiting is 3"):
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

    with pytest.raises(QueueFullError, match="5 more do not fit"):
        submit(5)
    submit(1)
    held.wait()
    submit(3)  # three seats, and one waits; none of them has been served yet
    with pytest.raises(QueueFullError, match="1 requests wait and max_num_waiting is 1"):
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
    with pytest.raises(QueueFullError, match="1 requests wait and max_num_waiting is 1"):
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
