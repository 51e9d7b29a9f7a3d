"""Tasks 5 and 6: iterations of the loop, and its end."""

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

from week_3_day_7.alphabet import LONG, THREE, AlphabetCore, Ear, events, put, request, text
from week_3_day_7.patience import background, value, within
from week_3_day_7.serving import small_core

# Task 5: EngineLoop.run_once


class Posting:
    """A loop with its inbox and its core, whose turns a test takes one by one."""

    def __init__(self, core: Any = None) -> None:
        self.inbox = Inbox()
        self.core = core or AlphabetCore()
        self.loop = EngineLoop(self.inbox, AdmissionControl(None, 8))
        self.loop.core = self.core

    def set_deadline(self, moment: float) -> None:
        """As task 6 sets it: the docstring of `run_once` names the attribute."""
        vars(self.loop)["_deadline"] = moment

    def add_drain(self, drained: Future[None]) -> None:
        """As task 6 adds it, without a deadline."""
        vars(self.loop)["_drained"].append(drained)

    def run_once(self, *tasks: Callable[[], Any]) -> list[Future[Any]]:
        """Post tasks, and let an iteration pass."""
        posted = [self.inbox.post(task) for task in tasks]
        within(self.loop.run_once)
        return posted


def is_over(drained: Future[None]) -> bool:
    """Whether a drain's future is done; raises what it raises."""
    assert drained.done(), "no request is active any more, and the drain's future is not done"
    return drained.result(0) is None


def test_task_5_a_task_and_then_a_step() -> None:
    """Oracle: by hand: a request that is added is served in the same iteration, and its listener called."""
    at, ear = Posting(), Ear()
    [added] = at.run_once(partial(at.loop.add, [request("one")], ear))
    assert added.done(), "the task has not run"
    assert at.core.log == ["add one", "step"]
    assert [text(events(call)) for call in ear.calls] == ["b"]


def test_task_5_an_iteration_is_one_step() -> None:
    """Oracle: by hand: three letters are three iterations, without any task."""
    at = Posting()
    ear = put(at.loop, request("one"))
    for iteration in range(1, 4):
        at.run_once()
        assert at.core.log.count("step") == iteration, "an iteration is one step"
        assert len(ear.calls) == iteration, "what a step gave is delivered at the end of its iteration, once"
    assert not at.loop.active


def test_task_5_without_an_active_request_it_waits_for_a_task() -> None:
    """Oracle: by hand: with nothing to do it waits until a task is posted; no step."""
    at = Posting()
    iteration = background(at.loop.run_once)
    with suppress(TimeoutError):
        iteration.exception(0.05)
    assert not iteration.done() or iteration.result(), "it did not wait: the thread would burn a processor"
    asked = at.inbox.post(lambda: 7)
    value(iteration, "`run_once` does not return, although a task was posted")
    assert asked.result(0) == 7
    assert at.core.log == []


def test_task_5_no_step_without_an_active_request() -> None:
    """Oracle: by hand: the core has work, but no listener waits for it."""
    at = Posting()
    at.core.add_request("by hand", [5], THREE)
    at.run_once(lambda: None)
    assert "step" not in at.core.log, "there was a step"


def test_task_5_everything_that_was_asked_for_comes_before_the_step() -> None:
    """Oracle: by hand: in the order of posting. One task per iteration is the mistake: others wait."""
    at, ran = Posting(), list[str]()
    put(at.loop, request("one"), request("two"))
    at.run_once(
        lambda: ran.append("first"),
        partial(at.loop.cancel, ["one"]),
        lambda: ran.append("second"),
        partial(at.loop.add, [request("three")], Ear()),
    )
    assert ran == ["first", "second"]
    assert at.core.log == ["add one", "add two", "cancel one", "add three", "step"]


def test_task_5_a_cancelled_request_gets_no_further_letter() -> None:
    """Oracle: by hand: its last event comes in this iteration, though there is no step for anybody."""
    at = Posting()
    ear = put(at.loop, request("one"))
    at.run_once()
    at.run_once(partial(at.loop.cancel, ["one"]))
    assert at.core.log.count("step") == 1, "there was a step although no request is active"
    assert [[event.finish_reason for event in events(call)] for call in ear.calls] == [[None], ["abort"]]


def test_task_5_a_listener_gets_all_of_a_step_at_once() -> None:
    """Oracle: by hand: two requests with two completions each are four events in one call."""
    at, pair = Posting(), SamplingParams(n=2, max_tokens=2)
    ear, other = put(at.loop, request("one", "a", pair), request("two", "m", pair)), Ear()
    put(at.loop, request("three", "x"), ear=other)
    at.run_once()
    at.run_once()
    assert [len(call) for call in ear.calls] == [4, 4]
    assert (text(ear.events, "one"), text(ear.events, "two")) == ("bbcc", "nnoo")
    assert [len(call) for call in other.calls] == [1, 1]


def test_task_5_what_a_task_raises_goes_to_its_future() -> None:
    """Oracle: by hand: its future raises, and the iteration goes on."""
    at = Posting()
    ear = put(at.loop, request("one"))
    [failed, fine] = at.run_once(lambda: 1 // 0, lambda: 7)
    assert isinstance(failed.exception(0), ZeroDivisionError)
    assert fine.result(0) == 7
    assert text(ear.events) == "b"


def test_task_5_what_a_step_raises_ends_the_thread() -> None:
    """Oracle: by hand: unforeseen: an iteration that goes on in silence leaves all clients waiting."""
    at = Posting()
    put(at.loop, request("one"))
    at.core.dies = SystemError("unforeseen")
    with pytest.raises(SystemError, match="unforeseen"):
        at.run_once()


def test_task_5_a_listener_that_raises_loses_its_requests() -> None:
    """Oracle: by hand: both of its requests are gone before the next step, and another's goes on."""
    at = Posting()

    def gone(items: list[Item]) -> None:
        raise OSError("gone")

    put(at.loop, request("one"), request("two"), ear=gone)
    ear = put(at.loop, request("other"))
    at.run_once()
    at.run_once()
    steps = at.core.log.index("step"), len(at.core.log) - 1 - at.core.log[::-1].index("step")
    assert sorted(at.core.log[steps[0] + 1 : steps[1]]) == ["cancel one", "cancel two"]
    assert list(at.loop.active) == ["other"]
    assert text(ear.events) == "bc"


def test_task_5_a_deadline_that_has_passed_cancels_all_before_the_step() -> None:
    """Oracle: by hand: a task sets it. Looking at it before the tasks is the mistake: one step too many."""
    at = Posting()
    ear = put(at.loop, request("one"), request("two"))
    at.run_once(partial(at.set_deadline, time.monotonic() + 100))
    assert list(at.loop.active) == ["one", "two"], "the deadline is not reached yet"
    at.run_once(partial(at.set_deadline, time.monotonic()))
    assert at.core.log.count("step") == 1, "a step was made after the deadline"
    assert Counter(event.finish_reason for event in ear.events) == {None: 2, "abort": 2}
    assert not at.loop.active


def test_task_5_a_drain_is_over_after_the_last_events_are_delivered() -> None:
    """Oracle: by hand: what is reported as done must have been delivered."""
    at, drained, was_done = Posting(), Future[None](), list[bool]()
    put(
        at.loop,
        request("one", params=SamplingParams(max_tokens=2)),
        ear=lambda _: was_done.append(drained.done()),
    )
    at.run_once(partial(at.add_drain, drained))
    assert not drained.done(), "the drain is over although a request is active"
    at.run_once()
    assert was_done == [False, False], "the drain was over before the last event was delivered"
    assert is_over(drained)


def test_task_5_a_drain_is_over_when_a_lost_listener_had_the_last_request() -> None:
    """Oracle: by hand: delivering cancels it, so `active` is looked at after that."""
    at, drained = Posting(), Future[None]()

    def gone(items: list[Item]) -> None:
        raise OSError("gone")

    put(at.loop, request("one"), ear=gone)
    at.run_once(partial(at.add_drain, drained))
    assert is_over(drained)


def test_task_5_watchers_see_the_pool_after_each_iteration() -> None:
    """Oracle: by hand: blocks are taken in a step, and are back in an iteration without one."""
    at, changes = Posting(core=small_core()), list[PoolChange]()
    at.run_once(partial(at.loop.watch, changes.append))
    assert len(changes) == 1, "the watcher was told of changes where there are none"
    put(at.loop, request("one", "abc", SamplingParams(max_tokens=9, ignore_eos=True)))
    at.run_once()
    assert len(changes) == 2, "the watcher was not told of the step"
    at.run_once(partial(at.loop.cancel, ["one"]))
    assert len(changes) == 3, "the watcher was not told of an iteration without a step"
    assert changes[-1].ended == ["one"]


def test_task_5_the_last_iteration_has_no_step() -> None:
    """Oracle: by hand."""
    at = Posting()
    put(at.loop, request("one"))
    at.run_once(at.loop.stop)
    assert "step" not in at.core.log, "there was a step"


def test_task_5_the_thread_iterates_until_a_task_stops_it() -> None:
    """Oracle: by hand: the given `run`, which everything hangs on: start, serve, stop."""
    at, ear = Posting(), Ear()
    begun = at.inbox.post(partial(at.loop.begin, lambda: at.core))
    thread = background(at.loop.run)
    value(begun, "`run` has not run the task `begin`")
    added = at.inbox.post(partial(at.loop.add, [request("one")], ear))
    value(added, "the second task was not run")
    assert text(ear.until_end()) == "bcd"
    value(at.inbox.post(at.loop.stop), "the task `stop` was not run: does `run_once` wait for tasks?")
    value(thread, "`run` does not return after `stop`")
    assert at.core.log.count("step") == 3, "three letters are three steps"


# Task 6: EngineLoop.drain


def test_task_6_new_requests_are_refused() -> None:
    """Oracle: by hand: new requests are refused, active ones stay."""
    at, drained = Posting(), Future[None]()
    put(at.loop, request("one"))
    at.loop.drain(None, drained)
    assert at.loop.refusal is not None
    assert isinstance(at.loop.refusal(), EngineStoppingError)
    with pytest.raises(EngineStoppingError):
        at.loop.add([request("two")], Ear())
    assert list(at.loop.active) == ["one"]
    assert not drained.done()


def test_task_6_a_refusal_that_is_there_stays() -> None:
    """Oracle: the docstring: an engine that was stopped, or has died, still says so."""
    at, there = Posting(), partial(EngineStoppingError, "stopped before")
    at.loop.refusal = there
    at.loop.drain(None, Future())
    assert at.loop.refusal is there


def test_task_6_it_is_over_when_all_have_ended() -> None:
    """Oracle: by hand: three letters, three turns, and nothing is cut off."""
    at, drained = Posting(), Future[None]()
    ear = put(at.loop, request("one"))
    at.run_once(partial(at.loop.drain, None, drained))
    assert not drained.done()
    at.run_once()
    assert not drained.done()
    at.run_once()
    assert is_over(drained)
    assert (text(ear.events), ear.events[-1].finish_reason) == ("bcd", "length")


def test_task_6_it_is_over_at_once_without_active_requests() -> None:
    """Oracle: by hand; a second time too."""
    at = Posting()
    for _ in range(2):
        drained: Future[None] = Future()
        at.run_once(partial(at.loop.drain, None, drained))
        assert is_over(drained)


def test_task_6_a_request_that_takes_too_long_is_cancelled_before_the_next_step() -> None:
    """Oracle: by hand: no time at all: the last events come in the same iteration, and it is over."""
    at, drained = Posting(), Future[None]()
    ear = put(at.loop, request("one"), request("two"))
    at.run_once()
    at.run_once(partial(at.loop.drain, 0, drained))
    assert at.core.log.count("step") == 1, "a step was made after the deadline"
    assert Counter(event.finish_reason for event in ear.events) == {None: 2, "abort": 2}
    assert is_over(drained)


def test_task_6_a_timeout_is_counted_from_now() -> None:
    """Oracle: by hand: time enough for all, so none is cancelled; and then time that runs out."""
    at, first = Posting(), Future[None]()
    ear = put(at.loop, request("one", params=SamplingParams(max_tokens=2)))
    at.run_once(partial(at.loop.drain, 100.0, first))
    at.run_once()
    assert ear.events[-1].finish_reason == "length"
    assert is_over(first)

    at, second = Posting(), Future[None]()
    ear = put(at.loop, request("one", params=LONG))
    at.run_once(partial(at.loop.drain, 0.05, second))
    time.sleep(0.06)
    at.run_once()
    assert ear.events[-1].finish_reason == "abort"
    assert is_over(second)


@pytest.mark.parametrize("timeouts", [(-0.001, None), (None, -0.001), (-0.001, 1000.0), (1000.0, -0.001)])
def test_task_6_of_two_the_shorter_one_counts(timeouts: tuple[float | None, float | None]) -> None:
    """Oracle: the docstring, for each of them; both are told."""
    at, drains = Posting(), (Future[None](), Future[None]())
    put(at.loop, request("one", params=LONG))
    at.run_once(*[partial(at.loop.drain, *each) for each in zip(timeouts, drains, strict=True)])
    assert not at.loop.active
    assert all(map(is_over, drains))
