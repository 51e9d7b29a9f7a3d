"""A core with known outputs, requests for it, and a listener that records its calls."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any

from tiny_llm.admission_control import AdmissionControl
from tiny_llm.delivery import Item
from tiny_llm.engine_core import EngineStats
from tiny_llm.engine_loop import ActiveRequest, EngineLoop, Request
from tiny_llm.errors import (
    DuplicateRequestError,
    EngineDeadError,
    RequestFailedError,
    RequestTooLargeError,
)
from tiny_llm.faults import Failure
from tiny_llm.inbox import Inbox
from tiny_llm.output_processor import RequestState
from tiny_llm.outputs import RequestEvent
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import completion_ids
from tiny_llm.token_output import TokenOutput

from tiny_llm_checkpoints.gguf_tokenizer import byte_level_bpe
from tiny_llm_checkpoints.tokenizer import Tokenizer
from week_3_day_7.timeouts import WAIT_LIMIT, unwrap_blank, with_timeout

# The core's rule: every completion gets the letters that follow its prompt in the alphabet.

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TOKENIZER = Tokenizer(byte_level_bpe(list(ALPHABET), [], "smollm"))
MAX_PROMPT = 20  # tokens
THREE_TOKENS = SamplingParams(max_tokens=3)
MANY_TOKENS = SamplingParams(max_tokens=10**6)


class Panic(BaseException):
    """An error that is not an `Exception`, like a panic of a tokenizer written in Rust."""


@dataclass
class LetterSequence:
    """One completion in the core."""

    request_id: str
    seq_id: str
    token: int
    left: int


class AlphabetCore:
    """Replaces `EngineCore`, without a model: "abc" gets "d", "e", "f", ..., one letter per step.

    log: the calls. failing: requests that fail in the next step. dies: the error that the next step raises.
    """

    def __init__(self, max_seqs: int = 8) -> None:
        self.max_seqs = max_seqs
        self.waiting: list[LetterSequence] = []
        self.running: list[LetterSequence] = []
        self.log: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.failures: list[Failure] = []
        self.dies: BaseException | None = None
        self.is_full = False
        self.is_held = False
        self.started_steps, self.permits = threading.Semaphore(0), threading.Semaphore(0)

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
        """Whether a request runs or waits."""
        return any(one.request_id == request_id for one in self.waiting + self.running)

    has_request = has

    def add_request(
        self, request_id: str, tokens: list[int], params: SamplingParams, grammar: None = None
    ) -> bool:
        if not tokens:
            raise ValueError("no tokens")
        if len(tokens) > MAX_PROMPT:
            raise RequestTooLargeError(f"{len(tokens)} tokens")
        if self.has(request_id):
            raise DuplicateRequestError(f"{request_id!r} is in use")
        if self.is_full:
            return False
        self.log.append(f"add {request_id}")
        ids = completion_ids(request_id, params.n)
        self.waiting += [
            LetterSequence(request_id, seq_id, tokens[-1], params.max_tokens or 16) for seq_id in ids
        ]
        return True

    def step(self) -> list[TokenOutput]:
        self.log.append("step")
        if self.is_held:
            self.started_steps.release()
            self.permits.acquire(timeout=WAIT_LIMIT.seconds)
        if self.dies is not None:
            raise self.dies
        for request_id, error in self.failing.items():
            if self.has(request_id):
                self.end(lambda one, who=request_id: one.request_id == who)  # type: ignore[misc]
                self.failures.append(Failure(request_id, error))
        self.failing = {}
        while self.waiting and len(self.running) < self.max_seqs:
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
            raise KeyError(seq_id)  # like the real core: the sequence has finished
        self.log.append(f"finish {seq_id}")
        self.end(lambda one: one.seq_id == seq_id)

    def cancel(self, request_id: str) -> None:
        if self.has(request_id):
            self.log.append(f"cancel {request_id}")
        self.end(lambda one: one.request_id == request_id)

    def end(self, has_ended: Callable[[LetterSequence], bool]) -> None:
        self.waiting = [one for one in self.waiting if not has_ended(one)]
        self.running = [one for one in self.running if not has_ended(one)]

    # Steps that wait until the test allows them.

    def hold(self) -> None:
        """Make each step wait at its start from now on."""
        self.is_held = True

    def wait_for_step(self) -> None:
        """Return when a step has started and waits."""
        if not self.started_steps.acquire(timeout=0.6 * WAIT_LIMIT.seconds):  # less than `run` waits
            WAIT_LIMIT.shorten()
            raise AssertionError(
                "no step started: the core has no request, or the engine's thread is blocked"
            )

    def allow_step(self) -> None:
        """Allow one step."""
        self.permits.release()

    def allow_all_steps(self) -> None:
        """Allow this and all later steps."""
        self.is_held = False
        self.permits.release(100)


def request(request_id: str, prompt: str = "a", params: SamplingParams = THREE_TOKENS) -> RequestState:
    """A request whose completions continue the alphabet."""
    tokens = [ALPHABET.index(letter) for letter in prompt]
    return RequestState(request_id, prompt, tokens, TOKENIZER, params)


def events(items: Sequence[Item]) -> list[RequestEvent]:
    """The events among a listener's items; raises the first error among them."""
    for item in items:
        if not isinstance(item, RequestEvent):
            raise item
    return [item for item in items if isinstance(item, RequestEvent)]


class RecordingListener:
    """A listener that records its calls."""

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
        """The items of all calls."""
        return [item for call in self.calls for item in call]

    @property
    def events(self) -> list[RequestEvent]:
        """The events of all calls, without errors."""
        return [item for item in self.items if isinstance(item, RequestEvent)]

    @property
    def errors(self) -> list[RequestFailedError]:
        """The errors of failed requests."""
        return [item for item in self.items if isinstance(item, RequestFailedError)]

    def next(self) -> list[RequestEvent]:
        """The events of the next call; raises its error, if any."""
        try:
            return events(self.queue.get(timeout=WAIT_LIMIT.seconds))
        except EngineDeadError as error:
            raise unwrap_blank(error) from error.__cause__
        except Empty:
            WAIT_LIMIT.shorten()
            raise AssertionError("the listener was not called") from None

    def until_end(self) -> list[RequestEvent]:
        """All events up to the last one of a request."""
        found: list[RequestEvent] = []
        while not found or found[-1].usage is None:
            found += self.next()
        return found


def text(events: Sequence[RequestEvent], request_id: str | None = None) -> str:
    """The joined text of the events, of one request or of all."""
    return "".join(event.text for event in events if request_id in (None, event.request_id))


def reason(one: Request) -> str | None:
    """The finish reason of a request's first completion."""
    assert isinstance(one, RequestState)
    return one.output.outputs[0].finish_reason


def make_loop(core: Any = None) -> EngineLoop:
    """An `EngineLoop` without its thread: the test calls its methods."""
    loop = EngineLoop(Inbox(), AdmissionControl(None, 8))
    loop.core = core or AlphabetCore()
    return loop


def activate(
    loop: EngineLoop, *requests: Request, listener: Callable[[list[Item]], None] | None = None
) -> Any:
    """Make requests active, as `add` does; return their listener."""
    listener = RecordingListener() if listener is None else listener
    for one in requests:
        one.begin(loop.core)
        loop.active[one.request_id] = ActiveRequest(one, listener)
    return listener


def published(loop: EngineLoop) -> EngineStats:
    """The statistics that other threads see."""
    assert hasattr(loop, "stats"), (
        "`stats` was not published: other threads and admission control see no figures"
    )
    return loop.stats


def finish_loop(loop: EngineLoop) -> None:
    """Stop the loop as its thread would: deliver all ready items without another step."""
    loop.stop()
    with_timeout(loop.run)
