"""The front door in Python: prompts in, completions out. Named and shaped like vLLM's `LLM`."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Any, NamedTuple

import mlx.core as mx

from tiny_llm_checkpoints.chat_template import CONTENT_FORMATS, ChatTemplate
from tiny_llm_checkpoints.errors import ConfigError, reading, shown
from tiny_llm_checkpoints.tokenizer import Tokenizer

from .beam_search import BeamSearchParams
from .delivery import Gathering, Item
from .engine import Engine
from .engine_config import EngineConfig
from .engine_core import EngineCore
from .engine_loop import Request
from .errors import ends_process, fitting
from .evaluation import text_logits
from .forking import prepare_to_compute
from .generation_defaults import fitted
from .kv_pool import DTYPES
from .loader import load_model
from .managers import make_manager
from .model import Model
from .output_processor import RequestState
from .outputs import BeamSearchOutput, RequestEvent, RequestOutput, TextDelta
from .prompts import ParsedPrompt, PromptType, parse_prompts
from .sampling_params import SamplingParams
from .search_state import SearchState

Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model, its tokenizer, and an engine that serves many prompts at once from one pool of pages.

    model: a `.gguf` file, a folder in Hugging Face's layout, or a hub id (`owner/name`, or one file of it,
    `owner/name/FILE.gguf`); None is the embedded SmolLM2-135M-Instruct. chat_template_content_format: what
    the chat template gets as the content of a message: "string"; "openai", a list of text parts; "auto" finds
    out. engine_options: the fields of `EngineConfig`. max_model_len: the longest prompt + output in tokens,
    which the pool holds. Any thread may use it, and several at once: the arrays belong to a thread of its
    own, that ends when the `LLM` is forgotten.

    Raises `ModelFileError` for a file that cannot be read and `ConfigError` for a bad option. Calls that wait
    raise `WrongThreadError` in the engine's thread (in a listener, a watcher, or a function for
    `engine.call`), and `ForkedProcessError` in a process that was forked from one with an `LLM`, where making
    another raises it too.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        chat_template_content_format: str = "auto",
        **engine_options: Any,
    ) -> None:
        self.engine_config = EngineConfig.from_options(**engine_options)
        _check_model(model)
        if chat_template_content_format not in CONTENT_FORMATS:
            raise ConfigError(
                f"chat_template_content_format must be one of {', '.join(CONTENT_FORMATS)}, "
                f"not {shown(chat_template_content_format)}"
            )
        prepare_to_compute()
        loaded = load_model(model, self.engine_config.activation_bits, self.engine_config.generation_config)
        self.model_name, self.model_path, self.model, self.tokenizer, self.sampling_defaults = loaded
        self.model_config = self.model.config
        self.max_model_len = self.engine_config.model_len(
            self.model_config, DTYPES[self.engine_config.kv_cache_dtype].size
        )
        with reading(_template_file(self.model_path)):
            self.chat_template = _chat_template(self.tokenizer, chat_template_content_format)
        mx.eval([layer.self_attn.inv_freq for layer in self.model.layers])  # what is lazy stays in its thread
        make_core = partial(_make_core, self.engine_config, self.model)
        vocab_size = self.model_config.vocab_size
        self.engine = Engine(make_core, self.tokenizer, vocab_size, self.engine_config, self.max_model_len)

    def get_default_sampling_params(self) -> SamplingParams:
        """What a call without parameters uses: the engine's defaults, and what the model recommends.

        A `SamplingParams` that a caller makes is used as it is, whatever the model recommends. To change one
        parameter and keep the rest, use `dataclasses.replace` on what this returns.
        """
        return SamplingParams.from_options(**self.sampling_defaults)

    @property
    def core(self) -> EngineCore:
        """The engine's inside, to look at while nothing runs; what changes it goes through `engine.call`."""
        return self.engine.core

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them together; outputs in the order of the prompts.

        prompts: a text, a list of token ids, a dict as in vLLM (`{"prompt": ...}` or
        `{"prompt_token_ids": ...}`, with or without a "cache_salt"), or a list of these; an array of whole
        numbers is a list of token ids, and one of two dimensions a list of prompts. sampling_params: one for
        all, or one for each; None: `get_default_sampling_params`. use_tqdm: show a progress bar on standard
        error where that is a terminal.

        A completion that fails does not end the others: it has the finish_reason "error", and its `error`
        says why. Raises ValueError for a prompt or parameters that cannot run; then none of them has run.
        Raises `RequestFailedError` where every completion of every prompt has failed.
        """
        self.engine.refuse_to_wait("LLM.generate")
        return self._run_all(parse_prompts(prompts), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several together, through the model's chat template.

        A message is a mapping with "role" and "content", a text or a list of text parts. Other fields go to
        the template. add_generation_prompt: end the prompt where an answer begins; None: unless
        `continue_final_message`, where the last message's text is continued. chat_template_kwargs: variables
        of the template, such as `{"enable_thinking": False}`.

        Raises `MessageError`, a ValueError that names place and field, for what is no conversation, and for
        text that the template drops.
        """
        self.engine.refuse_to_wait("LLM.chat")
        options = _Options(
            add_generation_prompt, continue_final_message, add_special_tokens, chat_template_kwargs
        )
        encoded = [self._encode_chat(one, options) for one in _conversations(messages)]
        return self._run_all(encoded, sampling_params, use_tqdm)

    def beam_search(
        self, prompts: PromptType | Sequence[PromptType], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The best continuations of each prompt, all of them searched together; in the order of the prompts.

        A search's beams share the pages of what they have in common. A search that fails has no sequences,
        and its `error` says why. Raises ValueError for a prompt or parameters that cannot run, and with
        batching="dense"; then none of them has run. Raises `RequestFailedError` where all have failed.
        """
        self.engine.refuse_to_wait("LLM.beam_search")
        searches = [self.engine.search(prompt, params) for prompt in parse_prompts(prompts)]
        with closing(self._serve(searches)) as steps:
            deque(steps, maxlen=0)
        return [_found(search) for search in searches]

    def stream(
        self, prompt: PromptType, sampling_params: SamplingParams | None = None
    ) -> Generator[TextDelta, None, None]:
        """Complete one prompt, piece by piece; closing the iterator cancels the request.

        Raises as `generate` does; `RequestFailedError` while the pieces come.
        """
        self.engine.refuse_to_wait("LLM.stream")
        return self._stream(self._request(prompt, sampling_params))

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generator[TextDelta, None, None]:
        """Answer one conversation as `chat` does, in pieces; closing the iterator cancels the request."""
        self.engine.refuse_to_wait("LLM.stream_chat")
        options = _Options(
            add_generation_prompt, continue_final_message, add_special_tokens, chat_template_kwargs
        )
        return self._stream(self._request(self._encode_chat(messages, options), sampling_params))

    def logits(self, token_ids: Sequence[int]) -> mx.array:
        """The logits [L, vocab_size] after each of L tokens, in float32: for evaluation.

        Runs through pages of their own, in chunks of the step's token budget, whatever else waits.
        Raises ValueError for no tokens, for what is no token id, and for ids outside the vocabulary.
        """
        tokens = self.engine.check_token_ids(token_ids)
        if not tokens:
            raise ValueError("logits of no tokens: there is nothing to compute")
        return self.engine.call(partial(_evaluated_logits, self.model, tokens, self.engine_config))

    def _encode_chat(self, messages: Messages, options: "_Options") -> list[int]:
        if self.chat_template is None:
            raise ValueError(f"{self.model_name} has no chat template: use generate instead of chat")
        with fitting():
            return self.chat_template.encode(
                messages, self.tokenizer, **options._asdict(), context=self.max_model_len
            )

    def _run_all(
        self,
        prompts: Sequence[PromptType | ParsedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if not isinstance(use_tqdm, bool):
            raise ValueError(f"use_tqdm must be True or False, not {shown(use_tqdm)}")
        params = _one_for_each(sampling_params, len(prompts))
        requests = [self._request(*each) for each in zip(prompts, params, strict=True)]
        with _progress(len(requests), use_tqdm) as report, closing(self._serve(requests)) as steps:
            for step in steps:
                report(step)
        return [request.output for request in requests]

    def _request(self, prompt: PromptType | ParsedPrompt, params: SamplingParams | None) -> RequestState:
        """A request to submit; without parameters it has the default ones, and a limit that fits."""
        chosen = self.get_default_sampling_params() if params is None else params
        request = self.engine.request(prompt, chosen)
        if params is not None or "max_tokens" not in self.sampling_defaults:
            return request
        fitting = fitted(chosen, len(request.prompt_token_ids), self.max_model_len)
        return request if fitting is chosen else self.engine.request(prompt, fitting)

    def _stream(self, request: Request) -> Generator[TextDelta, None, None]:
        with closing(self._serve([request])) as steps:
            for step in steps:
                for event in step:
                    yield TextDelta(event.index, event.text, event.token_ids, event.finish_reason)

    def _serve(self, requests: Sequence[Request]) -> Generator[list[RequestEvent], None, None]:
        """Submit requests and yield what each step has for them, until all have ended.

        What has not ended when this is left, by Ctrl-C too, is cancelled. Raises as `Gathering.check` does.
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


class _Options(NamedTuple):
    """How a conversation becomes a prompt."""

    add_generation_prompt: bool | None
    continue_final_message: bool
    add_special_tokens: bool
    chat_template_kwargs: Mapping[str, Any] | None


def _conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """A list of conversations; a single one becomes a list of one."""
    first = messages[0] if isinstance(messages, (list, tuple)) and messages else None
    return list(messages) if isinstance(first, (list, tuple)) else [messages]  # type: ignore[list-item, arg-type]


def _make_core(config: EngineConfig, model: Model) -> EngineCore:
    return EngineCore(make_manager(config, model), model.config.eos_token_ids, config.seed)


def _evaluated_logits(model: Model, token_ids: Sequence[int], config: EngineConfig) -> mx.array:
    logits = text_logits(model, token_ids, config)
    mx.eval(logits)
    return logits


def _template_file(model: Path) -> Path:
    """The file that a chat template comes from."""
    names = ("chat_template.jinja", "tokenizer_config.json")
    return next((model / name for name in names if (model / name).exists()), model)


def _chat_template(tokenizer: Tokenizer, content_format: str) -> ChatTemplate | None:
    """The template that came with the tokenizer, where one did."""
    source = tokenizer.chat_template
    if source is None:
        return None
    return ChatTemplate(
        source,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        content_format=content_format,
    )


def _check_model(model: object) -> None:
    """Raise `ConfigError` for what names no model."""
    if not (model is None or isinstance(model, (str, Path))) or model == "" or "\0" in str(model):
        raise ConfigError(f"model must be a path, a hub id or None, not {shown(model)}")


def _found(search: SearchState) -> BeamSearchOutput:
    """What a search has found; an error in its place where its texts cannot be made."""
    try:
        return search.output
    except BaseException as error:  # a panic of the tokenizer's library among them
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
            f"{len(params)} sampling_params for {num_prompts} prompts: give one, or one for each"
        )
    for place, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise ValueError(f"sampling_params[{place}] must be SamplingParams, not {shown(one)}")
    return list(params)


@contextmanager
def _progress(total: int, enabled: bool) -> Iterator[Callable[[list[RequestEvent]], None]]:
    """A progress bar over prompts; what it yields takes a step's events."""
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
