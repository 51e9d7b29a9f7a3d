"""Grammars that let a model write only calls of tools, with arguments that follow the tools' schemas.

They are Lark in llguidance's dialect. `%json` embeds a JSON schema; a control token is named by its id, as in
`<[151657]>`. Knows nothing of how a grammar is enforced.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chat_tools import Tool
from .reasoning_parser import ReasoningFormat
from .tool_formats import ToolFormat

# JSON as `tojson` writes it in templates, which is the form that models have learned.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "if")
_SPACE = "/[ \\n]{0,4}/"


@dataclass(frozen=True)
class Reasoning:
    """Reasoning that may precede the calls. is_open: the prompt ends within it."""

    form: ReasoningFormat
    is_open: bool


def tool_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    *,
    parallel: bool,
    control_tokens: Mapping[str, int],
    reasoning: Reasoning | None = None,
) -> str:
    """Return a grammar of one or more calls of these tools, and of nothing else except reasoning before them.

    parallel: allow several calls. control_tokens: the ids of the vocabulary's control tokens, by name.
    """
    rules = ["start: calls", *_calls(form, tools, parallel, control_tokens)]
    if reasoning is not None:
        rules[0] = f"start: reasoning{'' if reasoning.is_open else '?'} calls"
        rules += _thoughts(reasoning, control_tokens)
    return "\n".join(rules) + "\n"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """Return the schema of a tool's arguments for the grammar.

    It allows only the parameters that a schema lists, unless the schema says otherwise: the caller could not
    pass others to the function.
    """
    schema: dict[str, Any] = {"type": "object", **tool.parameters}
    is_list = "properties" in schema or not tool.parameters
    if is_list and "additionalProperties" not in schema and not any(key in schema for key in _COMBINING):
        schema["additionalProperties"] = False
    return {**schema, "x-guidance": _LAYOUT}


def _calls(
    form: ToolFormat, tools: Sequence[Tool], parallel: bool, control_tokens: Mapping[str, int]
) -> Iterator[str]:
    """The rules of the calls."""

    def literal(text: str) -> str:
        return _literal(text, form.markers, control_tokens)

    more = f"({literal(form.separator)} call)*" if parallel else ""
    yield f"calls: {literal(form.opening)} call {more} {literal(form.closing)}"
    yield "call: " + " | ".join(f"call_{place}" for place in range(len(tools)))
    for place, tool in enumerate(tools):
        head, tail = literal(form.head_of(tool.name)), literal(form.tail)
        yield f"call_{place}: {head} arguments_{place} {tail}"
        yield f"arguments_{place}: %json {json.dumps(arguments_schema(tool))}"


def _literal(text: str, markers: Sequence[str], control_tokens: Mapping[str, int]) -> str:
    """A text in Lark: strings, and ids of those of the markers that are control tokens."""
    names = [re.escape(marker) for marker in markers if marker in control_tokens]
    parts = re.split(f"({'|'.join(names)})", text) if names else [text]
    return " ".join(
        f"<[{control_tokens[part]}]>" if place % 2 else json.dumps(part)
        for place, part in enumerate(parts)
        if part
    )


def _thoughts(reasoning: Reasoning, control_tokens: Mapping[str, int]) -> Iterator[str]:
    """The rules of the reasoning, up to its end and the white space after that."""
    form = reasoning.form
    begin = _literal(form.begin, (form.begin,), control_tokens)
    yield f"reasoning: {'' if reasoning.is_open else begin} thoughts {_SPACE}"
    if form.end in control_tokens:
        yield f"thoughts: /(?s:.*)/ <[{control_tokens[form.end]}]>"
    else:
        end = re.escape(form.end).replace("/", "\\/")
        yield f"thoughts[lazy]: /(?s:.*){end}/"
