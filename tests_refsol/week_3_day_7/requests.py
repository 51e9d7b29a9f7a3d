"""Day 3.7, tasks 1 and 2: adding requests to the engine loop, and cancelling them."""

from contextlib import suppress
from functools import partial

import pytest
from tiny_llm.admission_control import AdmissionControl
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.engine_loop import EngineLoop
from tiny_llm.errors import (
    DuplicateRequestError,
    EngineStoppingError,
    QueueFullError,
    RequestTooLargeError,
)
from tiny_llm.inbox import Inbox
from tiny_llm.outputs import RequestEvent
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.search_state import SearchState

from week_3_day_7.alphabet import (
    MAX_PROMPT,
    THREE_TOKENS,
    TOKENIZER,
    AlphabetCore,
    Panic,
    RecordingListener,
    activate,
    finish_loop,
    make_loop,
    published,
    reason,
    request,
)
from week_3_day_7.serving import free_blocks, small_core

# Task 1: EngineLoop.add


def test_task_1_adding_a_request_queues_it_and_records_its_listener() -> None:
    """Oracle: by hand."""
    loop, one, listener = make_loop(), request("one"), RecordingListener()
    loop.add([one], listener)
    assert loop.core.log == ["add one"]
    assert list(loop.active) == ["one"]
    assert loop.active["one"].request is one
    assert loop.active["one"].listener is listener
    assert listener.calls == []


def test_task_1_several_requests_are_queued_in_the_given_order() -> None:
    """Oracle: by hand; an active request stays."""
    loop = make_loop()
    activate(loop, request("old"))
    loop.add([request("b"), request("a")], RecordingListener())
    assert loop.core.log == ["add old", "add b", "add a"]
    assert sorted(loop.active) == ["a", "b", "old"]


@pytest.mark.parametrize(
    ("prompt", "error"), [("", ValueError), ("a" * (MAX_PROMPT + 1), RequestTooLargeError)]
)
def test_task_1_the_error_of_the_core_is_raised(prompt: str, error: type[Exception]) -> None:
    """Oracle: what the core raises."""
    loop = make_loop()
    with pytest.raises(error):
        loop.add([request("one", prompt)], RecordingListener())
    assert not loop.active
    assert not loop.core.has_work


def test_task_1_any_error_cancels_the_requests_already_queued() -> None:
    """Oracle: by hand: the second of two raises an error that is not an `Exception`.

    The first is cancelled.
    """
    loop, second = make_loop(), request("second")

    def interrupted(core: object) -> None:
        raise Panic

    second.begin = interrupted  # type: ignore[method-assign]
    with pytest.raises(Panic):
        loop.add([request("first"), second], RecordingListener())
    assert not loop.core.has("first"), "the first request must be cancelled in the core"
    assert not loop.active


@pytest.mark.parametrize("position", [0, 1, 2])
def test_task_1_all_requests_of_a_call_are_queued_or_none(position: int) -> None:
    """Oracle: by hand: one of three is invalid, so none is queued; an active request continues."""
    loop, requests = make_loop(), [request(name) for name in "abc"]
    activate(loop, request("old"))
    requests[position] = request("bad", "")
    with pytest.raises(ValueError, match="no tokens"):
        loop.add(requests, RecordingListener())
    assert list(loop.active) == ["old"]
    assert [one.request_id for one in loop.core.waiting] == ["old"]


def test_task_1_a_rejected_duplicate_id_does_not_cancel_its_owner() -> None:
    """Oracle: by hand.

    Common mistake: cancelling all requested ids, one of which belongs to another request.
    """
    loop, owner = make_loop(), request("mine")
    activate(loop, owner)
    with pytest.raises(DuplicateRequestError):
        loop.add([request("new"), request("mine"), request("other")], RecordingListener())
    assert list(loop.active) == ["mine"], "only the active request must stay active"
    assert loop.active["mine"].request is owner
    waiting = [one.request_id for one in loop.core.waiting]
    assert waiting == ["mine"], (
        f"{waiting} wait in the core: cancel the requests that this call has queued, and not the request "
        "that had its id before"
    )


def test_task_1_a_full_core_raises_queue_full_error() -> None:
    """Oracle: the docstring: the errors of `RequestState.begin`."""
    loop = make_loop()
    loop.core.is_full = True
    with pytest.raises(QueueFullError):
        loop.add([request("one")], RecordingListener())
    assert not loop.active


def test_task_1_a_refusal_is_raised_for_every_request() -> None:
    """Oracle: the error that `refusal` makes, for valid and invalid requests."""
    loop = make_loop()
    loop.refusal = partial(EngineStoppingError, "no more")
    for prompt in ("a", ""):
        with pytest.raises(EngineStoppingError, match="no more"):
            loop.add([request("one", prompt)], RecordingListener())
    assert loop.core.log == []
    assert not loop.active


@pytest.mark.parametrize("outcome", ["queued", "rejected by the core", "rejected by the engine"])
def test_task_1_requests_are_counted_as_seen_whatever_their_outcome(outcome: str) -> None:
    """Oracle: by hand: 2, 4 and 6. Admission control counts a request as waiting until it is seen."""
    control = AdmissionControl(None, 0)
    loop = EngineLoop(Inbox(), control)
    loop.core = AlphabetCore()  # type: ignore[assignment]
    if outcome == "rejected by the engine":
        loop.refusal = partial(EngineStoppingError, "no more")
    for number in range(3):
        second = request(f"b{number}", "" if outcome == "rejected by the core" else "b")
        with suppress(ValueError, EngineStoppingError):
            loop.add([request(f"a{number}"), second], RecordingListener())
        seen, waiting = control.occupancy.num_seen, control.occupancy.num_waiting
        asked = 2 * (number + 1)
        assert seen == asked, f"`add` got {asked} requests, but admission control sees {seen}"
        assert waiting == published(loop).num_waiting_requests
        assert waiting == (asked if outcome == "queued" else 0), (
            "other threads see a wrong number of waiting requests"
        )


# Task 2: EngineLoop.cancel


def test_task_2_a_cancelled_request_is_removed_from_the_core_and_the_loop() -> None:
    """Oracle: by hand."""
    loop, one = make_loop(), request("one")
    activate(loop, one)
    loop.cancel(["one"])
    assert not loop.core.has_work
    assert not loop.active
    assert reason(one) == "abort"


def test_task_2_only_the_given_requests_are_cancelled() -> None:
    """Oracle: by hand: two of four."""
    loop, requests = make_loop(), [request(name) for name in "abcd"]
    activate(loop, *requests)
    loop.core.step()
    loop.cancel(["d", "b"])
    assert list(loop.active) == ["a", "c"]
    assert [one.request_id for one in loop.core.running] == ["a", "c"]
    assert [reason(one) for one in requests] == [None, "abort", None, "abort"]


def test_task_2_unknown_ids_are_ignored() -> None:
    """Oracle: by hand: an unknown id, a duplicate, and one that has ended. The ids after each are cancelled.

    Common mistake: returning at an id that is not active.
    """
    loop = make_loop()
    activate(loop, request("one"), request("two"))
    loop.cancel(["unknown", "one", "one", "two"])
    assert loop.core.log == ["add one", "add two", "cancel one", "cancel two"], (
        "an id that is not active must be skipped; the ids after it must be cancelled"
    )
    assert not loop.active
    loop.cancel(["one"])
    loop.cancel([])
    assert loop.core.log == ["add one", "add two", "cancel one", "cancel two"]


def test_task_2_a_request_that_was_added_to_the_core_directly_is_not_cancelled() -> None:
    """Oracle: the docstring: its id is not in `active`, so it is unknown and ignored."""
    loop = make_loop()
    activate(loop, request("one"))
    loop.core.add_request("by hand", [5], THREE_TOKENS)
    loop.cancel(["by hand", "one"])
    assert loop.core.has("by hand"), (
        "an id that is not in `active` must be ignored: a caller added this request to the core directly"
    )
    assert not loop.core.has("one")


def test_task_2_the_listener_gets_the_last_event() -> None:
    """Oracle: by hand: one event, with reason "abort" and the usage, and no other listener gets one."""
    loop = make_loop()
    listener, other = activate(loop, request("one", "ab")), activate(loop, request("two"))
    loop.cancel(["one"])
    loop.cancel(["one"])
    assert listener.calls == [], "`cancel` must not deliver events itself: the iteration does at its end"
    loop.core.cancel("two")
    del loop.active["two"]
    finish_loop(loop)
    assert [len(call) for call in listener.calls] == [1], "the last event must be delivered exactly once"
    event = listener.items[0]
    assert isinstance(event, RequestEvent)
    assert (event.request_id, event.finish_reason, event.token_ids) == ("one", "abort", ())
    assert event.usage is not None
    assert (event.usage.prompt_tokens, event.usage.completion_tokens) == (2, 0)
    assert other.calls == []


def test_task_2_every_unfinished_completion_gets_a_last_event() -> None:
    """Oracle: by hand: the second of three has finished; the usage comes with the last event."""
    loop, one = make_loop(), request("one", params=SamplingParams(n=3, max_tokens=5, stop="b"))
    listener = activate(loop, one)
    outputs = loop.core.step()
    one.push(outputs[1])
    loop.core.finish(outputs[1].seq_id)
    loop.cancel(["one"])
    finish_loop(loop)
    assert [(event.index, event.finish_reason) for event in listener.events] == [(0, "abort"), (2, "abort")]
    assert [event.usage is None for event in listener.events] == [True, False]
    assert len(listener.calls) == 1


def test_task_2_other_threads_see_the_new_figures_at_once() -> None:
    """Oracle: the core's figures, as other threads see them in `stats` and admission control."""
    control = AdmissionControl(1, 0)
    loop = EngineLoop(Inbox(), control)
    loop.core = AlphabetCore()  # type: ignore[assignment]
    activate(loop, request("one"), request("two"))
    loop.cancel(["one"])
    seen = (published(loop).num_waiting, control.occupancy.num_waiting)
    assert seen == (1, 1), "one of two was cancelled, but other threads do not see one waiting request"
    loop.cancel(["two"])
    seen = (published(loop).num_waiting, control.occupancy.num_waiting)
    assert seen == (0, 0), "both were cancelled, but other threads see a waiting request"


def test_task_2_a_beam_search_can_be_cancelled() -> None:
    """Oracle: by hand: its only event has reason "abort", and its pages are freed."""
    core = small_core()
    loop = make_loop(core)
    listener = activate(
        loop, SearchState("beams", [1, 2, 3], TOKENIZER, BeamSearchParams(beam_width=2, max_tokens=9))
    )
    core.step()
    loop.cancel(["beams"])
    assert free_blocks(core) == core.manager.capacity.num_blocks
    finish_loop(loop)
    assert len(listener.events) == 1, "a cancelled search must have exactly one event"
    event = listener.events[0]
    assert event.finish_reason == "abort"
    assert event.usage is not None


# `forget`, which is given, cancels by the object, not by the id


def test_task_2_forgetting_requests_cancels_them() -> None:
    """Oracle: by hand: cancelled as by `cancel`; the other continues."""
    loop, one, other = make_loop(), request("one"), request("other")
    listener = activate(loop, one, other)
    loop.forget([one])
    assert list(loop.active) == ["other"]
    assert [left.request_id for left in loop.core.waiting] == ["other"]
    assert (reason(one), reason(other)) == ("abort", None)
    finish_loop(loop)
    assert listener.events[0].request_id == "one"


def test_task_2_forgetting_a_request_does_not_cancel_another_request_with_the_same_id() -> None:
    """Oracle: by hand: the old request finished, and a new one uses its id.

    Common mistake: cancelling by id.
    """
    loop, old, new = make_loop(), request("name"), request("name")
    activate(loop, old)
    loop.core.cancel("name")
    activate(loop, new)
    loop.forget([old])
    assert loop.active["name"].request is new
    assert loop.core.has("name")
    assert reason(new) is None
    loop.forget([new])
    assert not loop.core.has_work


def test_task_2_forgetting_requests_ignores_finished_and_unknown_ones() -> None:
    """Oracle: by hand: of four, the only active one is cancelled."""
    loop, names = make_loop(), "abcd"
    requests = [request(name) for name in names]
    activate(loop, requests[1], request("c"))
    loop.forget(requests)
    assert list(loop.active) == ["c"]
    assert loop.core.log == ["add b", "add c", "cancel b"]
