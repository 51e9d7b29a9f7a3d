"""Day 3.7, task 11: the engine for coroutines."""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any

import pytest
from tiny_llm.engine import Engine
from tiny_llm.engine_loop import EngineLoop, Request
from tiny_llm.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineStoppingError,
    QueueFullError,
    RequestFailedError,
    RequestTooLargeError,
    WrongThreadError,
)
from tiny_llm.outputs import RequestEvent
from tiny_llm.sampling_params import SamplingParams

from week_3_day_7.alphabet import MANY_TOKENS, MAX_PROMPT, THREE_TOKENS, AlphabetCore, text
from week_3_day_7.serving import free_blocks, serving, small_core
from week_3_day_7.timeouts import background, in_thread, run, value, with_timeout

# Task 11: Engine.generate


async def open_stream(
    engine: Engine, prompt: Any, params: SamplingParams | None = None, **more: Any
) -> AsyncGenerator[RequestEvent, None]:
    """The iterator of `generate`. A blank exercise has no `yield`, so it is a coroutine and is awaited."""
    stream: Any = engine.generate(prompt, params, **more)
    if inspect.iscoroutine(stream):
        await stream
    result: AsyncGenerator[RequestEvent, None] = stream
    return result


async def collect_events(
    engine: Engine, prompt: Any, params: SamplingParams | None = None, **more: Any
) -> list[RequestEvent]:
    """All events of a request."""
    return [event async for event in await open_stream(engine, prompt, params, **more)]


def test_task_11_generate_yields_an_event_for_each_token() -> None:
    """Oracle: by hand."""
    with serving() as engine:
        found = run(collect_events(engine, "abc", THREE_TOKENS, request_id="mine"))
    assert [event.text for event in found] == ["d", "e", "f"]
    assert [event.token_ids for event in found] == [(3,), (4,), (5,)]
    assert {event.request_id for event in found} == {"mine"}
    assert [event.finish_reason for event in found] == [None, None, "length"]
    assert [event.usage is None for event in found] == [True, True, False]


def test_task_11_the_iterator_ends_with_the_last_of_several_completions() -> None:
    """Oracle: by hand: the second of two finishes early.

    Common mistake: ending with the first finish reason.
    """
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> list[RequestEvent]:
            client = asyncio.create_task(collect_events(engine, "a", SamplingParams(n=2, max_tokens=4)))
            await in_thread(core.wait_for_step)
            core.waiting[1].left = 2
            core.allow_all_steps()
            return await client

        found = run(main())
    assert [event.index for event in found] == [0, 1, 0, 1, 0, 0]
    assert [event.usage is None for event in found] == [True] * 5 + [False]


def test_task_11_five_concurrent_clients_get_the_same_tokens_as_when_served_separately() -> None:
    """Oracle: `EngineCore` on a small model, one request at a time; at most four sequences run."""
    requests = [
        ([1 + i, 2, 3 * i % 26], SamplingParams(max_tokens=8 + i, seed=i, ignore_eos=True)) for i in range(5)
    ]
    expected = []
    for prompt, params in requests:
        core, tokens = small_core(), []
        core.add_request("separate", prompt, params)
        while core.has_work:
            tokens += [output.token for output in core.step()]
        expected.append(tokens)
    core = small_core()
    with serving(core) as engine:

        async def main() -> list[list[RequestEvent]]:
            return await asyncio.gather(*(collect_events(engine, *each) for each in requests))

        found = run(main())
    assert [[token for event in one for token in event.token_ids] for one in found] == expected
    assert free_blocks(core) == 40


@pytest.mark.parametrize(
    ("prompt", "error"),
    [([], ValueError), ([26], ValueError), ([0] * (MAX_PROMPT + 1), RequestTooLargeError)],
)
def test_task_11_an_invalid_request_is_rejected_at_the_first_event(
    prompt: list[int], error: type[Exception]
) -> None:
    """Oracle: by hand: an empty prompt, a token outside the vocabulary, and a prompt that is too long."""
    with serving() as engine:
        with pytest.raises(error):
            run(collect_events(engine, prompt, THREE_TOKENS))
        assert text(run(collect_events(engine, "x", THREE_TOKENS))) == "yza"


def test_task_11_a_full_queue_rejects_a_client() -> None:
    """Oracle: by hand: one request runs, one may wait, and the third is rejected."""
    core = AlphabetCore(max_seqs=1)
    core.hold()
    with serving(core, max_num_seqs=1, max_num_waiting=1) as engine:

        async def main() -> list[list[RequestEvent]]:
            first = asyncio.create_task(collect_events(engine, "a", THREE_TOKENS))
            await in_thread(core.wait_for_step)
            core.allow_step()
            await in_thread(core.wait_for_step)  # the first request runs
            second = asyncio.create_task(collect_events(engine, "m", THREE_TOKENS))
            await asyncio.sleep(0)  # the second has started and waits for the engine
            with pytest.raises(QueueFullError):
                await collect_events(engine, "x", THREE_TOKENS)
            core.allow_all_steps()
            return [await first, await second]

        assert [text(found) for found in run(main())] == ["bcd", "nop"]


def test_task_11_an_iterator_that_is_never_started_submits_nothing() -> None:
    """Oracle: by hand."""
    core = AlphabetCore()
    with serving(core) as engine:

        async def main() -> None:
            await open_stream(engine, "a", MANY_TOKENS)
            await collect_events(engine, "a", THREE_TOKENS, request_id="started")

        run(main())
    assert [entry for entry in core.log if entry.startswith("add")] == ["add started"]


def test_task_11_the_event_loop_is_not_blocked_by_a_step() -> None:
    """Oracle: by hand: the event loop runs during a step. Common mistake: blocking on the engine's thread."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> str:
            first = asyncio.create_task(collect_events(engine, "a", THREE_TOKENS))
            await in_thread(core.wait_for_step)
            second = asyncio.create_task(collect_events(engine, "m", THREE_TOKENS))
            for _ in range(20):
                await asyncio.sleep(0)
            core.allow_all_steps()  # never reached if the event loop is blocked
            return text(await first) + text(await second)

        assert run(main()) == "bcdnop"


def test_task_11_generate_in_the_engine_thread_raises_wrong_thread_error() -> None:
    """Oracle: the docstring: an error instead of a deadlock, and no request is queued."""
    core = AlphabetCore()
    with serving(core) as engine:

        async def waiting() -> list[RequestEvent]:
            try:
                async with asyncio.timeout(1):
                    return await collect_events(engine, "a", THREE_TOKENS)
            except TimeoutError:
                raise AssertionError(
                    "`generate` waits in the engine's own thread, for itself: it must raise WrongThreadError "
                    "(`refuse_to_wait`)"
                ) from None

        with pytest.raises(WrongThreadError):
            with_timeout(engine.call, lambda: asyncio.run(waiting()))
        with_timeout(engine.call, lambda: None)
    assert core.log == []


@pytest.mark.parametrize("is_closed", [False, True])
def test_task_11_a_finished_request_is_not_cancelled(
    is_closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: by hand: the client reads to the end, or closes the iterator after the last event."""
    forgotten: list[Request] = []
    monkeypatch.setattr(EngineLoop, "forget", lambda self, requests: forgotten.extend(requests))
    with serving() as engine:

        async def main() -> str:
            found = []
            async with aclosing(await open_stream(engine, "a", THREE_TOKENS)) as stream:
                async for event in stream:
                    found.append(event)
                    if is_closed and event.usage is not None:
                        break
            return text(found)

        assert run(main()) == "bcd"
        with_timeout(engine.call, lambda: None)
    assert forgotten == [], "`forget` was posted for a finished request"


async def stop_reading(stream: AsyncGenerator[RequestEvent, None], now: asyncio.Event) -> None:
    """Leave the loop over the events, which drops the last reference to the iterator."""
    async for _ in stream:
        await now.wait()
        break


async def close(stream: AsyncGenerator[RequestEvent, None], now: asyncio.Event) -> None:
    """Close the iterator."""
    async with aclosing(stream):
        await anext(stream)
        await now.wait()


async def raise_error(stream: AsyncGenerator[RequestEvent, None], now: asyncio.Event) -> None:
    """Raise inside the loop over the events."""
    with suppress(ZeroDivisionError):
        async for _ in stream:
            await now.wait()
            raise ZeroDivisionError


@pytest.mark.parametrize("leave", [stop_reading, close, raise_error])
def test_task_11_a_client_that_leaves_is_cancelled_before_the_next_step(leave: Callable[..., Any]) -> None:
    """Oracle: by hand: the client reads one letter and leaves during the second step; there is no third."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> None:
            now = asyncio.Event()

            async def client() -> None:
                await leave(await open_stream(engine, "a", MANY_TOKENS), now)

            leaving = asyncio.create_task(client())
            await in_thread(core.wait_for_step)
            core.allow_step()
            await in_thread(core.wait_for_step)
            now.set()
            await leaving
            for _ in range(20):  # the event loop closes a dropped iterator
                await asyncio.sleep(0)
            core.allow_step()
            await in_thread(engine.call, lambda: None)

        run(
            main(),
            "a client that leaves (does a `finally` clause await? is `forget` posted?)",
        )
        steps = core.log.count("step")
        assert steps == 2, (
            f"{steps} steps: the request of a client that left must be cancelled before the third"
        )
        assert not core.has_work


@pytest.mark.parametrize("is_queued", [True, False])
def test_task_11_a_cancelled_task_cancels_its_request(is_queued: bool) -> None:
    """Oracle: by hand: cancelled while its first step runs, or while it still waits to be queued."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> None:
            first = asyncio.create_task(collect_events(engine, "a", MANY_TOKENS, request_id="first"))
            await in_thread(core.wait_for_step)
            second = asyncio.create_task(collect_events(engine, "m", MANY_TOKENS, request_id="second"))
            await asyncio.sleep(0)
            leaving = first if is_queued else second
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            core.allow_step()
            await in_thread(core.wait_for_step)
            remaining, removed = ("second", "first") if is_queued else ("first", "second")
            assert core.has(remaining), "cancelling one client removed the request of the other"
            assert not core.has(removed), "the task was cancelled, but its request is still in the core"
            core.allow_all_steps()
            (second if is_queued else first).cancel()

        run(main(), "the end of a client whose task was cancelled")


def test_task_11_a_rejected_client_does_not_cancel_the_request_that_owns_its_id() -> None:
    """Oracle: by hand: a request that is rejected because its id is in use does not cancel the first one."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> str:
            owner = asyncio.create_task(collect_events(engine, "a", THREE_TOKENS, request_id="name"))
            await in_thread(core.wait_for_step)
            rejected = asyncio.create_task(collect_events(engine, "m", THREE_TOKENS, request_id="name"))
            await asyncio.sleep(0)
            core.allow_step()
            with pytest.raises(DuplicateRequestError):
                await rejected
            for _ in range(20):
                await asyncio.sleep(0)
            core.allow_all_steps()
            return text(await owner)

        assert run(main()) == "bcd", "the rejected client cancelled the request that owns the id"


def test_task_11_a_cancelled_request_ends_with_finish_reason_abort() -> None:
    """Oracle: by hand: the iterator ends without an error."""
    with serving() as engine:

        async def main() -> list[RequestEvent]:
            stream = await open_stream(engine, "a", MANY_TOKENS, request_id="mine")
            first = await anext(stream)
            await asyncio.wrap_future(engine.cancel("mine"))
            return [first] + [event async for event in stream]

        found = run(main())
    assert (found[0].text, found[-1].finish_reason) == ("b", "abort")
    assert found[-1].usage is not None
    assert found[-1].usage.completion_tokens == sum(len(event.token_ids) for event in found)


def test_task_11_an_error_reaches_only_the_client_of_the_failed_request() -> None:
    """Oracle: by hand: one of three clients fails, and the others are not affected."""
    core, error = AlphabetCore(), ArithmeticError("broken")
    core.hold()
    with serving(core) as engine:

        async def main() -> list[Any]:
            first = asyncio.create_task(collect_events(engine, "a", THREE_TOKENS, request_id="a"))
            await in_thread(core.wait_for_step)
            others = [
                asyncio.create_task(collect_events(engine, name, THREE_TOKENS, request_id=name))
                for name in "bc"
            ]
            await asyncio.sleep(0)
            core.allow_step()
            await in_thread(core.wait_for_step)
            core.failing["b"] = error
            core.allow_all_steps()
            return await asyncio.gather(first, *others, return_exceptions=True)

        first, failed, last = run(main())
    assert (text(first), text(last)) == ("bcd", "def")
    assert isinstance(failed, RequestFailedError)
    assert (failed.request_id, failed.__cause__) == ("b", error)


def test_task_11_all_clients_get_the_error_of_a_dead_engine() -> None:
    """Oracle: by hand: with its cause, at once; no client waits forever."""
    core, error = AlphabetCore(), SystemError("unforeseen")
    core.hold()
    with serving(core) as engine:

        async def main() -> list[Any]:
            clients = [asyncio.create_task(collect_events(engine, name, MANY_TOKENS)) for name in "abc"]
            await in_thread(core.wait_for_step)
            core.dies = error
            core.allow_all_steps()
            return await asyncio.gather(*clients, return_exceptions=True)

        found = run(main())
    assert [type(one) for one in found] == [EngineDeadError] * 3
    assert {one.__cause__ for one in found} == {error}


def test_task_11_a_slow_client_loses_no_events_and_delays_no_other_client() -> None:
    """Oracle: by hand: another request finishes between the slow client's first and second read."""
    with serving() as engine:

        async def main() -> tuple[str, str]:
            slow = await open_stream(engine, "a", SamplingParams(max_tokens=6))
            first = await anext(slow)
            quick = await collect_events(engine, "m", THREE_TOKENS)
            return first.text + text([event async for event in slow]), text(quick)

        assert run(main()) == ("bcdefg", "nop")


def test_task_11_two_event_loops_share_one_engine() -> None:
    """Oracle: by hand: two threads with four clients each; every client gets its own letters."""
    with serving() as engine:

        async def main(letters: str) -> list[str]:
            found = await asyncio.gather(
                *(collect_events(engine, letter, THREE_TOKENS) for letter in letters)
            )
            return [text(one) for one in found]

        loops = [background(asyncio.run, main(letters)) for letters in ("aceg", "moqs")]
        missing = "one of two event loops in separate threads does not finish"
        assert [value(each, missing) for each in loops] == [
            ["bcd", "def", "fgh", "hij"],
            ["nop", "pqr", "rst", "tuv"],
        ]


def test_task_11_draining_lets_active_clients_finish() -> None:
    """Oracle: by hand: an active client gets all letters, a new one is rejected."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> list[RequestEvent]:
            client = asyncio.create_task(collect_events(engine, "a", THREE_TOKENS))
            await in_thread(core.wait_for_step)
            drain = asyncio.create_task(engine.drain())
            await asyncio.sleep(0)
            core.allow_step()
            await in_thread(core.wait_for_step)
            with pytest.raises(EngineStoppingError):
                await collect_events(engine, "m", THREE_TOKENS)
            assert not drain.done()
            core.allow_all_steps()
            await drain
            return await client

        assert text(run(main(), "an event of `generate`, or the end of a drain")) == "bcd"
