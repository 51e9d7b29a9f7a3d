"""What travels between the ingress and a replica: a call to a replica, and what it answers.

A call carries the engine requests of one HTTP request. The replica answers with a stream: first whether it
has accepted them, then lists of their events. When the ingress has a shared stream there, the call says that
it has moved, and its further events come in the shared one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tiny_llm import RequestEvent, SamplingParams, TinyLLMError
from tiny_llm_routing.prompt_blocks import PromptBlocks


@dataclass(frozen=True)
class PromptCall:
    """One prompt of a call: the request's id in the engine, the prompt's token ids, and its seed."""

    request_id: str
    token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Call:
    """The engine requests of one HTTP request; a replica accepts all of them or none.

    params: those of every prompt, but for the seed. visible: as in `Engine.request`. blocks: those of the
    first prompt, by which the call is routed. ingress: the name under which its sender opens shared streams.
    refused_by: replicas that have refused it; it goes to them only if there is no other.
    """

    prompts: tuple[PromptCall, ...]
    params: SamplingParams
    visible: tuple[str, ...]
    blocks: PromptBlocks
    ingress: str = ""
    refused_by: frozenset[str] = frozenset()

    @property
    def call_id(self) -> str:
        """The id by which the router knows the call: that of its first request."""
        return self.prompts[0].request_id

    @property
    def has_large_events(self) -> bool:
        """True if events have the log-probabilities of whole prompts: they would hold up those of others."""
        return self.params.prompt_logprobs is not None


@dataclass(frozen=True)
class Accepted:
    """The first answer of a replica that runs the call."""

    replica: str


@dataclass(frozen=True)
class Refused:
    """The only answer of a replica that does not run the call, with the error for the client."""

    replica: str
    error: TinyLLMError


@dataclass(frozen=True)
class OpenStream:
    """Asks a replica to open a shared stream for an ingress.

    Each answer is a list of events of those of its calls that have moved. number: tells this stream from the
    ingress's earlier ones on the same replica.
    """

    ingress: str
    replica: str
    number: int


@dataclass(frozen=True)
class Moved:
    """The last answer to a call whose further events come in the shared stream of this number.

    The call's own stream stays open, without answers, until its requests have ended.
    """

    number: int


@dataclass(frozen=True)
class Failure:
    """The end of one request that has failed on a replica. reason: the error's message."""

    request_id: str
    reason: str


Events = Sequence[RequestEvent | Failure]


def ends_request(event: RequestEvent | Failure) -> bool:
    """True for the last event of a request."""
    return isinstance(event, Failure) or event.usage is not None
