"""How requests and engines finish: faults, draining, stopping, garbage collection, the end of a program.

A fault fails only its own request; a stop cancels all requests; no page or thread is left. Oracle:
`EngineCore`, stepped by hand in this thread.
"""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import pytest
from tiny_llm.delivery import Item
from tiny_llm.engine_core import EngineCore

from promises import check_all_returned
from tiny_llm import (
    Engine,
    EngineDeadError,
    EngineStoppingError,
    RequestEvent,
    RequestFailedError,
    RequestTooLargeError,
    SamplingParams,
)
from tiny_llm_checkpoints.tokenizer import Detokenizer
from tiny_model import random_prompt
from toy_engine import (
    LONG,
    POISON,
    SECONDS,
    FailingModel,
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


# ---- faults ----


def test_a_failing_request_does_not_change_the_other_results() -> None:
    engine = make_engine(lambda: make_core(FailingModel()))  # type: ignore[arg-type]
    requests = many_requests(12, seed=4)
    requests[5] = ([*random_prompt(6, 1), POISON], LONG)

    async def main() -> list[Any]:
        clients = (collect_events(engine, *request, request_id=f"c{i}") for i, request in enumerate(requests))
        return await asyncio.gather(*clients, return_exceptions=True)

    outcomes = run(main())
    failed = outcomes.pop(5)
    assert isinstance(failed, RequestFailedError)
    assert (failed.request_id, type(failed.__cause__)) == ("c5", ArithmeticError)
    del requests[5]
    for (prompt, params), events in zip(requests, outcomes, strict=True):
        assert results_of(events) == results_from_core(prompt, params)
    engine.stop()
    check_all_returned(engine.core.manager)


def test_an_error_in_detokenization_fails_only_its_request(
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
    assert good.output.outputs[0].token_ids == results_from_core([20, 21], short)[0].tokens
    engine.call(lambda: check_all_returned(engine.core.manager))


def test_when_the_engine_dies_every_caller_gets_an_engine_dead_error() -> None:
    engine, step_started, die = make_engine(), threading.Event(), threading.Event()

    def dying() -> Any:
        step_started.set()
        assert die.wait(SECONDS)
        raise SystemError("unforeseen")

    engine.core.step = dying  # type: ignore[method-assign]

    async def main() -> None:
        first = asyncio.create_task(collect_events(engine, [20], LONG))
        await asyncio.to_thread(step_started.wait, SECONDS)
        waiting = [
            first,
            asyncio.create_task(collect_events(engine, [21], LONG)),
            asyncio.create_task(engine.drain()),
        ]
        called = asyncio.create_task(asyncio.to_thread(engine.call, lambda: None))
        await asyncio.sleep(0.02)
        die.set()
        outcomes = await asyncio.gather(*waiting, called, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineDeadError] * 4
        assert {type(outcome.__cause__) for outcome in outcomes} == {SystemError}
        with pytest.raises(EngineDeadError, match="SystemError: unforeseen"):
            await collect_events(engine, [20], LONG)
        with pytest.raises(EngineDeadError):
            await engine.drain()

    run(main())
    with pytest.raises(EngineDeadError):
        engine.call(lambda: None)
    with pytest.raises(EngineDeadError):
        engine.cancel("a").result(SECONDS)
    assert isinstance(engine.refusal, EngineDeadError)
    engine.stop()


def test_an_error_while_making_the_core_is_raised_by_the_engines_constructor() -> None:
    def broken() -> EngineCore:
        raise MemoryError("not enough memory")

    others = set(threading.enumerate())  # an engine of an earlier test may still exist
    with pytest.raises(MemoryError, match="not enough memory"):
        make_engine(broken)
    for thread in set(threading.enumerate()) - others:
        thread.join(SECONDS)
        assert not thread.is_alive()


# ---- draining and stopping ----


def test_draining_finishes_accepted_requests_and_rejects_new_ones(
    engine: Engine, held_core: HeldCore
) -> None:
    async def main() -> list[RequestEvent]:
        client = asyncio.create_task(collect_events(engine, [20, 21], LONG))
        await asyncio.to_thread(held_core.wait)
        drains = [asyncio.create_task(engine.drain()) for _ in range(2)]
        await asyncio.sleep(0.01)
        held_core.step()
        await asyncio.to_thread(held_core.wait)
        with pytest.raises(EngineStoppingError, match="shutting down"):
            await collect_events(engine, [20], LONG)
        assert not any(drain.done() for drain in drains)
        held_core.allow_all_steps()
        await asyncio.gather(*drains)
        assert engine.stats.num_running == 0
        await engine.drain()
        return await client

    assert results_of(run(main())) == results_from_core([20, 21], LONG)
    engine.start_draining().result(SECONDS)
    assert isinstance(engine.refusal, EngineStoppingError)


def test_a_drain_with_a_timeout_cancels_the_requests_that_are_left(
    engine: Engine, held_core: HeldCore
) -> None:
    async def main() -> list[RequestEvent]:
        client = asyncio.create_task(collect_events(engine, [20, 21], LONG))
        await asyncio.to_thread(held_core.wait)
        drain = asyncio.create_task(engine.drain(1.5))
        await asyncio.sleep(0.01)
        held_core.step()
        await asyncio.to_thread(held_core.wait)
        await asyncio.sleep(1.6)
        held_core.step()
        await drain
        return await client

    events = run(main())
    assert (events[-1].finish_reason, events[-1].usage.completion_tokens) == ("abort", 2)


def test_a_drain_continues_when_its_caller_stops_waiting(engine: Engine, held_core: HeldCore) -> None:
    async def main() -> None:
        client = asyncio.create_task(
            collect_events(engine, [20, 21], SamplingParams(max_tokens=3, ignore_eos=True))
        )
        await asyncio.to_thread(held_core.wait)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.drain(), 0.01)
        held_core.allow_all_steps()
        assert len(await client) == 3
        await engine.drain()

    run(main())


def test_stopping_cancels_active_requests_and_rejects_new_ones(engine: Engine, held_core: HeldCore) -> None:
    async def main() -> list[RequestEvent]:
        events, first = await started_request(engine, held_core)
        stops = [asyncio.create_task(asyncio.to_thread(engine.stop)) for _ in range(2)]
        while engine.refusal is None:
            await asyncio.sleep(0.01)
            held_core.step()
        await asyncio.gather(*stops)
        with pytest.raises(EngineStoppingError, match="stopped"):
            await collect_events(engine, [20], LONG)
        await engine.drain()
        return [first] + [event async for event in events]

    assert run(main())[-1].finish_reason == "abort"
    with pytest.raises(EngineStoppingError):
        engine.submit([engine.request([20])], print)
    with pytest.raises(EngineStoppingError):
        engine.call(int)
    assert not engine._thread.is_alive()


def test_leaving_an_async_with_block_stops_the_engine() -> None:
    async def main() -> Engine:
        async with make_engine() as engine:
            await anext(engine.generate([20, 21], LONG))
        return engine

    engine = run(main())
    assert not engine._thread.is_alive()
    check_all_returned(engine.core.manager)


def test_a_garbage_collected_engine_frees_its_arrays_and_stops_its_thread() -> None:
    def bytes_in_use() -> int:
        gc.collect()
        return mx.get_active_memory()

    make_core()
    before = bytes_in_use()
    engine = make_engine(lambda: make_core(FailingModel(), blocks=4000))  # type: ignore[arg-type]
    size = engine.core.manager.capacity.nbytes
    assert size > 10**6
    assert bytes_in_use() > before + 0.9 * size
    run(collect_events(engine, [20, 21], LONG))
    gc.collect()  # asyncio's own cycles
    with pytest.raises(RequestTooLargeError):
        engine.submit([engine.request([20] * 999, LONG)], print).result(SECONDS)
    with pytest.raises(RequestFailedError):
        collect_events_in_thread(engine, [20, POISON])
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0)
    engine.call(int)  # now the engine's thread holds neither the error nor a listener
    thread, gone = engine._thread, weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert gone() is None, "something still refers to the engine"
        assert not thread.is_alive()
        assert mx.get_active_memory() < before + size // 100
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["return", "sys.exit(3)", "raise KeyboardInterrupt"])
def test_a_program_can_exit_while_a_request_is_running(how: str) -> None:
    """If the interpreter killed the engine's thread in the middle of a step, the process would abort."""
    program = f"""
import sys
from toy_engine import LONG, make_engine
def main():
    engine = make_engine()
    engine.submit([engine.request([20 + i], LONG) for i in range(20)], lambda items: None).result()
    while not engine.stats.num_running: pass
    {how}
main()
"""
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    codes = {"return": 0, "sys.exit(3)": 3, "raise KeyboardInterrupt": -2}
    assert process.returncode == codes[how], process.stderr.decode()
    assert process.stdout == b""
    assert how.startswith("raise") or process.stderr == b""
