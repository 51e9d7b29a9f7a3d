"""Day 3.7, tasks 3 and 4: turning a step of the core into events, errors and finished requests."""

import time
from collections.abc import Sequence
from typing import Any

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
    text,
)
from week_3_day_7.serving import small_core

# Task 3: EngineLoop.take_output


def take_all(loop: EngineLoop) -> None:
    """Make a step of the core and pass each output to `take_output`."""
    for output in loop.core.step():
        loop.take_output(output)


def only_failure(listener: RecordingListener) -> RequestFailedError:
    """The only item of a listener, which must be an error."""
    kinds = [type(item).__name__ for item in listener.items]
    assert kinds == ["RequestFailedError"], "the listener of a failed request must get one error and no event"
    return listener.errors[0]


def test_task_3_a_token_becomes_an_event_of_its_request() -> None:
    """Oracle: by hand: "b" follows "a", and "n" follows "m"; each listener gets its own."""
    loop = make_loop()
    one, two = activate(loop, request("one", "a")), activate(loop, request("two", "m"))
    take_all(loop)
    assert list(loop.active) == ["one", "two"]
    finish_loop(loop)
    assert [(event.text, event.token_ids, event.finish_reason) for event in one.events] == [
        ("b", (1,), None),
        ("", (), "abort"),
    ]
    assert two.events[0].text == "n"


def test_task_3_a_finished_request_is_removed() -> None:
    """Oracle: by hand: one token, reason "length", and the usage; nothing is left to abort."""
    loop = make_loop()
    listener = activate(loop, request("one", params=SamplingParams(max_tokens=1)))
    take_all(loop)
    assert not loop.active
    finish_loop(loop)
    assert len(listener.events) == 1, "one token must give one event"
    event = listener.events[0]
    assert (event.text, event.finish_reason) == ("b", "length")
    assert event.usage is not None
    assert event.usage.completion_tokens == 1


def test_task_3_a_request_is_removed_when_its_last_completion_finishes() -> None:
    """Oracle: by hand: two completions. Common mistake: removing the request with the first one."""
    loop, one = make_loop(), request("one", params=SamplingParams(n=2, max_tokens=5))
    activate(loop, one)
    loop.core.waiting[0].left = 1
    take_all(loop)
    assert list(loop.active) == ["one"]
    for _ in range(4):
        take_all(loop)
    assert not loop.active
    assert [len(completion.token_ids) for completion in one.output.outputs] == [1, 5]


def test_task_3_a_stop_string_finishes_a_request_before_the_next_step() -> None:
    """Oracle: by hand: the third letter completes "cd"; the core finishes the sequence."""
    loop, one = make_loop(), request("one", params=SamplingParams(max_tokens=9, stop="cd"))
    listener = activate(loop, one)
    for _ in range(3):
        assert loop.core.has("one")
        take_all(loop)
    assert not loop.core.has("one"), "the core must finish the sequence, which frees its pages"
    assert not loop.active
    finish_loop(loop)
    assert (text(listener.events), listener.events[-1].finish_reason, reason(one)) == ("b", "stop", "stop")


def test_task_3_a_stop_string_finishes_only_one_of_several_completions() -> None:
    """Oracle: by hand. Common mistake: cancelling the whole request."""
    loop, one = make_loop(), request("one", params=SamplingParams(n=2, max_tokens=4, stop="xy"))
    activate(loop, one)
    loop.core.waiting[1].token = ALPHABET.index("w")
    take_all(loop)
    take_all(loop)
    assert loop.core.log[-1] == f"finish {completion_ids('one', 2)[1]}"
    take_all(loop)
    take_all(loop)
    assert not loop.active
    assert [completion.text for completion in one.output.outputs] == ["bcde", ""]


def test_task_3_a_stop_string_in_the_very_last_token_is_not_an_error() -> None:
    """Oracle: by hand: the output says "length", the event "stop".

    Common mistake: finishing the sequence because the two differ. The core no longer has it, so `finish`
    raises, and the client gets an error instead of its last event.
    """
    loop, one = make_loop(), request("one", params=SamplingParams(max_tokens=2, stop="c"))
    listener = activate(loop, one)
    take_all(loop)
    take_all(loop)
    assert reason(one) == "stop"
    assert not loop.active
    finish_loop(loop)
    assert listener.errors == [], (
        "the output has a finish_reason, so the core has ended the sequence: do not finish it again"
    )
    assert [event.finish_reason for event in listener.events] == [None, "stop"]
    assert listener.events[-1].usage is not None


class TokenizerWithoutX:
    """A tokenizer that cannot decode the letter "x"; also its detokenizer."""

    def __init__(self, detokenizer: Any = None) -> None:
        self.detokenizer = detokenizer

    def stream(self, prompt: Sequence[int], **options: Any) -> "TokenizerWithoutX":
        """A detokenizer that has read the prompt."""
        return TokenizerWithoutX(TOKENIZER.stream(prompt, **options))

    def fork(self) -> "TokenizerWithoutX":
        """A second one in the same state."""
        return TokenizerWithoutX(self.detokenizer.fork())

    def push(self, token: int) -> Any:
        """The text of a token; raises for "x"."""
        if token == ALPHABET.index("x"):
            raise ArithmeticError("no text")
        return self.detokenizer.push(token)

    def flush(self) -> Any:
        """The text that was held back."""
        return self.detokenizer.flush()


def test_task_3_a_completion_without_text_is_finished_in_the_core_and_the_others_continue() -> None:
    """Oracle: by hand: the event says "error", the output nothing.

    Common mistake: finishing only for the reason "stop", so that the core computes tokens without a reader.
    """
    params, tokenizer = SamplingParams(n=2, max_tokens=4), TokenizerWithoutX()
    loop, one = make_loop(), RequestState("one", "a", [0], tokenizer, params)  # type: ignore[arg-type]
    listener = activate(loop, one)
    loop.core.waiting[1].token = ALPHABET.index("w")
    take_all(loop)
    broken = completion_ids("one", 2)[1]
    assert f"finish {broken}" in loop.core.log, (
        'the event has the finish_reason "error" and the output has none: the core must finish the sequence'
    )
    assert list(loop.active) == ["one"], "the other completion must continue"
    while loop.core.has_work:
        take_all(loop)
    assert not loop.active
    finish_loop(loop)
    assert listener.errors == [], "one of two completions has failed, so the request must not fail"
    reasons = {event.index: event.finish_reason for event in listener.events if event.finish_reason}
    assert reasons == {0: "length", 1: "error"}
    assert text([event for event in listener.events if event.index == 0]) == "bcde"


class FailingRequest(RequestState):
    """A request whose `push` raises."""

    error: BaseException = ArithmeticError("`push` has raised: only its request must fail")

    def push(self, output: TokenOutput) -> RequestEvent:
        """Raise `error`."""
        raise self.error


def test_task_3_an_error_while_making_text_fails_only_its_request() -> None:
    """Oracle: by hand: the core cancels it too; its two completions get one error.

    The other request continues.
    """
    loop = make_loop()
    bad, good = RecordingListener(), RecordingListener()
    activate(
        loop, FailingRequest("bad", "a", [0], TOKENIZER, SamplingParams(n=2, max_tokens=9)), listener=bad
    )
    activate(loop, request("good"), listener=good)
    take_all(loop)
    assert list(loop.active) == ["good"], "a failed request must be removed, and the other must stay active"
    assert not loop.core.has("bad"), "the failed request is still in the core"
    take_all(loop)
    finish_loop(loop)
    failed = only_failure(bad)
    assert isinstance(failed.__cause__, ArithmeticError)
    assert failed.request_id == "bad"
    assert text(good.events) == "bc"


def test_task_3_a_panic_of_the_tokenizer_fails_only_its_request() -> None:
    """Oracle: by hand. Common mistake: catching only `Exception`, so that the engine dies."""
    loop, bad = make_loop(), FailingRequest("bad", "a", [0], TOKENIZER, THREE_TOKENS)
    bad.error = Panic("`push` has raised a BaseException: only its request must fail")
    failing, listener = activate(loop, bad), activate(loop, request("good"))
    take_all(loop)
    assert list(loop.active) == ["good"], "a failed request must be removed, and the other must stay active"
    assert not loop.core.has("bad"), "the failed request is still in the core"
    finish_loop(loop)
    assert only_failure(failing).__cause__ is bad.error
    assert text(listener.events) == "b"


def test_task_3_an_error_of_finish_fails_only_its_request() -> None:
    """Oracle: by hand: the core's `finish` raises; the listener gets the error instead of the event."""
    loop, error = make_loop(), ArithmeticError("`finish` has raised: only its request must fail")
    bad, good = (
        activate(loop, request("bad", params=SamplingParams(stop="b"))),
        activate(loop, request("good")),
    )

    def failing_finish(seq_id: str) -> None:
        raise error

    loop.core.finish = failing_finish  # type: ignore[method-assign]
    take_all(loop)
    assert list(loop.active) == ["good"], "a failed request must be removed, and the other must stay active"
    assert not loop.core.has("bad"), "the failed request is still in the core"
    finish_loop(loop)
    assert only_failure(bad).__cause__ is error
    assert text(good.events) == "b"


def test_task_3_tokens_without_a_listener_are_ignored() -> None:
    """Oracle: by hand: a request was added to the core directly."""
    loop = make_loop()
    listener = activate(loop, request("mine"))
    loop.core.add_request("by hand", [5], THREE_TOKENS)
    for _ in range(2):
        take_all(loop)
    assert loop.core.has("by hand")
    finish_loop(loop)
    assert {event.request_id for event in listener.events} == {"mine"}


def test_task_3_outputs_of_a_beam_search_are_ignored() -> None:
    """Oracle: by hand: a token with the id of a beam search is ignored; the search continues."""
    loop, listener = make_loop(), RecordingListener()
    search = SearchState("beams", [1, 2], TOKENIZER, BeamSearchParams(beam_width=2, max_tokens=9))
    loop.active["beams"] = ActiveRequest(search, listener)
    loop.take_output(TokenOutput("beams", "beams", 3, None, None, None))
    assert list(loop.active) == ["beams"], (
        "an output for a request that is not a `RequestState` must be ignored"
    )
    assert loop.core.log == []
    loop.cancel(["beams"])
    finish_loop(loop)
    assert [event.finish_reason for event in listener.events] == ["abort"]


# Task 4: EngineLoop.step


def test_task_4_a_step_gives_each_request_a_token() -> None:
    """Oracle: by hand: "b" follows "a", and "n" follows "m"."""
    loop = make_loop()
    one, two = activate(loop, request("one", "a")), activate(loop, request("two", "m"))
    loop.step()
    assert loop.core.log.count("step") == 1, "`step` must make one step of the core"
    finish_loop(loop)
    assert [(event.request_id, event.text, event.token_ids) for event in one.events[:1]] == [
        ("one", "b", (1,))
    ]
    assert [(event.request_id, event.text, event.token_ids) for event in two.events[:1]] == [
        ("two", "n", (13,))
    ]


def test_task_4_a_failure_reaches_only_the_listener_of_its_request() -> None:
    """Oracle: by hand: the error has the request's id and its cause; the other request gets its letter."""
    loop, error = make_loop(), ArithmeticError("broken")
    bad, good = activate(loop, request("bad")), activate(loop, request("good"))
    loop.step()
    loop.core.failing["bad"] = error
    loop.step()
    assert list(loop.active) == ["good"], "a failed request must be removed, and the other must stay active"
    loop.core.cancel("good")
    del loop.active["good"]
    finish_loop(loop)
    assert len(bad.errors) == 1, "the listener of a failed request must get one error"
    failed = bad.errors[0]
    assert failed.request_id == "bad"
    assert failed.__cause__ is error
    assert text(bad.events) == "b"
    assert (text(good.events), good.errors) == ("bc", [])


def test_task_4_the_only_request_may_fail() -> None:
    """Oracle: by hand: the core has no work left, the listener gets the error, and the engine lives on.

    Common mistake: taking the failures after `_note_step`, which asserts that no active request is lost.
    """
    loop, error = make_loop(), ArithmeticError("broken")
    bad = activate(loop, request("bad"))
    loop.core.failing["bad"] = error
    try:
        loop.step()
    except AssertionError as found:
        raise AssertionError(
            "call `_take_failures` and `_end_searches` before `_note_step`: the only request has failed in "
            f"this step, and `_note_step` says: {found}"
        ) from None
    assert not loop.active, "a failed request must be removed"
    finish_loop(loop)
    assert only_failure(bad).__cause__ is error


def test_task_4_two_failures_give_two_errors() -> None:
    """Oracle: by hand: in one step, for one listener; its third request continues."""
    loop = make_loop()
    listener = activate(loop, *[request(name) for name in "abc"])
    loop.core.failing = {"a": ArithmeticError("a"), "c": ArithmeticError("c")}
    loop.step()
    assert list(loop.active) == ["b"]
    finish_loop(loop)
    assert {str(error.__cause__): error.request_id for error in listener.errors} == {"a": "a", "c": "c"}
    assert len(listener.errors) == 2, "each of two failed requests must give one error"


def test_task_4_a_beam_search_ends_with_one_event() -> None:
    """Oracle: the core's own search, stepped by hand."""
    params, prompt = BeamSearchParams(beam_width=3, max_tokens=4), [3, 1, 4, 1]
    separate, core = small_core(), small_core()
    expected = separate.add_beam_search("separate", prompt, params)
    while expected.beams:
        separate.step()
    loop, search = make_loop(core), SearchState("beams", prompt, TOKENIZER, params)
    listener = activate(loop, search)
    steps = 0
    while loop.active and steps < 20:
        loop.step()
        steps += 1
    assert steps == 4, "a search of 4 tokens must finish and be removed in the 4th step"
    finish_loop(loop)
    assert len(listener.events) == 1, "a search must have exactly one event"
    event = listener.events[0]
    assert event.finish_reason == "stop"
    assert event.usage is not None
    found = [sequence.tokens[4:] for sequence in search.output.sequences]
    assert found == [ended.hypothesis.tokens for ended in expected.ended]


def test_task_4_step_times_and_figures_are_published() -> None:
    """Oracle: by hand: a core that takes 20 ms, and the core's figures after the step."""
    loop = make_loop(AlphabetCore(max_seqs=2))
    activate(loop, *[request(name) for name in "abc"])
    step = loop.core.step

    def slow() -> list[TokenOutput]:
        time.sleep(0.02)
        return step()

    loop.core.step = slow  # type: ignore[method-assign]
    for number in range(1, 4):
        loop.step()
        assert len(loop.step_times) == number, "each step must add one entry to `step_times`"
        assert loop.step_times[-1].core >= 0.015
        assert loop.step_times[-1].text >= 0
    loop.core.step = step  # type: ignore[method-assign]
    stats = published(loop)
    assert (stats.num_running, stats.num_waiting) == (0, 1), "publish the figures after the step"


def test_task_4_core_time_and_text_time_are_measured_separately() -> None:
    """Oracle: by hand: one of the two sleeps for 50 ms, the other takes less."""
    loop, slow = make_loop(), request("slow")
    activate(loop, slow)
    step, push = loop.core.step, slow.push

    def slow_step() -> list[TokenOutput]:
        time.sleep(0.05)
        return step()

    def slow_push(output: TokenOutput) -> RequestEvent:
        time.sleep(0.05)
        return push(output)

    loop.core.step = slow_step  # type: ignore[method-assign]
    loop.step()
    assert loop.step_times[-1].text < loop.step_times[-1].core, (
        "the time for text must not include the core's"
    )
    loop.core.step = step  # type: ignore[method-assign]
    slow.push = slow_push  # type: ignore[method-assign]
    loop.step()
    assert loop.step_times[-1].core < loop.step_times[-1].text, (
        "the time of the core must not include the text's"
    )


def test_task_4_admission_control_sees_a_request_that_a_step_left_waiting() -> None:
    """Oracle: by hand: two sequences run at a time; the third request waits until one has finished."""
    control = AdmissionControl(None, 2)
    loop = EngineLoop(Inbox(), control)
    loop.core = AlphabetCore(max_seqs=2)  # type: ignore[assignment]
    activate(loop, *[request(name, params=SamplingParams(max_tokens=2)) for name in "abc"])
    loop.step()
    assert (control.occupancy.num_waiting, control.occupancy.is_crowded) == (1, True)
    for _ in range(3):
        loop.step()
    assert (control.occupancy.num_waiting, control.occupancy.is_crowded) == (0, False)
