"""The engine's own thread: what runs in it, what never waits for it, and calls that would deadlock.

Oracle: `EngineCore`, stepped by hand in this thread. `HeldCore` lets a test decide when a step starts.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import pytest
from tiny_llm.delivery import Item, events_of

from tiny_llm import Engine, RequestEvent, SamplingParams, WrongThreadError
from toy_engine import (
    LONG,
    SECONDS,
    HeldCore,
    RecordingListener,
    collect_events,
    engine,
    held_core,
    make_engine,
    many_requests,
    results_from_core,
    results_of,
    run,
)

__all__ = ["engine", "held_core"]


# ---- threads ----


def test_two_event_loops_share_one_engine(engine: Engine) -> None:
    requests = many_requests(12, seed=5)

    def client(part: int) -> list[list[RequestEvent]]:
        async def main() -> list[list[RequestEvent]]:
            return await asyncio.gather(*(collect_events(engine, *request) for request in requests[part::2]))

        return run(main())

    with ThreadPoolExecutor(2) as pool:
        for part, answers in enumerate(pool.map(client, range(2))):
            expected = [results_from_core(*request) for request in requests[part::2]]
            assert [results_of(events) for events in answers] == expected


def test_the_model_runs_only_in_the_engines_thread(engine: Engine) -> None:
    threads = set()
    manager, model = engine.core.manager, engine.core.manager._model

    def watched(*args: Any) -> mx.array:
        threads.add(threading.current_thread())
        return model(*args)

    watched.config = model.config  # type: ignore[attr-defined]
    manager._model = watched
    run(collect_events(engine, [20, 21], LONG))
    manager._model = model
    assert threads == {engine.call(threading.current_thread)}
    assert threading.main_thread() not in threads


def test_call_runs_a_function_in_the_engines_thread_and_returns_its_value_or_raises_its_error(
    engine: Engine,
) -> None:
    assert engine.call(lambda: engine.call(threading.current_thread)).name == "tiny-llm-engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0)
    assert len(run(collect_events(engine, [20], SamplingParams(max_tokens=3, ignore_eos=True)))) == 3


def test_reading_stats_and_step_times_never_waits_for_a_step(engine: Engine, held_core: HeldCore) -> None:
    requests = [engine.request([20], LONG), engine.request([21], LONG)]
    engine.submit(requests, lambda items: None).result(SECONDS)
    held_core.wait()
    assert (engine.stats.num_running, engine.stats.num_waiting, engine.step_times) == (0, 2, ())
    held_core.step()
    held_core.wait()
    assert (engine.stats.num_running, engine.stats.num_waiting) == (2, 0)
    [times] = engine.step_times
    assert times.core > 0
    assert times.text > 0


def test_the_engine_does_not_step_a_core_that_is_stepped_by_hand(engine: Engine) -> None:
    core = engine.core
    engine.call(lambda: core.add_request("by hand", [20, 21], LONG))
    assert len(engine.call(core.step)) == 1
    time.sleep(0.02)
    assert engine.call(lambda: len(core.manager.sequence("by hand").outputs)) == 1
    engine.call(lambda: core.cancel("by hand"))


def test_an_idle_engine_uses_no_cpu_time(engine: Engine) -> None:
    run(collect_events(engine, [20], LONG))
    clock = time.pthread_getcpuclockid(engine._thread.ident)
    before = time.clock_gettime(clock)
    time.sleep(0.3)
    assert time.clock_gettime(clock) - before < 0.01


def test_a_cancelled_future_does_not_harm_the_engine(engine: Engine, held_core: HeldCore) -> None:
    engine.submit([engine.request([20], LONG)], lambda items: None).result(SECONDS)
    held_core.wait()
    posted: list[Future[Any]] = [engine.cancel("a"), engine.start_draining()]
    assert all(future.cancel() for future in posted)
    held_core.allow_all_steps()
    engine.stop()


# ---- the engine's own thread ----


async def first_event(events: AsyncGenerator[RequestEvent, None]) -> RequestEvent:
    return await anext(events)


WAITING_CALLS: dict[str, Callable[[Engine], object]] = {
    "Engine.generate": lambda engine: asyncio.run(first_event(engine.generate([20], LONG))),
    "Engine.drain": lambda engine: asyncio.run(engine.drain()),
    "result()": lambda engine: engine.submit([engine.request([20], LONG)], lambda items: None).result(),
    "exception()": lambda engine: engine.cancel("x").exception(5.0),
    "result() ": lambda engine: engine.start_draining().result(),
}


@pytest.mark.parametrize("call", WAITING_CALLS)
@pytest.mark.parametrize("where", ["listener", "watcher", "call", "callback"])
def test_a_blocking_call_in_the_engines_own_thread_raises_at_once(call: str, where: str) -> None:
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
        # The future is not done yet, so the callback will run in the engine's thread.
        engine.cancel("x").add_done_callback(misuse)
        gate.set()
    error = raised.get(timeout=SECONDS)
    assert isinstance(error, WrongThreadError), error
    assert call.strip() in str(error)
    assert "would make the engine's own thread wait for itself" in str(error)
    engine.stop()


def test_calls_that_do_not_block_work_in_the_engines_own_thread(engine: Engine) -> None:
    done, listener = threading.Event(), RecordingListener()

    def chain(items: list[Item]) -> None:
        assert engine.call(lambda: engine.stats.num_running) >= 0
        engine.cancel("unknown")
        engine.submit([engine.request([21], LONG)], listener)
        assert not engine._inbox.post(int).done()
        with pytest.raises(TimeoutError):
            engine._inbox.post(int).result(0)
        done.set()

    engine.submit([engine.request([20], SamplingParams(max_tokens=1))], chain).result(SECONDS)
    assert done.wait(SECONDS)
    assert listener.finished.wait(SECONDS)
    assert results_of(events_of(listener.items)) == results_from_core([21], LONG)
    engine.call(engine.stop)
    engine._thread.join(SECONDS)
    assert not engine._thread.is_alive()
