"""Tokens become text: one completion's growing text, its stop strings, and a request's output.

Knows nothing of models or batches. Text that could be the beginning of a stop string is held back
until it is certain, so what was streamed never has to be taken back.
"""

from collections.abc import Sequence as Seq
from time import monotonic

from .beam_search import BeamSearch
from .engine_core import TokenOutput
from .outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TextDelta,
)
from .sampling_params import SamplingParams
from .sequence import TokenLogprobs
from .tokenizer import Tokenizer


class CompletionText:
    """One completion as it grows."""

    def __init__(self, index: int, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._text = ""
        self._num_streamed = 0
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.stream(skip_special_tokens=params.skip_special_tokens)
        self._stop = params.stop_strings
        self._min_tokens = params.min_tokens
        self._shows_stop = params.include_stop_str_in_output
        self._wants_logprobs = params.logprobs is not None

    def push(self, output: TokenOutput) -> TextDelta:
        """Take one token; the text that became certain with it.

        Sets `finish_reason` where the token or its text ends the completion.
        """
        self.token_ids.append(output.token)
        self._note_logprobs(output)
        old = len(self._text)
        if output.finish_reason != "stop" or self._shows_stop:
            self._text += self._detokenizer.push(output.token)
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_token
        if self.finish_reason is not None:
            self._text += self._detokenizer.flush()
        if len(self.token_ids) > self._min_tokens:
            self._cut_at_stop_string(old)
        return TextDelta(self.index, self._stream(), (output.token,), self.finish_reason)

    def abort(self) -> None:
        """Mark as ended from outside, unless it has ended by itself."""
        self.finish_reason = self.finish_reason or "abort"

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
        )

    def _cut_at_stop_string(self, old: int) -> None:
        """End the text at the first stop string that has something of what follows the `old` characters."""
        found = [(self._text.find(stop, max(0, old - len(stop) + 1)), stop) for stop in self._stop]
        found = [(at, stop) for at, stop in found if at >= 0]
        if found:
            at, stop = min(found)
            self._text = self._text[: at + len(stop) if self._shows_stop else at]
            self.finish_reason, self.stop_reason = "stop", stop

    def _stream(self) -> str:
        """Text not streamed yet, less an end that may turn out to be the beginning of a stop string."""
        held = (
            0
            if self.finish_reason is not None
            else max((_overlap(self._text, s) for s in self._stop), default=0)
        )
        delta = self._text[self._num_streamed : len(self._text) - held]
        self._num_streamed += len(delta)
        return delta

    def _note_logprobs(self, output: TokenOutput) -> None:
        if output.logprobs is not None:
            self._logprobs.append(_with_text(output.token, output.logprobs, self._tokenizer))
            self._cumulative_logprob += output.logprobs.logprob


class RequestState:
    """One request from arrival to end: its completions and its times."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Seq[int],
        seq_ids: Seq[str],
        tokenizer: Tokenizer,
        params: SamplingParams,
    ) -> None:
        self.request_id = request_id
        self._prompt = prompt
        self._prompt_token_ids = tuple(prompt_token_ids)
        self._tokenizer = tokenizer
        self._prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
        self._completions = {id_: CompletionText(i, tokenizer, params) for i, id_ in enumerate(seq_ids)}
        self._untaken: list[TextDelta] = []
        self._arrival = monotonic()
        self._first_token: float | None = None
        self._num_cached_tokens = 0
        self._finished: float | None = None

    def push(self, output: TokenOutput) -> TextDelta:
        """Take one token of one of the completions."""
        if self._first_token is None:
            self._first_token = monotonic()
            self._num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            self._note_prompt_logprobs(output.prompt_logprobs)
        delta = self._completions[output.seq_id].push(output)
        if self.finished:
            self._finished = monotonic()
        self._untaken.append(delta)
        return delta

    def take_deltas(self) -> list[TextDelta]:
        """What `push` has returned since the last call, for whoever streams this request."""
        taken, self._untaken = self._untaken, []
        return taken

    def abort(self) -> None:
        """Mark every completion that has not ended as aborted."""
        for completion in self._completions.values():
            completion.abort()

    def _note_prompt_logprobs(self, found: Seq[TokenLogprobs]) -> None:
        """Take those of a request's first sequence; its forks bring the same."""
        if self._prompt_logprobs is None:
            pairs = zip(self._prompt_token_ids[1:], found, strict=True)
            self._prompt_logprobs = (None, *(_with_text(*pair, self._tokenizer) for pair in pairs))

    @property
    def finished(self) -> bool:
        """True when every completion has ended."""
        return all(completion.finish_reason is not None for completion in self._completions.values())

    @property
    def output(self) -> RequestOutput:
        """The request so far."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=tuple(completion.output for completion in self._completions.values()),
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            metrics=RequestMetrics(self._arrival, self._first_token, self._finished),
        )


def found_by(search: BeamSearch, prompt: Seq[int], tokenizer: Tokenizer) -> BeamSearchOutput:
    """What a search that is over has found, with its texts."""
    return BeamSearchOutput(
        tuple(
            BeamSearchSequence(
                tokens=(*prompt, *ended.hypothesis.tokens),
                text=tokenizer.decode(list(ended.hypothesis.tokens)),
                cum_logprob=ended.hypothesis.logprob,
                score=ended.score,
                finish_reason=ended.finish_reason,
            )
            for ended in search.ended
        )
    )


def _with_text(token: int, found: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """The log-probabilities at one place by token id, the token's own among them."""
    own = Logprob(found.logprob, found.rank, tokenizer.token_text(token))
    top = {
        other: Logprob(logprob, rank, tokenizer.token_text(other))
        for rank, (other, logprob) in enumerate(found.top, start=1)
    }
    return {token: own, **top}


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
