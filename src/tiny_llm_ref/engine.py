"""The serving engine's interface: `generate` and `chat` for coroutines, `submit` and `call` for threads.

The engine's thread (`engine_loop`) owns every array. Tasks go to it through an inbox; events come back as
frozen records of numbers and texts. An array that leaves the thread must be evaluated, because a lazy array
belongs to its thread.
"""

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, Self, TypeVar

from tiny_llm_checkpoints.errors import shown
from tiny_llm_checkpoints.tokenizer import Tokenizer

from .admission_control import AdmissionControl
from .beam_search import BeamSearchParams
from .chat_prompts import ChatOptions, ChatPrompts, Messages
from .delivery import AsyncListener, Listener
from .engine_config import EngineConfig
from .engine_core import EngineCore, EngineStats
from .engine_loop import EngineLoop, PoolListener, Request, StepTime
from .errors import EngineStoppingError
from .forking import note_engine, prepare_to_compute
from .grammar_compiler import GrammarCompiler
from .inbox import Answer, Inbox, fail, resolve
from .output_processor import RequestState
from .outputs import RequestEvent
from .prompts import ParsedPrompt, PromptType
from .request_maker import RequestMaker
from .resources import requiring
from .sampling_params import SamplingParams
from .search_state import SearchState

T = TypeVar("T")

ENGINE_STACK = 8 << 20  # bytes, the usual size; `ulimit -s` may be less than MLX and Python need
EXIT_SECONDS = 30.0  # how long the exit of the program, or a finalizer, waits for a step to end


class Engine:
    """Serves requests from any number of threads and event loops in one batch.

    make_core: makes the core, in the engine's thread; the constructor raises its errors. The thread ends when
    the engine is garbage-collected, so `make_core` must not refer to an object that refers to the engine: the
    thread would keep both alive. max_model_len: the longest prompt + output in tokens; a prompt that is
    clearly longer is rejected before it is tokenized. None: the core rejects it. chat_prompts: makes the
    prompts of `chat`; None: there is no chat template. defaults: the parameters of requests that have none of
    their own; None: `SamplingParams()`. grammars: compiles `structured_outputs`; None: it is not supported.

    A call that would wait for the engine forever raises an error instead: `WrongThreadError` in the engine's
    own thread, `ForkedProcessError` in a forked process.
    """

    def __init__(
        self,
        make_core: Callable[[], EngineCore],
        tokenizer: Tokenizer,
        vocab_size: int,
        config: EngineConfig,
        max_model_len: int | None = None,
        *,
        chat_prompts: ChatPrompts | None = None,
        defaults: SamplingParams | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._grammars = grammars
        self._maker = RequestMaker(
            tokenizer,
            vocab_size,
            config.max_num_seqs,
            max_model_len,
            chat_prompts=chat_prompts,
            defaults=defaults,
            grammars=grammars,
        )
        self._inbox = Inbox()
        self._admission = AdmissionControl(config.max_num_waiting, config.max_num_seqs)
        self._loop = EngineLoop(self._inbox, self._admission)
        self._thread = _start(self._inbox, self._loop, make_core)
        weakref.finalize(self, _stop, self._inbox, self._loop, self._thread)

    def request(
        self,
        prompt: PromptType | ParsedPrompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        visible: Collection[str] = (),
    ) -> RequestState:
        """Make a request, which can be submitted once; `RequestMaker.request` says more."""
        return self._maker.request(prompt, params, request_id, visible)

    def chat_request(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        options: ChatOptions | None = None,
        request_id: str | None = None,
    ) -> RequestState:
        """Make a request to answer a conversation; `RequestMaker.chat_request` says more."""
        return self._maker.chat_request(messages, params, options, request_id)

    def search(
        self,
        prompt: PromptType | ParsedPrompt,
        params: BeamSearchParams,
        request_id: str | None = None,
    ) -> SearchState:
        """Make a beam search, which can be submitted once; `RequestMaker.search` says more."""
        return self._maker.search(prompt, params, request_id)

    def submit(self, requests: Seq[Request], deliver: Listener) -> Future[None]:
        """Queue requests, all of them or none; returns a future at once, which is done when they are queued.

        deliver: the listener, a callback. The engine's thread calls it at most once per iteration, with a
        list of everything that the iteration produced for these requests: events, or an error that ended one
        of them. It must return quickly. If it raises, its requests are cancelled.

        First check, in the calling thread and in this order, so that a rejected request never counts as
        waiting:

        1. `_submittable` raises TypeError if `requests` are not requests or `deliver` is not callable. It
           returns the requests as a tuple: use that, because the caller may change its list.
        2. If `_loop.refusal` is set, raise the error that it makes (`EngineStoppingError` or
           `EngineDeadError`).
        3. `_admission.admit` raises `QueueFullError` if more than `max_num_waiting` requests would wait.

        Then post `_loop.add` to the inbox, and return the future that `post` returns. The engine's thread
        runs this task between two steps. The future raises the errors of `_loop.add`: ValueError for an empty
        prompt or for something that the batch manager cannot do, `RequestTooLargeError`, and
        `DuplicateRequestError` for an id in use or a request that was submitted before. Post a `partial` of
        the loop's method: a lambda would refer to the engine, whose thread ends when nothing refers to it any
        more.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> engine = Engine(lambda: EngineCore(PagedBatchManager(8, 4, 2), ()), None, 26, EngineConfig())
        >>> print(engine.submit([], deliver=print).result())
        None
        >>> engine.stop()
        """
        requests = self._submittable(requests, deliver)
        if self._loop.refusal is not None:
            raise self._loop.refusal()
        self._admission.admit(len(requests))
        return self._inbox.post(partial(self._loop.add, requests, deliver))

    def check_admission(self, num_requests: int = 1) -> None:
        """Raise the error, if any, with which `submit` would refuse this number of requests now."""
        if (refusal := self.refusal) is not None:
            raise refusal
        self._admission.check(num_requests)

    def cancel(self, request_id: str) -> Future[None]:
        """Cancel a request before the next step; returns a future at once.

        The future is done when the request's blocks are free. The request's listener gets its last events,
        with finish_reason "abort". An unknown id is ignored. Raises TypeError if `request_id` is not a
        string.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, not {shown(request_id)}")
        return self._inbox.post(partial(self._loop.cancel, [request_id]))

    def forget(self, requests: Seq[Request]) -> None:
        """Cancel submitted requests that have not ended; returns when their blocks are free.

        In the engine's own thread it returns at once.
        """
        forgotten = self._inbox.post(partial(self._loop.forget, requests))
        # A generator may be garbage-collected, and so closed, in the engine's thread: do not wait there.
        if threading.current_thread() is not self._thread:
            forgotten.exception()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the engine's thread (`_thread`) between two steps; return its value.

        Post it to the inbox, wait for the result, and return it or raise what the function raised. In the
        engine's own thread call the function directly, because that thread would wait for itself. Compare
        thread objects, not their idents: a new thread may have the ident of one that has ended. Arrays in the
        value must be evaluated, because a lazy array belongs to its thread.

        Raises TypeError if the function is not callable (`_check_callable("function", function)`), and
        `EngineStoppingError` or `EngineDeadError` if the engine has ended.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> engine = Engine(lambda: EngineCore(PagedBatchManager(8, 4, 2), ()), None, 26, EngineConfig())
        >>> engine.call(lambda: engine.call(lambda: 7))
        7
        >>> engine.stop()
        """
        _check_callable("function", function)
        if threading.current_thread() is self._thread:
            return function()
        return self._inbox.post(function).result()

    async def generate(
        self, prompt: PromptType, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[RequestEvent, None]:
        """Complete a prompt: yield an event for each token, in order; the last has the request's `usage`.

        prompt: a string or token ids. params: the engine's defaults if None. request_id: a new number if
        None. `self.request` takes these three and makes a request, and `submit` queues it; an `AsyncListener`
        is the callback that passes its events to the caller's event loop. Await the future that `submit`
        returns with `asyncio.wrap_future`. Never call its `result()`: that would block all clients of this
        event loop.

        The generator ends with the event that has a `usage`. A finish_reason means only that one completion
        has ended: "abort" if the request was cancelled, "error" if that completion failed while others go on.

        The client may leave at any time, even while it waits for the request to be queued: by `break`,
        `aclose`, an exception, or the cancellation of its task. In that case post `_loop.forget` to the inbox
        (not `self.forget`, which waits): it cancels the request before the next step. Await nothing after
        that. Cancelling the wait does not cancel the posted `_loop.add`; it still runs, and `forget` runs
        after it. A request has ended once the generator reaches its event with a `usage`. Post nothing then,
        not even if the client leaves at that event. A `forget` for a request that was rejected or has failed
        is harmless.

        Nothing happens until the caller asks for the first event. The first `anext` raises `WrongThreadError`
        in the engine's own thread (`refuse_to_wait("Engine.generate")`), and the errors of `request` and
        `submit`. Later ones raise `RequestFailedError` if the whole request has failed, and `EngineDeadError`
        if the engine's thread has ended unexpectedly.

        >>> from tiny_llm.paged_batch import PagedBatchManager
        >>> engine = Engine(lambda: EngineCore(PagedBatchManager(8, 4, 2), ()), None, 26, EngineConfig())
        >>> async def first(events):
        ...     return await anext(events)
        >>> asyncio.run(first(engine.generate([26])))
        Traceback (most recent call last):
        ValueError: token id 26 is outside the vocabulary (0 to 25)
        >>> engine.stop()
        """
        self.refuse_to_wait("Engine.generate")
        request = self.request(prompt, params, request_id)
        listener, ended = AsyncListener(), False
        accepted = self.submit([request], listener)
        try:
            await asyncio.wrap_future(accepted)
            while not ended:
                for event in await listener.next():
                    ended = event.usage is not None
                    yield event
        finally:
            if not ended:
                self._inbox.post(partial(self._loop.forget, [request]))

    async def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tools: Seq[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[RequestEvent, None]:
        """Answer a conversation: make a prompt as `LLM.chat` does, and yield events as `generate` does.

        Without a `max_tokens`, from the caller or from the model, the answer may use all tokens that the
        context has left. `ChatOptions` describes the other arguments. Leaving the loop early cancels the
        request.

        Raises `MessageError`, a ValueError that names the message and the field, for anything that is not a
        conversation. Also raises ValueError if the model has no chat template, and the errors of `generate`.
        """
        self.refuse_to_wait("Engine.chat")
        options = ChatOptions(
            add_generation_prompt, continue_final_message, add_special_tokens, chat_template_kwargs, tools
        )
        tokens = await asyncio.to_thread(self._maker.encode_chat, messages, options)
        chosen = self._maker.chat_params(params, len(tokens))
        async with aclosing(self.generate(tokens, chosen, request_id=request_id)) as events:
            async for event in events:
                yield event

    def watch_blocks(self, watcher: PoolListener) -> Callable[[], Future[None]]:
        """Call a watcher with the content of the pool, then with the changes of each step.

        Returns a function that removes the watcher. watcher: called in the engine's thread; it must return
        quickly, and is removed if it raises. Changes are tracked only while there is a watcher. Raises
        ValueError if the batch manager has no blocks, TypeError if the watcher is not callable.
        """
        _check_callable("watcher", watcher)
        listener = partial(watcher)  # a new object, because one watcher may be added twice
        self.call(partial(self._loop.watch, listener))
        return lambda: self._inbox.post(partial(self._loop.unwatch, listener))

    async def drain(self, timeout: float | None = None) -> None:
        """Reject new requests, and return when all accepted requests have ended.

        timeout: seconds after which unfinished requests are cancelled; None: no limit.
        """
        self.refuse_to_wait("Engine.drain", "start_draining")
        await asyncio.wrap_future(self.start_draining(timeout))

    def start_draining(self, timeout: float | None = None) -> Future[None]:
        """Drain without waiting; returns a future that is done when all requests have ended.

        Raises TypeError for a timeout that is not a number of seconds or None.
        """
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float))):
            raise TypeError(f"timeout must be a number of seconds or None, not {shown(timeout)}")
        drained: Future[None] = Answer(self._inbox)

        def on_posted(posted: Future[None]) -> None:
            error = posted.exception()
            if isinstance(error, EngineStoppingError):
                resolve(drained, None)
            elif error is not None:
                fail(drained, error)

        self._inbox.post(partial(self._loop.drain, timeout, drained)).add_done_callback(on_posted)
        return drained

    def stop(self) -> None:
        """Cancel all requests and end the thread; returns when it has ended. New requests are rejected.

        A second call does nothing. In the engine's own thread `stop` returns at once, and the thread ends
        after the current iteration.
        """
        self._inbox.post(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def close(self) -> None:
        """Stop the engine and free its KV pool. Raises `WrongThreadError` in the engine's own thread."""
        if self._inbox.is_mine:
            self.refuse_to_wait("Engine.close", "stop")
        self.stop()
        self._loop.free_core()
        if self._grammars is not None:
            self._grammars.close()

    async def __aenter__(self) -> Self:
        """The engine itself, which is already running."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop the engine without blocking the event loop."""
        if self._inbox.is_mine:
            self.stop()
        else:
            await asyncio.to_thread(self.stop)

    @property
    def stats(self) -> EngineStats:
        """The engine's load after the last step; never waits."""
        return self._loop.stats

    @property
    def step_times(self) -> tuple[StepTime, ...]:
        """The times of the most recent steps, the latest last; never waits."""
        return tuple(self._loop.step_times)

    @property
    def refusal(self) -> Exception | None:
        """The error that any new request would get now; None while the engine takes requests."""
        return None if self._loop.refusal is None else self._loop.refusal()

    @property
    def core(self) -> EngineCore:
        """The core, for reading while nothing runs; change it only through `call`.

        Raises `EngineStoppingError` after `close`, which frees it.
        """
        if not hasattr(self._loop, "core"):
            raise EngineStoppingError("the engine has been closed")
        return self._loop.core

    @property
    def is_forked(self) -> bool:
        """True in a process that was forked from the engine's process."""
        return self._inbox.forked() is not None

    def refuse_to_wait(self, call: str, instead: str = "submit") -> None:
        """Raise an error if a call would wait for the engine forever.

        call, instead: the call's name and its alternative, for the message. Raises `WrongThreadError` in the
        engine's own thread, `ForkedProcessError` in a forked process.
        """
        self._inbox.refuse_to_wait(call, instead)

    def check_token_ids(self, tokens: Seq[int]) -> list[int]:
        """Token ids as a list of ints. Raises ValueError for other values and ids outside the vocabulary."""
        return self._maker.check_token_ids(tokens)

    def is_compiled(self, params: SamplingParams) -> bool:
        """True if a request with these parameters needs no grammar, or one that is compiled already."""
        return self._maker.is_compiled(params)

    def _submittable(self, requests: Seq[Request], deliver: Listener) -> Seq[Request]:
        """The requests as a tuple. Raises TypeError for other values, or if `deliver` is not callable."""
        if (refusal := self._inbox.forked()) is not None:
            raise refusal
        if not isinstance(requests, Seq):
            raise TypeError(f"requests must be a list, not {shown(requests)}")
        for place, request in enumerate(requests):
            if not isinstance(request, Request):
                expected = "be made by `request` or `search`"
                raise TypeError(f"requests[{place}] must {expected}, not {shown(request)}")
        _check_callable("deliver", deliver)
        return tuple(requests)


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {shown(value)}")


def _start(inbox: Inbox, loop: EngineLoop, make_core: Callable[[], EngineCore]) -> threading.Thread:
    """Start the engine's thread and return it once the core is made. Raises the errors of `make_core`."""
    prepare_to_compute()
    ready = inbox.post(partial(loop.begin, make_core))
    thread = threading.Thread(target=loop.run, name="tiny-llm-engine", daemon=True)
    with requiring("the engine's thread"), _stack_of(ENGINE_STACK):
        thread.start()
    note_engine()
    try:
        ready.result()
    except BaseException:  # including Ctrl-C
        inbox.post(loop.stop)
        raise
    finally:
        del ready  # breaks a reference cycle: the future's error holds this frame
    return thread


@contextmanager
def _stack_of(nbytes: int) -> Iterator[None]:
    """Give threads that start in this block a stack of `nbytes` bytes."""
    usual = threading.stack_size(nbytes)
    try:
        yield
    finally:
        threading.stack_size(usual)


def _stop(inbox: Inbox, loop: EngineLoop, thread: threading.Thread) -> None:
    """End the engine's thread when the engine is garbage-collected or at exit; wait for the current step."""
    inbox.post(loop.stop)
    if threading.current_thread() is not thread:
        thread.join(EXIT_SECONDS)
