"""Tasks 3 and 4: a step of the core becomes events, errors and ends of requests."""

import time

from tiny_llm.admission_control import AdmissionControl
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.engine_loop import ActiveRequest, EngineLoop
from tiny_llm.errors import (
    RequestFailedError,
)
from tiny_llm.inbox import Inbox
from tiny_llm.output_processor import RequestState
from tiny_llm.outputs import RequestEvent
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.search_state import SearchState
from tiny_llm.sequence import completion_ids
from tiny_llm.token_output import TokenOutput

from week_3_day_7.alphabet import (
    ALPHABET,
    THREE,
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
    text,
)
from week_3_day_7.serving import small_core

# Task 3: EngineLoop.take_output


def take_all(loop: EngineLoop) -> None:
    """A step of the core, each of its outputs taken."""
    for output in loop.core.step():
        loop.take_output(output)


def only_failure(ear: Ear) -> RequestFailedError:
    """What a listener got, where that is one error and nothing else."""
    kinds = [type(item).__name__ for item in ear.items]
    assert kinds == ["RequestFailedError"], "the listener of a failed request gets one error, and no event"
    return ear.errors[0]


def test_task_3_a_token_becomes_an_event_of_its_request() -> None:
    """Oracle: by hand: "b" follows "a", and "n" follows "m"; each listener gets its own."""
    loop = make_loop()
    one, two = put(loop, request("one", "a")), put(loop, request("two", "m"))
    take_all(loop)
    assert list(loop.active) == ["one", "two"]
    hang_up(loop)
    assert [(event.text, event.token_ids, event.finish_reason) for event in one.events] == [
        ("b", (1,), None),
        ("", (), "abort"),
    ]
    assert two.events[0].text == "n"


def test_task_3_a_request_that_has_ended_is_gone() -> None:
    """Oracle: by hand: one token, reason "length", and its usage; there is nothing to abort afterwards."""
    loop = make_loop()
    ear = put(loop, request("one", params=SamplingParams(max_tokens=1)))
    take_all(loop)
    assert not loop.active
    hang_up(loop)
    assert len(ear.events) == 1, "one token is one event"
    event = ear.events[0]
    assert (event.text, event.finish_reason) == ("b", "length")
    assert event.usage is not None
    assert event.usage.completion_tokens == 1


def test_task_3_a_request_goes_when_its_last_completion_ends() -> None:
    """Oracle: by hand: two completions; going with the first that ends is the mistake."""
    loop, one = make_loop(), request("one", params=SamplingParams(n=2, max_tokens=5))
    put(loop, one)
    loop.core.waiting[0].left = 1
    take_all(loop)
    assert list(loop.active) == ["one"]
    for _ in range(4):
        take_all(loop)
    assert not loop.active
    assert [len(completion.token_ids) for completion in one.output.outputs] == [1, 5]


def test_task_3_a_stop_string_ends_a_request_before_the_next_step() -> None:
    """Oracle: by hand: the third letter completes "cd"; the core has no more work with it."""
    loop, one = make_loop(), request("one", params=SamplingParams(max_tokens=9, stop="cd"))
    ear = put(loop, one)
    for _ in range(3):
        assert loop.core.has("one")
        take_all(loop)
    assert not loop.core.has("one"), "it runs on, and its pages are not back"
    assert not loop.active
    hang_up(loop)
    assert (text(ear.events), ear.events[-1].finish_reason, reason(one)) == ("b", "stop", "stop")


def test_task_3_a_stop_string_ends_one_completion_of_several() -> None:
    """Oracle: by hand: cancelling the whole request is the mistake."""
    loop, one = make_loop(), request("one", params=SamplingParams(n=2, max_tokens=4, stop="xy"))
    put(loop, one)
    loop.core.waiting[1].token = ALPHABET.index("w")
    take_all(loop)
    take_all(loop)
    assert loop.core.log[-1] == f"finish {completion_ids('one', 2)[1]}"
    take_all(loop)
    take_all(loop)
    assert not loop.active
    assert [completion.text for completion in one.output.outputs] == ["bcde", ""]


def test_task_3_what_the_core_has_ended_is_not_ended_again() -> None:
    """Oracle: by hand: a stop string in the very last letter; the core knows no such sequence any more."""
    loop, one = make_loop(), request("one", params=SamplingParams(max_tokens=2, stop="c"))
    put(loop, one)
    take_all(loop)
    take_all(loop)
    assert reason(one) == "stop"
    assert not loop.active


class Unspeakable(RequestState):
    """A request whose text cannot be made."""

    error: BaseException = ArithmeticError("no text")

    def push(self, output: TokenOutput) -> RequestEvent:
        """Raise, whatever the token is."""
        raise self.error


def test_task_3_a_text_that_cannot_be_made_fails_only_its_request() -> None:
    """Oracle: by hand: it ends in the core too, with one error for its two completions; the other goes on."""
    loop = make_loop()
    bad, good = Ear(), Ear()
    put(loop, Unspeakable("bad", "a", [0], TOKENIZER, SamplingParams(n=2, max_tokens=9)), ear=bad)
    put(loop, request("good"), ear=good)
    take_all(loop)
    assert list(loop.active) == ["good"], "a request that has failed is active no more, the other goes on"
    assert not loop.core.has("bad"), "what has failed is still in the core"
    take_all(loop)
    hang_up(loop)
    failed = only_failure(bad)
    assert isinstance(failed.__cause__, ArithmeticError)
    assert failed.request_id == "bad"
    assert text(good.events) == "bc"


def test_task_3_a_panic_of_the_tokenizer_fails_only_its_request() -> None:
    """Oracle: by hand. Catching `Exception` is the mistake: the engine would die of one request's text."""
    loop, bad = make_loop(), Unspeakable("bad", "a", [0], TOKENIZER, THREE)
    bad.error = Panic("no text")
    failing, ear = put(loop, bad), put(loop, request("good"))
    take_all(loop)
    assert list(loop.active) == ["good"], "a request that has failed is active no more, the other goes on"
    assert not loop.core.has("bad"), "what has failed is still in the core"
    hang_up(loop)
    assert only_failure(failing).__cause__ is bad.error
    assert text(ear.events) == "b"


def test_task_3_a_sequence_that_cannot_be_finished_fails_only_its_request() -> None:
    """Oracle: by hand: the core's `finish` raises; the event is dropped, and the error comes instead."""
    loop, error = make_loop(), ArithmeticError("not finished")
    bad, good = put(loop, request("bad", params=SamplingParams(stop="b"))), put(loop, request("good"))

    def unfinished(seq_id: str) -> None:
        raise error

    loop.core.finish = unfinished  # type: ignore[method-assign]
    take_all(loop)
    assert list(loop.active) == ["good"], "a request that has failed is active no more, the other goes on"
    assert not loop.core.has("bad"), "what has failed is still in the core"
    hang_up(loop)
    assert only_failure(bad).__cause__ is error
    assert text(good.events) == "b"


def test_task_3_tokens_without_a_listener_are_ignored() -> None:
    """Oracle: by hand: a request was added to the core directly."""
    loop = make_loop()
    ear = put(loop, request("mine"))
    loop.core.add_request("by hand", [5], THREE)
    for _ in range(2):
        take_all(loop)
    assert loop.core.has("by hand")
    hang_up(loop)
    assert {event.request_id for event in ear.events} == {"mine"}


def test_task_3_a_search_has_no_outputs() -> None:
    """Oracle: by hand: a token with the id of a beam search is ignored; the search goes on."""
    loop, ear = make_loop(), Ear()
    search = SearchState("beams", [1, 2], TOKENIZER, BeamSearchParams(beam_width=2, max_tokens=9))
    loop.active["beams"] = ActiveRequest(search, ear)
    loop.take_output(TokenOutput("beams", "beams", 3, None, None, None))
    assert list(loop.active) == ["beams"], "an output for a request that is no `RequestState` is ignored"
    assert loop.core.log == []
    loop.cancel(["beams"])
    hang_up(loop)
    assert [event.finish_reason for event in ear.events] == ["abort"]


# Task 4: EngineLoop.step


def test_task_4_a_step_is_a_letter_for_each() -> None:
    """Oracle: by hand: "b" follows "a", and "n" follows "m"."""
    loop = make_loop()
    one, two = put(loop, request("one", "a")), put(loop, request("two", "m"))
    loop.step()
    assert loop.core.log.count("step") == 1, "`step` is one step of the core"
    hang_up(loop)
    assert [(event.request_id, event.text, event.token_ids) for event in one.events[:1]] == [
        ("one", "b", (1,))
    ]
    assert [(event.request_id, event.text, event.token_ids) for event in two.events[:1]] == [
        ("two", "n", (13,))
    ]


def test_task_4_a_failure_reaches_only_its_listener() -> None:
    """Oracle: by hand: the error names the request, and has its cause; the other gets its letter."""
    loop, error = make_loop(), ArithmeticError("broken")
    bad, good = put(loop, request("bad")), put(loop, request("good"))
    loop.step()
    loop.core.failing["bad"] = error
    loop.step()
    assert list(loop.active) == ["good"], "a request that has failed is active no more, the other goes on"
    loop.core.cancel("good")
    del loop.active["good"]
    hang_up(loop)
    assert len(bad.errors) == 1, "the listener of a failed request gets one error"
    failed = bad.errors[0]
    assert failed.request_id == "bad"
    assert failed.__cause__ is error
    assert text(bad.events) == "b"
    assert (text(good.events), good.errors) == ("bc", [])


def test_task_4_two_failures_are_two_errors() -> None:
    """Oracle: by hand: in one step, for one listener, whose third request goes on."""
    loop = make_loop()
    ear = put(loop, *[request(name) for name in "abc"])
    loop.core.failing = {"a": ArithmeticError("a"), "c": ArithmeticError("c")}
    loop.step()
    assert list(loop.active) == ["b"]
    hang_up(loop)
    assert {str(error.__cause__): error.request_id for error in ear.errors} == {"a": "a", "c": "c"}
    assert len(ear.errors) == 2, "two requests have failed, and each has one error"


def test_task_4_a_search_ends_with_one_event() -> None:
    """Oracle: the core's own search, stepped by hand."""
    params, prompt = BeamSearchParams(beam_width=3, max_tokens=4), [3, 1, 4, 1]
    alone, core = small_core(), small_core()
    expected = alone.add_beam_search("alone", prompt, params)
    while expected.beams:
        alone.step()
    loop, search = make_loop(core), SearchState("beams", prompt, TOKENIZER, params)
    ear = put(loop, search)
    steps = 0
    while loop.active and steps < 20:
        loop.step()
        steps += 1
    assert steps == 4, "the search has 4 tokens: it ends in the 4th step, and is active no more"
    hang_up(loop)
    assert len(ear.events) == 1, "a search has one event, its last"
    event = ear.events[0]
    assert event.finish_reason == "stop"
    assert event.usage is not None
    found = [sequence.tokens[4:] for sequence in search.output.sequences]
    assert found == [ended.hypothesis.tokens for ended in expected.ended]


def test_task_4_how_long_it_took_and_how_full_it_is() -> None:
    """Oracle: by hand: a core that takes 20 ms; figures of the core after the step."""
    loop = make_loop(AlphabetCore(max_seqs=2))
    put(loop, *[request(name) for name in "abc"])
    step = loop.core.step

    def slow() -> list[TokenOutput]:
        time.sleep(0.02)
        return step()

    loop.core.step = slow  # type: ignore[method-assign]
    for number in range(1, 4):
        loop.step()
        assert len(loop.step_times) == number, "each step has its times, once"
        assert loop.step_times[-1].core >= 0.015
        assert loop.step_times[-1].text >= 0
    loop.core.step = step  # type: ignore[method-assign]
    stats = published(loop)
    assert (stats.num_running, stats.num_waiting) == (0, 1), "the figures are not those after the step"


def test_task_4_a_core_that_is_slow_and_a_text_that_is_slow() -> None:
    """Oracle: by hand: one of the two sleeps for 50 ms, and the other takes less than that."""
    loop, slow = make_loop(), request("slow")
    put(loop, slow)
    step, push = loop.core.step, slow.push

    def slow_step() -> list[TokenOutput]:
        time.sleep(0.05)
        return step()

    def slow_push(output: TokenOutput) -> RequestEvent:
        time.sleep(0.05)
        return push(output)

    loop.core.step = slow_step  # type: ignore[method-assign]
    loop.step()
    assert loop.step_times[-1].text < loop.step_times[-1].core, "the text's seconds include the core's"
    loop.core.step = step  # type: ignore[method-assign]
    slow.push = slow_push  # type: ignore[method-assign]
    loop.step()
    assert loop.step_times[-1].core < loop.step_times[-1].text, "the core's seconds include the text's"


def test_task_4_admission_control_sees_that_a_step_left_a_request_waiting() -> None:
    """Oracle: by hand: two sequences run at once, the third request waits until one of them has ended."""
    control = AdmissionControl(None, 2)
    loop = EngineLoop(Inbox(), control)
    loop.core = AlphabetCore(max_seqs=2)  # type: ignore[assignment]
    put(loop, *[request(name, params=SamplingParams(max_tokens=2)) for name in "abc"])
    loop.step()
    assert (control.occupancy.num_waiting, control.occupancy.is_crowded) == (1, True)
    for _ in range(3):
        loop.step()
    assert (control.occupancy.num_waiting, control.occupancy.is_crowded) == (0, False)
