"""What the server needs of a model: `tiny_llm.LLM` has it; so may a model whose engine runs elsewhere."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

from tiny_llm.delivery import Listener
from tiny_llm.prompts import PlainPrompt

from tiny_llm import EngineConfig, EngineStats, PoolChange, RequestEvent, SamplingParams
from tiny_llm_checkpoints.chat_template import ChatTemplate
from tiny_llm_checkpoints.tokenizer import Tokenizer


class ServedRequest(Protocol):
    """A request that an engine has made, as the server uses it."""

    @property
    def request_id(self) -> str:
        """The id that its events have."""

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt's token ids."""

    @property
    def has_failed(self) -> bool:
        """True when all of its completions have failed."""

    def fail(self, error: BaseException) -> list[RequestEvent]:
        """End all unfinished completions with an error; returns their last events."""


class ServedEngine(Protocol):
    """An engine as the server uses it. Any thread may call it; the errors are those of `tiny_llm.Engine`."""

    @property
    def stats(self) -> EngineStats:
        """How full the engine is; never waits. With several replicas, their sum (`sum_stats`)."""

    @property
    def refusal(self) -> Exception | None:
        """The error that any new request would get now; None while the engine takes requests."""

    def check_admission(self) -> None:
        """Raise the error, if any, with which `submit` would refuse one request now."""

    def check_token_ids(self, tokens: Sequence[int]) -> list[int]:
        """Token ids as a list of ints. Raises ValueError for other values and ids outside the vocabulary."""

    def is_compiled(self, params: SamplingParams) -> bool:
        """True if `request` need not compile a grammar for these parameters."""

    def request(
        self,
        prompt: PlainPrompt,
        params: SamplingParams,
        request_id: str | None = None,
        visible: Collection[str] = (),
        /,
    ) -> ServedRequest:
        """Make a request, which can be submitted once; raises for one that can never run."""

    def submit(self, requests: Sequence[Any], deliver: Listener, /) -> Future[None]:
        """Queue requests, all or none; returns at once. The future is done when they are queued.

        requests: those that `request` of this engine has made. deliver: gets lists of their events, or
        errors, in any thread; it returns quickly.
        """

    def cancel(self, request_id: str, /) -> object:
        """Cancel a request; returns at once. An unknown id is ignored."""

    async def drain(self, timeout: float | None = None) -> None:
        """Reject new requests; return when all others have ended. After `timeout` seconds, cancel them."""

    def stop(self) -> None:
        """Cancel all requests and end the engine; returns when it has ended."""

    def watch_blocks(self, watcher: Callable[[PoolChange], None], /) -> Callable[[], object]:
        """Call a watcher with the pool's content, then with its changes; returns a function that ends this.

        Only `/live` needs it.
        """


@runtime_checkable
class Replicated(Protocol):
    """The part of an engine with several replicas that a single engine lacks."""

    @property
    def is_draining(self) -> bool:
        """True if it refuses requests because it drains, not because no replica runs."""

    @property
    def replica_stats(self) -> Mapping[str, EngineStats]:
        """How full each replica is, by its name in the metrics; never waits."""


class ServedModel(Protocol):
    """A loaded model as the server uses it."""

    @property
    def engine(self) -> ServedEngine:
        """The engine that runs its requests."""

    @property
    def engine_config(self) -> EngineConfig:
        """The engine's options; with several replicas, those of each."""

    @property
    def max_model_len(self) -> int:
        """The longest prompt + output in tokens."""

    @property
    def model_name(self) -> str:
        """Its name, unless the operator sets another one."""

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Values of parameters that a request leaves out, by the names of `SamplingParams`."""

    @property
    def sampling_source(self) -> str | None:
        """Where these values are from; None if there are none."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The template that turns messages into a prompt; None if the model has none."""
