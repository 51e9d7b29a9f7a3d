"""Hostile listeners, repeated requests, thousands of requests: each may only affect its own results.

The same holds for a completion that fails. Oracle: `EngineCore`, stepped by hand in this thread; for
completions, the same request without the fault.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import pytest
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.delivery import events_of
from tiny_llm.kv_context import KVContext

from promises import check_all_returned
from tiny_llm import DuplicateRequestError, Engine, EngineDeadError, RequestFailedError, SamplingParams
from tiny_llm_checkpoints.tokenizer import Detokenizer
from toy_engine import (
    LONG,
    POISON,
    SECONDS,
    FailingModel,
    HeldCore,
    RecordingListener,
    collect_events_in_thread,
    engine,
    held_core,
    make_core,
    make_engine,
    results_from_core,
    results_of,
)

__all__ = ["engine", "held_core"]


# ---- hostile callers ----


class Fatal(BaseException):
    """Like a panic in a Rust library: not an `Exception`."""


class UnprintableError(Exception):
    """An error whose `str()` raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class EqualToAllListener(RecordingListener):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


class UnhashableListener(RecordingListener):
    __hash__ = None  # type: ignore[assignment]


class HostileListener(RecordingListener):
    def _refuse(self, *_: object) -> Any:
        raise Fatal

    __eq__ = __hash__ = __bool__ = __len__ = __repr__ = _refuse  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [RecordingListener, EqualToAllListener, UnhashableListener, HostileListener])
def test_each_listener_gets_its_own_events_even_if_listeners_compare_equal(
    engine: Engine, kind: type[RecordingListener]
) -> None:
    listeners = [kind() for _ in range(3)]
    requests = [engine.request([20 + place], LONG) for place in range(3)]
    for request, listener in zip(requests, listeners, strict=True):
        engine.submit([request], listener).result(SECONDS)
    for request, listener in zip(requests, listeners, strict=True):
        assert listener.finished.wait(SECONDS)
        events = events_of(listener.items)
        assert {event.request_id for event in events} == {request.request_id}
        assert results_of(events) == results_from_core(list(request.prompt_token_ids), LONG)


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
        Fatal(),
        UnprintableError(),
    ],
)
def test_any_exception_of_a_listener_or_watcher_affects_only_that_listener_or_watcher(
    engine: Engine, held_core: HeldCore, error: BaseException
) -> None:
    def raising(_: object) -> None:
        raise error

    calls: list[object] = []

    def watching(change: object) -> None:
        calls.append(change)
        if len(calls) > 1:
            raise error

    engine.submit([engine.request([20], LONG)], raising).result(SECONDS)
    held_core.allow_all_steps()
    engine.watch_blocks(watching)
    good = results_of(collect_events_in_thread(engine, [21]))
    engine.call(lambda: check_all_returned(engine.core.manager))
    with pytest.raises(type(error)):
        engine.call(lambda: raising(None))
    with pytest.raises(type(error)):
        engine.watch_blocks(raising)
    assert good == results_of(collect_events_in_thread(engine, [21])) == results_from_core([21], LONG)
    assert len(calls) == 2


def test_a_callback_that_watches_blocks_twice_is_called_until_both_watches_end(engine: Engine) -> None:
    changes: list[object] = []
    first, second = (engine.watch_blocks(changes.append) for _ in range(2))
    changes.clear()
    first().result(SECONDS)
    collect_events_in_thread(engine, [20])
    assert changes
    second().result(SECONDS)
    changes.clear()
    collect_events_in_thread(engine, [20])
    assert not changes


def test_a_futures_callback_that_raises_does_not_harm_the_engine(engine: Engine, held_core: HeldCore) -> None:
    def raising(_: object) -> None:
        raise Fatal

    engine.submit([engine.request([20], LONG)], lambda items: None).result(SECONDS)
    held_core.wait()
    for future in (engine.cancel("x"), engine.start_draining(), engine._inbox.post(int)):
        future.add_done_callback(raising)
    own = engine._inbox.post(int)
    own.set_result(5)
    held_core.allow_all_steps()
    engine.stop()
    assert not isinstance(engine.refusal, EngineDeadError)


@pytest.mark.parametrize("error", [Fatal(), UnprintableError(), SystemExit(3)])
def test_any_exception_in_a_step_fails_only_the_request_that_caused_it(error: BaseException) -> None:
    class PanickingModel(FailingModel):
        def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
            if POISON in tokens[0].tolist():
                raise error
            return super().__call__(tokens, context)

    engine = make_engine(lambda: make_core(PanickingModel()))  # type: ignore[arg-type]
    good = RecordingListener()
    engine.submit([engine.request([21], LONG)], good).result(SECONDS)
    with pytest.raises(RequestFailedError) as failed:
        collect_events_in_thread(engine, [20, POISON])
    assert failed.value.__cause__ is error
    assert good.finished.wait(SECONDS)
    assert results_of(events_of(good.items)) == results_from_core([21], LONG)
    engine.stop()
    check_all_returned(engine.core.manager)


# ---- one of several completions ----


def broken_after(monkeypatch: pytest.MonkeyPatch, error: BaseException, num_tokens: int) -> list[Detokenizer]:
    """Return a list: each detokenizer that a test adds to it raises after `num_tokens` tokens."""
    push, broken, pushed = Detokenizer.push, list[Detokenizer](), dict[int, int]()

    def raising(self: Detokenizer, token_id: int) -> str:
        pushed[id(self)] = pushed.get(id(self), 0) + 1
        if self in broken and pushed[id(self)] > num_tokens:
            raise error
        return push(self, token_id)

    monkeypatch.setattr(Detokenizer, "push", raising)
    return broken


@pytest.mark.parametrize("error", [ArithmeticError("no text"), Fatal("panic"), UnprintableError()])
def test_a_failing_completion_does_not_change_the_other_completions_of_its_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Oracle: the same request without the fault."""
    params = SamplingParams(n=3, seed=5, max_tokens=9, logprobs=1, ignore_eos=True)
    expected = results_from_core([20, 21], params)
    broken = broken_after(monkeypatch, error, 4)
    request, listener = engine.request([20, 21], params), RecordingListener()
    broken.append(list(request._completions.values())[1]._detokenizer)
    engine.submit([request], listener).result(SECONDS)
    assert listener.finished.wait(SECONDS)
    events = events_of(listener.items)
    first, failed, last = results_of(events)
    assert (first, last) == (expected[0], expected[2])
    assert failed == (expected[1].tokens[:4], expected[1].logprobs[:4], "error")
    [message] = [event.error for event in events if event.error is not None]
    assert message == ("UnprintableError" if isinstance(error, UnprintableError) else str(error))
    output = request.output.outputs[1]
    assert (output.token_ids, output.finish_reason, output.error) == (failed.tokens, "error", message)
    assert len(output.logprobs or ()) == 4
    assert output.cumulative_logprob == sum(failed.logprobs)
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 9 + 4 + 9
    engine.call(lambda: check_all_returned(engine.core.manager))


def test_a_request_fails_when_all_its_completions_have_failed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = broken_after(monkeypatch, ArithmeticError("no text"), 2)
    request, listener = (
        engine.request([20, 21], SamplingParams(n=2, seed=1, ignore_eos=True)),
        RecordingListener(),
    )
    broken.extend(completion._detokenizer for completion in request._completions.values())
    engine.submit([request], listener).result(SECONDS)
    assert listener.finished.wait(SECONDS)
    *events, failed = listener.items
    assert isinstance(failed, RequestFailedError)
    assert [event.finish_reason for event in events_of(events)] == [None, None, None, None, "error"]
    engine.call(lambda: check_all_returned(engine.core.manager))


# ---- requests that are submitted twice ----


def test_a_request_or_search_cannot_be_submitted_twice(engine: Engine, held_core: HeldCore) -> None:
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
    held_core.allow_all_steps()
    for future in again:
        with pytest.raises(DuplicateRequestError, match="submitted before"):
            future.result(SECONDS)
    engine.start_draining().result(SECONDS)
    for one in (request, search):
        with pytest.raises(DuplicateRequestError, match="submitted before: make a new one"):
            other.submit([one], lambda items: None).result(SECONDS)
    other.stop()
    check_all_returned(other.core.manager)


def test_a_valid_request_of_a_rejected_submission_may_be_submitted_again(engine: Engine) -> None:
    good, bad, listener = engine.request([20], LONG), engine.request([]), RecordingListener()
    with pytest.raises(ValueError, match="no tokens"):
        engine.submit([good, bad], listener).result(SECONDS)
    engine.submit([good], listener).result(SECONDS)
    assert listener.finished.wait(SECONDS)
    assert results_of(events_of(listener.items)) == results_from_core([20], LONG)


# ---- thousands of requests ----


def test_thousands_of_requests_are_queued_by_many_threads_and_cancelled() -> None:
    """With linear searches of lists, queueing 16,000 requests took 155 s and cancelling them 42 s."""
    engine = make_engine()
    held_core, params, began = HeldCore(engine), SamplingParams(max_tokens=2), time.monotonic()
    first = engine.request([20], params)
    engine.submit([first], lambda items: None).result(SECONDS)
    held_core.wait()

    def client(number: int) -> list[str]:
        requests = [engine.request([20 + number], params, f"{number}-{i}") for i in range(1000)]
        futures = [engine.submit([request], EqualToAllListener()) for request in requests]
        held_core.allow_all_steps()
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
