"""A beam search as its caller sees it: no output until it is over, then texts with their scores."""

from collections.abc import Sequence as Seq
from time import monotonic
from weakref import ref

from tiny_llm_checkpoints.tokenizer import Detokenizer, Tokenizer

from .beam_search import BeamSearch, BeamSearchParams, Ended
from .engine_core import EngineCore
from .errors import described
from .output_processor import reject_resubmission
from .outputs import BeamSearchOutput, BeamSearchSequence, RequestEvent, RequestMetrics, RequestUsage


class SearchState:
    """One beam search from its arrival to its end."""

    def __init__(
        self, request_id: str, prompt: Seq[int], tokenizer: Tokenizer, params: BeamSearchParams
    ) -> None:
        self.request_id = request_id
        self._prompt = tuple(prompt)
        self._params = params
        self._tokenizer = tokenizer
        self._arrival = monotonic()
        self._search: BeamSearch | None = None
        self._core: ref[EngineCore] | None = None
        self._error: str | None = None
        self._has_ended = False

    def begin(self, core: EngineCore) -> None:
        """Queue the search; raises as `add_beam_search` does, and `DuplicateRequestError` if called twice."""
        reject_resubmission(self, self._core)
        self._search = core.add_beam_search(self.request_id, list(self._prompt), self._params)
        self._core = ref(core)

    @property
    def has_begun(self) -> bool:
        """True once a hypothesis or the whole search has ended."""
        return self._has_ended or (self._search is not None and bool(self._search.ended))

    @property
    def has_failed(self) -> bool:
        """True if the search has ended with an error."""
        return self._error is not None

    @property
    def finished(self) -> bool:
        """True if no beam is left."""
        return self._search is not None and not self._search.beams

    def end(self, reason: str = "stop") -> list[RequestEvent]:
        """End the search; return its only event. `output` has the hypotheses that have ended so far."""
        self._has_ended = True
        num_tokens = sum(len(one.hypothesis.tokens) for one in self._ended)
        metrics = RequestMetrics(self._arrival, None, monotonic())
        usage = RequestUsage(len(self._prompt), num_tokens, 0, metrics)
        return [
            RequestEvent(self.request_id, 0, "", (), finish_reason=reason, usage=usage, error=self._error)
        ]

    def abort(self) -> list[RequestEvent]:
        """End the search because it was cancelled; return its event."""
        return self.end("abort")

    def fail(self, error: BaseException) -> list[RequestEvent]:
        """End the search with an error; return its event."""
        self._error = described(error)
        return self.end("error")

    @property
    def output(self) -> BeamSearchOutput:
        """The hypotheses that have ended so far, with their texts."""
        if self._search is None or self._error is not None:
            return BeamSearchOutput((), self._error)
        after_prompt = self._tokenizer.stream(self._prompt)
        return BeamSearchOutput(tuple(self._with_text(one, after_prompt.fork()) for one in self._ended))

    @property
    def _ended(self) -> Seq[Ended]:
        return () if self._search is None else self._search.ended

    def _with_text(self, ended: Ended, detokenizer: Detokenizer) -> BeamSearchSequence:
        tokens, logprob = ended.hypothesis
        return BeamSearchSequence(
            tokens=(*self._prompt, *tokens),
            text="".join([*map(detokenizer.push, tokens), detokenizer.flush()]),
            cum_logprob=logprob,
            score=ended.score,
            finish_reason=ended.finish_reason,
        )
