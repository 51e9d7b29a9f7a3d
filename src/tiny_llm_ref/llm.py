"""The Python API: prompts in, completions out. Names and signatures follow vLLM's `LLM`."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Self

import mlx.core as mx

from tiny_llm_checkpoints.chat_template import CONTENT_FORMATS
from tiny_llm_checkpoints.errors import ConfigError, shown
from tiny_llm_checkpoints.suggestions import check_fields
from tiny_llm_checkpoints.tokenizer import Tokenizer

from .beam_search import BeamSearchParams
from .chat_prompts import ChatOptions, ChatPrompts, Messages
from .delivery import Gathering, Item
from .engine import Engine
from .engine_config import EngineConfig
from .engine_core import EngineCore
from .engine_loop import Request
from .errors import EngineStoppingError, ends_process
from .evaluation import text_logits
from .forking import prepare_to_compute
from .grammar_compiler import GrammarCompiler
from .kv_pool import DTYPES
from .loader import load_chat_template, load_model
from .managers import make_manager
from .model import Model
from .output_processor import RequestState
from .outputs import BeamSearchOutput, RequestEvent, RequestOutput, TextDelta
from .prompts import PromptType, parse_prompts
from .resources import return_free_memory
from .sampling_params import SamplingParams
from .search_state import SearchState

_OWN_OPTIONS = ("model", "chat_template_content_format")  # of `LLM`; all others are those of `EngineConfig`


class LLM:
    """A model, its tokenizer, and an engine that serves many prompts at once from one pool of pages.

    model: a `.gguf` file, a folder in Hugging Face's layout, or a hub id (`owner/name`, or
    `owner/name/FILE.gguf` for one file); None: the embedded SmolLM2-135M-Instruct.
    chat_template_content_format: how the chat template gets the content of a message: "string", "openai" (a
    list of text parts), or "auto" (detected). engine_options: the fields of `EngineConfig`.

    >>> from tiny_llm import LLM, SamplingParams
    >>> with LLM() as llm:
    ...     [output] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=1))
    >>> output.outputs[0].text
    ' Paris'

    Any number of threads may use it at the same time. The arrays belong to the engine's own thread, which
    ends at `close`, at the end of a `with` block, or when the `LLM` is garbage-collected. The attribute
    `max_model_len` is the longest prompt + output in tokens.

    Raises `ModelFileError` for a file that cannot be read, `ConfigError` for a bad option, and
    `OutOfResourcesError` if memory or threads are short. Methods that wait raise `EngineStoppingError` after
    `close`, `WrongThreadError` in the engine's thread (in a listener, a watcher, or a function for
    `engine.call`), and `ForkedProcessError` in a process that was forked from one with an `LLM`; creating
    another `LLM` there raises it too.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        chat_template_content_format: str = "auto",
        **engine_options: Any,
    ) -> None:
        check_fields(EngineConfig, engine_options, "option", ConfigError, _OWN_OPTIONS)
        self.engine_config = EngineConfig.from_options(**engine_options)
        _check_model(model)
        if chat_template_content_format not in CONTENT_FORMATS:
            raise ConfigError(
                f"chat_template_content_format must be one of {', '.join(CONTENT_FORMATS)}, "
                f"not {shown(chat_template_content_format)}"
            )
        prepare_to_compute()
        loaded = load_model(model, self.engine_config.activation_bits, self.engine_config.generation_config)
        self.model_name, self.model_path, self.tokenizer = loaded.name, loaded.path, loaded.tokenizer
        self.sampling_defaults, self.sampling_source = loaded.sampling_defaults, loaded.sampling_source
        self._model: Model | None = loaded.model
        self.model_config = loaded.model.config
        self.max_model_len = self.engine_config.model_len(
            self.model_config, DTYPES[self.engine_config.kv_cache_dtype].size
        )
        self.chat_template = load_chat_template(self.model_path, self.tokenizer, chat_template_content_format)
        # A lazy array belongs to the thread that made it, and the engine's thread uses these.
        mx.eval([layer.self_attn.inv_freq for layer in self.model.layers])
        self.engine = Engine(
            partial(_make_core, self.engine_config, self.model),
            self.tokenizer,
            self.model_config.vocab_size,
            self.engine_config,
            self.max_model_len,
            chat_prompts=ChatPrompts(self.model_name, self.chat_template, self.tokenizer, self.max_model_len),
            defaults=self.get_default_sampling_params(),
            grammars=GrammarCompiler(
                self.tokenizer, self.model_config.vocab_size, self.model_config.eos_token_ids
            ),
        )

    def __repr__(self) -> str:
        """The model, its context in tokens, and whether it is closed."""
        closed = ", closed" if self._model is None else ""
        return f"LLM({self.model_name!r}, max_model_len={self.max_model_len}{closed})"

    def close(self) -> None:
        """Cancel all requests, stop the engine's thread, and free the weights and the KV pool.

        Returns when all of that is done. A second call does nothing. Afterwards every method that needs the
        model raises `EngineStoppingError`. In the engine's own thread `close` raises `WrongThreadError`; in a
        forked process it does nothing, because the thread and the memory belong to the parent.
        """
        if self.engine.is_forked:
            return
        self.engine.close()
        self._model = None
        return_free_memory()

    def __enter__(self) -> Self:
        """The LLM itself; the end of the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def model(self) -> Model:
        """The model. Raises `EngineStoppingError` after `close`."""
        if self._model is None:
            raise EngineStoppingError("this LLM has been closed: create a new one")
        return self._model

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer, which also works after `close`."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of a call without `sampling_params`: the model's values, or else the engine's.

        A `SamplingParams` that you pass is used as it is, without the model's values. To change one parameter
        and keep the others, use `dataclasses.replace` on the result.
        """
        return SamplingParams.from_options(**self.sampling_defaults)

    @property
    def core(self) -> EngineCore:
        """The engine's core, for reading while nothing runs; change it only through `engine.call`.

        Raises `EngineStoppingError` after `close`.
        """
        return self.engine.core

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts in one batch; returns outputs in the order of the prompts.

        prompts: a string, a list of token ids, a dict as in vLLM (`{"prompt": ...}` or
        `{"prompt_token_ids": ...}`, optionally with a "cache_salt"), or a list of these. An integer array is
        a list of token ids; a two-dimensional one is a list of prompts. sampling_params: one for all prompts,
        or one for each; None: `get_default_sampling_params`. use_tqdm: show a progress bar on standard error
        if that is a terminal.

        Without a `max_tokens`, from the caller or from the model, an output has at most 16 tokens, as in
        vLLM, and no more than the context has left. A completion that fails does not end the others: its
        finish_reason is "error" and its `error` has the message. Raises ValueError for a prompt or parameters
        that cannot run; no prompt has run then. Raises `RequestFailedError` if every completion of every
        prompt has failed.
        """
        self._check_open("LLM.generate")
        parsed = parse_prompts(prompts)
        each = _one_for_each(sampling_params, len(parsed))
        requests = [self.engine.request(*pair) for pair in zip(parsed, each, strict=True)]
        return self._run_all(requests, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several in one batch, through the model's chat template.

        messages: a list of mappings with "role" and "content", or a list of such lists. A content is a string
        or a list of text parts, such as `{"type": "text", "text": "hi"}`; the template gets all other fields
        too. sampling_params: as in `generate`, except that without a `max_tokens` an answer may use all
        tokens that the context has left. `ChatOptions` describes the other arguments.

        Raises `MessageError`, a ValueError that names the message and the field, for anything that is not a
        conversation and for text that the template drops. Otherwise raises as `generate` does.
        """
        self._check_open("LLM.chat")
        options = ChatOptions(
            add_generation_prompt, continue_final_message, add_special_tokens, chat_template_kwargs, tools
        )
        conversations = _conversations(messages)
        each = _one_for_each(sampling_params, len(conversations))
        requests = [
            self.engine.chat_request(conversation, params, options)
            for conversation, params in zip(conversations, each, strict=True)
        ]
        return self._run_all(requests, use_tqdm)

    def beam_search(
        self, prompts: PromptType | Sequence[PromptType], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """Find the best continuations of each prompt, all prompts in one batch; returns them in order.

        The beams of a search share the pages of their common tokens. A search that fails has no sequences,
        and its `error` has the message. Raises ValueError for a prompt or parameters that cannot run, and
        with batching="dense"; no prompt has run then. Raises `RequestFailedError` if all searches failed.
        """
        self._check_open("LLM.beam_search")
        searches = [self.engine.search(prompt, params) for prompt in parse_prompts(prompts)]
        with closing(self._serve(searches)) as steps:
            deque(steps, maxlen=0)
        return [_found(search) for search in searches]

    def stream(
        self, prompt: PromptType, sampling_params: SamplingParams | None = None
    ) -> Generator[TextDelta, None, None]:
        """Complete one prompt and yield the text in pieces; closing the iterator cancels the request.

        Raises as `generate` does, and `RequestFailedError` if the request fails while it streams.
        """
        self._check_open("LLM.stream")
        return self._stream(self.engine.request(prompt, sampling_params))

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generator[TextDelta, None, None]:
        """Answer one conversation as `chat` does, in pieces; closing the iterator cancels the request.

        Raises as `chat` does, and `RequestFailedError` if the request fails while it streams.
        """
        self._check_open("LLM.stream_chat")
        options = ChatOptions(
            add_generation_prompt, continue_final_message, add_special_tokens, chat_template_kwargs, tools
        )
        return self._stream(self.engine.chat_request(messages, sampling_params, options))

    def logits(self, token_ids: Sequence[int]) -> mx.array:
        """The logits [L, vocab_size] after each of L tokens, in float32: for evaluation.

        Computes in a temporary pool, in chunks of `max_num_batched_tokens`, ahead of all waiting requests.
        Raises ValueError for an empty list, for a value that is not a token id, and for ids outside the
        vocabulary.
        """
        model = self.model
        tokens = self.engine.check_token_ids(token_ids)
        if not tokens:
            raise ValueError("token_ids is empty: there are no logits to compute")
        return self.engine.call(partial(_evaluated_logits, model, tokens, self.engine_config))

    def _check_open(self, call: str) -> None:
        """Raise `EngineStoppingError` after `close`, and the errors of `Engine.refuse_to_wait`."""
        if self._model is None:
            raise EngineStoppingError(f"{call}: this LLM has been closed: create a new one")
        self.engine.refuse_to_wait(call)

    def _run_all(self, requests: Sequence[RequestState], use_tqdm: bool) -> list[RequestOutput]:
        """Run requests to their end, with a progress bar."""
        if not isinstance(use_tqdm, bool):
            raise ValueError(f"use_tqdm must be True or False, not {shown(use_tqdm)}")
        with _progress(len(requests), use_tqdm) as report, closing(self._serve(requests)) as steps:
            for step in steps:
                report(step)
        return [request.output for request in requests]

    def _stream(self, request: Request) -> Generator[TextDelta, None, None]:
        with closing(self._serve([request])) as steps:
            for step in steps:
                for event in step:
                    yield TextDelta(event.index, event.text, event.token_ids, event.finish_reason)

    def _serve(self, requests: Sequence[Request]) -> Generator[list[RequestEvent], None, None]:
        """Submit requests and yield the events of each step, until all requests have ended.

        If the caller leaves early, by Ctrl-C for example, the requests that have not ended are cancelled.
        Raises as `Gathering.check` does.
        """
        inbox: SimpleQueue[list[Item]] = SimpleQueue()
        gathering = Gathering(requests)
        try:
            self.engine.submit(requests, inbox.put).result()
            while gathering.unfinished:
                self.engine.refuse_to_wait("the next piece of a stream")
                step = gathering.take(inbox.get())
                gathering.check()
                yield step
        finally:
            if gathering.unfinished:
                self.engine.forget(requests)


def _conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """The conversations as a list; a single conversation becomes a list of one."""
    first = messages[0] if isinstance(messages, (list, tuple)) and messages else None
    return list(messages) if isinstance(first, (list, tuple)) else [messages]  # type: ignore[list-item, arg-type]


def _make_core(config: EngineConfig, model: Model) -> EngineCore:
    return EngineCore(make_manager(config, model), model.config.eos_token_ids, config.seed)


def _evaluated_logits(model: Model, token_ids: Sequence[int], config: EngineConfig) -> mx.array:
    logits = text_logits(model, token_ids, config)
    mx.eval(logits)
    return logits


def _check_model(model: object) -> None:
    """Raise `ConfigError` for a value that cannot name a model."""
    if not (model is None or isinstance(model, (str, Path))) or model == "" or "\0" in str(model):
        raise ConfigError(f"model must be a path, a hub id or None, not {shown(model)}")


def _found(search: SearchState) -> BeamSearchOutput:
    """The result of a search; if its texts cannot be decoded, the search has failed with that error."""
    try:
        return search.output
    except BaseException as error:  # including a panic of the tokenizer's library
        if ends_process(error):
            raise
        search.fail(error)
        return search.output


def _one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, (list, tuple)):
        raise ValueError(f"sampling_params must be SamplingParams, or a list of them, not {shown(params)}")
    if len(params) != num_prompts:
        raise ValueError(
            f"{len(params)} sampling_params for {num_prompts} prompts: pass one for all prompts, "
            "or a list with one for each"
        )
    for place, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise ValueError(f"sampling_params[{place}] must be SamplingParams, not {shown(one)}")
    return list(params)


@contextmanager
def _progress(total: int, enabled: bool) -> Iterator[Callable[[list[RequestEvent]], None]]:
    """Show a progress bar over prompts; yields a function that takes a step's events."""
    if not enabled:
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Processed prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    speed = TextColumn("{task.fields[tokens]:,} tokens, {task.fields[speed]:,.0f} tokens/s")
    console = Console(stderr=True)
    with Progress(*columns, speed, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("prompts", total=total, tokens=0, speed=0.0)
        tokens, start = 0, perf_counter()

        def report(step: list[RequestEvent]) -> None:
            nonlocal tokens
            tokens += sum(len(event.token_ids) for event in step)
            ended = sum(event.usage is not None for event in step)
            bar.update(task, advance=ended, tokens=tokens, speed=tokens / (perf_counter() - start))

        yield report
