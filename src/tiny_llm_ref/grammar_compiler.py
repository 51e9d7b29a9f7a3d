"""Compiles the forms that requests ask for to grammars of the library llguidance.

The library is imported on first use, because most programs never need it.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Any

from tiny_llm_checkpoints.errors import shown
from tiny_llm_checkpoints.tokenizer import Tokenizer

from .errors import GrammarError, SamplingParamsError
from .grammar import Grammar
from .grammar_reasons import reworded
from .grammar_trials import TOO_COSTLY, GrammarTrials
from .grammar_vocabulary import library_tokenizer
from .json_schema import check_schema, parsed, place_of_error, with_alternatives_in_place, with_closed_objects
from .lark_schemas import refuse_temperatures, with_checked_schemas
from .structured_outputs import FIELD, StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHED_GRAMMARS = 32
CACHED_CHARACTERS = 1 << 20  # in the parameters of cached grammars, some 200 bytes of memory for each

SEARCH_SECONDS = 0.5  # for the place of an error in a schema
# The parser's limits. With them a mask takes some 30 ms at most.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}

# One space, or a line break and an indent. Without a bound a model can write blanks until `max_tokens`.
WHITESPACE = r"\x20|\n\x20{0,16}"


class GrammarCompiler:
    """Compiles the grammars of requests for one model; any number of threads may use it.

    vocab_size: the number of logits, which may exceed the tokenizer's vocabulary; tokens beyond it are never
    allowed. eos_token_ids: the tokens that may follow a complete text.

    The vocabulary is converted for the library on first use, in about half a second. A grammar is tried in
    another process (`GrammarTrials`) before it is compiled here. Compiled grammars are cached by their
    parameters, the most recently used ones: at most 32, with 1,048,576 characters together.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(token for token in eos_token_ids if token < min(vocab_size, tokenizer.vocab_size))
        self._lock = Lock()
        self._vocabulary: LLTokenizer | None = None
        names = {token: name for name, token in tokenizer.control_token_ids().items()}
        self._trials = GrammarTrials(tokenizer.vocab_size, names, self._eos)
        self._compiled: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """Return a new grammar for texts of this form, at its start.

        Raises `SamplingParamsError` for a schema, an expression or a grammar that is wrong, not supported or
        too large. The message names the field and the reason, and the place in a schema if it is known.
        Raises `OutOfResourcesError` if the process for trials cannot be started.
        """
        with self._lock:
            vocabulary = self._made_vocabulary()
            if params in self._compiled:
                self._compiled.move_to_end(params)
                return self._compiled[params].fork()
        grammar = self._compile(params, vocabulary)
        with self._lock:
            self._keep(params, grammar)
            return grammar.fork()

    def is_compiled(self, params: StructuredOutputsParams) -> bool:
        """True if `compile` would find the grammar in its cache, and so return at once."""
        with self._lock:
            return params in self._compiled

    def close(self) -> None:
        """End the process that tries grammars."""
        self._trials.close()

    def _made_vocabulary(self) -> "LLTokenizer":
        """The vocabulary as the library needs it, made on first use."""
        if self._vocabulary is None:
            self._vocabulary = library_tokenizer(self._tokenizer, self._eos)
        return self._vocabulary

    def _keep(self, params: StructuredOutputsParams, grammar: Grammar) -> None:
        """Cache a grammar, and drop those that were used least recently."""
        self._compiled[params] = grammar
        while len(self._compiled) > CACHED_GRAMMARS or self._num_characters() > CACHED_CHARACTERS:
            self._compiled.popitem(last=False)

    def _num_characters(self) -> int:
        return sum(params.num_characters for params in self._compiled)

    def _compile(self, params: StructuredOutputsParams, vocabulary: "LLTokenizer") -> Grammar:
        """Compile a grammar, and compute its first mask."""
        field = f"{FIELD}.{params.kind}"
        source = _source(params, field)
        if reason := self._reason_to_refuse(source, names_line=params.grammar is not None):
            raise SamplingParamsError(f"{self._place(params, reason)}: {reason}")
        grammar = Grammar(_matcher(vocabulary, source), self._vocab_size)
        try:
            grammar.allowed()
        except GrammarError as error:
            raise SamplingParamsError(f"{field}: {error}") from None
        return grammar

    def _reason_to_refuse(self, source: str, *, names_line: bool = False) -> str:
        """The reason why a grammar cannot be compiled, or ""."""
        return reworded(self._trials.reason_to_refuse(source, LIMITS), names_line=names_line)

    def _place(self, params: StructuredOutputsParams, reason: str) -> str:
        """The field that is refused for a reason, and the place in a schema if it is known."""
        end = monotonic() + SEARCH_SECONDS

        def reason_for(schema: Any) -> str:
            return self._reason_to_refuse(_json_source(schema, params)) if monotonic() < end else ""

        if params.whitespace_pattern is not None and reason_for({}) == reason:
            return f"{FIELD}.whitespace_pattern"
        if params.json is None or reason == TOO_COSTLY:
            return f"{FIELD}.{params.kind}"
        place = place_of_error(parsed(params.json), reason, reason_for)
        return f"{FIELD}.json{'' if place is None else f' at {place}'}"


def _source(params: StructuredOutputsParams, field: str) -> str:
    """The grammar of a request's form, as the library takes it."""
    from llguidance import LLMatcher

    if params.json is not None:
        return _json_source(_checked_schema(params, field), params)
    if params.json_object:
        return _json_source({"type": "object"}, params)
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        choices = " | ".join(map(json.dumps, params.choice))
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    assert params.grammar is not None
    if params.grammar.lstrip().startswith("{"):  # the library's own form, which may have schemas too
        raise SamplingParamsError(f"{field} must be a grammar in Lark's syntax, not {shown(params.grammar)}")
    refuse_temperatures(params.grammar, field)
    return LLMatcher.grammar_from_lark(with_checked_schemas(params.grammar, field, WHITESPACE))


def _checked_schema(params: StructuredOutputsParams, field: str) -> Any:
    """The schema as it is enforced. Raises `SamplingParamsError` for what cannot be."""
    schema = parsed(params.json)
    check_schema(schema, field)
    schema = with_closed_objects(schema) if params.disable_additional_properties else schema
    return with_alternatives_in_place(schema)


def _json_source(schema: Any, params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    options: Any = {"whitespace_pattern": params.whitespace_pattern or WHITESPACE}
    if params.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def _matcher(vocabulary: "LLTokenizer", source: str) -> "LLMatcher":
    """A matcher for a grammar that has been tried."""
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(vocabulary, source, log_level=0, limits=LLParserLimits(**LIMITS))
