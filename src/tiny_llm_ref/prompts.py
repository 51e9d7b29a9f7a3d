"""Parse prompts: texts, token ids, arrays and dicts, one or many. Forms and keys are vLLM's.

Invalid prompts raise here, with their position and value, before anything is encoded or queued.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import islice
from operator import index
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeGuard

from tiny_llm_checkpoints.errors import shown

from .errors import is_integer

MAX_TOKENS = 10_000_000  # in a prompt; more than any model's context
FORMS = "a string, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'"
_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_WHOLE = frozenset("bBhHiIlLqQnN")  # the struct module's format characters for integers


class TextPrompt(TypedDict):
    """A prompt as a string. cache_salt: as in `SamplingParams`, which it overrides."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids. prompt: their text, which appears in the output and is never encoded."""

    prompt_token_ids: Seq[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


PlainPrompt = str | Seq[int]
PromptType = PlainPrompt | TextPrompt | TokensPrompt


class ParsedPrompt(NamedTuple):
    """A parsed prompt. text: None if only ids were given. token_ids: None if the text must be encoded."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str | None = None

    @property
    def content(self) -> PlainPrompt:
        """The token ids if they are given, otherwise the text."""
        if self.token_ids is not None:
            return self.token_ids
        assert self.text is not None
        return self.text


def parse_prompts(prompts: object) -> list[ParsedPrompt]:
    """Parse one prompt or a list of prompts, in any form; a list of integers is one prompt.

    A two-dimensional integer array is a list of prompts, one in each row. Raises ValueError for any other
    value, with its position in the list: "prompts[3]: ...".
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
    """Parse a single prompt, in any form. Raises ValueError, which names `place`, for any other value."""
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
    """Like `parse_prompt`, but also raises ValueError for an empty list of token ids."""
    parsed = parse_prompt(prompt, place)
    if parsed.token_ids == []:
        raise ValueError(f"{place} has no tokens: there is nothing to continue")
    return parsed


def checked_text(text: str, place: str) -> str:
    """Return the text. Raises ValueError if it has a lone surrogate, which cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise ValueError(f"{place}: character {error.start} is a lone surrogate, {found!r}") from error
    return text


def token_list(ids: object, place: str) -> list[int]:
    """Token ids as a list of ints, from a list, tuple or other sequence, or a one-dimensional integer array.

    Raises ValueError for any other value, and for an element that is not an integer; a bool is not one.
    """
    array = _array(ids)
    if array is not None and array.ndim == 1:
        ids = _numbers(array, ids, place)
    if not _is_list(ids):
        raise ValueError(f"{place} must be a list of token ids, not {shown(ids)}")
    if len(ids) > MAX_TOKENS:
        raise ValueError(f"{place}: {len(ids)} token ids are more than {MAX_TOKENS}")
    values = list(islice(ids, len(ids)))  # a sequence's iterator may have more elements than len()
    if set(map(type, values)) <= {int}:
        return values
    return [_number(one, f"{place}[{at}]") for at, one in enumerate(values)]


def _parse_dict(prompt: Mapping[Any, Any], place: str) -> ParsedPrompt:
    """Parse a prompt that is a dict; a key with the value None counts as left out."""
    given = {key: value for key, value in prompt.items() if value is not None}
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"{place}: {shown(key)} is not supported; known: {', '.join(_KEYS)}")
    text, salt = given.get("prompt"), given.get("cache_salt")
    for name, value in (("prompt", text), ("cache_salt", salt)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{place}[{name!r}] must be a string, not {shown(value)}")
    if text is not None:
        checked_text(text, place)
    if "prompt_token_ids" in given:
        return ParsedPrompt(text, token_list(given["prompt_token_ids"], place), salt)
    if text is None:
        raise ValueError(f"{place}: a dict must have 'prompt' or 'prompt_token_ids', not {shown(prompt)}")
    return ParsedPrompt(text, None, salt)


def _is_list(value: object) -> TypeGuard[Seq[Any]]:
    """True for a sequence other than a string or bytes."""
    return isinstance(value, Seq) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _number(value: Any, place: str) -> int:
    if not is_integer(value):
        raise ValueError(f"{place}: a token id must be a whole number, not {shown(value)}")
    return index(value)


def _array(value: object) -> memoryview | None:
    """The memory of an array with at least one dimension; None for any other value."""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return None
    try:
        view = memoryview(value)  # type: ignore[arg-type]
    except Exception:  # a TypeError, or an error in the array's own code
        return None
    return view if view.ndim else None


def _numbers(array: memoryview, value: object, place: str) -> list[Any]:
    """The integers of an array as nested lists. Raises ValueError for other numbers."""
    if array.format not in _WHOLE:
        raise ValueError(f"{place}: an array of token ids must have whole numbers, not {shown(value)}")
    return array.tolist()
