"""The front door in Python: prompts in, completions out. Named and shaped like vLLM's `LLM`."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx

from .beam_search import BeamSearch, BeamSearchParams
from .chat_template import ChatTemplate
from .engine_config import EngineConfig
from .engine_core import EngineCore
from .evaluation import text_logits
from .loader import load_model
from .managers import make_manager
from .output_processor import RequestState, found_by
from .outputs import BeamSearchOutput, RequestOutput, TextDelta
from .sampling_params import SamplingParams
from .sequence import completion_ids
from .tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]


class LLM:
    """A model, its tokenizer, and an engine that serves many prompts at once from one pool of pages.

    model: a `.gguf` file, a folder in Hugging Face's layout, or a hub id (`owner/name`, or one file of it,
    `owner/name/FILE.gguf`); None is the embedded SmolLM2-135M-Instruct. engine_options: the fields of
    `EngineConfig`. Belongs to the thread that made it.

    Raises `ModelFileError` for a file that cannot be read and `ConfigError` for a bad option.
    """

    def __init__(self, model: str | Path | None = None, **engine_options: Any) -> None:
        self.engine_config = EngineConfig.from_options(**engine_options)
        self.model_name, self.model_path, self.model, self.tokenizer = load_model(model)
        self.model_config = self.model.config
        self.chat_template = _chat_template(self.tokenizer)
        manager = make_manager(self.engine_config, self.model)
        self.core = EngineCore(manager, self.model_config.eos_token_ids, self.engine_config.seed)
        self._request_ids = map(str, count())
        self._live: dict[str, RequestState] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them together; outputs in the order of the prompts.

        prompts: a text, a list of token ids, or a list of either. sampling_params: one for all, or
        one for each. use_tqdm: show a progress bar on standard error where that is a terminal.

        Raises ValueError for a prompt or parameters that cannot run; then none of them has run.
        """
        listed = _as_list(prompts)
        encoded = [self._encode(prompt) for prompt in listed]
        texts = [prompt if isinstance(prompt, str) else None for prompt in listed]
        return self._run_all(encoded, texts, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several together, through the model's chat template.

        A message is a mapping with "role" and "content".
        """
        first = messages[0] if messages else None
        conversations = [messages] if first is None or isinstance(first, Mapping) else messages
        encoded = [self._encode_chat(conversation) for conversation in conversations]  # type: ignore[arg-type]
        return self._run_all(encoded, [None] * len(encoded), sampling_params, use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The best continuations of each prompt, all of them searched together; in the order of the prompts.

        A search's beams share the pages of what they have in common. Raises ValueError for a prompt or
        parameters that cannot run, and with batching="dense"; then none of them has run.
        """
        encoded = [self._encode(prompt) for prompt in _as_list(prompts)]
        searches: dict[str, BeamSearch] = {}
        try:
            for tokens in encoded:
                self._check_ids(tokens)
                request_id = next(self._request_ids)
                searches[request_id] = self.core.add_beam_search(request_id, tokens, params)
            while any(search.beams for search in searches.values()):
                self._step()
        finally:
            for request_id in searches:
                self.core.cancel(request_id)
        return [
            found_by(search, tokens, self.tokenizer)
            for search, tokens in zip(searches.values(), encoded, strict=True)
        ]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[TextDelta, None, None]:
        """Complete one prompt, piece by piece; closing the iterator cancels the request."""
        return self._stream(self._encode(prompt), sampling_params or SamplingParams())

    def stream_chat(
        self, messages: Messages, sampling_params: SamplingParams | None = None
    ) -> Generator[TextDelta, None, None]:
        """Answer one conversation, piece by piece; closing the iterator cancels the request."""
        return self._stream(self._encode_chat(messages), sampling_params or SamplingParams())

    def logits(self, token_ids: Sequence[int]) -> mx.array:
        """The logits [L, vocab_size] after each of L tokens, in float32: for evaluation.

        Runs through pages of their own, in chunks of the step's token budget, whatever else waits.
        Raises ValueError for no tokens and for ids outside the vocabulary.
        """
        if not token_ids:
            raise ValueError("logits of no tokens: there is nothing to compute")
        self._check_ids(token_ids)
        return text_logits(self.model, token_ids, self.engine_config)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        return list(prompt)

    def _encode_chat(self, messages: Messages) -> list[int]:
        if self.chat_template is None:
            raise ValueError(f"{self.model_name} has no chat template: use generate instead of chat")
        return self.chat_template.encode(messages, self.tokenizer)

    def _add(self, tokens: list[int], text: str | None, params: SamplingParams) -> RequestState:
        request_id = next(self._request_ids)
        self._check_ids(tokens)
        self._check_ids([*(params.stop_token_ids or ()), *(params.logit_bias or ())])
        self.core.add_request(request_id, tokens, params)
        seq_ids = completion_ids(request_id, params.n)
        request = RequestState(request_id, text, tokens, seq_ids, self.tokenizer, params)
        self._live[request_id] = request
        return request

    def _check_ids(self, tokens: Sequence[int]) -> None:
        vocab_size = self.model_config.vocab_size
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary (0 to {vocab_size - 1})")

    def _run_all(
        self,
        encoded: Sequence[list[int]],
        texts: Sequence[str | None],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = _one_for_each(sampling_params, len(encoded))
        with self._served() as requests, _progress(len(encoded), use_tqdm) as report:
            for tokens, text, param in zip(encoded, texts, params, strict=True):
                requests.append(self._add(tokens, text, param))
            while not all(request.finished for request in requests):
                self._step()
                deltas = [delta for request in requests for delta in request.take_deltas()]
                report(sum(request.finished for request in requests), deltas)
            return [request.output for request in requests]

    def _step(self) -> None:
        """One engine step; each request takes its own tokens. A stop string ends its sequence here."""
        for output in self.core.step():
            delta = self._live[output.request_id].push(output)
            if delta.finish_reason is not None and output.finish_reason is None:
                self.core.finish(output.seq_id)

    def _stream(self, tokens: list[int], params: SamplingParams) -> Generator[TextDelta, None, None]:
        with self._served() as requests:
            request = self._add(tokens, None, params)
            requests.append(request)
            while not request.finished:
                self._step()
                yield from request.take_deltas()
            yield from request.take_deltas()  # what a neighbour's step brought while this stream waited

    @contextmanager
    def _served(self) -> Iterator[list[RequestState]]:
        """Serve what the block puts into the list; what has not ended when it is left is cancelled."""
        requests: list[RequestState] = []
        try:
            yield requests
        finally:
            for request in requests:
                self.core.cancel(request.request_id)
                del self._live[request.request_id]


def _chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that came with the tokenizer, where one did."""
    source = tokenizer.chat_template
    if source is None:
        return None
    return ChatTemplate(source, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt, as text or as token ids, becomes a list of one."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise ValueError(
            f"{len(params)} sampling_params for {num_prompts} prompts: give one, or one for each"
        )
    return list(params)


@contextmanager
def _progress(total: int, enabled: bool) -> Iterator[Callable[[int, Sequence[TextDelta]], None]]:
    """A progress bar over prompts; what it yields takes the number finished and a step's deltas."""
    if not enabled:
        yield lambda finished, deltas: None
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

        def report(finished: int, deltas: Sequence[TextDelta]) -> None:
            nonlocal tokens
            tokens += sum(len(delta.token_ids) for delta in deltas)
            bar.update(task, completed=finished, tokens=tokens)

        yield report
