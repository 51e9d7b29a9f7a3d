"""The served model: loading it, its name and defaults, and submitting requests to its engine."""

import asyncio
import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from threading import Thread
from time import time
from typing import Any

from fastapi import Request
from tiny_llm.generation_defaults import fit_to_context
from tiny_llm.prompts import PlainPrompt
from tiny_llm.resources import requiring

from tiny_llm import (
    EngineStats,
    RequestTooLargeError,
    SamplingParams,
    SamplingParamsError,
    StructuredOutputsParams,
)
from tiny_llm_checkpoints.chat_template import ChatTemplate
from tiny_llm_checkpoints.errors import PromptTooLongError
from tiny_llm_checkpoints.plain_json import MessageError

from .answer_form import AnswerForm
from .chat_format import ChatFormat
from .config import ServerConfig
from .errors import ApiError, load_error, refused
from .metrics import CollectRequests, Metrics
from .run import Run
from .sampling_defaults import checked_overrides, described
from .schema import ROLES, ChatCompletionRequest, Generation, TokenizeRequest
from .served_model import Replicated, ServedModel, ServedRequest
from .structured_fields import STRUCTURED_OUTPUTS
from .tool_use import refused_message

LOG = logging.getLogger("uvicorn.error")  # the logger that uvicorn sets up


class Status(Enum):
    """State of the server. failed: the model could not be loaded. draining: new requests are refused.

    unavailable: new requests are refused until a replica runs again.
    """

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"


class Service:
    """An engine that loads while the server already answers.

    load: makes the model; it is called in a thread. failure: the error that it raised. of_requests: collects
    the figures of requests for `/metrics`; None: those of this server are all.
    """

    def __init__(
        self,
        load: Callable[[], ServedModel],
        config: ServerConfig,
        of_requests: CollectRequests | None = None,
    ) -> None:
        self.config = config
        self.created = int(time())
        self.failure: Exception | None = None
        self._load = load
        self._llm: ServedModel | None = None
        self.is_stopping = False
        self._at_end: list[Callable[[], None]] = []
        self._overrides = checked_overrides(config.override_generation_config)
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self._compiling = ThreadPoolExecutor(1, "grammars")
        self.metrics = Metrics(lambda: self._llm, lambda: self.model_name)
        self._of_requests = of_requests

    async def load(self) -> None:
        """Load the model; returns when it is loaded or has failed. Cancelling stops only the waiting."""
        outcome: Future[ServedModel] = Future()
        try:
            with requiring("the thread that loads the model"):  # the command line knows it by its name
                Thread(target=_resolve_with, args=(outcome, self._load), name="load", daemon=True).start()
            self._llm = await asyncio.wrap_future(outcome)
        except Exception as error:  # the process ends with its message
            self.failure = load_error(error)
        else:
            self._log_ready(self._llm)

    def _log_ready(self, llm: ServedModel) -> None:
        LOG.info(
            "%s is ready: %d blocks of %d tokens, context of %d tokens; the API is at /v1%s",
            *(self.model_name, llm.engine.stats.num_blocks, llm.engine_config.block_size, llm.max_model_len),
            ", the live page at /" if self.config.live else "",
        )
        if self.sampling_defaults:
            LOG.info(
                "Sampling defaults for fields that a request leaves out: %s",
                described(self._overrides, llm.sampling_defaults, llm.sampling_source),
            )

    @property
    def status(self) -> Status:
        """The status that `/health` returns."""
        if self.failure is not None:
            return Status.FAILED
        if self._llm is None:
            return Status.LOADING
        engine = self._llm.engine
        if engine.refusal is None:
            return Status.READY
        is_unavailable = isinstance(engine, Replicated) and not engine.is_draining
        return Status.UNAVAILABLE if is_unavailable else Status.DRAINING

    @property
    def llm(self) -> ServedModel:
        """The model. Raises `ApiError` (503) if it is not loaded."""
        if self._llm is None:
            raise ApiError(
                503, f"the model is {self.status.value}", code=self.status.value, headers={"Retry-After": "1"}
            )
        return self._llm

    @property
    def model_name(self) -> str:
        """Name of the model in requests and answers; empty if it is not known until the model is loaded."""
        if self.config.served_model_name is not None:
            return self.config.served_model_name
        return "" if self._llm is None else self._llm.model_name

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Values of the sampling parameters that a request leaves out, by the names of `SamplingParams`."""
        return {**self.llm.sampling_defaults, **self._overrides}

    async def metrics_text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return self.metrics.text(None if self._of_requests is None else await self._of_requests())

    def engine_stats(self) -> EngineStats | None:
        """How full the engine is; None while the model loads."""
        return None if self._llm is None else self._llm.engine.stats

    @property
    def num_unfinished_requests(self) -> int:
        """HTTP requests with completions that the engine has not finished."""
        return sum(run.is_unfinished for run in self._runs)

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output in tokens."""
        return self.llm.max_model_len

    @property
    def max_prompts(self) -> int:
        """The maximum number of prompts in one request; no more than an idle engine can run and queue."""
        limit, engine = self.config.max_prompts, self.llm.engine_config
        if engine.max_num_waiting is None:
            return limit
        return min(limit, engine.max_num_waiting + engine.max_num_seqs)

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError` (404) for another model's name; None and "" mean the served model."""
        named = self.config.served_model_name
        known = self.llm.model_name if named is None else named
        if name not in (None, "", known):
            message = f"the model {name!r} does not exist; this server has {known!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check(self, body: Generation, num_prompts: int = 1) -> None:
        """Raise an error for another model's name, for a request beyond the limits, and if the queue is full.

        Raises `ApiError`, `QueueFullError` and `EngineStoppingError`.
        """
        self.check_model(body.model)
        self.llm.engine.check_admission()
        if body.priority and self.config.scheduling_policy == "fcfs":
            raise refused("priority is not allowed with --scheduling-policy fcfs", "priority")
        limits, stops = self.config, [body.stop] if isinstance(body.stop, str) else body.stop or []
        for name, count, limit in (("n", body.n, limits.max_n), ("stop", len(stops), limits.max_stop)):
            if count > limit:
                raise refused(f"{name}: must be at most {limit} (--max-{name}), not {count}", name)
        self._check_sequences(num_prompts, body.n)

    def _check_sequences(self, num_prompts: int, n: int) -> None:
        """Raise `ApiError` for a request so large that later ones would wait too long for it."""
        if num_prompts > (limit := self.max_prompts):
            raise refused(f"prompt: a request may have at most {limit} prompts, not {num_prompts}", "prompt")
        if (count := num_prompts * n) > (limit := self.config.max_sequences):
            product = f"{num_prompts} prompts times n {n}"
            message = (
                f"n: a request may have at most {limit} sequences (--max-sequences), not {count} ({product})"
            )
            raise refused(message, "n")

    async def begin(
        self,
        prompts: Sequence[PlainPrompt],
        params: SamplingParams,
        request_id: str,
        field: str,
        *,
        form: AnswerForm | None = None,
        may_shorten: bool = False,
        visible: Collection[str] = (),
        arrival: float,
    ) -> Run:
        """Queue prompts in the engine. field: the request's field with the prompts, for error messages.

        form: that of the answers; a new grammar is compiled in a thread of its own, so that other requests do
        not wait for it. may_shorten: `max_tokens` is a default, so lower it if the context has fewer tokens
        left. visible: control tokens that the completions' texts have although they skip others. arrival:
        when the request arrived, by `time.monotonic`.

        The engine knows a single prompt by `request_id`, and several by `request_id` and their index. Raises
        `ApiError` that names the field at fault, and the engine's errors if it takes no requests.
        """
        engine, ids = self.llm.engine, prompt_ids(request_id, len(prompts))
        try:
            requests = await self._in_thread(
                lambda: [
                    self._request(prompt, params, name, may_shorten, visible)
                    for prompt, name in zip(prompts, ids, strict=True)
                ],
                params,
                form,
            )
            if self.config.log_requests:
                for request, prompt in zip(requests, prompts, strict=True):
                    LOG.info("Received request %s: prompt %r, %r", request.request_id, prompt, params)
            lengths = {request.request_id: len(request.prompt_token_ids) for request in requests}
            stats = self.metrics.request_stats(lengths, params.n, arrival)
            run = await Run.begin(engine, requests, stats, self.config.request_timeout)
            self._runs.add(run)
            return run
        except RequestTooLargeError as error:
            raise _too_large(error, field) from error
        except SamplingParamsError as error:
            raise _of_params(error) from error
        except ValueError as error:
            raise refused(str(error), field) from error

    async def _in_thread(
        self, make: Callable[[], list[ServedRequest]], params: SamplingParams, form: AnswerForm | None
    ) -> list[ServedRequest]:
        """Make requests in a thread. Raises `ApiError` that names the field if the form is at fault."""

        def make_or_refuse() -> list[ServedRequest]:
            try:
                return make()
            except SamplingParamsError as error:
                if form is None or not str(error).startswith(STRUCTURED_OUTPUTS):
                    raise
                raise form.refused(error, self._compile) from error

        if self.llm.engine.is_compiled(params):
            return await asyncio.to_thread(make_or_refuse)
        return await asyncio.get_running_loop().run_in_executor(self._compiling, make_or_refuse)

    def _compile(self, form: StructuredOutputsParams) -> None:
        """Raise `SamplingParamsError` for a form that cannot be compiled."""
        self.llm.engine.request([0], SamplingParams(max_tokens=1, structured_outputs=form))

    def _request(
        self,
        prompt: PlainPrompt,
        params: SamplingParams,
        request_id: str,
        may_shorten: bool,
        visible: Collection[str],
    ) -> ServedRequest:
        request = self.llm.engine.request(prompt, params, request_id, visible)
        if not may_shorten:
            return request
        fitting = fit_to_context(params, len(request.prompt_token_ids), self.max_model_len)
        return request if fitting is params else self.llm.engine.request(prompt, fitting, request_id, visible)

    def may_shorten(self, body: Generation) -> bool:
        """Return whether a request's `max_tokens` is a default, of the API, the model or the operator."""
        return body.leaves_out("max_tokens")

    def cache_salt(self, body: Generation, request: Request) -> str:
        """Return the salt within which a request shares cached prefixes; with `isolate_keys`, one per key."""
        if not self.config.isolate_keys:
            return body.cache_salt
        return f"{request.state.client}:{body.cache_salt}"

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template. Raises `ApiError` (400) if it has none."""
        template = self.llm.chat_template
        if template is None:
            raise refused(f"{self.model_name} has no chat template: use /v1/completions", "messages")
        return template

    @property
    def chat_format(self) -> ChatFormat:
        """The forms of the model's answers to conversations."""
        return ChatFormat.of(self.chat_template, self.config)

    def encode_chat(
        self,
        body: ChatCompletionRequest | TokenizeRequest,
        tools: Sequence[Mapping[str, Any]] | None = None,
        context: int | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation. Control tokens spelled out in a message stay plain text.

        tools: those that the prompt describes. context: refuse a conversation that leaves no token of this
        context for an answer. Raises `ApiError`.
        """
        llm, template = self.llm, self.chat_template
        kwargs = dict(body.chat_template_kwargs or {})
        effort = body.reasoning_effort if isinstance(body, ChatCompletionRequest) else None
        if effort is not None and template.uses_variable("reasoning_effort"):
            kwargs = {"reasoning_effort": effort, **kwargs}
        try:
            return template.encode(
                body.messages or [],
                llm.tokenizer,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                add_special_tokens=bool(body.add_special_tokens),
                chat_template_kwargs=kwargs,
                tools=tools,
                tool_format=self.chat_format.tools,
                roles=ROLES,
                context=context,
            )
        except MessageError as error:
            raise refused_message(error) from error
        except PromptTooLongError as error:
            raise refused(str(error), "messages", "context_length_exceeded") from error
        except ValueError as error:
            raise refused(str(error), "messages") from error

    async def drain(self, seconds: float | None) -> None:
        """Refuse new requests; return when the others have finished, or been aborted after `seconds`."""
        try:
            if self._llm is not None:
                await self._llm.engine.drain(seconds)
        finally:
            self.end()

    def end(self) -> None:
        """Tell the watchers of `/live` that the server stops."""
        self.is_stopping = True
        while self._at_end:
            self._at_end.pop()()

    @contextmanager
    def call_when_stopping(self, tell: Callable[[], None]) -> Iterator[None]:
        """Have `tell` called if the server stops within this block."""
        self._at_end.append(tell)
        try:
            yield
        finally:
            self._at_end = [other for other in self._at_end if other is not tell]

    def stop(self) -> None:
        """Abort all requests now."""
        if self._llm is not None:
            self._llm.engine.stop()


def _resolve_with(outcome: "Future[ServedModel]", load: Callable[[], ServedModel]) -> None:
    """Set the future to what `load` returns or raises."""
    outcome.set_running_or_notify_cancel()  # cancelling has no effect from now on
    try:
        outcome.set_result(load())
    except BaseException as error:  # including a panic in a Rust library
        outcome.set_exception(load_error(error))


def prompt_ids(request_id: str, num_prompts: int) -> list[str]:
    """Return the engine's request ids for the prompts of an HTTP request.

    >>> prompt_ids("cmpl-1", 1), prompt_ids("cmpl-1", 2)
    (['cmpl-1'], ['cmpl-1-0', 'cmpl-1-1'])
    """
    return [request_id] if num_prompts == 1 else [f"{request_id}-{index}" for index in range(num_prompts)]


def sampling_params(body: Generation, defaults: Mapping[str, Any], **others: Any) -> SamplingParams:
    """Make the engine's parameters of a request. Raises `ApiError` that names the field at fault.

    defaults: values for the parameters that the client left out.
    """
    left_out = {name: value for name, value in defaults.items() if body.leaves_out(name)}
    try:
        return SamplingParams.from_options(**{**body.sampling(), **others, **left_out})
    except ValueError as error:
        raise _of_params(error) from error


def _of_params(error: ValueError) -> ApiError:
    """The engine's message starts with the field's name."""
    return refused(str(error), str(error).split(" ", 1)[0].split("[", 1)[0])


def _too_large(error: RequestTooLargeError, field: str) -> ApiError:
    """Name the field that must be smaller in a request that could never run."""
    message = str(error).split(": ", 1)[-1]
    if error.field == "n":
        return refused(message, "n")
    return refused(message, error.field or field, "context_length_exceeded")
