"""Task 11: the engine for coroutines."""

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

from week_3_day_7.alphabet import LONG, LONGEST, THREE, AlphabetCore, text
from week_3_day_7.patience import background, elsewhere, run, value, within
from week_3_day_7.serving import free_blocks, serving, small_core

# Task 11: Engine.generate


async def opened(
    engine: Engine, prompt: Any, params: SamplingParams | None = None, **more: Any
) -> AsyncGenerator[RequestEvent, None]:
    """The iterator that `generate` gives. A blank one has no `yield`: it is a coroutine, and is awaited."""
    stream: Any = engine.generate(prompt, params, **more)
    if inspect.iscoroutine(stream):
        await stream
    result: AsyncGenerator[RequestEvent, None] = stream
    return result


async def heard(
    engine: Engine, prompt: Any, params: SamplingParams | None = None, **more: Any
) -> list[RequestEvent]:
    """All events of a request."""
    return [event async for event in await opened(engine, prompt, params, **more)]


def test_task_11_an_event_for_each_letter() -> None:
    """Oracle: by hand."""
    with serving() as engine:
        found = run(heard(engine, "abc", THREE, request_id="mine"))
    assert [event.text for event in found] == ["d", "e", "f"]
    assert [event.token_ids for event in found] == [(3,), (4,), (5,)]
    assert {event.request_id for event in found} == {"mine"}
    assert [event.finish_reason for event in found] == [None, None, "length"]
    assert [event.usage is None for event in found] == [True, True, False]


def test_task_11_several_completions_end_with_the_last_of_them() -> None:
    """Oracle: by hand: the second of two ends early. Common mistake: ending with the first finish reason."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> list[RequestEvent]:
            client = asyncio.create_task(heard(engine, "a", SamplingParams(n=2, max_tokens=4)))
            await elsewhere(core.wait_for_step)
            core.waiting[1].left = 2
            core.let_go()
            return await client

        found = run(main())
    assert [event.index for event in found] == [0, 1, 0, 1, 0, 0]
    assert [event.usage is None for event in found] == [True] * 5 + [False]


def test_task_11_five_clients_at_once_get_what_each_gets_by_itself() -> None:
    """Oracle: `EngineCore` on a small model, one request at a time, stepped by hand; there are four seats."""
    requests = [
        ([1 + i, 2, 3 * i % 26], SamplingParams(max_tokens=8 + i, seed=i, ignore_eos=True)) for i in range(5)
    ]
    expected = []
    for prompt, params in requests:
        core, tokens = small_core(), []
        core.add_request("alone", prompt, params)
        while core.has_work:
            tokens += [output.token for output in core.step()]
        expected.append(tokens)
    core = small_core()
    with serving(core) as engine:

        async def main() -> list[list[RequestEvent]]:
            return await asyncio.gather(*(heard(engine, *each) for each in requests))

        found = run(main())
    assert [[token for event in one for token in event.token_ids] for one in found] == expected
    assert free_blocks(core) == 40


@pytest.mark.parametrize(
    ("prompt", "error"),
    [([], ValueError), ([26], ValueError), ([0] * (LONGEST + 1), RequestTooLargeError)],
)
def test_task_11_a_refusal_comes_at_the_first_event(prompt: list[int], error: type[Exception]) -> None:
    """Oracle: by hand: an empty prompt, a token that there is not, and a prompt that is too long."""
    with serving() as engine:
        with pytest.raises(error):
            run(heard(engine, prompt, THREE))
        assert text(run(heard(engine, "x", THREE))) == "yza"


def test_task_11_a_full_queue() -> None:
    """Oracle: by hand: one seat, one may wait, and the third client is told so."""
    core = AlphabetCore(max_seqs=1)
    core.hold()
    with serving(core, max_num_seqs=1, max_num_waiting=1) as engine:

        async def main() -> list[list[RequestEvent]]:
            first = asyncio.create_task(heard(engine, "a", THREE))
            await elsewhere(core.wait_for_step)
            core.let_step()
            await elsewhere(core.wait_for_step)  # it has the seat
            second = asyncio.create_task(heard(engine, "m", THREE))
            await asyncio.sleep(0)  # it has begun, and waits for the engine
            with pytest.raises(QueueFullError):
                await heard(engine, "x", THREE)
            core.let_go()
            return [await first, await second]

        assert [text(found) for found in run(main())] == ["bcd", "nop"]


def test_task_11_an_iterator_that_is_never_begun_asks_for_nothing() -> None:
    """Oracle: by hand."""
    core = AlphabetCore()
    with serving(core) as engine:

        async def main() -> None:
            await opened(engine, "a", LONG)
            await heard(engine, "a", THREE, request_id="begun")

        run(main())
    assert [entry for entry in core.log if entry.startswith("add")] == ["add begun"]


def test_task_11_the_event_loop_goes_on_while_a_step_runs() -> None:
    """Oracle: by hand: the event loop goes on during a step. Waiting for the thread itself holds up all."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> str:
            first = asyncio.create_task(heard(engine, "a", THREE))
            await elsewhere(core.wait_for_step)
            second = asyncio.create_task(heard(engine, "m", THREE))
            for _ in range(20):
                await asyncio.sleep(0)
            core.let_go()  # with an event loop that stands still this would never come
            return text(await first) + text(await second)

        assert run(main()) == "bcdnop"


def test_task_11_the_engines_own_thread_must_not_wait_for_itself() -> None:
    """Oracle: the docstring: an error, and no request is queued, instead of an event that never comes."""
    core = AlphabetCore()
    with serving(core) as engine:

        async def waiting() -> list[RequestEvent]:
            async with asyncio.timeout(1):
                return await heard(engine, "a", THREE)

        with pytest.raises(WrongThreadError):
            within(engine.call, lambda: asyncio.run(waiting()))
        within(engine.call, lambda: None)
    assert core.log == []


@pytest.mark.parametrize("is_closed", [False, True])
def test_task_11_a_request_that_has_ended_is_not_cancelled(
    is_closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: by hand: the client reads to the end, or leaves with the last event in its hands."""
    forgotten: list[Request] = []
    monkeypatch.setattr(EngineLoop, "forget", lambda self, requests: forgotten.extend(requests))
    with serving() as engine:

        async def main() -> str:
            found = []
            async with aclosing(await opened(engine, "a", THREE)) as stream:
                async for event in stream:
                    found.append(event)
                    if is_closed and event.usage is not None:
                        break
            return text(found)

        assert run(main()) == "bcd"
        within(engine.call, lambda: None)
    assert forgotten == [], "`forget` was posted for a request that had ended"


async def stop_reading(stream: AsyncGenerator[RequestEvent, None], now: asyncio.Event) -> None:
    """Leave the loop over the events; the iterator is dropped with its last name."""
    async for _ in stream:
        await now.wait()
        break


async def close(stream: AsyncGenerator[RequestEvent, None], now: asyncio.Event) -> None:
    """Close the iterator."""
    async with aclosing(stream):
        await anext(stream)
        await now.wait()


async def stumble(stream: AsyncGenerator[RequestEvent, None], now: asyncio.Event) -> None:
    """Raise within the loop."""
    with suppress(ZeroDivisionError):
        async for _ in stream:
            await now.wait()
            raise ZeroDivisionError


@pytest.mark.parametrize("leave", [stop_reading, close, stumble])
def test_task_11_a_client_that_leaves_is_cancelled_before_the_next_step(leave: Callable[..., Any]) -> None:
    """Oracle: by hand: one letter is read, and left during the second step: there is no third."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> None:
            now = asyncio.Event()

            async def client() -> None:
                await leave(await opened(engine, "a", LONG), now)

            leaving = asyncio.create_task(client())
            await elsewhere(core.wait_for_step)
            core.let_step()
            await elsewhere(core.wait_for_step)
            now.set()
            await leaving
            for _ in range(20):  # what was dropped is closed by the event loop
                await asyncio.sleep(0)
            core.let_step()
            await elsewhere(engine.call, lambda: None)

        run(
            main(),
            "the end of the second step without a third (is the request of the client that left cancelled?)",
        )
        steps = core.log.count("step")
        assert steps == 2, (
            f"{steps} steps: the request of a client that has left must be cancelled before the third"
        )
        assert not core.has_work


@pytest.mark.parametrize("is_queued", [True, False])
def test_task_11_a_task_that_is_cancelled_leaves_too(is_queued: bool) -> None:
    """Oracle: by hand: cancelled while its first step runs, or while it still waits to be queued."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> None:
            first = asyncio.create_task(heard(engine, "a", LONG, request_id="first"))
            await elsewhere(core.wait_for_step)
            second = asyncio.create_task(heard(engine, "m", LONG, request_id="second"))
            await asyncio.sleep(0)
            leaving = first if is_queued else second
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            core.let_step()
            await elsewhere(core.wait_for_step)
            stays, left = ("second", "first") if is_queued else ("first", "second")
            assert core.has(stays), "one client was cancelled, and the request of the other one is gone"
            assert not core.has(left), "the task was cancelled, and its request is still in the core"
            core.let_go()
            (second if is_queued else first).cancel()

        run(main(), "the end of a client whose task was cancelled")


def test_task_11_a_client_that_leaves_does_not_cancel_another_request_with_its_id() -> None:
    """Oracle: by hand: a request that was refused, because its id is in use, does not end the owner of it."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> str:
            owner = asyncio.create_task(heard(engine, "a", THREE, request_id="name"))
            await elsewhere(core.wait_for_step)
            refused = asyncio.create_task(heard(engine, "m", THREE, request_id="name"))
            await asyncio.sleep(0)
            core.let_step()
            with pytest.raises(DuplicateRequestError):
                await refused
            for _ in range(20):
                await asyncio.sleep(0)
            core.let_go()
            return text(await owner)

        assert run(main()) == "bcd", "the client that was refused has ended the request that owns the id"


def test_task_11_a_request_that_is_cancelled_ends_with_abort() -> None:
    """Oracle: by hand: the iterator ends by itself, without an error."""
    with serving() as engine:

        async def main() -> list[RequestEvent]:
            stream = await opened(engine, "a", LONG, request_id="mine")
            first = await anext(stream)
            await asyncio.wrap_future(engine.cancel("mine"))
            return [first] + [event async for event in stream]

        found = run(main())
    assert (found[0].text, found[-1].finish_reason) == ("b", "abort")
    assert found[-1].usage is not None
    assert found[-1].usage.completion_tokens == sum(len(event.token_ids) for event in found)


def test_task_11_an_error_reaches_the_client_that_it_befell() -> None:
    """Oracle: by hand: of three clients one fails, and the others hear nothing of it."""
    core, error = AlphabetCore(), ArithmeticError("broken")
    core.hold()
    with serving(core) as engine:

        async def main() -> list[Any]:
            first = asyncio.create_task(heard(engine, "a", THREE, request_id="a"))
            await elsewhere(core.wait_for_step)
            others = [asyncio.create_task(heard(engine, name, THREE, request_id=name)) for name in "bc"]
            await asyncio.sleep(0)
            core.let_step()
            await elsewhere(core.wait_for_step)
            core.failing["b"] = error
            core.let_go()
            return await asyncio.gather(first, *others, return_exceptions=True)

        first, failed, last = run(main())
    assert (text(first), text(last)) == ("bcd", "def")
    assert isinstance(failed, RequestFailedError)
    assert (failed.request_id, failed.__cause__) == ("b", error)


def test_task_11_an_engine_that_dies_tells_all_clients() -> None:
    """Oracle: by hand: with its cause, and at once: no client waits for an event that never comes."""
    core, error = AlphabetCore(), SystemError("unforeseen")
    core.hold()
    with serving(core) as engine:

        async def main() -> list[Any]:
            clients = [asyncio.create_task(heard(engine, name, LONG)) for name in "abc"]
            await elsewhere(core.wait_for_step)
            core.dies = error
            core.let_go()
            return await asyncio.gather(*clients, return_exceptions=True)

        found = run(main())
    assert [type(one) for one in found] == [EngineDeadError] * 3
    assert {one.__cause__ for one in found} == {error}


def test_task_11_a_slow_client_misses_nothing_and_delays_no_other() -> None:
    """Oracle: by hand: another request runs to its end between the first letter and the second."""
    with serving() as engine:

        async def main() -> tuple[str, str]:
            slow = await opened(engine, "a", SamplingParams(max_tokens=6))
            first = await anext(slow)
            quick = await heard(engine, "m", THREE)
            return first.text + text([event async for event in slow]), text(quick)

        assert run(main()) == ("bcdefg", "nop")


def test_task_11_two_event_loops_share_one_engine() -> None:
    """Oracle: by hand: each in a thread of its own, four clients each; every client gets its own letters."""
    with serving() as engine:

        async def main(letters: str) -> list[str]:
            found = await asyncio.gather(*(heard(engine, letter, THREE) for letter in letters))
            return [text(one) for one in found]

        loops = [background(asyncio.run, main(letters)) for letters in ("aceg", "moqs")]
        missing = "one of two event loops, each in its thread, does not end"
        assert [value(each, missing) for each in loops] == [
            ["bcd", "def", "fgh", "hij"],
            ["nop", "pqr", "rst", "tuv"],
        ]


def test_task_11_draining_lets_clients_end() -> None:
    """Oracle: by hand: a client that is there gets all letters, a new one is refused."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:

        async def main() -> list[RequestEvent]:
            client = asyncio.create_task(heard(engine, "a", THREE))
            await elsewhere(core.wait_for_step)
            drain = asyncio.create_task(engine.drain())
            await asyncio.sleep(0)
            core.let_step()
            await elsewhere(core.wait_for_step)
            with pytest.raises(EngineStoppingError):
                await heard(engine, "m", THREE)
            assert not drain.done()
            core.let_go()
            await drain
            return await client

        assert text(run(main(), "an event of `generate`, or the end of a drain")) == "bcd"
