"""The engine's interface for callers in any thread: outputs, cancellation and admission.

Oracle: `EngineCore`, stepped by hand in this thread. `HeldCore` lets a test decide when a step starts.
"""

import asyncio
import random
import threading
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
    EngineDeadError,
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
    HeldCore,
    collect_events,
    collect_events_in_thread,
    engine,
    held_core,
    make_core,
    make_engine,
    many_requests,
    results_from_core,
    results_of,
    run,
    started_request,
)

__all__ = ["engine", "held_core"]


# ---- outputs ----


def test_fifty_concurrent_clients_get_the_same_results_as_each_running_alone(engine: Engine) -> None:
    requests = many_requests(50, seed=1)

    async def main() -> list[list[RequestEvent]]:
        return await asyncio.gather(*(collect_events(engine, prompt, params) for prompt, params in requests))

    for (prompt, params), events in zip(requests, run(main()), strict=True):
        assert results_of(events) == results_from_core(prompt, params)
        assert [event.usage is not None for event in events] == [False] * (len(events) - 1) + [True]


def test_the_texts_of_a_requests_events_join_to_the_text_of_all_its_tokens(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    events = run(collect_events(engine, "abc", params))
    tokens = [token for event in events for token in event.token_ids]
    assert len(tokens) == 20
    assert "".join(event.text for event in events) == TOKENIZER.decode(tokens)


def test_a_stop_string_finishes_its_completion_before_the_next_step(
    engine: Engine, held_core: HeldCore
) -> None:
    """Oracle: the text of the tokens without a stop string."""
    unstopped = results_from_core([20, 21], LONG)[0].tokens
    stop = TOKENIZER.decode(list(unstopped[2:4]))
    assert TOKENIZER.decode(list(unstopped[:4])).find(stop) == 2
    deliveries: SimpleQueue[list[Item]] = SimpleQueue()
    params = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True, stop=stop)
    request = engine.request([20, 21], params)
    engine.submit([request], deliveries.put).result(SECONDS)
    for _ in range(4):
        held_core.wait()
        held_core.step()
    while not request.finished:
        deliveries.get(timeout=SECONDS)
    engine.call(lambda: check_all_returned(engine.core.manager))
    [completion] = request.output.outputs
    assert (completion.token_ids, completion.stop_reason) == (unstopped[:4], stop)
    assert completion.text + stop == TOKENIZER.decode(list(unstopped[:4]))


def test_the_last_event_reports_usage_and_timing(engine: Engine) -> None:
    prompt, params = random_prompt(13, 3), SamplingParams(n=2, max_tokens=5, seed=1, ignore_eos=True)
    first, second = (run(collect_events(engine, prompt, params))[-1].usage for _ in range(2))
    assert (first.prompt_tokens, first.completion_tokens, first.num_cached_tokens) == (13, 10, 0)
    assert second.num_cached_tokens == 12, "all but the last token, which must give logits"
    assert first.metrics.arrival <= first.metrics.first_token <= first.metrics.finished


def test_only_the_first_event_has_prompt_logprobs(engine: Engine) -> None:
    params = SamplingParams(n=2, seed=1, max_tokens=3, prompt_logprobs=0, ignore_eos=True)
    events = run(collect_events(engine, [20, 21, 22], params))
    assert [event.prompt_logprobs is not None for event in events] == [True] + [False] * 5
    assert [entry and list(entry) for entry in events[0].prompt_logprobs] == [None, [21], [22]]


def test_a_listener_gets_all_events_of_a_step_in_one_delivery(engine: Engine) -> None:
    deliveries: SimpleQueue[list[Item]] = SimpleQueue()
    params = SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True)
    requests = [engine.request(random_prompt(4, seed), params) for seed in (1, 2)]
    engine.submit(requests, deliveries.put).result(SECONDS)
    steps = [deliveries.get(timeout=SECONDS) for _ in range(4)]
    assert [len(step) for step in steps] == [6] * 4
    assert deliveries.empty()


def test_a_beam_search_delivers_one_final_event(engine: Engine) -> None:
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


# ---- disconnecting and cancelling ----


def test_cancelling_requests_at_random_times_does_not_change_the_other_results(engine: Engine) -> None:
    requests, draw = many_requests(40, seed=2), random.Random(3)

    async def client(number: int) -> list[RequestEvent] | None:
        prompt, params = requests[number]
        if number % 2:
            return await collect_events(engine, prompt, params)
        async with aclosing(engine.generate(prompt, params)) as events:
            for _ in range(draw.randrange(6)):
                await anext(events, None)
            return None

    async def main() -> list[list[RequestEvent] | None]:
        return await asyncio.gather(*(client(number) for number in range(len(requests))))

    for (prompt, params), events in zip(requests, run(main()), strict=True):
        assert events is None or results_of(events) == results_from_core(prompt, params)
    engine.call(lambda: check_all_returned(engine.core.manager))


async def _break_out_of_loop(events: AsyncGenerator[RequestEvent, None], go: asyncio.Event) -> None:
    async for _ in events:
        await go.wait()
        break


async def _close_iterator(events: AsyncGenerator[RequestEvent, None], go: asyncio.Event) -> None:
    await anext(events)
    await go.wait()
    await events.aclose()


async def _raise_in_loop(events: AsyncGenerator[RequestEvent, None], go: asyncio.Event) -> None:
    with suppress(ZeroDivisionError):
        async for _ in events:
            await go.wait()
            raise ZeroDivisionError


async def _cancel_reading_task(events: AsyncGenerator[RequestEvent, None], go: asyncio.Event) -> None:
    task = asyncio.create_task(anext(events))  # type: ignore[arg-type]
    await task
    task = asyncio.create_task(anext(events))  # type: ignore[arg-type]
    await go.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "stop_reading", [_break_out_of_loop, _close_iterator, _raise_in_loop, _cancel_reading_task]
)
def test_a_request_whose_client_stops_reading_is_cancelled_before_the_next_step(
    engine: Engine, held_core: HeldCore, stop_reading: Callable[..., Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        go = asyncio.Event()
        stopping = asyncio.create_task(stop_reading(engine.generate(random_prompt(5, 1), LONG), go))
        await asyncio.to_thread(held_core.wait)
        held_core.step()
        await asyncio.to_thread(held_core.wait)  # the first event was delivered; the second step is held
        go.set()
        await stopping
        for _ in range(10):  # an iterator that was dropped is closed by the event loop
            await asyncio.sleep(0)
        held_core.step()
        await asyncio.to_thread(engine.call, lambda: check_all_returned(engine.core.manager))

    run(main())
    assert not held_core.step_started.acquire(blocking=False), "a step ran for a cancelled request"


def test_requests_cancelled_while_the_engine_is_busy_leave_nothing_behind(
    engine: Engine, held_core: HeldCore
) -> None:
    async def main() -> None:
        first = asyncio.create_task(collect_events(engine, [20, 21], LONG))
        await asyncio.to_thread(held_core.wait)
        second = asyncio.create_task(collect_events(engine, [22, 23], LONG, request_id="second"))
        await asyncio.sleep(0.01)
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        held_core.allow_all_steps()
        await asyncio.to_thread(engine.call, lambda: check_all_returned(engine.core.manager))

    run(main())


def test_an_iterator_that_is_never_started_submits_no_request(engine: Engine) -> None:
    async def main() -> None:
        engine.generate([20], LONG)
        await asyncio.sleep(0)

    run(main())
    assert engine.call(lambda: engine.core.has_work) is False


def test_a_cancelled_request_finishes_with_abort_and_frees_its_pages(
    engine: Engine, held_core: HeldCore
) -> None:
    async def main() -> list[RequestEvent]:
        events, first = await started_request(engine, held_core, request_id="mine")
        cancelled = engine.cancel("mine")
        held_core.step()
        await asyncio.wrap_future(cancelled)
        assert engine.stats.num_running == 0
        return [first] + [event async for event in events]

    events = run(main())
    assert [event.finish_reason for event in events] == [None, None, "abort"]
    assert events[-1].usage.completion_tokens == 2
    engine.cancel("unknown").result(SECONDS)


def test_forgetting_a_request_does_not_cancel_a_later_request_with_the_same_id(engine: Engine) -> None:
    deliveries: SimpleQueue[list[Item]] = SimpleQueue()
    old, new = (engine.request([20, 21], LONG, request_id="name") for _ in range(2))
    engine.submit([old], deliveries.put).result(SECONDS)
    engine.forget([old])
    engine.submit([new], deliveries.put).result(SECONDS)
    engine.forget([old])
    while not new.finished:
        deliveries.get(timeout=SECONDS)
    assert new.output.outputs[0].finish_reason == "length"


def test_a_slow_reader_delays_no_other_request_and_misses_no_event(engine: Engine) -> None:
    async def main() -> tuple[list[RequestEvent], list[RequestEvent]]:
        slow = engine.generate(random_prompt(5, 1), LONG)
        first = await anext(slow)
        quick = await collect_events(engine, [30, 31], LONG)
        return [first] + [event async for event in slow], quick

    slow, quick = run(main())
    assert results_of(slow) == results_from_core(random_prompt(5, 1), LONG)
    assert results_of(quick) == results_from_core([30, 31], LONG)


def test_a_listener_that_raises_aborts_only_its_own_requests(engine: Engine) -> None:
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


def test_an_event_loop_is_woken_once_for_the_lists_of_all_its_listeners() -> None:
    async def wakes_for(num_listeners: int) -> int:
        loop, wakes = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        listeners = [AsyncListener() for _ in range(num_listeners)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", lambda *args: wakes.append(args) or wake(*args))
            for _ in range(2):
                errors: list[Item] = [EngineDeadError(str(index)) for index in range(num_listeners)]
                for listener, error in zip(listeners, errors, strict=True):
                    listener([error])
                assert [item for one in listeners for item in await one.next_items()] == errors
        return len(wakes)

    assert run(wakes_for(1)) == 2
    assert run(wakes_for(5)) == 2


def test_a_listener_gets_the_lists_of_another_thread_in_their_order() -> None:
    errors: list[Item] = [EngineDeadError(str(index)) for index in range(500)]

    async def read() -> list[Item]:
        listener = AsyncListener()
        sending = threading.Thread(target=lambda: [listener([error]) for error in errors])
        sending.start()
        found = [item for _ in errors for item in await listener.next_items()]
        sending.join()
        return found

    assert run(read()) == errors


# ---- admission ----


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], {}, ValueError, "no tokens"),
        ([VOCAB], {}, ValueError, f"token id {VOCAB} is outside the vocabulary"),
        ([-1], {}, ValueError, "token id -1"),
        ("\ud800", {}, ValueError, "lone surrogate"),
        ([20], {"stop_token_ids": [999]}, SamplingParamsError, "^stop_token_ids has token id 999, which"),
        ([20], {"logit_bias": {999: 1.0}}, SamplingParamsError, "^logit_bias has token id 999, which"),
        ([20], {"n": 9}, RequestTooLargeError, "n = 9"),
        ([20] * 100, {"max_tokens": 100}, RequestTooLargeError, "exceed the context of 128"),
    ],
)
def test_an_invalid_request_is_rejected_by_generate_and_by_submit(
    engine: Engine, prompt: Any, params: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(collect_events(engine, prompt, SamplingParams(**params)))
    with pytest.raises(error, match=message):
        engine.submit([engine.request(prompt, SamplingParams(**params))], print).result(SECONDS)


def test_a_duplicate_request_id_is_rejected_and_the_first_request_continues(
    engine: Engine, held_core: HeldCore
) -> None:
    async def main() -> None:
        events, first = await started_request(engine, held_core, request_id="mine")
        second = asyncio.create_task(collect_events(engine, [20], LONG, request_id="mine"))
        await asyncio.sleep(0.01)
        held_core.allow_all_steps()
        with pytest.raises(DuplicateRequestError, match="'mine'"):
            await second
        assert results_of([first] + [event async for event in events]) == results_from_core(
            random_prompt(5, 1), LONG
        )
        await collect_events(engine, [20], SamplingParams(max_tokens=1), request_id="mine")

    run(main())


def test_a_submission_with_one_invalid_request_submits_none_of_them(engine: Engine) -> None:
    deliveries: SimpleQueue[list[Item]] = SimpleQueue()
    requests = [engine.request([20] * length, LONG) for length in (1, 0, 1)]
    with pytest.raises(ValueError, match="no tokens"):
        engine.submit(requests, deliveries.put).result(SECONDS)
    engine.call(lambda: check_all_returned(engine.core.manager))
    assert deliveries.empty()


def test_a_full_queue_rejects_a_request_at_once_and_says_how_many_wait() -> None:
    engine = make_engine(max_num_seqs=2, max_num_waiting=3)
    held_core = HeldCore(engine)
    params = SamplingParams(max_tokens=2, n=2, ignore_eos=True)

    async def main() -> None:
        running = asyncio.create_task(collect_events(engine, [20], params))
        await asyncio.to_thread(held_core.wait)
        held_core.step()
        await asyncio.to_thread(held_core.wait)  # it takes both slots
        waiting = [asyncio.create_task(collect_events(engine, [20 + i], params)) for i in range(3)]
        await asyncio.sleep(0.01)
        before = time.monotonic()
        with pytest.raises(QueueFullError, match="3 requests wait and max_num_waiting is 3"):
            await collect_events(engine, [20], params)
        assert time.monotonic() - before < SECONDS / 2, "the call waited for the step"
        held_core.allow_all_steps()
        await asyncio.gather(running, *waiting)
        await collect_events(engine, [20], params)

    run(main())
    engine.stop()


def test_requests_count_as_waiting_only_when_all_slots_are_taken() -> None:
    engine = make_engine(max_num_seqs=3, max_num_waiting=1)
    held_core, params = HeldCore(engine), SamplingParams(max_tokens=1)

    def submit(number: int) -> Future[None]:
        return engine.submit([engine.request([20], params) for _ in range(number)], lambda items: None)

    with pytest.raises(QueueFullError, match="5 more do not fit"):
        submit(5)
    submit(1)
    held_core.wait()
    submit(3)  # three slots, and one request waits; none has been served yet
    with pytest.raises(QueueFullError, match="1 request waits and max_num_waiting is 1"):
        submit(1)
    held_core.allow_all_steps()
    engine.start_draining().result(SECONDS)
    engine.stop()


def test_requests_count_as_waiting_when_slots_are_free_but_pages_are_not() -> None:
    engine = make_engine(lambda: make_core(blocks=6), max_num_waiting=1)
    held_core, params = HeldCore(engine), SamplingParams(max_tokens=7, ignore_eos=True)

    def submit(seed: int) -> Future[None]:
        return engine.submit([engine.request(random_prompt(16, seed), params)], lambda items: None)

    submit(1).result(SECONDS)  # each prompt has 16 tokens; 24 fit
    held_core.wait()
    second = submit(2)  # a step is held: the request is queued before the next step
    for _ in range(2):
        held_core.step()
        held_core.wait()
    second.result(SECONDS)
    assert (engine.stats.num_running, engine.stats.num_waiting) == (1, 1)
    with pytest.raises(QueueFullError, match="1 request waits and max_num_waiting is 1"):
        engine.submit([engine.request([20], params)], print)
    held_core.allow_all_steps()
    engine.start_draining().result(SECONDS)
    engine.stop()


def test_rejected_and_cancelled_requests_do_not_count_as_waiting() -> None:
    engine = make_engine(max_num_seqs=1, max_num_waiting=2)
    for _ in range(9):
        with pytest.raises(ValueError, match="no tokens"):
            engine.submit([engine.request([])], print).result(SECONDS)
    for _ in range(3):
        requests = [engine.request([20], LONG) for _ in range(3)]
        engine.submit(requests, lambda items: None).result(SECONDS)
        engine.forget(requests)
    assert results_of(collect_events_in_thread(engine, [20])) == results_from_core([20], LONG)
    engine.stop()
