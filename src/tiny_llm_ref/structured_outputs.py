"""Structured outputs: the form that a request asks for, checked and normalized. Names are vLLM's.

Knows nothing of tokens and grammars.
"""

import json as json_library
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from tiny_llm_checkpoints.errors import shown
from tiny_llm_checkpoints.plain_json import reject_constant
from tiny_llm_checkpoints.suggestions import did_you_mean, suggests_fields

from .errors import SamplingParamsError, described
from .json_schema import MAX_DEPTH, depth_of, with_closed_objects
from .parameter_checks import check, flag, listed, refuse, text

FIELD = "structured_outputs"  # the field of `SamplingParams`, with which each error message starts
KINDS = ("json", "regex", "choice", "grammar", "json_object")
JSON_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")

MAX_CHARACTERS = 1 << 18  # in a schema, an expression, a grammar, or all choices together
MAX_PATTERN = 1024  # characters of a whitespace pattern
MAX_CHOICES = 4096


@suggests_fields
@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form of a request's text: exactly one of the first five fields, checked on creation.

    json: the text is a JSON value that satisfies this JSON Schema (Draft 2020-12): a mapping, JSON text, or a
        pydantic model class. Objects of a class have no other properties, as with OpenAI's client, unless
        the class allows them. Stored as compact JSON text.
    regex: the whole text matches this regular expression, in the syntax of Rust's `regex` crate.
    choice: the text is one of these strings. Stored as a tuple.
    grammar: the text matches the rule `start` of this grammar, in llguidance's dialect of Lark. The grammar
        may embed JSON schemas (`%json {...}`) and name tokens (`<[12]>`, `<|name|>`), even control tokens.
        An end-of-sequence token ends the text wherever the grammar names it.
    json_object: True: the text is a JSON object. False is an error, because it would ask for nothing.

    The other fields are for `json` and `json_object`. Without them, there is at most one space between two
    tokens of JSON, or a line break and up to 16 spaces. A model could otherwise write blanks until
    `max_tokens`.

    disable_any_whitespace: no white space outside of strings.
    whitespace_pattern: a regular expression for the white space between two tokens; at most 1,024 characters.
    disable_additional_properties: where a schema has `properties` but not `additionalProperties`, no other
        properties are allowed.

    Raises `SamplingParamsError`, which names the field, for a value of the wrong type, more than 262,144
    characters, more than 4,096 choices, or a schema with more than 64 levels. What a schema, an expression or
    a grammar says is checked by `GrammarCompiler.compile`, when the request is made.
    """

    json: str | Mapping[str, Any] | type | None = None
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        """Check every field, and replace `json` by its text and `choice` by a tuple."""
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = " and ".join(kinds) if kinds else "none"
            raise SamplingParamsError(f"{FIELD} must have exactly one of {', '.join(KINDS)}, not {found}")
        checked = _CHECKS[kinds[0]](f"{FIELD}.{kinds[0]}", getattr(self, kinds[0]))
        object.__setattr__(self, kinds[0], checked)
        self._check_options(kinds[0])

    def _check_options(self, kind: str) -> None:
        """Check the fields that are only for JSON."""
        for name in JSON_OPTIONS[:2]:
            object.__setattr__(self, name, flag(f"{FIELD}.{name}", getattr(self, name)))
        if self.whitespace_pattern is not None:
            checked = text(f"{FIELD}.whitespace_pattern", self.whitespace_pattern, MAX_PATTERN)
            object.__setattr__(self, "whitespace_pattern", checked)
        for name in JSON_OPTIONS:
            if getattr(self, name) not in (False, None) and not kind.startswith("json"):
                raise SamplingParamsError(f"{FIELD}.{name} is only for json and json_object, not for {kind}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise SamplingParamsError(f"{FIELD}.whitespace_pattern needs disable_any_whitespace=False")

    @classmethod
    def of(cls, given: object) -> Self:
        """Return the parameters, or make them from a mapping of their fields.

        Raises `SamplingParamsError` for anything else, an unknown field, or a wrong value.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            refuse(FIELD, "StructuredOutputsParams or a mapping of its fields", given)
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise SamplingParamsError(
                    f"{FIELD} has no field {shown(name)}{did_you_mean(str(name), known)}"
                )
        return cls(**given)

    @property
    def kind(self) -> str:
        """The name of the one field that is set of `KINDS`."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def num_characters(self) -> int:
        """The number of characters in all strings of the fields; their memory is in proportion to it."""
        values = [getattr(self, field.name) for field in fields(self)]
        return sum(len("".join(one)) for one in values if isinstance(one, (str, tuple)))


def _json(name: str, given: object) -> str:
    """The compact text of a JSON Schema."""
    try:
        if isinstance(given, type) and hasattr(given, "model_json_schema"):
            given = with_closed_objects(given.model_json_schema())
        if not isinstance(given, str):
            check(
                isinstance(given, Mapping),
                name,
                "a JSON schema: a mapping, JSON text or a pydantic model",
                given,
            )
            given = json_library.dumps({**given}, allow_nan=False)  # type: ignore[dict-item]
        source = text(name, given, MAX_CHARACTERS)
        schema = json_library.loads(source, parse_constant=reject_constant)
        compact = json_library.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise SamplingParamsError(f"{name} must have at most {MAX_DEPTH} levels") from None
    except SamplingParamsError:
        raise
    except Exception as error:  # from JSON, or from a pydantic model
        raise SamplingParamsError(f"{name} is not a JSON schema: {described(error)[:200]}") from None
    check(isinstance(schema, dict), name, "a JSON schema, which is an object", schema)
    if depth_of(schema) > MAX_DEPTH:
        raise SamplingParamsError(f"{name} must have at most {MAX_DEPTH} levels")
    return text(name, compact, MAX_CHARACTERS)


def _pattern(name: str, given: object) -> str:
    """The text of an expression or a grammar."""
    return text(name, given, MAX_CHARACTERS)


def _choice(name: str, given: object) -> tuple[str, ...]:
    """The choices: strings that are not empty."""
    choices = listed(name, given, "strings", MAX_CHOICES)
    check(len(choices) > 0, name, "a list with at least one string", given)
    found = tuple(text(f"{name}[{i}]", one, MAX_CHARACTERS) for i, one in enumerate(choices))
    check(all(found), name, "a list of strings that are not empty", given)
    if (total := sum(map(len, found))) > MAX_CHARACTERS:
        raise SamplingParamsError(f"{name} must have at most {MAX_CHARACTERS} characters, not {total}")
    return found


def _json_object(name: str, given: object) -> bool:
    """True."""
    if given is not True:
        raise SamplingParamsError(f"{name} must be true or left out, not {shown(given)}")
    return True


_CHECKS = {
    "json": _json,
    "regex": _pattern,
    "choice": _choice,
    "grammar": _pattern,
    "json_object": _json_object,
}
