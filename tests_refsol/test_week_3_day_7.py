"""Day 3.7: the engine as a server: one thread owns the arrays, and any number of clients talk to it.

When it passes, requests of any thread and any event loop run in one batch; whoever leaves is cancelled before
the next step, an error reaches those whom it befell, and the engine can be drained and stopped.
"""

import asyncio
import inspect
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_llm.engine
from tiny_llm.admission_control import AdmissionControl
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.delivery import Item
from tiny_llm.engine import Engine
from tiny_llm.engine_config import EngineConfig
from tiny_llm.engine_core import EngineCore, EngineStats
from tiny_llm.engine_loop import ActiveRequest, EngineLoop, Request
from tiny_llm.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineStoppingError,
    QueueFullError,
    RequestFailedError,
    RequestTooLargeError,
)
from tiny_llm.faults import Failure
from tiny_llm.gguf_tokenizer import byte_level_bpe
from tiny_llm.inbox import Inbox
from tiny_llm.linear import Linear
from tiny_llm.model import Model, build_model
from tiny_llm.model_config import ModelConfig
from tiny_llm.output_processor import RequestState
from tiny_llm.outputs import RequestEvent
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler import AgedPriority
from tiny_llm.search_state import SearchState
from tiny_llm.sequence import completion_ids
from tiny_llm.token_output import TokenOutput
from tiny_llm.tokenizer import Tokenizer

# The model runs with and without compiled kernels; the warning that there are none is not this day's matter.
pytestmark = pytest.mark.filterwarnings("ignore:no compiled kernels:RuntimeWarning")

# A thread that does not end is a failure, and nobody waits for it at the end of the run as well.
tiny_llm.engine.EXIT_SECONDS = 0.2


# Nothing here may hang: whatever could wait runs in a thread that is given up.


class Patience:
    """How long anything may take. Who has waited for nothing once does not wait so long again."""

    seconds = 10.0

    def lose(self) -> None:
        """Something did not come."""
        self.seconds = 1.0


PATIENCE = Patience()


def background(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run a function in a thread of its own, which nobody has to wait for."""
    outcome: Future[Any] = Future()

    def work() -> None:
        outcome.set_running_or_notify_cancel()  # from now on nobody takes it back
        try:
            outcome.set_result(function(*args))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome


def value(outcome: "Future[Any]") -> Any:
    """The value of a future, or what it raises; a failure where it does not come."""
    try:
        return outcome.result(PATIENCE.seconds)
    except EngineDeadError as error:
        raise blank_or(error) from error.__cause__
    except TimeoutError:
        PATIENCE.lose()
        raise AssertionError("it did not end: somebody waits for what never comes") from None


def blank_or(error: BaseException) -> BaseException:
    """What the engine's thread has died of, where that is an exercise that is blank."""
    return error.__cause__ if isinstance(error.__cause__, NotImplementedError) else error


def within(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives, or raises; a failure where it hangs."""
    return value(background(function, *args))


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine gives, in an event loop of its own; a failure where it hangs."""

    async def guarded() -> Any:
        async with asyncio.timeout(0.8 * PATIENCE.seconds):
            return await main

    return within(asyncio.run, guarded())


def elsewhere(function: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
    """Something to await: a function that may wait, in a thread of its own."""
    return asyncio.wrap_future(background(function, *args))


# A core that a test understands: every completion gets the letters that follow its prompt in the alphabet.

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TOKENIZER = Tokenizer(byte_level_bpe(list(ALPHABET), [], "smollm"))
LONGEST = 20  # tokens of a prompt
THREE = SamplingParams(max_tokens=3)
LONG = SamplingParams(max_tokens=10**6)


@dataclass
class Letters:
    """One completion in the core."""

    request_id: str
    seq_id: str
    token: int
    left: int


class AlphabetCore:
    """Stands in for `EngineCore`, without a model: "abc" gets "d", "e", "f" and so on, a letter a step.

    log: what was asked of it. failing: requests that fail in the next step. dies: what the next step raises.
    """

    def __init__(self, seats: int = 8) -> None:
        self.seats = seats
        self.waiting: list[Letters] = []
        self.running: list[Letters] = []
        self.log: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.failures: list[Failure] = []
        self.dies: BaseException | None = None
        self.is_full = False
        self.is_held = False
        self.begun, self.permits = threading.Semaphore(0), threading.Semaphore(0)

    @property
    def manager(self) -> Any:
        return SimpleNamespace(waiting=self.waiting, running=self.running)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def stats(self) -> EngineStats:
        waiting = len({one.request_id for one in self.waiting})
        return EngineStats(len(self.running), len(self.waiting), *[0] * 7, num_waiting_requests=waiting)

    def has(self, request_id: str) -> bool:
        """Whether it works on a request, or is going to."""
        return any(one.request_id == request_id for one in self.waiting + self.running)

    has_request = has

    def add_request(self, request_id: str, tokens: list[int], params: SamplingParams) -> bool:
        if not tokens:
            raise ValueError("no tokens")
        if len(tokens) > LONGEST:
            raise RequestTooLargeError(f"{len(tokens)} tokens")
        if self.has(request_id):
            raise DuplicateRequestError(f"{request_id!r} is in use")
        if self.is_full:
            return False
        self.log.append(f"add {request_id}")
        ids = completion_ids(request_id, params.n)
        self.waiting += [Letters(request_id, seq_id, tokens[-1], params.max_tokens or 16) for seq_id in ids]
        return True

    def step(self) -> list[TokenOutput]:
        self.log.append("step")
        if self.is_held:
            self.begun.release()
            self.permits.acquire(timeout=PATIENCE.seconds)
        if self.dies is not None:
            raise self.dies
        for request_id, error in self.failing.items():
            if self.has(request_id):
                self.end(lambda one, who=request_id: one.request_id == who)  # type: ignore[misc]
                self.failures.append(Failure(request_id, error))
        self.failing = {}
        while self.waiting and len(self.running) < self.seats:
            self.running.append(self.waiting.pop(0))
        outputs = []
        for one in self.running:
            one.token, one.left = (one.token + 1) % len(ALPHABET), one.left - 1
            reason = None if one.left else "length"
            outputs.append(TokenOutput(one.request_id, one.seq_id, one.token, None, reason, None))
        self.end(lambda one: not one.left)
        return outputs

    def take_failures(self) -> list[Failure]:
        failures, self.failures = self.failures, []
        return failures

    def take_ended_searches(self) -> list[str]:
        return []

    def finish(self, seq_id: str) -> None:
        if all(one.seq_id != seq_id for one in self.running):
            raise KeyError(seq_id)  # the real one raises it too: it has ended
        self.log.append(f"finish {seq_id}")
        self.end(lambda one: one.seq_id == seq_id)

    def cancel(self, request_id: str) -> None:
        if self.has(request_id):
            self.log.append(f"cancel {request_id}")
        self.end(lambda one: one.request_id == request_id)

    def end(self, has_ended: Callable[[Letters], bool]) -> None:
        self.waiting = [one for one in self.waiting if not has_ended(one)]
        self.running = [one for one in self.running if not has_ended(one)]

    # Steps that wait until a test lets them.

    def hold(self) -> None:
        """From now on each step waits in its beginning."""
        self.is_held = True

    def wait_for_step(self) -> None:
        """Return when a step is being held."""
        if not self.begun.acquire(timeout=PATIENCE.seconds):
            PATIENCE.lose()
            raise AssertionError("no step began")

    def let_step(self) -> None:
        """Let one step happen."""
        self.permits.release()

    def let_go(self) -> None:
        """Hold no step any more."""
        self.is_held = False
        self.permits.release(100)


def request(request_id: str, prompt: str = "a", params: SamplingParams = THREE) -> RequestState:
    """A request whose completions go on in the alphabet."""
    tokens = [ALPHABET.index(letter) for letter in prompt]
    return RequestState(request_id, prompt, tokens, TOKENIZER, params)


def events(items: Sequence[Item]) -> list[RequestEvent]:
    """What a listener was called with, where all of it is events; raises the first error."""
    for item in items:
        if not isinstance(item, RequestEvent):
            raise item
    return [item for item in items if isinstance(item, RequestEvent)]


class Ear:
    """A listener that keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[list[Item]] = []
        self.queue: SimpleQueue[list[Item]] = SimpleQueue()
        self.threads: set[threading.Thread] = set()

    def __call__(self, items: list[Item]) -> None:
        self.calls.append(list(items))
        self.threads.add(threading.current_thread())
        self.queue.put(list(items))

    @property
    def items(self) -> list[Item]:
        """Everything, whenever it came."""
        return [item for call in self.calls for item in call]

    @property
    def events(self) -> list[RequestEvent]:
        """Everything but errors."""
        return [item for item in self.items if isinstance(item, RequestEvent)]

    @property
    def errors(self) -> list[RequestFailedError]:
        """The requests that failed."""
        return [item for item in self.items if isinstance(item, RequestFailedError)]

    def next(self) -> list[RequestEvent]:
        """The events of the next call; raises the error where one came."""
        try:
            return events(self.queue.get(timeout=PATIENCE.seconds))
        except EngineDeadError as error:
            raise blank_or(error) from error.__cause__
        except Empty:
            PATIENCE.lose()
            raise AssertionError("nothing was delivered") from None

    def until_end(self) -> list[RequestEvent]:
        """The events up to a request's last."""
        found: list[RequestEvent] = []
        while not found or found[-1].usage is None:
            found += self.next()
        return found


def text(heard: Sequence[RequestEvent], request_id: str | None = None) -> str:
    """What the events say, of one request or of all."""
    return "".join(event.text for event in heard if request_id in (None, event.request_id))


def reason(one: Request) -> str | None:
    """Why a request's first completion has ended."""
    assert isinstance(one, RequestState)
    return one.output.outputs[0].finish_reason


def make_loop(core: Any = None) -> EngineLoop:
    """What runs in the engine's thread, without the thread: the test calls it."""
    loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
    loop.core = core or AlphabetCore()
    return loop


def put(loop: EngineLoop, *requests: Request, ear: Callable[[list[Item]], None] | None = None) -> Any:
    """Requests that are served already, whoever put them there; who listens to them."""
    ear = Ear() if ear is None else ear
    for one in requests:
        one.begin(loop.core)
        loop.active[one.request_id] = ActiveRequest(one, ear)
    return ear


def hang_up(loop: EngineLoop) -> None:
    """The end of the thread: without another step, what is ready is delivered to those who listen."""
    loop.stop()
    within(loop.run)


# Task 1: AgedPriority.key


def order(priorities: Sequence[int], patience: int) -> list[int]:
    """Who comes first, of requests that arrived in this order; among equal turns the earlier one does."""
    key = AgedPriority(patience).key
    return sorted(range(len(priorities)), key=lambda number: (key(number, priorities[number]), number))


def test_task_1_who_passes_whom() -> None:
    """Oracle: by hand: priority 1 lets those two of priority 0 pass that arrive 1 and 2 later."""
    assert order([1, 0, 0, 0, 0], 3) == [1, 2, 0, 3, 4]


def test_task_1_an_urgent_request_passes_those_that_wait() -> None:
    """Oracle: by hand, patience 3: the last one, of priority 0, passes those that came 1 and 2 before it."""
    assert order([1, 1, 1, 1, 0], 3) == [0, 1, 4, 2, 3]


def test_task_1_one_priority_keeps_the_order_of_arrival() -> None:
    """Oracle: the order of arrival; multiplying the number is a mistake for some priorities."""
    for priority in (-3, 0, 5):
        assert order([priority] * 6, 4) == list(range(6))


@pytest.mark.parametrize("patience", [0, 1, 2, 7])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (-2, -1), (0, 3), (-1, 2)])
def test_task_1_a_step_of_priority_is_worth_so_many_arrivals(patience: int, low: int, high: int) -> None:
    """Oracle: the docstring, counted: `patience` later arrivals for each step of priority between them."""
    for later in range(1, 40):
        passes = order([high, *[high] * (later - 1), low], patience).index(later) == 0
        assert passes == (later < patience * (high - low))


def test_task_1_a_turn_is_fixed_when_a_request_arrives() -> None:
    """Oracle: the same question twice, with others between: nothing that arrives later may move it."""
    policy = AgedPriority(5)
    first = policy.key(3, 2)
    for number in range(4, 40):
        policy.key(number, number % 3)
    assert policy.key(3, 2) == first


def test_task_1_everybodys_turn_comes() -> None:
    """Oracle: by hand: patience 4 and 5 steps behind: of endless urgent requests 19 pass, whatever comes."""
    assert order([5, *[0] * 100], 4).index(0) == 19


def test_task_1_on_pages_the_waiting_run_in_that_order() -> None:
    """Oracle: by hand: one seat, patience 2. Larger numbers first is the mistake, and so is no age at all."""
    manager = PagedBatchManager(8, 4, 1, max_model_len=8, policies=Policies(priority_key=AgedPriority(2).key))
    for number, priority in enumerate([1, 0, 0, 2, 0, -1]):
        manager.add_request([1, 2], str(number), SamplingParams(max_tokens=1, priority=priority), 0)
    ran = []
    while manager.has_work:
        manager.process_batch()
        [one] = manager.running
        ran.append(one.seq_id)
        manager.finish(one.seq_id)
    # The turns are 2, 1, 2, 7, 4 and 3.
    assert "".join(ran) == "102543"


# Task 2: EngineLoop.add


def test_task_2_a_request_is_queued_and_its_listener_known() -> None:
    """Oracle: by hand."""
    loop, one, ear = make_loop(), request("one"), Ear()
    loop.add([one], ear)
    assert loop.core.log == ["add one"]
    assert list(loop.active) == ["one"]
    assert loop.active["one"].request is one
    assert loop.active["one"].listener is ear
    assert ear.calls == []


def test_task_2_several_are_queued_in_their_order() -> None:
    """Oracle: by hand; who was there before stays."""
    loop = make_loop()
    put(loop, request("old"))
    loop.add([request("b"), request("a")], Ear())
    assert loop.core.log == ["add old", "add b", "add a"]
    assert sorted(loop.active) == ["a", "b", "old"]


@pytest.mark.parametrize(("prompt", "error"), [("", ValueError), ("a" * (LONGEST + 1), RequestTooLargeError)])
def test_task_2_the_doors_error_reaches_whoever_asks(prompt: str, error: type[Exception]) -> None:
    """Oracle: what the core raises."""
    loop = make_loop()
    with pytest.raises(error):
        loop.add([request("one", prompt)], Ear())
    assert not loop.active
    assert not loop.core.has_work


@pytest.mark.parametrize("place", [0, 1, 2])
def test_task_2_all_or_none(place: int) -> None:
    """Oracle: by hand: one of three cannot run, so none of them does, and who was there goes on."""
    loop, requests = make_loop(), [request(name) for name in "abc"]
    put(loop, request("old"))
    requests[place] = request("bad", "")
    with pytest.raises(ValueError, match="no tokens"):
        loop.add(requests, Ear())
    assert list(loop.active) == ["old"]
    assert [one.request_id for one in loop.core.waiting] == ["old"]


def test_task_2_an_id_in_use_does_not_end_its_owner() -> None:
    """Oracle: by hand. Cancelling every id that was asked for is the mistake: one of them is another's."""
    loop, owner = make_loop(), request("mine")
    put(loop, owner)
    with pytest.raises(DuplicateRequestError):
        loop.add([request("new"), request("mine"), request("other")], Ear())
    assert loop.active["mine"].request is owner
    assert [one.request_id for one in loop.core.waiting] == ["mine"]
    assert list(loop.active) == ["mine"]


def test_task_2_a_core_that_can_queue_no_more() -> None:
    """Oracle: the docstring: what `RequestState.begin` raises."""
    loop = make_loop()
    loop.core.is_full = True
    with pytest.raises(QueueFullError):
        loop.add([request("one")], Ear())
    assert not loop.active


def test_task_2_an_engine_that_takes_no_more_says_so() -> None:
    """Oracle: the error that `refusal` makes, whatever the request is."""
    loop = make_loop()
    loop.refusal = partial(EngineStoppingError, "no more")
    for prompt in ("a", ""):
        with pytest.raises(EngineStoppingError, match="no more"):
            loop.add([request("one", prompt)], Ear())
    assert loop.core.log == []
    assert not loop.active


@pytest.mark.parametrize("how", ["taken", "refused by the core", "refused by the engine"])
def test_task_2_who_has_come_in_is_counted_once_however_it_ends(how: str) -> None:
    """Oracle: `AdmissionControl`, which lets the next one in. Who is never counted as seen waits for ever."""
    inbox, admission = Inbox(), AdmissionControl(2, 0)
    loop = EngineLoop(inbox, admission)
    loop.core = AlphabetCore()  # type: ignore[assignment]
    if how == "refused by the engine":
        loop.refusal = partial(EngineStoppingError, "no more")
    for iteration in range(3):
        admission.admit(2)
        with suppress(ValueError, EngineStoppingError):
            loop.add(
                [
                    request(f"a{iteration}"),
                    request(f"b{iteration}", "" if how == "refused by the core" else "b"),
                ],
                Ear(),
            )
        assert admission.occupancy.num_seen == 2 * (iteration + 1)
        if how == "taken":
            with pytest.raises(QueueFullError):
                admission.admit(1)
            loop.core.end(lambda one: True)
            loop.add([], Ear())
            assert admission.occupancy.num_waiting == 0


# Task 3: EngineLoop.cancel


def test_task_3_a_cancelled_request_has_ended_everywhere() -> None:
    """Oracle: by hand."""
    loop, one = make_loop(), request("one")
    put(loop, one)
    loop.cancel(["one"])
    assert not loop.core.has_work
    assert not loop.active
    assert reason(one) == "abort"


def test_task_3_only_those_that_are_named() -> None:
    """Oracle: by hand: two of four."""
    loop, requests = make_loop(), [request(name) for name in "abcd"]
    put(loop, *requests)
    loop.core.step()
    loop.cancel(["d", "b"])
    assert list(loop.active) == ["a", "c"]
    assert [one.request_id for one in loop.core.running] == ["a", "c"]
    assert [reason(one) for one in requests] == [None, "abort", None, "abort"]


def test_task_3_ids_that_nobody_has_are_ignored() -> None:
    """Oracle: by hand: an unknown id, one that has ended, and one that is named twice."""
    loop, one = make_loop(), request("one")
    put(loop, one)
    loop.cancel(["nobody", "one", "one"])
    loop.cancel(["one"])
    loop.cancel([])
    assert loop.core.log == ["add one", "cancel one"]


def test_task_3_the_listener_gets_the_last_event() -> None:
    """Oracle: by hand: one event, with reason "abort" and the request's usage, and nobody else gets one."""
    loop = make_loop()
    ear, other = put(loop, request("one", "ab")), put(loop, request("two"))
    loop.cancel(["one"])
    loop.cancel(["one"])
    loop.core.cancel("two")
    del loop.active["two"]
    hang_up(loop)
    [[event]] = ear.calls
    assert isinstance(event, RequestEvent)
    assert (event.request_id, event.finish_reason, event.token_ids) == ("one", "abort", ())
    assert event.usage is not None
    assert (event.usage.prompt_tokens, event.usage.completion_tokens) == (2, 0)
    assert other.calls == []


def test_task_3_every_completion_that_has_not_ended_gets_an_event() -> None:
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


def test_task_3_others_can_see_at_once_that_there_is_room() -> None:
    """Oracle: the core's own figures, as other threads see them: `stats`, and the admission control."""
    admission = AdmissionControl(1, 0)
    loop = EngineLoop(Inbox(), admission)
    loop.core = AlphabetCore()  # type: ignore[assignment]
    admission.admit(1)
    loop.add([request("one")], Ear())
    with pytest.raises(QueueFullError):
        admission.admit(1)
    loop.cancel(["one"])
    assert loop.stats.num_waiting == 0
    admission.admit(1)


def test_task_3_a_beam_search_ends_too() -> None:
    """Oracle: by hand: its only event says "abort", and its pages are back."""
    core = small_core()
    loop = make_loop(core)
    ear = put(loop, SearchState("beams", [1, 2, 3], TOKENIZER, BeamSearchParams(beam_width=2, max_tokens=9)))
    core.step()
    loop.cancel(["beams"])
    assert free_blocks(core) == core.manager.capacity.num_blocks
    hang_up(loop)
    [event] = ear.events
    assert event.finish_reason == "abort"
    assert event.usage is not None


# Task 4: EngineLoop.forget


def test_task_4_a_forgotten_request_has_ended() -> None:
    """Oracle: by hand: cancelled as by `cancel`; the other goes on."""
    loop, one, other = make_loop(), request("one"), request("other")
    ear = put(loop, one, other)
    loop.forget([one])
    assert list(loop.active) == ["other"]
    assert [left.request_id for left in loop.core.waiting] == ["other"]
    assert (reason(one), reason(other)) == ("abort", None)
    hang_up(loop)
    assert ear.events[0].request_id == "one"


def test_task_4_the_next_request_of_that_name_is_spared() -> None:
    """Oracle: by hand: the old one ended, and somebody else took its id. Cancelling by id is the mistake."""
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


def test_task_4_some_have_ended_and_some_were_never_there() -> None:
    """Oracle: by hand: of four, the one that is there is cancelled."""
    loop, names = make_loop(), "abcd"
    requests = [request(name) for name in names]
    put(loop, requests[1], request("c"))
    loop.forget(requests)
    assert list(loop.active) == ["c"]
    assert loop.core.log == ["add b", "add c", "cancel b"]


# Task 5: EngineLoop.step


def test_task_5_a_step_is_a_letter_for_each() -> None:
    """Oracle: by hand: "b" follows "a", and "n" follows "m"."""
    loop = make_loop()
    one, two = put(loop, request("one", "a")), put(loop, request("two", "m"))
    loop.step()
    assert loop.core.log.count("step") == 1
    hang_up(loop)
    assert [(event.request_id, event.text, event.token_ids) for event in one.events[:1]] == [
        ("one", "b", (1,))
    ]
    assert [(event.request_id, event.text, event.token_ids) for event in two.events[:1]] == [
        ("two", "n", (13,))
    ]


def test_task_5_a_request_that_has_ended_is_gone() -> None:
    """Oracle: by hand: one token, reason "length", and its usage; there is nobody to abort afterwards."""
    loop = make_loop()
    ear = put(loop, request("one", params=SamplingParams(max_tokens=1)))
    loop.step()
    assert not loop.active
    hang_up(loop)
    [event] = ear.events
    assert (event.text, event.finish_reason) == ("b", "length")
    assert event.usage is not None
    assert event.usage.completion_tokens == 1


def test_task_5_a_request_goes_when_its_last_completion_ends() -> None:
    """Oracle: by hand: two completions; going with the first that ends is the mistake."""
    loop, one = make_loop(), request("one", params=SamplingParams(n=2, max_tokens=5))
    put(loop, one)
    loop.core.waiting[0].left = 1
    loop.step()
    assert list(loop.active) == ["one"]
    for _ in range(4):
        loop.step()
    assert not loop.active
    assert [len(completion.token_ids) for completion in one.output.outputs] == [1, 5]


def test_task_5_a_stop_string_ends_a_request_before_the_next_step() -> None:
    """Oracle: by hand: the third letter completes "cd"; the core has no more work with it."""
    loop, one = make_loop(), request("one", params=SamplingParams(max_tokens=9, stop="cd"))
    ear = put(loop, one)
    for _ in range(3):
        assert loop.core.has("one")
        loop.step()
    assert not loop.core.has("one"), "it runs on, and its pages are not back"
    assert not loop.active
    hang_up(loop)
    assert (text(ear.events), ear.events[-1].finish_reason, reason(one)) == ("b", "stop", "stop")


def test_task_5_a_stop_string_ends_one_completion_of_several() -> None:
    """Oracle: by hand: cancelling the whole request is the mistake."""
    loop, one = make_loop(), request("one", params=SamplingParams(n=2, max_tokens=4, stop="xy"))
    put(loop, one)
    loop.core.waiting[1].token = ALPHABET.index("w")
    loop.step()
    loop.step()
    assert loop.core.log[-1] == f"finish {completion_ids('one', 2)[1]}"
    loop.step()
    loop.step()
    assert not loop.active
    assert [completion.text for completion in one.output.outputs] == ["bcde", ""]


def test_task_5_what_the_core_has_ended_is_not_ended_again() -> None:
    """Oracle: by hand: a stop string in the very last letter; the core knows no such sequence any more."""
    loop, one = make_loop(), request("one", params=SamplingParams(max_tokens=2, stop="c"))
    put(loop, one)
    loop.step()
    loop.step()
    assert reason(one) == "stop"
    assert not loop.active


def test_task_5_a_failure_reaches_its_listener_alone() -> None:
    """Oracle: by hand: the error names the request, and has its cause; the other gets its letter."""
    loop, error = make_loop(), ArithmeticError("broken")
    bad, good = put(loop, request("bad")), put(loop, request("good"))
    loop.step()
    loop.core.failing["bad"] = error
    loop.step()
    assert list(loop.active) == ["good"]
    loop.core.cancel("good")
    del loop.active["good"]
    hang_up(loop)
    [failed] = bad.errors
    assert failed.request_id == "bad"
    assert failed.__cause__ is error
    assert text(bad.events) == "b"
    assert (text(good.events), good.errors) == ("bc", [])


def test_task_5_two_failures_are_two_errors() -> None:
    """Oracle: by hand: in one step, for one listener, who has a third request that goes on."""
    loop = make_loop()
    ear = put(loop, *[request(name) for name in "abc"])
    loop.core.failing = {"a": ArithmeticError("a"), "c": ArithmeticError("c")}
    loop.step()
    assert list(loop.active) == ["b"]
    hang_up(loop)
    assert {str(error.__cause__): error.request_id for error in ear.errors} == {"a": "a", "c": "c"}
    assert len(ear.errors) == 2


class Unspeakable(RequestState):
    """A request whose text cannot be made."""

    def push(self, output: TokenOutput) -> RequestEvent:
        """Raise, whatever the token is."""
        raise ArithmeticError("no text")


def test_task_5_a_text_that_cannot_be_made_is_its_requests_alone() -> None:
    """Oracle: by hand: it ends in the core too, with one error for its two completions; the other goes on."""
    loop = make_loop()
    bad, good = Ear(), Ear()
    put(loop, Unspeakable("bad", "a", [0], TOKENIZER, SamplingParams(n=2, max_tokens=9)), ear=bad)
    put(loop, request("good"), ear=good)
    loop.step()
    assert list(loop.active) == ["good"]
    assert not loop.core.has("bad")
    loop.step()
    hang_up(loop)
    [failed] = bad.items
    assert isinstance(failed, RequestFailedError)
    assert isinstance(failed.__cause__, ArithmeticError)
    assert failed.request_id == "bad"
    assert text(good.events) == "bc"


def test_task_5_tokens_that_nobody_listens_to_are_left_alone() -> None:
    """Oracle: by hand: somebody gave the core a request behind the loop's back."""
    loop = make_loop()
    ear = put(loop, request("mine"))
    loop.core.add_request("by hand", [5], THREE)
    for _ in range(2):
        loop.step()
    assert loop.core.has("by hand")
    hang_up(loop)
    assert {event.request_id for event in ear.events} == {"mine"}


def test_task_5_a_search_ends_with_one_event() -> None:
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
    assert steps == 4
    hang_up(loop)
    [event] = ear.events
    assert event.finish_reason == "stop"
    assert event.usage is not None
    found = [sequence.tokens[4:] for sequence in search.output.sequences]
    assert found == [ended.hypothesis.tokens for ended in expected.ended]


def test_task_5_how_long_it_took_and_how_full_it_is() -> None:
    """Oracle: by hand: a core that takes 20 ms; figures of the core after the step."""
    loop = make_loop(AlphabetCore(seats=2))
    put(loop, *[request(name) for name in "abc"])
    step = loop.core.step

    def slow() -> list[TokenOutput]:
        time.sleep(0.02)
        return step()

    loop.core.step = slow  # type: ignore[method-assign]
    for number in range(1, 4):
        loop.step()
        assert len(loop.step_times) == number
        assert loop.step_times[-1].core >= 0.015
        assert loop.step_times[-1].text >= 0
    loop.core.step = step  # type: ignore[method-assign]
    assert (loop.stats.num_running, loop.stats.num_waiting) == (0, 1)


# Task 6: EngineLoop.run_once


class Posting:
    """A loop with its inbox and its core, whose turns a test takes one by one."""

    def __init__(self, limit: int | None = None) -> None:
        self.inbox = Inbox()
        self.core = AlphabetCore()
        self.loop = EngineLoop(self.inbox, AdmissionControl(limit, 8))
        self.loop.core = self.core  # type: ignore[assignment]

    def run_once(self, *tasks: Callable[[], Any]) -> list[Future[Any]]:
        """Post tasks, and let an iteration pass."""
        posted = [self.inbox.post(task) for task in tasks]
        within(self.loop.run_once)
        return posted


def test_task_6_an_task_and_then_a_step() -> None:
    """Oracle: by hand: who is added is served in the same iteration, and hears of it."""
    at, ear = Posting(), Ear()
    [added] = at.run_once(partial(at.loop.add, [request("one")], ear))
    assert added.done()
    assert at.core.log == ["add one", "step"]
    assert [text(events(call)) for call in ear.calls] == ["b"]


def test_task_6_a_turn_is_one_step() -> None:
    """Oracle: by hand: three letters are three turns, and nobody has to post anything."""
    at = Posting()
    ear = put(at.loop, request("one"))
    for iteration in range(1, 4):
        at.run_once()
        assert at.core.log.count("step") == iteration
        assert len(ear.calls) == iteration
    assert not at.loop.active


def test_task_6_without_anybody_it_waits_for_an_task() -> None:
    """Oracle: by hand: with nothing to do it waits until somebody asks for something; no step."""
    at = Posting()
    iteration = background(at.loop.run_once)
    with suppress(TimeoutError):
        iteration.exception(0.05)
    assert not iteration.done() or iteration.result(), "it did not wait: the thread would burn a processor"
    asked = at.inbox.post(lambda: 7)
    value(iteration)
    assert asked.result(0) == 7
    assert at.core.log == []


def test_task_6_no_step_is_taken_for_nobody() -> None:
    """Oracle: by hand: the core has work that nobody here listens to."""
    at = Posting()
    at.core.add_request("by hand", [5], THREE)
    at.run_once(lambda: None)
    assert "step" not in at.core.log


def test_task_6_everything_that_was_asked_for_comes_before_the_step() -> None:
    """Oracle: by hand: in the order of asking. One task an iteration is the mistake: others wait a step."""
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


def test_task_6_who_is_cancelled_gets_no_further_letter() -> None:
    """Oracle: by hand: its last event comes in this iteration, though there is no step for anybody."""
    at = Posting()
    ear = put(at.loop, request("one"))
    at.run_once()
    at.run_once(partial(at.loop.cancel, ["one"]))
    assert at.core.log.count("step") == 1
    assert [[event.finish_reason for event in events(call)] for call in ear.calls] == [[None], ["abort"]]


def test_task_6_a_listener_gets_all_of_a_step_at_once() -> None:
    """Oracle: by hand: two requests with two completions each are four events in one call."""
    at, pair = Posting(), SamplingParams(n=2, max_tokens=2)
    ear, other = put(at.loop, request("one", "a", pair), request("two", "m", pair)), Ear()
    put(at.loop, request("three", "x"), ear=other)
    at.run_once()
    at.run_once()
    assert [len(call) for call in ear.calls] == [4, 4]
    assert (text(ear.events, "one"), text(ear.events, "two")) == ("bbcc", "nnoo")
    assert [len(call) for call in other.calls] == [1, 1]


def test_task_6_what_an_task_raises_is_its_askers() -> None:
    """Oracle: by hand: its future raises, and the iteration goes on."""
    at = Posting()
    ear = put(at.loop, request("one"))
    [failed, fine] = at.run_once(lambda: 1 // 0, lambda: 7)
    assert isinstance(failed.exception(0), ZeroDivisionError)
    assert fine.result(0) == 7
    assert text(ear.events) == "b"


def test_task_6_what_a_step_raises_ends_the_thread() -> None:
    """Oracle: by hand: nobody foresaw it; an iteration that goes on in silence leaves everybody waiting."""
    at = Posting()
    put(at.loop, request("one"))
    at.core.dies = SystemError("unforeseen")
    with pytest.raises(SystemError, match="unforeseen"):
        at.run_once()


def test_task_6_a_listener_that_raises_loses_its_requests() -> None:
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


def test_task_6_a_last_turn_has_no_step() -> None:
    """Oracle: by hand."""
    at = Posting()
    put(at.loop, request("one"))
    at.run_once(at.loop.stop)
    assert "step" not in at.core.log


def test_task_6_the_thread_takes_turns_until_it_is_told_to_stop() -> None:
    """Oracle: by hand: the given `run`, which everything hangs on: start, serve, stop."""
    at, ear = Posting(), Ear()
    begun = at.inbox.post(partial(at.loop.begin, lambda: at.core))
    thread = background(at.loop.run)
    value(begun)
    value(at.inbox.post(partial(at.loop.add, [request("one")], ear)))
    assert text(ear.until_end()) == "bcd"
    value(at.inbox.post(at.loop.stop))
    value(thread)
    assert at.core.log.count("step") == 3


# Task 7: EngineLoop.drain


def test_task_7_nobody_else_is_let_in() -> None:
    """Oracle: by hand: who comes is refused, and who is there stays."""
    at, drained = Posting(), Future[None]()
    put(at.loop, request("one"))
    at.loop.drain(None, drained)
    assert at.loop.refusal is not None
    assert isinstance(at.loop.refusal(), EngineStoppingError)
    with pytest.raises(EngineStoppingError):
        at.loop.add([request("two")], Ear())
    assert list(at.loop.active) == ["one"]
    assert not drained.done()


def test_task_7_it_is_over_when_all_have_ended() -> None:
    """Oracle: by hand: three letters, three turns, and nothing is cut off."""
    at, drained = Posting(), Future[None]()
    ear = put(at.loop, request("one"))
    at.run_once(partial(at.loop.drain, None, drained))
    assert not drained.done()
    at.run_once()
    assert not drained.done()
    at.run_once()
    assert drained.result(0) is None
    assert (text(ear.events), ear.events[-1].finish_reason) == ("bcd", "length")


def test_task_7_it_is_over_at_once_where_nobody_is_there() -> None:
    """Oracle: by hand; a second time too."""
    at = Posting()
    for _ in range(2):
        drained: Future[None] = Future()
        at.run_once(partial(at.loop.drain, None, drained))
        assert drained.result(0) is None


def test_task_7_who_takes_too_long_is_cancelled_before_the_next_step() -> None:
    """Oracle: by hand: no time at all: the last events come in the same iteration, and it is over."""
    at, drained = Posting(), Future[None]()
    ear = put(at.loop, request("one"), request("two"))
    at.run_once()
    at.run_once(partial(at.loop.drain, 0, drained))
    assert at.core.log.count("step") == 1
    assert Counter(event.finish_reason for event in ear.events) == {None: 2, "abort": 2}
    assert drained.result(0) is None


def test_task_7_a_timeout_is_counted_from_now() -> None:
    """Oracle: by hand: time enough for all, so nobody is cut off; and then time that runs out."""
    at, first = Posting(), Future[None]()
    ear = put(at.loop, request("one", params=SamplingParams(max_tokens=2)))
    at.run_once(partial(at.loop.drain, 100.0, first))
    at.run_once()
    assert ear.events[-1].finish_reason == "length"
    assert first.result(0) is None

    at, second = Posting(), Future[None]()
    ear = put(at.loop, request("one", params=LONG))
    at.run_once(partial(at.loop.drain, 0.05, second))
    time.sleep(0.06)
    at.run_once()
    assert ear.events[-1].finish_reason == "abort"
    assert second.result(0) is None


@pytest.mark.parametrize("timeouts", [(-0.001, None), (None, -0.001), (-0.001, 1000.0), (1000.0, -0.001)])
def test_task_7_of_two_the_shorter_one_counts(timeouts: tuple[float | None, float | None]) -> None:
    """Oracle: the docstring, for each of them; both are told."""
    at, drains = Posting(), (Future[None](), Future[None]())
    put(at.loop, request("one", params=LONG))
    at.run_once(*[partial(at.loop.drain, *each) for each in zip(timeouts, drains, strict=True)])
    assert not at.loop.active
    assert [drain.result(0) for drain in drains] == [None, None]


# The engine: the same thread behind it, and the faces that others see.


@contextmanager
def serving(core: Any = None, vocab_size: int = len(ALPHABET), **options: Any) -> Iterator[Engine]:
    """An engine that ends with the test; a thread that does not end is a failure, and is given up."""
    core = core or AlphabetCore()
    config = EngineConfig(**{"max_num_seqs": 8, **options})
    engine = within(Engine, lambda: core, TOKENIZER, vocab_size, config)
    try:
        yield engine
    except BaseException:
        let_go(core)
        background(engine.stop)
        raise
    let_go(core)
    within(engine.stop)


def let_go(core: Any) -> None:
    """Hold no step any more, where it is a core that does."""
    if isinstance(core, AlphabetCore):
        core.let_go()


@cache
def small_model() -> Model:
    """One layer, 26 tokens, random weights."""
    config = ModelConfig(
        architecture="llama",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        vocab_size=len(ALPHABET),
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    rng, linears, vectors = np.random.default_rng(0), {}, {}
    for name, shape in config.parameter_shapes.items():
        noise = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            vectors[name.removesuffix(".weight")] = mx.array(1 + 0.1 * noise)
        else:
            gain = 1.0 if "embed" in name else 2.0 * shape[1] ** -0.5
            linears[name.removesuffix(".weight")] = Linear(mx.array(gain * noise))
    model = build_model(config, linears, vectors)
    # What is lazy belongs to the thread that described it, and the engine has a thread of its own.
    mx.eval(list(vectors.values()), [layer.self_attn.inv_freq for layer in model.layers])
    return model


def small_core() -> EngineCore:
    """A real core on the small model, with room for four sequences."""
    return EngineCore(PagedBatchManager(40, 4, 4, model=small_model(), max_batched_tokens=12), ())


def free_blocks(core: EngineCore) -> int:
    """Blocks that can be had."""
    return core.manager.capacity.num_free + core.manager.capacity.num_cached


# Task 8: Engine.submit


def test_task_8_a_request_from_another_thread() -> None:
    """Oracle: by hand: a letter a step, the usage with the last."""
    with serving() as engine:
        ear, one = Ear(), engine.request("abc", THREE)
        assert value(engine.submit([one], ear)) is None
        heard = ear.until_end()
    assert text(heard) == "def"
    assert [event.usage is None for event in heard] == [True, True, False]
    assert [len(call) for call in ear.calls] == [1, 1, 1]


def test_task_8_the_listener_is_called_in_the_engines_thread() -> None:
    """Oracle: the threads' names: not this one, which would have to wait for a step."""
    with serving() as engine:
        ear = Ear()
        value(engine.submit([engine.request("a", THREE)], ear))
        ear.until_end()
    assert [thread.name for thread in ear.threads] == ["tiny-llm-engine"]


def test_task_8_it_does_not_wait_for_the_step_that_runs() -> None:
    """Oracle: by hand: a future now, which is done before the next step."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:
        within(engine.submit, [engine.request("a", LONG)], Ear())
        core.wait_for_step()
        ear = Ear()
        queued = within(engine.submit, [engine.request("m", LONG, "second")], ear)
        assert not queued.done()
        core.let_step()
        core.wait_for_step()
        assert queued.done()
        assert core.log[-3:] == ["step", "add second", "step"]
        core.let_step()
        assert text(ear.next()) == "n"


@pytest.mark.parametrize(("prompt", "error"), [([], ValueError), ([0] * (LONGEST + 1), RequestTooLargeError)])
def test_task_8_the_door_speaks_to_whoever_asks(prompt: list[int], error: type[Exception]) -> None:
    """Oracle: the core's error, and nothing of a batch of three is queued."""
    core, ear = AlphabetCore(), Ear()
    with serving(core) as engine:
        requests = [engine.request(tokens, THREE) for tokens in ([0], prompt, [1])]
        with pytest.raises(error):
            value(engine.submit(requests, ear))
        value(engine.submit([engine.request("x", SamplingParams(max_tokens=1), "last")], ear))
        assert [event.request_id for event in ear.until_end()] == ["last"]
    assert len(ear.calls) == 1


def test_task_8_an_id_in_use() -> None:
    """Oracle: by hand: the second one is refused, and the first goes on to its end."""
    core, ear = AlphabetCore(), Ear()
    core.hold()
    with serving(core) as engine:
        within(engine.submit, [engine.request("a", THREE, "name")], ear)
        core.wait_for_step()
        refused = within(engine.submit, [engine.request("m", THREE, "name")], Ear())
        core.let_go()
        with pytest.raises(DuplicateRequestError):
            value(refused)
        assert text(ear.until_end()) == "bcd"


def test_task_8_a_full_queue_refuses_at_once() -> None:
    """Oracle: by hand: two seats, and two may wait; refused while the step still runs, and later let in."""
    core = AlphabetCore(seats=2)
    with serving(core, max_num_seqs=2, max_num_waiting=2) as engine:
        first, second = Ear(), Ear()
        value(engine.submit([engine.request(letter, LONG, letter) for letter in "ab"], first))
        first.next()
        core.hold()
        core.wait_for_step()
        waiting = within(engine.submit, [engine.request(letter, THREE) for letter in "cd"], second)
        for _ in range(3):
            with pytest.raises(QueueFullError):
                within(engine.submit, [engine.request("e", THREE)], Ear())
        core.let_go()
        value(waiting)
        for letter in "ab":
            value(engine.cancel(letter))
        while sum(event.usage is not None for event in second.events) < 2:
            second.next()
        third = Ear()
        value(engine.submit([engine.request("e", THREE)], third))
        assert text(third.until_end()) == "fgh"


def test_task_8_requests_enter_together_or_not_at_all() -> None:
    """Oracle: by hand: one seat and one that may wait: three are too many, and two come in after that."""
    core = AlphabetCore(seats=1)
    with serving(core, max_num_seqs=1, max_num_waiting=1) as engine:
        requests = [engine.request("a", THREE) for _ in range(3)]
        with pytest.raises(QueueFullError):
            within(engine.submit, requests, Ear())
        ear = Ear()
        value(engine.submit(requests[:2], ear))
        assert text(ear.until_end() + ear.until_end()) == "bcdbcd"


def test_task_8_an_engine_that_drains_refuses_at_once() -> None:
    """Oracle: by hand: raised here and now, while a step runs; not by a future that nobody may look at."""
    core = AlphabetCore()
    with serving(core) as engine:
        ear = Ear()
        value(engine.submit([engine.request("a", LONG, "a")], ear))
        ear.next()
        drained = engine.start_draining()
        value(engine.cancel("nobody"))
        core.hold()
        core.wait_for_step()
        with pytest.raises(EngineStoppingError):
            within(engine.submit, [engine.request("b", THREE)], Ear())
        cancelled = engine.cancel("a")
        core.let_go()
        value(cancelled)
        value(drained)


def test_task_8_an_engine_that_was_stopped() -> None:
    """Oracle: by hand: who is there is cancelled, and who comes is refused, however often that is."""
    with serving(max_num_waiting=1) as engine:
        ear = Ear()
        value(engine.submit([engine.request("a", LONG)], ear))
        within(engine.stop)
        assert ear.until_end()[-1].finish_reason == "abort"
        for _ in range(10):  # more than would find room
            with pytest.raises(EngineStoppingError):
                within(engine.submit, [engine.request("b", THREE)], Ear())


def test_task_8_when_the_engine_dies_everybody_hears_of_it() -> None:
    """Oracle: by hand: the listener gets the error with its cause, and who comes afterwards as well."""
    core, error = AlphabetCore(), SystemError("unforeseen")
    with serving(core) as engine:
        ear = Ear()
        value(engine.submit([engine.request("a", LONG)], ear))
        ear.next()
        core.dies = error
        with pytest.raises(EngineDeadError) as raised:
            ear.until_end()
        assert raised.value.__cause__ is error
        with pytest.raises(EngineDeadError):
            value(engine.submit([engine.request("b", THREE)], Ear()))


# Task 9: Engine.cancel


def test_task_9_it_takes_effect_before_the_next_step() -> None:
    """Oracle: by hand: asked for during the second step; no third one is taken for it."""
    core, ear = AlphabetCore(), Ear()
    core.hold()
    with serving(core) as engine:
        within(engine.submit, [engine.request("a", LONG, "mine"), engine.request("m", LONG, "other")], ear)
        core.wait_for_step()
        core.let_step()
        core.wait_for_step()
        done = within(engine.cancel, "mine")
        assert not done.done()
        core.let_step()
        core.wait_for_step()
        assert value(done) is None
        assert core.log[-3:] == ["step", "cancel mine", "step"]
    mine = [event for event in ear.events if event.request_id == "mine"]
    assert (text(mine), mine[-1].finish_reason) == ("bc", "abort")
    assert mine[-1].usage is not None
    assert mine[-1].usage.completion_tokens == 2


def test_task_9_when_it_is_done_the_pages_are_back() -> None:
    """Oracle: the pool of a real core: all blocks can be had, and the figures say so."""
    core = small_core()
    with serving(core) as engine:
        ear = Ear()
        params = SamplingParams(max_tokens=50, ignore_eos=True, seed=1)
        value(engine.submit([engine.request([1, 2, 3], params, "mine")], ear))
        ear.next()
        value(engine.cancel("mine"))
        assert engine.stats.num_running == 0
        assert free_blocks(core) == 40
        assert ear.until_end()[-1].finish_reason == "abort"


def test_task_9_an_id_that_is_not_known_is_ignored() -> None:
    """Oracle: by hand: none, one that has ended, and others go on."""
    with serving() as engine:
        ear = Ear()
        value(engine.submit([engine.request("a", THREE, "a")], ear))
        ear.until_end()
        assert [value(engine.cancel(name)) for name in ("nobody", "a")] == [None, None]
        other = Ear()
        value(engine.submit([engine.request("a", THREE, "a")], other))
        assert text(other.until_end()) == "bcd"


# Task 10: Engine.call


def test_task_10_a_functions_value() -> None:
    """Oracle: by hand, and the name of the thread that it ran in."""
    with serving() as engine:
        assert within(engine.call, lambda: 6 * 7) == 42
        assert within(engine.call, threading.current_thread).name == "tiny-llm-engine"
        assert within(engine.call, lambda: None) is None


def test_task_10_what_a_function_raises() -> None:
    """Oracle: by hand: it reaches the caller, and nobody else; the engine goes on."""
    with serving() as engine:
        ear = Ear()
        value(engine.submit([engine.request("a", LONG)], ear))
        with pytest.raises(ZeroDivisionError):
            within(engine.call, lambda: 1 // 0)
        assert within(engine.call, lambda: 7) == 7
        assert text(ear.next()) == "b"


def test_task_10_between_two_steps() -> None:
    """Oracle: by hand: asked for during a step; it runs after that, before the next."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:
        within(engine.submit, [engine.request("a", LONG)], Ear())
        core.wait_for_step()
        called = background(engine.call, partial(core.log.append, "called"))

        def steps() -> None:
            while not called.done():
                core.let_step()
                core.wait_for_step()

        within(steps)
        value(called)
        first = core.log.index("called")
        assert core.log[first - 1] == "step"
        assert core.log[first + 1] == "step"


def test_task_10_a_call_within_a_call() -> None:
    """Oracle: by hand: the thread that waits for itself waits for ever."""
    with serving() as engine:
        assert within(engine.call, lambda: engine.call(lambda: engine.call(lambda: 7))) == 7


def test_task_10_nobody_is_there_any_more() -> None:
    """Oracle: the docstring of `stop`: an error, instead of an answer that never comes."""
    with serving() as engine:
        within(engine.stop)
        with pytest.raises(EngineStoppingError):
            within(engine.call, lambda: 7)


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
    """Oracle: by hand: the second of two ends early. Ending with the first finish reason is the mistake."""
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


def test_task_11_five_clients_at_once_get_what_each_gets_alone() -> None:
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
def test_task_11_the_doors_errors_come_at_the_first_event(prompt: list[int], error: type[Exception]) -> None:
    """Oracle: by hand: an empty prompt, a token that there is not, and a prompt that is too long."""
    with serving() as engine:
        with pytest.raises(error):
            run(heard(engine, prompt, THREE))
        assert text(run(heard(engine, "x", THREE))) == "yza"


def test_task_11_a_full_queue() -> None:
    """Oracle: by hand: one seat, one may wait, and the third client is told so."""
    core = AlphabetCore(seats=1)
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


def test_task_11_nobody_else_waits_while_a_step_runs() -> None:
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
def test_task_11_who_leaves_is_cancelled_before_the_next_step(leave: Callable[..., Any]) -> None:
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

        run(main())
        assert core.log.count("step") == 2
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
            assert core.has("second" if is_queued else "first")
            assert not core.has("first" if is_queued else "second")
            core.let_go()
            (second if is_queued else first).cancel()

        run(main())


def test_task_11_who_leaves_spares_the_next_one_of_that_name() -> None:
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

        assert run(main()) == "bcd"


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


def test_task_11_an_engine_that_dies_tells_everybody() -> None:
    """Oracle: by hand: with its cause, and at once; nobody waits for an event that never comes."""
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


def test_task_11_a_slow_reader_misses_nothing_and_nobody_waits_for_it() -> None:
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
        assert [value(each) for each in loops] == [["bcd", "def", "fgh", "hij"], ["nop", "pqr", "rst", "tuv"]]


def test_task_11_draining_lets_clients_end() -> None:
    """Oracle: by hand: who is there gets all letters, who comes is refused."""
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

        assert text(run(main())) == "bcd"
