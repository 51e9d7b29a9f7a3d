"""Makes and checks requests, in the caller's thread: prompts become tokens, and schemas become grammars.

Needs no model and no engine: a process that has only the tokenizer can make requests for an engine elsewhere.
"""

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import count
from typing import TypeVar

from tiny_llm_checkpoints.errors import shown
from tiny_llm_checkpoints.tokenizer import Tokenizer, check_length

from .batch_manager import check_num_sequences
from .beam_search import BeamSearchParams
from .chat_prompts import ChatOptions, ChatPrompts, Messages
from .errors import SamplingParamsError, prompt_length_errors
from .generation_defaults import fit_to_context
from .grammar import Grammar
from .grammar_compiler import GrammarCompiler
from .output_processor import RequestState
from .prompts import ParsedPrompt, PlainPrompt, PromptType, parse_prompt, token_list
from .sampling_params import SamplingParams
from .search_state import SearchState
from .structured_outputs import StructuredOutputsParams

T = TypeVar("T")

MAX_ID_CHARACTERS = 256  # in a request id; every completion's id starts with it


class RequestMaker:
    """Makes the requests of an engine. Any thread may call it.

    vocab_size: token ids are below it. max_num_seqs: the engine's limit of sequences that run at once.
    max_model_len: the longest prompt + output in tokens; a prompt that is clearly longer is rejected before
    it is tokenized. None: no limit here. chat_prompts: makes the prompts of `chat_request`; None: there is no
    chat template. defaults: the parameters of requests that have none of their own; None: `SamplingParams()`.
    grammars: compiles `structured_outputs`; None: it is not supported.

    >>> RequestMaker(None, vocab_size=26, max_num_seqs=4).check_token_ids((0, 25))
    [0, 25]
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        max_num_seqs: int,
        max_model_len: int | None = None,
        *,
        chat_prompts: ChatPrompts | None = None,
        defaults: SamplingParams | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._chat_prompts = chat_prompts or ChatPrompts("this engine", None, tokenizer, max_model_len)
        self._defaults = defaults or SamplingParams()
        self._grammars = grammars
        self._request_ids = map(str, count())

    def request(
        self,
        prompt: PromptType | ParsedPrompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        visible: Collection[str] = (),
    ) -> RequestState:
        """Make a request, which can be submitted once.

        params: the engine's defaults if None; a default `max_tokens` is lowered to what the context has left.
        request_id: a string of 1 to 256 characters that no unfinished
        request has; a new number if None. visible: control tokens that the text has even with
        `skip_special_tokens`, such as those that mark calls of tools.

        Raises ValueError for an invalid prompt, params or id, and for token ids outside the vocabulary;
        `SamplingParamsError` names the field of `params` with such ids, and is raised by
        `GrammarCompiler.compile`. Raises `RequestTooLargeError` if `n` exceeds `max_num_seqs`, and for a
        prompt that the context cannot hold (before it is tokenized, if its length already shows that).
        """
        is_default = params is None
        params, name = _checked(params, SamplingParams, self._defaults), self._name(request_id)
        parsed = parse_prompt(prompt)
        if parsed.cache_salt is not None:
            params = replace(params, cache_salt=parsed.cache_salt)
        check_num_sequences(name, params.n, self._max_num_seqs)
        tokens = self._encode(parsed.content)
        if is_default or params.leaves_out_max_tokens:
            params = self._fitted(params, len(tokens))
        for field in ("stop_token_ids", "logit_bias"):
            self._check_vocabulary(field, getattr(params, field) or ())
        grammar = self._grammar(params)
        return RequestState(name, parsed.text, tokens, self._tokenizer, params, visible, grammar)

    def chat_request(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        options: ChatOptions | None = None,
        request_id: str | None = None,
    ) -> RequestState:
        """Make a request to answer a conversation, as `request` does; `encode_chat` makes the prompt.

        Without a `max_tokens`, from the caller or from the model, the answer may use all tokens that the
        context has left. Raises the errors of `ChatPrompts.encode` and of `request`.
        """
        tokens = self.encode_chat(messages, options or ChatOptions())
        return self.request(tokens, self.chat_params(params, len(tokens)), request_id)

    def search(
        self,
        prompt: PromptType | ParsedPrompt,
        params: BeamSearchParams,
        request_id: str | None = None,
    ) -> SearchState:
        """Make a beam search, which can be submitted once; it has a single event, at its end.

        prompt, request_id: as in `request`. Raises ValueError for an invalid prompt, params or id, and
        `RequestTooLargeError` if `beam_width` exceeds `max_num_seqs`, and for a prompt that the context
        cannot hold.
        """
        params, name = _checked(params, BeamSearchParams), self._name(request_id)
        parsed = parse_prompt(prompt)
        check_num_sequences(name, params.beam_width, self._max_num_seqs, "beam_width")
        if parsed.cache_salt is not None:
            params = replace(params, cache_salt=parsed.cache_salt)
        return SearchState(name, self._encode(parsed.content), self._tokenizer, params)

    def encode_chat(self, messages: Messages, options: ChatOptions) -> list[int]:
        """The token ids of a conversation. Raises the errors of `ChatPrompts.encode`."""
        return self._chat_prompts.encode(messages, options)

    def chat_params(self, params: SamplingParams | None, num_prompt_tokens: int) -> SamplingParams:
        """The parameters of a chat answer to a prompt of this length; the engine's defaults if None."""
        if params is None:
            return self._fitted(self._defaults.for_chat(), num_prompt_tokens)
        return _checked(params, SamplingParams).for_chat()

    def check_token_ids(self, tokens: Seq[int]) -> list[int]:
        """Token ids as a list of ints. Raises ValueError for other values and ids outside the vocabulary."""
        tokens = token_list(tokens, "token_ids")
        if tokens and not (min(tokens) >= 0 and max(tokens) < self._vocab_size):
            bad = next(token for token in tokens if not 0 <= token < self._vocab_size)
            raise ValueError(f"token id {shown(bad)} is outside the vocabulary (0 to {self._vocab_size - 1})")
        return tokens

    def is_compiled(self, params: SamplingParams) -> bool:
        """True if a request with these parameters needs no grammar, or one that is compiled already."""
        form = params.structured_outputs
        return form is None or (
            self._grammars is not None and self._grammars.is_compiled(StructuredOutputsParams.of(form))
        )

    def _fitted(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """The parameters, with a default `max_tokens` reduced to the tokens left in the context."""
        if self._max_model_len is None:
            return params
        return fit_to_context(params, num_prompt_tokens, self._max_model_len)

    def _name(self, request_id: str | None) -> str:
        """The id of a new request. Raises ValueError for an invalid one."""
        if request_id is None:
            return next(self._request_ids)
        if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID_CHARACTERS:
            limits = f"a string of 1 to {MAX_ID_CHARACTERS} characters"
            raise ValueError(f"request_id must be {limits}, not {shown(request_id)}")
        return str.__str__(request_id)

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        """The grammar of a request, compiled in the caller's thread; None if any text is allowed."""
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            raise SamplingParamsError("structured_outputs is not supported by this engine")
        return self._grammars.compile(StructuredOutputsParams.of(params.structured_outputs))

    def _check_vocabulary(self, name: str, tokens: Iterable[int]) -> None:
        """Raise `SamplingParamsError` for a field with a token id outside the vocabulary."""
        last = self._vocab_size - 1
        for token in tokens:
            if token > last:
                raise SamplingParamsError(
                    f"{name} has token id {token}, which is outside the vocabulary (0 to {last})"
                )

    def _encode(self, prompt: PlainPrompt) -> list[int]:
        """The token ids of a prompt. Raises for ids outside the vocabulary and for too many tokens."""
        context = self._max_model_len
        with prompt_length_errors():
            if isinstance(prompt, str):
                return self._tokenizer.encode(prompt, add_special_tokens=True, context=context)
            check_length(len(prompt), context)
        return self.check_token_ids(prompt)


def _checked(params: T | None, kind: type[T], default: T | None = None) -> T:
    """The parameters, or the default for None. Raises ValueError if they are not of the right class."""
    params = default if params is None else params
    if not isinstance(params, kind):
        raise ValueError(f"params must be {kind.__name__}, not {shown(params)}")
    return params
