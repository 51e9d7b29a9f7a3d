"""A beam search as its caller sees it: nothing until it is over, and then texts with their scores."""

from collections.abc import Sequence as Seq
from time import monotonic

from .beam_search import BeamSearch, BeamSearchParams, Ended
from .engine_core import EngineCore
from .outputs import BeamSearchOutput, BeamSearchSequence, RequestEvent, RequestMetrics, RequestUsage
from .tokenizer import Detokenizer, Tokenizer


class SearchState:
    """One beam search from arrival to end."""

    def __init__(
        self, request_id: str, prompt: Seq[int], tokenizer: Tokenizer, params: BeamSearchParams
    ) -> None:
        self.request_id = request_id
        self._prompt = tuple(prompt)
        self._params = params
        self._tokenizer = tokenizer
        self._arrival = monotonic()
        self._search: BeamSearch | None = None

    def begin(self, core: EngineCore) -> None:
        """Queue it in the engine. Raises what the engine's door raises."""
        self._search = core.add_beam_search(self.request_id, list(self._prompt), self._params)

    @property
    def finished(self) -> bool:
        """True when no beam is left."""
        return self._search is not None and not self._search.beams

    def end(self, reason: str = "stop") -> list[RequestEvent]:
        """Its only event: it is over; `output` says what was found until now."""
        num_tokens = sum(len(one.hypothesis.tokens) for one in self._ended)
        metrics = RequestMetrics(self._arrival, None, monotonic())
        usage = RequestUsage(len(self._prompt), num_tokens, 0, metrics)
        return [RequestEvent(self.request_id, 0, "", (), finish_reason=reason, usage=usage)]

    def abort(self) -> list[RequestEvent]:
        """End it from outside."""
        return self.end("abort")

    @property
    def output(self) -> BeamSearchOutput:
        """What has ended so far, with its texts."""
        behind_prompt = self._tokenizer.stream(self._prompt)
        return BeamSearchOutput(tuple(self._with_text(one, behind_prompt.fork()) for one in self._ended))

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
