"""The model behind the server: whether it is there yet, its name, and requests on their way to it."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from enum import Enum
from threading import Thread
from time import time
from typing import Any

from fastapi import Request
from tiny_llm.engine import Prompt
from tiny_llm.generation_defaults import fitted
from tiny_llm.output_processor import RequestState
from tiny_llm.resources import needing

from tiny_llm import LLM, RequestTooLargeError, SamplingParams, SamplingParamsError
from tiny_llm_checkpoints.chat_messages import MessageError
from tiny_llm_checkpoints.chat_template import ChatTemplate
from tiny_llm_checkpoints.errors import PromptTooLongError

from .config import ServerConfig
from .errors import ApiError, load_error, refused
from .metrics import Metrics
from .run import Run
from .schema import ROLES, ChatCompletionRequest, Generation, TokenizeRequest

LOG = logging.getLogger("uvicorn.error")  # uvicorn's own, for whatever is no request's line


class Status(Enum):
    """loading: the model is not there yet. failed: it will not be. draining: no new requests are taken."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Service:
    """An engine that is loaded while the server answers already.

    load: makes the LLM, in a thread of its own; what it raises is kept in `failure`.
    """

    def __init__(self, load: Callable[[], LLM], config: ServerConfig) -> None:
        self.config = config
        self.created = int(time())
        self.failure: Exception | None = None
        self._load = load
        self._llm: LLM | None = None
        self.is_ending = False
        self._at_end: list[Callable[[], None]] = []
        self.metrics = Metrics(lambda: self._llm, lambda: self.model_name)

    async def load(self) -> None:
        """Load the model; returns when it is there, or has failed. Cancelled, it waits for neither."""
        outcome: Future[LLM] = Future()
        try:
            with needing("the thread that loads the model"):
                Thread(target=_settle, args=(outcome, self._load), name="load", daemon=True).start()
            self._llm = await asyncio.wrap_future(outcome)
        except Exception as error:  # the process ends with its message
            self.failure = load_error(error)
        else:
            config, stats = self._llm.engine_config, self._llm.engine.stats
            LOG.info(
                "%s is ready: %d blocks of %d tokens, contexts of %d; the API is at /v1%s",
                *(self.model_name, stats.num_blocks, config.block_size, self._llm.max_model_len),
                ", the live page at /" if self.config.live else "",
            )
            if defaults := self._llm.sampling_defaults:
                LOG.info(
                    "default sampling parameters: %s (from %s; --generation-config vllm turns them off)",
                    ", ".join(f"{name} {value}" for name, value in defaults.items()),
                    self._llm.sampling_source,
                )

    @property
    def status(self) -> Status:
        """What `/health` says."""
        if self.failure is not None:
            return Status.FAILED
        if self._llm is None:
            return Status.LOADING
        return Status.READY if self._llm.engine.refusal is None else Status.DRAINING

    @property
    def llm(self) -> LLM:
        """The model. Raises `ApiError` where it is not there."""
        if self._llm is None:
            raise ApiError(
                503, f"the model is {self.status.value}", code=self.status.value, headers={"Retry-After": "1"}
            )
        return self._llm

    @property
    def model_name(self) -> str:
        """What the model is called here; nothing while that is not known."""
        if self.config.served_model_name is not None:
            return self.config.served_model_name
        return "" if self._llm is None else self._llm.model_name

    @property
    def max_model_len(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return self.llm.max_model_len

    @property
    def max_prompts(self) -> int:
        """Most prompts of one request: more than may ever run and wait would be refused for ever."""
        most, engine = self.config.max_prompts, self.llm.engine_config
        if engine.max_num_waiting is None:
            return most
        return min(most, engine.max_num_waiting + engine.max_num_seqs)

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name."""
        named = self.config.served_model_name
        known = self.llm.model_name if named is None else named
        if name not in (None, "", known):
            message = f"the model {name!r} does not exist; this server has {known!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check(self, body: Generation, num_prompts: int = 1) -> None:
        """Refuse another model's name, more of something than this server gives, and all while it is full."""
        self.check_model(body.model)
        self.llm.engine.check_admission()
        if body.priority and self.config.scheduling_policy == "fcfs":
            raise refused("priority: refused by --scheduling-policy fcfs", "priority")
        most, stops = self.config, [body.stop] if isinstance(body.stop, str) else body.stop or []
        for name, count, limit in (("n", body.n, most.max_n), ("stop", len(stops), most.max_stop)):
            if count > limit:
                raise refused(f"{name}: at most {limit} here, not {count}", name)
        self._check_sequences(num_prompts, body.n)

    def _check_sequences(self, num_prompts: int, n: int) -> None:
        """Refuse a request that would keep later ones waiting for too long."""
        if num_prompts > (most := self.max_prompts):
            raise refused(f"prompt: at most {most} prompts in one request, not {num_prompts}", "prompt")
        if (count := num_prompts * n) > (most := self.config.max_sequences):
            product = f"{num_prompts} prompts times n {n}"
            message = f"n: at most {most} sequences in one request (--max-sequences), not {count} ({product})"
            raise refused(message, "n")

    async def begin(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        request_id: str,
        field: str,
        *,
        may_shorten: bool = False,
    ) -> Run:
        """Queue prompts in the engine. field: where they came from, for what is wrong with them.

        may_shorten: `max_tokens` is the model's recommendation, and less where the context has less left.

        A single prompt is known to the engine by `request_id`, several by that and their place.
        """
        engine, ids = self.llm.engine, prompt_ids(request_id, len(prompts))
        try:
            requests = await asyncio.to_thread(
                lambda: [
                    self._request(prompt, params, name, may_shorten)
                    for prompt, name in zip(prompts, ids, strict=True)
                ]
            )
            if self.config.log_requests:
                for request, prompt in zip(requests, prompts, strict=True):
                    LOG.info("%s asks %r of %r", request.request_id, params, prompt)
            lengths = {request.request_id: len(request.prompt_token_ids) for request in requests}
            watch = self.metrics.watch(lengths, params.n)
            return await Run.begin(engine, requests, watch, self.config.request_timeout)
        except RequestTooLargeError as error:
            raise _too_large(error, field) from error
        except SamplingParamsError as error:
            raise _of_params(error) from error
        except ValueError as error:
            raise refused(str(error), field) from error

    def _request(
        self, prompt: Prompt, params: SamplingParams, request_id: str, may_shorten: bool
    ) -> RequestState:
        request = self.llm.engine.request(prompt, params, request_id)
        if not may_shorten:
            return request
        fitting = fitted(params, len(request.prompt_token_ids), self.max_model_len)
        return request if fitting is params else self.llm.engine.request(prompt, fitting, request_id)

    def may_shorten(self, body: Generation) -> bool:
        """Whether `max_tokens` of a request is what the model recommends."""
        return "max_tokens" in self.llm.sampling_defaults and body.leaves_out("max_tokens")

    def cache_salt(self, body: Generation, request: Request) -> str:
        """What a request shares kept prompts by: its own salt, of its own key where keys are kept apart."""
        if not self.config.isolate_keys:
            return body.cache_salt
        return f"{request.state.client}:{body.cache_salt}"

    def encode_chat(
        self, body: ChatCompletionRequest | TokenizeRequest, context: int | None = None
    ) -> list[int]:
        """A conversation as the template writes it; what a message spells out is text, never control.

        context: refuse a conversation that leaves no place for an answer in so many tokens.
        """
        llm = self.llm
        if llm.chat_template is None:
            raise refused(f"{self.model_name} has no chat template: use /v1/completions", "messages")
        kwargs = dict(body.chat_template_kwargs or {})
        if isinstance(body, ChatCompletionRequest):
            kwargs = self._of_template(llm.chat_template, body, kwargs)
        try:
            return llm.chat_template.encode(
                body.messages or [],
                llm.tokenizer,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                add_special_tokens=bool(body.add_special_tokens),
                chat_template_kwargs=kwargs,
                roles=ROLES,
                context=context,
            )
        except MessageError as error:
            code = "unsupported_field" if error.unsupported else None
            raise refused(str(error), error.field, code) from error
        except PromptTooLongError as error:
            raise refused(str(error), "messages", "context_length_exceeded") from error
        except ValueError as error:
            raise refused(str(error), "messages") from error

    def _of_template(
        self, template: ChatTemplate, body: ChatCompletionRequest, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The template's variables, with those that are fields of their own in OpenAI's API."""
        if body.tools and body.tool_choice != "none":
            raise refused("tools is not supported, only with tool_choice none", "tools", "unsupported_field")
        if body.tools and template.uses_variable("tools"):
            message = "tools is not supported: this model's template would write them"
            raise refused(message, "tools", "unsupported_field")
        if body.reasoning_effort is not None and template.uses_variable("reasoning_effort"):
            return {"reasoning_effort": body.reasoning_effort, **kwargs}
        return kwargs

    async def drain(self, seconds: float | None) -> None:
        """Take no new requests, and return when the others have ended, or their `seconds` are over."""
        try:
            if self._llm is not None:
                await self._llm.engine.drain(seconds)
        finally:
            self.end()

    def end(self) -> None:
        """Tell those who only watch that nothing more will come."""
        self.is_ending = True
        while self._at_end:
            self._at_end.pop()()

    @contextmanager
    def until_the_end(self, tell: Callable[[], None]) -> Iterator[None]:
        """For whoever would watch for ever: `tell` is called when nothing more will come."""
        self._at_end.append(tell)
        try:
            yield
        finally:
            self._at_end = [other for other in self._at_end if other is not tell]

    def stop(self) -> None:
        """End whatever runs, at once."""
        if self._llm is not None:
            self._llm.engine.stop()


def _settle(outcome: "Future[LLM]", load: Callable[[], LLM]) -> None:
    """Give a future what `load` returns or raises."""
    outcome.set_running_or_notify_cancel()  # from now on nobody can cancel it
    try:
        outcome.set_result(load())
    except BaseException as error:  # also a panic of a library
        outcome.set_exception(load_error(error))


def prompt_ids(request_id: str, num_prompts: int) -> list[str]:
    """What the engine calls the prompts of a request."""
    return [request_id] if num_prompts == 1 else [f"{request_id}-{place}" for place in range(num_prompts)]


def sampling_params(body: Generation, defaults: Mapping[str, Any], **others: Any) -> SamplingParams:
    """The engine's parameters of a request; ValueErrors of the engine become refusals that name the field.

    defaults: what the model recommends, for the parameters that the client has left out.
    """
    left_out = {name: value for name, value in defaults.items() if body.leaves_out(name)}
    try:
        return SamplingParams.from_options(**{**body.sampling(), **others, **left_out})
    except ValueError as error:
        raise _of_params(error) from error


def _of_params(error: ValueError) -> ApiError:
    """The engine's message begins with the field's name."""
    return refused(str(error), str(error).split(" ", 1)[0].split("[", 1)[0])


def _too_large(error: RequestTooLargeError, field: str) -> ApiError:
    """A request that could never run: the field that must be smaller is named."""
    message = str(error).split(": ", 1)[-1]
    if error.field == "n":
        return refused(message, "n")
    return refused(message, error.field or field, "context_length_exceeded")
