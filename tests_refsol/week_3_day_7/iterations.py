"""Day 3.7, tasks 5 and 6: iterations of the engine loop, and draining."""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from tiny_llm.admission_control import AdmissionControl
from tiny_llm.block_events import PoolChange
from tiny_llm.delivery import Item
from tiny_llm.engine_loop import EngineLoop
from tiny_llm.errors import (
    EngineStoppingError,
)
from tiny_llm.inbox import Inbox
from tiny_llm.sampling_params import SamplingParams

from week_3_day_7.alphabet import (
    MANY_TOKENS,
    THREE_TOKENS,
    AlphabetCore,
    RecordingListener,
    activate,
    events,
    request,
    text,
)
from week_3_day_7.serving import small_core
from week_3_day_7.timeouts import background, value, with_timeout

# Task 5: EngineLoop.run_once


class LoopDriver:
    """A loop with its inbox and core; the test runs its iterations one by one."""

    def __init__(self, core: Any = None) -> None:
        self.inbox = Inbox()
        self.core = core or AlphabetCore()
        self.loop = EngineLoop(self.inbox, AdmissionControl(None, 8))
        self.loop.core = self.core

    def set_deadline(self, moment: float) -> None:
        """Set the deadline as task 6 does: the docstring of `run_once` names the attribute."""
        vars(self.loop)["_deadline"] = moment

    def add_drain(self, drained: Future[None]) -> None:
        """Add a drain as task 6 does, without a deadline."""
        vars(self.loop)["_drained"].append(drained)

    def run_once(self, *tasks: Callable[[], Any]) -> list[Future[Any]]:
        """Post tasks and run one iteration."""
        posted = [self.inbox.post(task) for task in tasks]
        with_timeout(self.loop.run_once)
        return posted


def is_over(drained: Future[None]) -> bool:
    """Assert that a drain's future is done; raises its error, if any."""
    assert drained.done(), "no request is active any more, but the drain's future is not done"
    return drained.result(0) is None


def test_task_5_an_iteration_runs_tasks_and_then_a_step() -> None:
    """Oracle: by hand: an added request is served in the same iteration, and its listener is called."""
    driver, listener = LoopDriver(), RecordingListener()
    [added] = driver.run_once(partial(driver.loop.add, [request("one")], listener))
    assert added.done(), "the task has not run"
    assert driver.core.log == ["add one", "step"]
    assert [text(events(call)) for call in listener.calls] == ["b"]


def test_task_5_an_iteration_makes_one_step() -> None:
    """Oracle: by hand: three letters are three iterations, without any task."""
    driver = LoopDriver()
    listener = activate(driver.loop, request("one"))
    for iteration in range(1, 4):
        driver.run_once()
        assert driver.core.log.count("step") == iteration, "an iteration must make one step"
        assert len(listener.calls) == iteration, (
            "the events of a step must be delivered once, at the end of its iteration"
        )
    assert not driver.loop.active


def test_task_5_without_active_requests_the_loop_waits_for_a_task() -> None:
    """Oracle: by hand: with nothing to do, the loop waits until a task is posted, without a step."""
    driver = LoopDriver()
    iteration = background(driver.loop.run_once)
    with suppress(TimeoutError):
        iteration.exception(0.05)
    assert not iteration.done() or iteration.result(), (
        "`run_once` did not wait: the thread would use a whole CPU core"
    )
    asked = driver.inbox.post(lambda: 7)
    value(iteration, "`run_once` does not return, although a task was posted")
    assert asked.result(0) == 7
    assert driver.core.log == []


def test_task_5_the_loop_waits_for_a_task_even_if_the_core_has_work() -> None:
    """Oracle: by hand: a caller added a request to the core directly, and must step it itself.

    Common mistake: waiting only if the core has no work: the loop would iterate and make no step.
    """
    driver = LoopDriver()
    driver.core.add_request("by hand", [5], THREE_TOKENS)
    iteration = background(driver.loop.run_once)
    with suppress(TimeoutError):
        iteration.exception(0.05)
    assert not iteration.done() or iteration.result(), (
        "`run_once` did not wait, although no request is active: the thread would use a whole CPU core"
    )
    driver.inbox.post(lambda: 7)
    value(iteration, "`run_once` does not return, although a task was posted")


def test_task_5_the_first_iteration_makes_the_core() -> None:
    """Oracle: by hand: `begin` is the first task; until it has run, the loop has no attribute `core`."""
    inbox = Inbox()
    loop = EngineLoop(inbox, AdmissionControl(None, 8))
    started = inbox.post(partial(loop.begin, AlphabetCore))  # type: ignore[arg-type]
    with_timeout(loop.run_once)
    assert started.result(0) is None
    assert isinstance(loop.core, AlphabetCore)


def test_task_5_without_active_requests_there_is_no_step() -> None:
    """Oracle: by hand: the core has work, but no listener waits for it."""
    driver = LoopDriver()
    driver.core.add_request("by hand", [5], THREE_TOKENS)
    driver.run_once(lambda: None)
    assert "step" not in driver.core.log, "there must be no step"


def test_task_5_all_posted_tasks_run_before_the_step() -> None:
    """Oracle: by hand: in the order of posting.

    Common mistake: one task per iteration, which delays the others.
    """
    driver, ran = LoopDriver(), list[str]()
    activate(driver.loop, request("one"), request("two"))
    driver.run_once(
        lambda: ran.append("first"),
        partial(driver.loop.cancel, ["one"]),
        lambda: ran.append("second"),
        partial(driver.loop.add, [request("three")], RecordingListener()),
    )
    assert ran == ["first", "second"]
    assert driver.core.log == ["add one", "add two", "cancel one", "add three", "step"]


def test_task_5_a_cancelled_request_gets_no_further_token() -> None:
    """Oracle: by hand: its last event comes in this iteration, although there is no step."""
    driver = LoopDriver()
    listener = activate(driver.loop, request("one"))
    driver.run_once()
    driver.run_once(partial(driver.loop.cancel, ["one"]))
    assert driver.core.log.count("step") == 1, "there must be no step without an active request"
    assert [[event.finish_reason for event in events(call)] for call in listener.calls] == [[None], ["abort"]]


def test_task_5_a_listener_gets_all_events_of_a_step_in_one_call() -> None:
    """Oracle: by hand: two requests with two completions each are four events in one call."""
    driver, pair = LoopDriver(), SamplingParams(n=2, max_tokens=2)
    listener, other = (
        activate(driver.loop, request("one", "a", pair), request("two", "m", pair)),
        RecordingListener(),
    )
    activate(driver.loop, request("three", "x"), listener=other)
    driver.run_once()
    driver.run_once()
    assert [len(call) for call in listener.calls] == [4, 4]
    assert (text(listener.events, "one"), text(listener.events, "two")) == ("bbcc", "nnoo")
    assert [len(call) for call in other.calls] == [1, 1]


def test_task_5_a_listener_gets_the_events_of_tasks_and_step_in_one_call() -> None:
    """Oracle: the docstring of `Engine.submit`: at most one call per iteration.

    Common mistake: delivering the "abort" event before the step, and the step's events after it.
    """
    driver = LoopDriver()
    listener = activate(driver.loop, request("one"), request("two"))
    driver.run_once(partial(driver.loop.cancel, ["one"]))
    calls = [[(event.request_id, event.finish_reason) for event in events(call)] for call in listener.calls]
    assert calls == [[("one", "abort"), ("two", None)]], (
        "deliver once, at the end of the iteration: the events of its tasks and of its step in one call"
    )


def test_task_5_an_error_of_a_task_is_set_on_its_future() -> None:
    """Oracle: by hand: its future raises, and the iteration continues."""
    driver = LoopDriver()
    listener = activate(driver.loop, request("one"))
    [failed, fine] = driver.run_once(lambda: 1 // 0, lambda: 7)
    assert isinstance(failed.exception(0), ZeroDivisionError)
    assert fine.result(0) == 7
    assert text(listener.events) == "b"


def test_task_5_an_error_of_a_step_ends_the_loop() -> None:
    """Oracle: by hand: an unexpected error. Swallowing it would leave all clients waiting."""
    driver = LoopDriver()
    activate(driver.loop, request("one"))
    driver.core.dies = SystemError("unforeseen")
    with pytest.raises(SystemError, match="unforeseen"):
        driver.run_once()


def test_task_5_the_requests_of_a_listener_that_raises_are_cancelled() -> None:
    """Oracle: by hand: both of its requests are cancelled before the next step; others continue."""
    driver = LoopDriver()

    def failing(items: list[Item]) -> None:
        raise OSError("failed")

    activate(driver.loop, request("one"), request("two"), listener=failing)
    listener = activate(driver.loop, request("other"))
    driver.run_once()
    driver.run_once()
    steps = driver.core.log.index("step"), len(driver.core.log) - 1 - driver.core.log[::-1].index("step")
    assert sorted(driver.core.log[steps[0] + 1 : steps[1]]) == ["cancel one", "cancel two"]
    assert list(driver.loop.active) == ["other"]
    assert text(listener.events) == "bc"


def test_task_5_an_expired_deadline_cancels_all_requests_before_the_step() -> None:
    """Oracle: by hand: a task sets it.

    Common mistake: checking it before the tasks, which makes one step too many.
    """
    driver = LoopDriver()
    listener = activate(driver.loop, request("one"), request("two"))
    driver.run_once(partial(driver.set_deadline, time.monotonic() + 100))
    assert list(driver.loop.active) == ["one", "two"], "the deadline has not passed yet"
    driver.run_once(partial(driver.set_deadline, time.monotonic()))
    assert driver.core.log.count("step") == 1, "there must be no step after the deadline"
    assert Counter(event.finish_reason for event in listener.events) == {None: 2, "abort": 2}
    assert not driver.loop.active


def test_task_5_a_drain_is_done_after_the_last_events_are_delivered() -> None:
    """Oracle: by hand: events must be delivered before the drain is reported as done."""
    driver, drained, was_done = LoopDriver(), Future[None](), list[bool]()
    activate(
        driver.loop,
        request("one", params=SamplingParams(max_tokens=2)),
        listener=lambda _: was_done.append(drained.done()),
    )
    driver.run_once(partial(driver.add_drain, drained))
    assert not drained.done(), "the drain must not be done while a request is active"
    driver.run_once()
    assert was_done == [False, False], "the drain must not be done before the last event is delivered"
    assert is_over(drained)


def test_task_5_a_drain_is_done_if_a_failing_listener_had_the_last_request() -> None:
    """Oracle: by hand: delivery cancels the request, so check `active` after it."""
    driver, drained = LoopDriver(), Future[None]()

    def failing(items: list[Item]) -> None:
        raise OSError("failed")

    activate(driver.loop, request("one"), listener=failing)
    driver.run_once(partial(driver.add_drain, drained))
    assert is_over(drained)


def test_task_5_watchers_see_the_pool_after_each_iteration() -> None:
    """Oracle: by hand: blocks are allocated in a step and freed in an iteration without a step."""
    driver, changes = LoopDriver(core=small_core()), list[PoolChange]()
    driver.run_once(partial(driver.loop.watch, changes.append))
    assert len(changes) == 1, "the watcher must be called only with changes"
    activate(driver.loop, request("one", "abc", SamplingParams(max_tokens=9, ignore_eos=True)))
    driver.run_once()
    assert len(changes) == 2, "the watcher was not called after the step"
    driver.run_once(partial(driver.loop.cancel, ["one"]))
    assert len(changes) == 3, "the watcher was not called after an iteration without a step"
    assert changes[-1].ended == ["one"]


def test_task_5_watchers_see_a_step_before_the_listeners_get_its_events() -> None:
    """Oracle: the docstring: when a client gets an event, the watchers know the step that made it."""
    driver, calls = LoopDriver(core=small_core()), list[str]()
    driver.run_once(partial(driver.loop.watch, lambda _: calls.append("watcher")))
    calls.clear()
    activate(driver.loop, request("one", "abc"), listener=lambda _: calls.append("listener"))
    driver.run_once()
    assert calls == ["watcher", "listener"], "call `_tell_watchers` before `_deliver`"


def test_task_5_the_last_iteration_has_no_step() -> None:
    """Oracle: by hand."""
    driver = LoopDriver()
    activate(driver.loop, request("one"))
    driver.run_once(driver.loop.stop)
    assert "step" not in driver.core.log, "there must be no step"


def test_task_5_the_thread_iterates_until_a_task_stops_it() -> None:
    """Oracle: by hand: the given `run`: start, serve, stop."""
    driver, listener = LoopDriver(), RecordingListener()
    started = driver.inbox.post(partial(driver.loop.begin, lambda: driver.core))
    thread = background(driver.loop.run)
    value(started, "`run` did not run the task `begin`")
    added = driver.inbox.post(partial(driver.loop.add, [request("one")], listener))
    value(added, "the second task was not run")
    assert text(listener.until_end()) == "bcd"
    value(driver.inbox.post(driver.loop.stop), "the task `stop` was not run: does `run_once` wait for tasks?")
    value(thread, "`run` does not return after `stop`")
    assert driver.core.log.count("step") == 3, "three letters must take three steps"


# Task 6: EngineLoop.drain


def test_task_6_new_requests_are_rejected() -> None:
    """Oracle: by hand: new requests are rejected, active ones stay."""
    driver, drained = LoopDriver(), Future[None]()
    activate(driver.loop, request("one"))
    driver.loop.drain(None, drained)
    assert driver.loop.refusal is not None
    assert isinstance(driver.loop.refusal(), EngineStoppingError)
    with pytest.raises(EngineStoppingError):
        driver.loop.add([request("two")], RecordingListener())
    assert list(driver.loop.active) == ["one"]
    assert not drained.done()


def test_task_6_each_client_gets_an_error_object_of_its_own() -> None:
    """Oracle: the docstring of `refusal`, a function.

    Raising one object twice would mix the tracebacks of two clients.
    """
    driver = LoopDriver()
    driver.loop.drain(None, Future())
    assert driver.loop.refusal is not None
    first, second = driver.loop.refusal(), driver.loop.refusal()
    assert first is not second, "two clients get the same error object: `refusal` must make one for each call"


def test_task_6_a_drain_does_not_replace_an_existing_refusal() -> None:
    """Oracle: the docstring: a stopped or dead engine keeps its own error."""
    driver, existing = LoopDriver(), partial(EngineStoppingError, "stopped before")
    driver.loop.refusal = existing
    driver.loop.drain(None, Future())
    assert driver.loop.refusal is existing, "`drain` has replaced a refusal that was set already"


def test_task_6_a_drain_is_done_when_all_requests_have_finished() -> None:
    """Oracle: by hand: three letters take three iterations, and none is lost."""
    driver, drained = LoopDriver(), Future[None]()
    listener = activate(driver.loop, request("one"))
    driver.run_once(partial(driver.loop.drain, None, drained))
    assert not drained.done()
    driver.run_once()
    assert not drained.done()
    driver.run_once()
    assert is_over(drained)
    assert (text(listener.events), listener.events[-1].finish_reason) == ("bcd", "length")


def test_task_6_a_drain_without_active_requests_is_done_at_once() -> None:
    """Oracle: by hand. A second drain is done at once too."""
    driver = LoopDriver()
    for _ in range(2):
        drained: Future[None] = Future()
        driver.run_once(partial(driver.loop.drain, None, drained))
        assert is_over(drained)


def test_task_6_a_drain_is_done_after_the_event_of_a_request_cancelled_before_it() -> None:
    """Oracle: by hand: both tasks run in one iteration, and no request is active when `drain` is called.

    Common mistake: completing the future in `drain`, before the "abort" event has been delivered.
    """
    driver, drained, was_done = LoopDriver(), Future[None](), list[bool]()
    activate(driver.loop, request("one"), listener=lambda _: was_done.append(drained.done()))
    driver.run_once(partial(driver.loop.cancel, ["one"]), partial(driver.loop.drain, None, drained))
    assert was_done == [False], (
        "the drain was done before the last event was delivered: `drain` must leave the future to `run_once`"
    )
    assert is_over(drained)


def test_task_6_a_timeout_of_zero_cancels_requests_before_the_next_step() -> None:
    """Oracle: by hand: with a timeout of 0 the last events come in the same iteration."""
    driver, drained = LoopDriver(), Future[None]()
    listener = activate(driver.loop, request("one"), request("two"))
    driver.run_once()
    driver.run_once(partial(driver.loop.drain, 0, drained))
    assert driver.core.log.count("step") == 1, "there must be no step after the deadline"
    assert Counter(event.finish_reason for event in listener.events) == {None: 2, "abort": 2}
    assert is_over(drained)


def test_task_6_a_timeout_counts_from_the_call_of_drain() -> None:
    """Oracle: by hand: a long timeout cancels nothing; a short one that passes cancels the request."""
    driver, first = LoopDriver(), Future[None]()
    listener = activate(driver.loop, request("one", params=SamplingParams(max_tokens=2)))
    driver.run_once(partial(driver.loop.drain, 100.0, first))
    driver.run_once()
    assert listener.events[-1].finish_reason == "length"
    assert is_over(first)

    driver, second = LoopDriver(), Future[None]()
    listener = activate(driver.loop, request("one", params=MANY_TOKENS))
    driver.run_once(partial(driver.loop.drain, 0.05, second))
    time.sleep(0.06)
    driver.run_once()
    assert listener.events[-1].finish_reason == "abort"
    assert is_over(second)


@pytest.mark.parametrize("timeouts", [(-0.001, None), (None, -0.001), (-0.001, 1000.0), (1000.0, -0.001)])
def test_task_6_the_shorter_of_two_timeouts_counts(timeouts: tuple[float | None, float | None]) -> None:
    """Oracle: the docstring, in both orders; both futures are done."""
    driver, drains = LoopDriver(), (Future[None](), Future[None]())
    activate(driver.loop, request("one", params=MANY_TOKENS))
    driver.run_once(*[partial(driver.loop.drain, *each) for each in zip(timeouts, drains, strict=True)])
    assert not driver.loop.active, (
        f"the timeouts {timeouts} were given in this order, and the shorter one has passed: the earliest "
        "deadline counts, so all requests must be cancelled"
    )
    assert all(map(is_over, drains))
