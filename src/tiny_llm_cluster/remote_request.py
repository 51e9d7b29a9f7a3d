"""A request that runs on a replica, as the ingress sees it: it counts what has come, so that it can fail."""

from collections.abc import Collection
from time import monotonic

from tiny_llm.errors import described
from tiny_llm.output_processor import RequestState
from tiny_llm.outputs import RequestMetrics, RequestUsage

from tiny_llm import RequestEvent
from tiny_llm_routing.prompt_blocks import PromptBlocks

from .calls import PromptCall


class RemoteRequest:
    """A checked request; the replica has the completions' state, and this object counts their events.

    state: the request as `RequestMaker` made it, at its start. visible: as in `Engine.request`. blocks: those
    of its prompt.
    """

    def __init__(self, state: RequestState, visible: Collection[str], blocks: PromptBlocks) -> None:
        self.request_id = state.request_id
        self.prompt_token_ids = state.prompt_token_ids
        self.params = state.params
        self.visible = tuple(visible)
        self.blocks = blocks
        self._arrival = monotonic()
        self._num_completions: int = state.params.n
        self._unfinished = dict.fromkeys(range(self._num_completions))
        self._num_tokens = 0
        self._num_failed = 0

    def prompt_call(self, seed: int) -> PromptCall:
        """What a replica needs to know of it, besides the parameters. seed: for a request without one."""
        own = self.params.seed
        return PromptCall(self.request_id, self.prompt_token_ids, seed if own is None else own)

    @property
    def has_failed(self) -> bool:
        """True when every completion has ended with an error."""
        return self._num_failed == self._num_completions

    def note(self, event: RequestEvent) -> None:
        """Count one of its events."""
        self._num_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self._unfinished.pop(event.index, None)
            self._num_failed += event.finish_reason == "error"

    def fail(self, error: BaseException) -> list[RequestEvent]:
        """End all unfinished completions with an error; returns their last events."""
        return self._end("error", described(error))

    def abort(self) -> list[RequestEvent]:
        """End all unfinished completions with "abort"; returns their last events."""
        return self._end("abort", None)

    def _end(self, reason: str, error: str | None) -> list[RequestEvent]:
        indices = list(self._unfinished)
        events = [
            RequestEvent(
                self.request_id,
                index,
                "",
                (),
                finish_reason=reason,
                error=error,
                usage=self._usage() if index == indices[-1] else None,
            )
            for index in indices
        ]
        for event in events:
            self.note(event)
        return events

    def _usage(self) -> RequestUsage:
        metrics = RequestMetrics(self._arrival, None, monotonic())
        return RequestUsage(len(self.prompt_token_ids), self._num_tokens, 0, metrics)
