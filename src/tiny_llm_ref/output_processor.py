"""The output side of requests: turn tokens into text, find stop strings, and make events and outputs.

Text that could be the start of a stop string is held back until that is ruled out, so that streamed text
never has to be withdrawn. Knows nothing of models, batches or threads.
"""

from collections.abc import Collection
from collections.abc import Sequence as Seq
from time import monotonic
from typing import NamedTuple, Protocol, Self
from weakref import ref

from tiny_llm_checkpoints.tokenizer import Detokenizer, Tokenizer

from .control_stops import ControlStops, control_patterns
from .engine_core import EngineCore
from .errors import DuplicateRequestError, QueueFullError, described
from .grammar import Grammar
from .outputs import (
    CompletionOutput,
    Logprob,
    RequestEvent,
    RequestMetrics,
    RequestOutput,
    RequestUsage,
    TextDelta,
)
from .sampling_params import SamplingParams
from .sequence import TokenLogprobs, completion_ids
from .stop_string import Item, StopString
from .token_output import TokenOutput


class Start(NamedTuple):
    """The state that all completions of a request start from; each forks the detokenizer.

    detokenizer: one that has read the prompt. patterns: the stop strings that contain control tokens, if the
    text leaves these tokens out.
    """

    detokenizer: Detokenizer
    patterns: dict[str, Seq[Item]]

    @classmethod
    def of(
        cls, prompt: Seq[int], tokenizer: Tokenizer, params: SamplingParams, visible: Collection[str] = ()
    ) -> Self:
        """The state after a prompt. visible: control tokens that the text has although it skips others."""
        skips = params.skip_special_tokens
        patterns = control_patterns(params.stop_strings, tokenizer) if skips else {}
        return cls(tokenizer.stream(prompt, skip_special_tokens=skips, visible=visible), patterns)


class CompletionText:
    """One growing completion. start: the state after the prompt; None if the prompt is empty."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, params: SamplingParams, start: Start | None = None
    ) -> None:
        start = start or Start.of((), tokenizer, params)
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self._text = ""
        self._num_streamed = 0
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0
        self._tokenizer = tokenizer
        self._detokenizer = start.detokenizer.fork()
        self._stops = {text: StopString(text) for text in params.stop_strings}
        self._control_stops = ControlStops(start.patterns, tokenizer, start.detokenizer.fork())
        self._min_tokens = params.min_tokens
        self._shows_stop = params.include_stop_str_in_output
        self._wants_logprobs = params.logprobs is not None

    def push(self, output: TokenOutput) -> TextDelta:
        """Add one token; returns the text that is certain now and was not before.

        Sets `finish_reason` if the token or its text ends the completion.
        """
        self.token_ids.append(output.token)
        self._note_logprobs(output)
        may_stop = len(self.token_ids) > self._min_tokens
        found = self._control_stops.push(output.token, self._text, self._detokenizer)
        piece = ""
        if output.finish_reason != "stop" or output.completes_text or self._shows_stop:
            piece = self._detokenizer.push(output.token)
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_token
        if self.finish_reason is not None or (found and may_stop):
            piece += self._detokenizer.flush()
        found += self._grow(piece)
        if may_stop:
            self._cut_at(found)
        return TextDelta(self.index, self._stream(), (output.token,), self.finish_reason)

    def push_all(self, outputs: Seq[TokenOutput]) -> TextDelta:
        """Add tokens until one ends the completion; returns one delta for all of them."""
        deltas: list[TextDelta] = []
        for output in outputs:
            deltas.append(self.push(output))
            if self.finish_reason is not None:
                break
        text = "".join(delta.text for delta in deltas)
        token_ids = tuple(token for delta in deltas for token in delta.token_ids)
        return TextDelta(self.index, text, token_ids, self.finish_reason)

    def abort(self) -> TextDelta:
        """End an unfinished completion with "abort"; returns the text that was held back."""
        self._grow(self._detokenizer.flush())
        self.finish_reason = "abort"
        return TextDelta(self.index, self._stream(), (), self.finish_reason)

    def fail(self, error: BaseException) -> TextDelta:
        """End the completion with an error; returns the text that was held back."""
        self.finish_reason, self.stop_reason, self.error = "error", None, described(error)
        return TextDelta(self.index, self._stream(), (), self.finish_reason)

    def undo_push(self, num_tokens: int) -> None:
        """After a push that raised: go back to the first `num_tokens` tokens."""
        del self.token_ids[num_tokens:], self._logprobs[num_tokens:]
        self._cumulative_logprob = 0.0
        for token, place in zip(self.token_ids, self._logprobs, strict=False):
            self._cumulative_logprob += place[token].logprob
        self.finish_reason = self.stop_reason = None

    def last_logprobs(self, num_tokens: int) -> tuple[dict[int, Logprob], ...] | None:
        """The log-probabilities of the last `num_tokens` tokens, at least 1; None if not requested."""
        return tuple(self._logprobs[-num_tokens:]) if self._wants_logprobs else None

    @property
    def output(self) -> CompletionOutput:
        """The completion so far."""
        return CompletionOutput(
            index=self.index,
            text=self._text,
            token_ids=tuple(self.token_ids),
            cumulative_logprob=self._cumulative_logprob if self._wants_logprobs else None,
            logprobs=tuple(self._logprobs) if self._wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )

    def _grow(self, piece: str) -> list[tuple[int, str]]:
        """Add a piece to the text. Returns the start and the text of each stop string that ends in it."""
        old = len(self._text)
        self._text += piece
        ends = [(stop.push(piece), text) for text, stop in self._stops.items()]
        return [(old + end - len(text), text) for end, text in ends if end is not None]

    def _cut_at(self, found: Seq[tuple[int, str]]) -> None:
        """End the text at the first stop string in `found`, which has the start and the text of each."""
        if found:
            at, stop = min(found)
            self._text = self._text[:at] + (stop if self._shows_stop else "")
            self.finish_reason, self.stop_reason = "stop", stop

    def _stream(self) -> str:
        """The text not streamed yet, without an end that may be the start of a stop string."""
        certain = len(self._text)
        if self.finish_reason is None:
            held = max((stop.matched for stop in self._stops.values()), default=0)
            certain = min(certain - held, self._control_stops.limit(certain))
        delta = self._text[self._num_streamed : certain]
        self._num_streamed += len(delta)
        return delta

    def _note_logprobs(self, output: TokenOutput) -> None:
        if output.logprobs is not None:
            self._logprobs.append(_with_text(output.token, output.logprobs, self._tokenizer))
            self._cumulative_logprob += output.logprobs.logprob


class RequestState:
    """One request from arrival to end: its completions and its times.

    text: the prompt's text; None if the prompt was given as token ids. prompt: its token ids. visible:
    control tokens that the completions' texts have although they skip others. grammar: that of
    `params.structured_outputs`.
    """

    def __init__(
        self,
        request_id: str,
        text: str | None,
        prompt: Seq[int],
        tokenizer: Tokenizer,
        params: SamplingParams,
        visible: Collection[str] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self.request_id = request_id
        self._text = text
        self.prompt_token_ids = tuple(prompt)
        self.params = params
        self._grammar = grammar
        self._tokenizer = tokenizer
        self._prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
        start = Start.of(prompt, tokenizer, params, visible)
        self._completions = {
            seq_id: CompletionText(index, tokenizer, params, start)
            for index, seq_id in enumerate(completion_ids(request_id, params.n))
        }
        self._arrival = monotonic()
        self._first_token: float | None = None
        self._scheduled: float | None = None
        self._num_cached_tokens = 0
        self._finished: float | None = None
        self._core: ref[EngineCore] | None = None

    def begin(self, core: EngineCore) -> None:
        """Queue the request in the core.

        Raises the errors of `EngineCore.add_request`, `DuplicateRequestError` if the request was queued
        before, and `QueueFullError` if it cannot be queued now.
        """
        reject_resubmission(self, self._core)
        tokens = list(self.prompt_token_ids)
        if not core.add_request(self.request_id, tokens, self.params, self._grammar):
            raise QueueFullError(f"request {self.request_id!r}: the engine's queue is full")
        self._core = ref(core)

    @property
    def has_begun(self) -> bool:
        """True once it has a token or has ended."""
        return any(one.token_ids or one.finish_reason for one in self._completions.values())

    def push(self, output: TokenOutput) -> RequestEvent:
        """Add a step's token, or tokens, to one of the completions; returns its event.

        Tokens after the one that ends the completion, by a stop string, are dropped. A completion whose text
        cannot be decoded ends with finish_reason "error", and the others continue. If all others have ended
        like that, the whole request fails, and the error is raised.
        """
        if self._first_token is None:
            self._first_token = monotonic()
            self._scheduled = output.scheduled
            self._num_cached_tokens = output.num_cached_tokens
        completion = self._completions[output.seq_id]
        num_tokens = len(completion.token_ids)
        try:
            prompt_logprobs = self._new_prompt_logprobs(output)
            delta = (
                completion.push_all((*output.earlier, output)) if output.earlier else completion.push(output)
            )
        except BaseException as error:  # including a panic of the tokenizer's library
            completion.undo_push(num_tokens)
            if all(one.error is not None for one in self._completions.values() if one is not completion):
                raise
            return self._event(completion, completion.fail(error))
        logprobs = completion.last_logprobs(len(delta.token_ids))
        return self._event(completion, delta, logprobs, prompt_logprobs)

    def abort(self) -> list[RequestEvent]:
        """End every unfinished completion with "abort"; returns their last events."""
        return [self._event(completion, _aborted(completion)) for completion in self._running]

    def fail(self, error: BaseException) -> list[RequestEvent]:
        """End every unfinished completion with an error; returns their last events."""
        return [self._event(completion, completion.fail(error)) for completion in self._running]

    @property
    def has_failed(self) -> bool:
        """True when every completion has ended with an error."""
        return all(completion.error is not None for completion in self._completions.values())

    @property
    def _running(self) -> list[CompletionText]:
        return [one for one in self._completions.values() if one.finish_reason is None]

    @property
    def finished(self) -> bool:
        """True when every completion has ended."""
        return all(completion.finish_reason is not None for completion in self._completions.values())

    @property
    def output(self) -> RequestOutput:
        """The request's output so far."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._text,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple(completion.output for completion in self._completions.values()),
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            metrics=self._metrics,
        )

    @property
    def _metrics(self) -> RequestMetrics:
        return RequestMetrics(self._arrival, self._first_token, self._finished, self._scheduled)

    def _event(
        self,
        completion: CompletionText,
        delta: TextDelta,
        logprobs: tuple[dict[int, Logprob], ...] | None = None,
        prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None,
    ) -> RequestEvent:
        """The event of one delta of a completion; the request's last event also has its usage."""
        return RequestEvent(
            request_id=self.request_id,
            index=delta.index,
            text=delta.text,
            token_ids=delta.token_ids,
            logprobs=logprobs,
            finish_reason=delta.finish_reason,
            stop_reason=completion.stop_reason,
            error=completion.error,
            prompt_logprobs=prompt_logprobs,
            usage=self._end() if delta.finish_reason is not None and self.finished else None,
        )

    def _end(self) -> RequestUsage:
        """Record the end of the request; returns its usage."""
        self._finished = monotonic()
        num_tokens = sum(len(completion.token_ids) for completion in self._completions.values())
        return RequestUsage(len(self.prompt_token_ids), num_tokens, self._num_cached_tokens, self._metrics)

    def _new_prompt_logprobs(self, output: TokenOutput) -> tuple[dict[int, Logprob] | None, ...] | None:
        """The prompt's log-probabilities, from the first sequence that has them; its forks have the same."""
        if output.prompt_logprobs is None or self._prompt_logprobs is not None:
            return None
        pairs = zip(self.prompt_token_ids[1:], output.prompt_logprobs, strict=True)
        self._prompt_logprobs = (None, *(_with_text(*pair, self._tokenizer) for pair in pairs))
        return self._prompt_logprobs


def _aborted(completion: CompletionText) -> TextDelta:
    """End a completion with "abort", or with "error" if its text cannot be decoded."""
    try:
        return completion.abort()
    except BaseException as error:  # as in `RequestState.push`
        return completion.fail(error)


class _Submitted(Protocol):
    @property
    def request_id(self) -> str: ...
    @property
    def has_begun(self) -> bool: ...


def reject_resubmission(request: _Submitted, core: "ref[EngineCore] | None") -> None:
    """Raise `DuplicateRequestError`, a ValueError, for a request that was submitted before.

    core: the core in which the request was queued; None if it was never queued.
    """
    queued_in = None if core is None else core()
    if request.has_begun or (queued_in is not None and queued_in.has_request(request.request_id)):
        raise DuplicateRequestError(
            f"request {request.request_id!r} was submitted before: make a new one with `Engine.request`"
        )


def _with_text(token: int, found: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """The log-probabilities at one position by token id, including the token's own."""
    own = Logprob(found.logprob, found.rank, tokenizer.token_text(token))
    top = {
        other: Logprob(logprob, rank, tokenizer.token_text(other))
        for rank, (other, logprob) in enumerate(found.top, start=1)
    }
    return {token: own, **top}
