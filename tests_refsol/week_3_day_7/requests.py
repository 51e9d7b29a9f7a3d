"""Tasks 1 and 2: requests come into the loop, and are cancelled."""

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
    LONGEST,
    TOKENIZER,
    AlphabetCore,
    Ear,
    Panic,
    hang_up,
    make_loop,
    published,
    put,
    reason,
    request,
)
from week_3_day_7.serving import free_blocks, small_core

# Task 1: EngineLoop.add


def test_task_1_a_request_is_queued_and_its_listener_known() -> None:
    """Oracle: by hand."""
    loop, one, ear = make_loop(), request("one"), Ear()
    loop.add([one], ear)
    assert loop.core.log == ["add one"]
    assert list(loop.active) == ["one"]
    assert loop.active["one"].request is one
    assert loop.active["one"].listener is ear
    assert ear.calls == []


def test_task_1_several_are_queued_in_their_order() -> None:
    """Oracle: by hand; an active request stays."""
    loop = make_loop()
    put(loop, request("old"))
    loop.add([request("b"), request("a")], Ear())
    assert loop.core.log == ["add old", "add b", "add a"]
    assert sorted(loop.active) == ["a", "b", "old"]


@pytest.mark.parametrize(("prompt", "error"), [("", ValueError), ("a" * (LONGEST + 1), RequestTooLargeError)])
def test_task_1_the_cores_error_is_raised(prompt: str, error: type[Exception]) -> None:
    """Oracle: what the core raises."""
    loop = make_loop()
    with pytest.raises(error):
        loop.add([request("one", prompt)], Ear())
    assert not loop.active
    assert not loop.core.has_work


def test_task_1_whatever_is_raised_none_is_queued() -> None:
    """Oracle: by hand: no `Exception`, from the second of two: the first is cancelled in the core."""
    loop, second = make_loop(), request("second")

    def interrupted(core: object) -> None:
        raise Panic

    second.begin = interrupted  # type: ignore[method-assign]
    with pytest.raises(Panic):
        loop.add([request("first"), second], Ear())
    assert not loop.core.has("first"), "a request that had begun stays in the core"
    assert not loop.active


@pytest.mark.parametrize("place", [0, 1, 2])
def test_task_1_all_or_none(place: int) -> None:
    """Oracle: by hand: one of three cannot run, so none of them does; an active request goes on."""
    loop, requests = make_loop(), [request(name) for name in "abc"]
    put(loop, request("old"))
    requests[place] = request("bad", "")
    with pytest.raises(ValueError, match="no tokens"):
        loop.add(requests, Ear())
    assert list(loop.active) == ["old"]
    assert [one.request_id for one in loop.core.waiting] == ["old"]


def test_task_1_an_id_in_use_does_not_end_its_owner() -> None:
    """Oracle: by hand. Cancelling every id that was asked for is the mistake: one of them is another's."""
    loop, owner = make_loop(), request("mine")
    put(loop, owner)
    with pytest.raises(DuplicateRequestError):
        loop.add([request("new"), request("mine"), request("other")], Ear())
    assert loop.active["mine"].request is owner
    assert [one.request_id for one in loop.core.waiting] == ["mine"]
    assert list(loop.active) == ["mine"]


def test_task_1_a_core_that_can_queue_no_more() -> None:
    """Oracle: the docstring: what `RequestState.begin` raises."""
    loop = make_loop()
    loop.core.is_full = True
    with pytest.raises(QueueFullError):
        loop.add([request("one")], Ear())
    assert not loop.active


def test_task_1_an_engine_that_takes_no_more_says_so() -> None:
    """Oracle: the error that `refusal` makes, whatever the request is."""
    loop = make_loop()
    loop.refusal = partial(EngineStoppingError, "no more")
    for prompt in ("a", ""):
        with pytest.raises(EngineStoppingError, match="no more"):
            loop.add([request("one", prompt)], Ear())
    assert loop.core.log == []
    assert not loop.active


@pytest.mark.parametrize("how", ["taken", "refused by the core", "refused by the engine"])
def test_task_1_requests_are_counted_as_seen_however_it_ends(how: str) -> None:
    """Oracle: by hand: 2, 4 and 6. Admission control counts a request as waiting until it is seen."""
    control = AdmissionControl(None, 0)
    loop = EngineLoop(Inbox(), control)
    loop.core = AlphabetCore()  # type: ignore[assignment]
    if how == "refused by the engine":
        loop.refusal = partial(EngineStoppingError, "no more")
    for number in range(3):
        second = request(f"b{number}", "" if how == "refused by the core" else "b")
        with suppress(ValueError, EngineStoppingError):
            loop.add([request(f"a{number}"), second], Ear())
        seen, waiting = control.occupancy.num_seen, control.occupancy.num_waiting
        asked = 2 * (number + 1)
        assert seen == asked, f"{asked} requests have come to `add`, and admission control sees {seen}"
        assert waiting == published(loop).num_waiting_requests
        assert waiting == (asked if how == "taken" else 0), "other threads see another number that waits"


# Task 2: EngineLoop.cancel


def test_task_2_a_cancelled_request_has_ended_everywhere() -> None:
    """Oracle: by hand."""
    loop, one = make_loop(), request("one")
    put(loop, one)
    loop.cancel(["one"])
    assert not loop.core.has_work
    assert not loop.active
    assert reason(one) == "abort"


def test_task_2_only_those_that_are_named() -> None:
    """Oracle: by hand: two of four."""
    loop, requests = make_loop(), [request(name) for name in "abcd"]
    put(loop, *requests)
    loop.core.step()
    loop.cancel(["d", "b"])
    assert list(loop.active) == ["a", "c"]
    assert [one.request_id for one in loop.core.running] == ["a", "c"]
    assert [reason(one) for one in requests] == [None, "abort", None, "abort"]


def test_task_2_unknown_ids_are_ignored() -> None:
    """Oracle: by hand: an unknown id, one that has ended, and one that is named twice."""
    loop, one = make_loop(), request("one")
    put(loop, one)
    loop.cancel(["nobody", "one", "one"])
    loop.cancel(["one"])
    loop.cancel([])
    assert loop.core.log == ["add one", "cancel one"]


def test_task_2_the_listener_gets_the_last_event() -> None:
    """Oracle: by hand: one event, with reason "abort" and the usage, and no other listener gets one."""
    loop = make_loop()
    ear, other = put(loop, request("one", "ab")), put(loop, request("two"))
    loop.cancel(["one"])
    loop.cancel(["one"])
    assert ear.calls == [], "`cancel` delivers nothing itself: the iteration does, when it ends"
    loop.core.cancel("two")
    del loop.active["two"]
    hang_up(loop)
    assert [len(call) for call in ear.calls] == [1], "one last event, delivered once"
    event = ear.items[0]
    assert isinstance(event, RequestEvent)
    assert (event.request_id, event.finish_reason, event.token_ids) == ("one", "abort", ())
    assert event.usage is not None
    assert (event.usage.prompt_tokens, event.usage.completion_tokens) == (2, 0)
    assert other.calls == []


def test_task_2_every_completion_that_has_not_ended_gets_an_event() -> None:
    """Oracle: by hand: of three the second has ended; the usage comes with the last event."""
    loop, one = make_loop(), request("one", params=SamplingParams(n=3, max_tokens=5, stop="b"))
    ear = put(loop, one)
    outputs = loop.core.step()
    one.push(outputs[1])
    loop.core.finish(outputs[1].seq_id)
    loop.cancel(["one"])
    hang_up(loop)
    assert [(event.index, event.finish_reason) for event in ear.events] == [(0, "abort"), (2, "abort")]
    assert [event.usage is None for event in ear.events] == [True, False]
    assert len(ear.calls) == 1


def test_task_2_others_see_the_free_capacity_at_once() -> None:
    """Oracle: the core's own figures, as other threads see them: `stats`, and admission control."""
    control = AdmissionControl(1, 0)
    loop = EngineLoop(Inbox(), control)
    loop.core = AlphabetCore()  # type: ignore[assignment]
    put(loop, request("one"), request("two"))
    loop.cancel(["one"])
    seen = (published(loop).num_waiting, control.occupancy.num_waiting)
    assert seen == (1, 1), "one of two was cancelled, and other threads see another number that waits"
    loop.cancel(["two"])
    seen = (published(loop).num_waiting, control.occupancy.num_waiting)
    assert seen == (0, 0), "both were cancelled, and other threads see that one waits"


def test_task_2_a_beam_search_ends_too() -> None:
    """Oracle: by hand: its only event says "abort", and its pages are back."""
    core = small_core()
    loop = make_loop(core)
    ear = put(loop, SearchState("beams", [1, 2, 3], TOKENIZER, BeamSearchParams(beam_width=2, max_tokens=9)))
    core.step()
    loop.cancel(["beams"])
    assert free_blocks(core) == core.manager.capacity.num_blocks
    hang_up(loop)
    assert len(ear.events) == 1, "a search that is cancelled has one event, its last"
    event = ear.events[0]
    assert event.finish_reason == "abort"
    assert event.usage is not None


# `forget`, which is given, cancels by the object, not by the id


def test_task_2_a_forgotten_request_has_ended() -> None:
    """Oracle: by hand: cancelled as by `cancel`; the other goes on."""
    loop, one, other = make_loop(), request("one"), request("other")
    ear = put(loop, one, other)
    loop.forget([one])
    assert list(loop.active) == ["other"]
    assert [left.request_id for left in loop.core.waiting] == ["other"]
    assert (reason(one), reason(other)) == ("abort", None)
    hang_up(loop)
    assert ear.events[0].request_id == "one"


def test_task_2_forget_does_not_cancel_another_request_with_the_id() -> None:
    """Oracle: by hand: the old one ended, and a new one took its id. Common mistake: cancelling by id."""
    loop, old, new = make_loop(), request("name"), request("name")
    put(loop, old)
    loop.core.cancel("name")
    put(loop, new)
    loop.forget([old])
    assert loop.active["name"].request is new
    assert loop.core.has("name")
    assert reason(new) is None
    loop.forget([new])
    assert not loop.core.has_work


def test_task_2_some_have_ended_and_some_were_never_there() -> None:
    """Oracle: by hand: of four, the one that is there is cancelled."""
    loop, names = make_loop(), "abcd"
    requests = [request(name) for name in names]
    put(loop, requests[1], request("c"))
    loop.forget(requests)
    assert list(loop.active) == ["c"]
    assert loop.core.log == ["add b", "add c", "cancel b"]
