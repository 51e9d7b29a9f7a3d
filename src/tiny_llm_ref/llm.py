"""The front door in Python: prompts in, completions out. Named and shaped like vLLM's `LLM`."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import mlx.core as mx

from .beam_search import BeamSearchParams
from .chat_template import ChatTemplate
from .delivery import Gathering, Item
from .engine import Engine
from .engine_config import EngineConfig
from .engine_core import EngineCore
from .engine_loop import Request
from .errors import ConfigError, ends_process, shown
from .evaluation import text_logits
from .forking import prepare_to_compute
from .kv_pool import DTYPES
from .loader import load_model
from .managers import make_manager
from .model import Model
from .outputs import BeamSearchOutput, RequestEvent, RequestOutput, TextDelta
from .prompts import ParsedPrompt, PromptType, parse_prompts
from .sampling_params import SamplingParams
from .search_state import SearchState
from .tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]


class LLM:
    """A model, its tokenizer, and an engine that serves many prompts at once from one pool of pages.

    model: a `.gguf` file, a folder in Hugging Face's layout, or a hub id (`owner/name`, or one file of it,
    `owner/name/FILE.gguf`); None is the embedded SmolLM2-135M-Instruct. engine_options: the fields of
    `EngineConfig`. max_model_len: the longest prompt + output in tokens, which the pool holds. Any thread may
    use it, and several at once: the arrays belong to a thread of its own, that ends when the `LLM` is
    forgotten.

    Raises `ModelFileError` for a file that cannot be read and `ConfigError` for a bad option. Calls that wait
    raise `WrongThreadError` in the engine's thread (in a listener, a watcher, or a function for
    `engine.call`), and `ForkedProcessError` in a process that was forked from one with an `LLM`, where making
    another raises it too.
    """

    def __init__(self, model: str | Path | None = None, **engine_options: Any) -> None:
        self.engine_config = EngineConfig.from_options(**engine_options)
        _check_model(model)
        prepare_to_compute()
        self.model_name, self.model_path, self.model, self.tokenizer = load_model(
            model, self.engine_config.activation_bits
        )
        self.model_config = self.model.config
        self.max_model_len = self.engine_config.model_len(
            self.model_config, DTYPES[self.engine_config.kv_cache_dtype].size
        )
        self.chat_template = _chat_template(self.tokenizer)
        mx.eval([layer.self_attn.inv_freq for layer in self.model.layers])  # what is lazy stays in its thread
        make_core = partial(_make_core, self.engine_config, self.model)
        self.engine = Engine(make_core, self.tokenizer, self.model_config.vocab_size, self.engine_config)

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
        all, or one for each. use_tqdm: show a progress bar on standard error where that is a terminal.

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
    ) -> list[RequestOutput]:
        """Answer one conversation, or several together, through the model's chat template.

        A message is a mapping with "role" and "content".
        """
        self.engine.refuse_to_wait("LLM.chat")
        first = messages[0] if messages else None
        conversations = [messages] if first is None or isinstance(first, Mapping) else messages
        encoded = [self._encode_chat(conversation) for conversation in conversations]  # type: ignore[arg-type]
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
        return self._stream(self.engine.request(prompt, sampling_params))

    def stream_chat(
        self, messages: Messages, sampling_params: SamplingParams | None = None
    ) -> Generator[TextDelta, None, None]:
        """Answer one conversation, piece by piece; closing the iterator cancels the request."""
        self.engine.refuse_to_wait("LLM.stream_chat")
        return self._stream(self.engine.request(self._encode_chat(messages), sampling_params))

    def logits(self, token_ids: Sequence[int]) -> mx.array:
        """The logits [L, vocab_size] after each of L tokens, in float32: for evaluation.

        Runs through pages of their own, in chunks of the step's token budget, whatever else waits.
        Raises ValueError for no tokens, for what is no token id, and for ids outside the vocabulary.
        """
        tokens = self.engine.check_token_ids(token_ids)
        if not tokens:
            raise ValueError("logits of no tokens: there is nothing to compute")
        return self.engine.call(partial(_evaluated_logits, self.model, tokens, self.engine_config))

    def _encode_chat(self, messages: Messages) -> list[int]:
        if self.chat_template is None:
            raise ValueError(f"{self.model_name} has no chat template: use generate instead of chat")
        return self.chat_template.encode(messages, self.tokenizer)

    def _run_all(
        self,
        prompts: Sequence[PromptType | ParsedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if not isinstance(use_tqdm, bool):
            raise ValueError(f"use_tqdm must be True or False, not {shown(use_tqdm)}")
        params = _one_for_each(sampling_params, len(prompts))
        requests = [self.engine.request(*each) for each in zip(prompts, params, strict=True)]
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


def _make_core(config: EngineConfig, model: Model) -> EngineCore:
    return EngineCore(make_manager(config, model), model.config.eos_token_ids, config.seed)


def _evaluated_logits(model: Model, token_ids: Sequence[int], config: EngineConfig) -> mx.array:
    logits = text_logits(model, token_ids, config)
    mx.eval(logits)
    return logits


def _chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that came with the tokenizer, where one did."""
    source = tokenizer.chat_template
    if source is None:
        return None
    return ChatTemplate(source, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


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
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
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
    console = Console(stderr=True)
    with Progress(
        *columns, TextColumn("{task.fields[tokens]} tokens"), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("prompts", total=total, tokens=0)
        tokens = 0

        def report(step: list[RequestEvent]) -> None:
            nonlocal tokens
            tokens += sum(len(event.token_ids) for event in step)
            bar.update(task, advance=sum(event.usage is not None for event in step), tokens=tokens)

        yield report
