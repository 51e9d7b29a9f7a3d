"""Prompts as callers write them: texts, token ids, arrays and dicts, one or many; forms and keys are vLLM's.

What cannot be a prompt is refused here, with its place and value, before anything is encoded or queued.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import islice
from operator import index
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeGuard

from tiny_llm_checkpoints.errors import shown

from .errors import is_integer

MOST_TOKENS = 10_000_000  # of a prompt: more than any model reads
FORMS = "a text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'"
_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_WHOLE = frozenset("bBhHiIlLqQnN")  # formats of whole numbers, as the struct module names them


class TextPrompt(TypedDict):
    """A prompt as a text. cache_salt: as in `SamplingParams`, and stronger than that."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids. prompt: the text behind them, which is shown and never encoded."""

    prompt_token_ids: Seq[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


PlainPrompt = str | Seq[int]
PromptType = PlainPrompt | TextPrompt | TokensPrompt


class ParsedPrompt(NamedTuple):
    """A prompt in one form. text: None where it came as token ids only. token_ids: None: encode the text."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str | None = None

    @property
    def content(self) -> PlainPrompt:
        """What the model is to read."""
        if self.token_ids is not None:
            return self.token_ids
        assert self.text is not None
        return self.text


def parse_prompts(prompts: object) -> list[ParsedPrompt]:
    """One prompt or a list of prompts, in any of their forms; a list of whole numbers is one prompt.

    A two-dimensional array of whole numbers is a list of prompts, row by row. Raises ValueError for any other
    value, with its place in the list: "prompts[3]: ...".
    """
    array = _array(prompts)
    if isinstance(prompts, (str, Mapping)) or (array is not None and array.ndim == 1):
        return [_not_empty(prompts)]
    if array is not None and array.ndim == 2:
        prompts = _numbers(array, prompts, "prompts")
    if not _is_list(prompts):
        raise ValueError(f"prompts must be {FORMS}, or a list of these, not {shown(prompts)}")
    if len(prompts) and (is_integer(prompts[0]) or isinstance(prompts[0], bool)):
        return [_not_empty(prompts)]
    return [_not_empty(prompt, f"prompts[{place}]") for place, prompt in enumerate(prompts)]


def parse_prompt(prompt: object, place: str = "prompt") -> ParsedPrompt:
    """A single prompt, in any of its forms. Raises ValueError with `place` for any other value."""
    if isinstance(prompt, ParsedPrompt):
        return prompt
    if isinstance(prompt, str):
        return ParsedPrompt(checked_text(prompt, place), None)
    if isinstance(prompt, Mapping):
        return _parse_dict(prompt, place)
    if _array(prompt) is None and not _is_list(prompt):
        raise ValueError(f"{place}: a prompt must be {FORMS}, not {shown(prompt)}")
    return ParsedPrompt(None, token_list(prompt, place))


def _not_empty(prompt: object, place: str = "prompt") -> ParsedPrompt:
    """As `parse_prompt`; raises ValueError for an empty list of token ids too."""
    parsed = parse_prompt(prompt, place)
    if parsed.token_ids == []:
        raise ValueError(f"{place}: no tokens: there is nothing to continue")
    return parsed


def checked_text(text: str, place: str) -> str:
    """The text. Raises ValueError where it has a surrogate, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise ValueError(f"{place}: character {error.start} is a lone surrogate, {found!r}") from error
    return text


def token_list(ids: object, place: str) -> list[int]:
    """Token ids as ints: from a list, a tuple, another sequence, or a one-dimensional array of whole numbers.

    Raises ValueError for any other value, and for a member that is no whole number; True and False are none.
    """
    array = _array(ids)
    if array is not None and array.ndim == 1:
        ids = _numbers(array, ids, place)
    if not _is_list(ids):
        raise ValueError(f"{place}: token ids must be in a list, not {shown(ids)}")
    if len(ids) > MOST_TOKENS:
        raise ValueError(f"{place}: {len(ids)} token ids are more than {MOST_TOKENS}")
    values = list(islice(ids, len(ids)))  # a sequence may have more than it says, without end
    if set(map(type, values)) <= {int}:
        return values
    return [_number(one, f"{place}[{at}]") for at, one in enumerate(values)]


def _parse_dict(prompt: Mapping[Any, Any], place: str) -> ParsedPrompt:
    """A prompt as a dict; a key whose value is None counts as left out."""
    given = {key: value for key, value in prompt.items() if value is not None}
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"{place}: {shown(key)} is not supported; known: {', '.join(_KEYS)}")
    text, salt = given.get("prompt"), given.get("cache_salt")
    for name, value in (("prompt", text), ("cache_salt", salt)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{place}[{name!r}] must be a text, not {shown(value)}")
    if text is not None:
        checked_text(text, place)
    if "prompt_token_ids" in given:
        return ParsedPrompt(text, token_list(given["prompt_token_ids"], place), salt)
    if text is None:
        raise ValueError(f"{place}: a dict must have 'prompt' or 'prompt_token_ids', not {shown(prompt)}")
    return ParsedPrompt(text, None, salt)


def _is_list(value: object) -> TypeGuard[Seq[Any]]:
    """True for a sequence of values; a text and bytes are none."""
    return isinstance(value, Seq) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _number(value: Any, place: str) -> int:
    if not is_integer(value):
        raise ValueError(f"{place}: a token id must be a whole number, not {shown(value)}")
    return index(value)


def _array(value: object) -> memoryview | None:
    """An array's memory, of one dimension or more; None for what is no array."""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return None
    try:
        view = memoryview(value)  # type: ignore[arg-type]
    except Exception:  # a TypeError, or whatever an array that cannot show its memory raises
        return None
    return view if view.ndim else None


def _numbers(array: memoryview, value: object, place: str) -> list[Any]:
    """The whole numbers of an array, in nested lists."""
    if array.format not in _WHOLE:
        raise ValueError(f"{place}: an array of token ids must have whole numbers, not {shown(value)}")
    return array.tolist()
