"""Checks the JSON schemas in a grammar: `%json {...}` in llguidance's dialect of Lark.

The schemas are found without the library's lexer: each `%json {` counts, even in a string or a comment.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from tiny_llm_checkpoints.errors import shown
from tiny_llm_checkpoints.plain_json import reject_constant

from .errors import SamplingParamsError
from .json_schema import MAX_DEPTH, check_schema, depth_of, with_alternatives_in_place

KEYWORD, ESCAPED = "%json", "\\u0025json"  # in a JSON string, the second means the first
# The keywords of "x-guidance", the library's own keyword of a schema, that set the white space.
LAYOUT = ("whitespace_flexible", "whitespace_pattern", "item_separator", "key_separator")
_SCHEMA = re.compile(rf"{KEYWORD}[ \t\r\n]*(?=\{{)")
_TEMPERATURE = re.compile(r"^[ \t]*([?!]?\w+)[ \t]*\[[^\]\n]*\btemperature\b", re.MULTILINE)
_FLEXIBLE = {"whitespace_flexible", "whitespace_pattern"}


def refuse_temperatures(grammar: str, field: str) -> None:
    """Raise `SamplingParamsError` for a rule with a temperature, which would be parsed but not used."""
    if found := _TEMPERATURE.search(grammar):
        line = grammar.count("\n", 0, found.start(1)) + 1
        raise SamplingParamsError(
            f"{field} at line {line}: {found[1]!r} must not have a temperature: it is the parameter "
            "`temperature` for the whole answer"
        )


def with_checked_schemas(grammar: str, field: str, whitespace: str) -> str:
    """Check the schemas in a grammar, and return it with them as the library needs them, in the same lines.

    field: the name of the parameter, with which messages start. whitespace: a regular expression for the
    white space between two tokens of JSON, for schemas whose "x-guidance" does not set it.

    Raises `SamplingParamsError`, with the line, for a schema that is not JSON, that `check_schema` rejects,
    or whose "x-guidance" has other keywords than `LAYOUT`.
    """
    parts, end = [], 0
    for found in _SCHEMA.finditer(grammar):
        if found.start() < end:  # in a string of the schema before it
            continue
        where = f"{field} at line {grammar.count(chr(10), 0, found.start()) + 1}"
        schema, stop = _decoded(grammar, found.end(), where)
        checked = json.dumps(_checked(schema, where, whitespace))
        checked = checked.replace(KEYWORD, ESCAPED)  # the library might read it as the start of a schema
        num_lines = grammar.count("\n", found.start(), stop)
        parts += [grammar[end : found.start()], KEYWORD, "\n" * num_lines or " ", checked]
        end = stop
    return "".join([*parts, grammar[end:]])


def _decoded(grammar: str, start: int, where: str) -> tuple[Any, int]:
    """The schema that starts at a place of the grammar, and the place after it."""
    try:
        schema, stop = json.JSONDecoder(parse_constant=reject_constant).raw_decode(grammar, start)
    except RecursionError:
        raise SamplingParamsError(f"{where}: a schema must have at most {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise SamplingParamsError(f"{where}: what follows {KEYWORD} is not JSON: {error}") from None
    if depth_of(schema) > MAX_DEPTH:
        raise SamplingParamsError(f"{where}: a schema must have at most {MAX_DEPTH} levels")
    return schema, stop


def _checked(schema: Mapping[str, Any], where: str, whitespace: str) -> dict[str, Any]:
    """The schema as the library needs it."""
    plain = {keyword: value for keyword, value in schema.items() if keyword != "x-guidance"}
    check_schema(plain, where)
    layout = schema.get("x-guidance", {})
    if not isinstance(layout, Mapping) or not set(layout) <= {*LAYOUT}:
        raise SamplingParamsError(f"{where}: x-guidance may have {', '.join(LAYOUT)}, not {shown(layout)}")
    if _FLEXIBLE.isdisjoint(layout):
        layout = {**layout, "whitespace_pattern": whitespace}
    return {**with_alternatives_in_place(plain), "x-guidance": layout}
