"""Makes grammars of whole answers: reasoning, then calls of tools or content, each in its form.

They are Lark in llguidance's dialect: `%json` embeds a JSON schema, `<[151657]>` is the token with this id.
Knows nothing of how a grammar is enforced.
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
_ANY = {"type": "object", "x-guidance": _LAYOUT}
_SPACE = "/[ \\n]{0,4}/"


@dataclass(frozen=True)
class Reasoning:
    """Reasoning that may precede an answer. is_open: the prompt ends within it."""

    form: ReasoningFormat
    is_open: bool

    @property
    def is_certain(self) -> bool:
        """Whether each answer has it."""
        return self.is_open or self.form.is_implied


def tool_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    *,
    is_forced: bool,
    parallel: bool,
    control_tokens: Mapping[str, int],
    reasoning: Reasoning | None = None,
    content: str | None = None,
) -> str:
    """Return a grammar, in Lark, of answers that may call these tools.

    is_forced: the answer is one or more calls, with arguments that follow the schemas. Otherwise it is text,
    or text and then calls, and only the arguments of strict tools follow their schemas. parallel: allow
    several calls. control_tokens: name to id, for all of the vocabulary. reasoning: what may precede all of
    that. content: the right side of a Lark rule for the text; then the answer is either text or calls. None:
    any text.
    """
    schemas = [arguments_schema(tool) if is_forced or tool.is_strict else _ANY for tool in tools]
    rules: list[str] = []
    if not is_forced and content is None:
        rules += _free_text(form, control_tokens)
    elif not is_forced:
        rules += ["answer: content | calls", f"content: {content}"]
    has_begun = not is_forced and content is None and form.begin not in ("", *control_tokens)
    rules += _calls(form, tools, schemas, parallel, control_tokens, has_begun)
    return _grammar("calls" if is_forced else "answer", rules, control_tokens, reasoning)


def content_grammar(content: str, reasoning: Reasoning, control_tokens: Mapping[str, int]) -> str:
    """Return a grammar of answers with reasoning before their content. Parameters as of `tool_grammar`."""
    return _grammar("content", [f"content: {content}"], control_tokens, reasoning)


def _grammar(
    answer: str, rules: Sequence[str], control_tokens: Mapping[str, int], reasoning: Reasoning | None
) -> str:
    """The grammar of an answer, given by its rules, after the reasoning."""
    if reasoning is None:
        return "\n".join([f"start: {answer}", *rules]) + "\n"
    start = f"start: reasoning{'' if reasoning.is_certain else '?'} {answer}"
    return "\n".join([start, *rules, *_thoughts(reasoning, control_tokens)]) + "\n"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """Return the schema of a tool's arguments for the grammar: an object, with the white space of `_LAYOUT`.

    Only listed properties are allowed, because the client could not pass others to the function. So {} allows
    none. A schema stays open if it has `additionalProperties`, one of `_COMBINING`, or keywords but no
    `properties`.
    """
    schema: dict[str, Any] = {"type": "object", **tool.parameters}
    is_list = "properties" in schema or not tool.parameters
    if is_list and "additionalProperties" not in schema and not any(key in schema for key in _COMBINING):
        schema["additionalProperties"] = False
    return {**schema, "x-guidance": _LAYOUT}


def _free_text(form: ToolFormat, control_tokens: Mapping[str, int]) -> Iterator[str]:
    """The rules of an answer that may be text.

    Where a text has the marker of calls, calls must follow; an answer in a form without markers is text if it
    does not begin as JSON does.
    """
    if not form.begin:
        yield "answer: TEXT | calls"
        yield "TEXT: /(\\s*[^\\s{\\[](?s:.*))?/"
        return
    marker = _pattern(form.begin)
    yield f"TEXT: /(?s:.*)/ & ~/(?s:.*){marker}(?s:.*)/"
    if form.begin in control_tokens:
        yield "answer: TEXT calls?"
    else:
        yield "answer: TEXT | text_before calls"
        yield f"text_before[lazy]: /(?s:.*){marker}/"


def _calls(
    form: ToolFormat,
    tools: Sequence[Tool],
    schemas: Sequence[Mapping[str, Any]],
    parallel: bool,
    control_tokens: Mapping[str, int],
    has_begun: bool,
) -> Iterator[str]:
    """The rules of the calls. has_begun: the marker that starts them stands before them."""

    def literal(text: str) -> str:
        return _literal(text, form.markers, control_tokens)

    more = f"({literal(form.separator)} call)*" if parallel else ""
    opening = form.opening.removeprefix(form.begin) if has_begun else form.opening
    yield f"calls: {literal(opening)} call {more} {literal(form.closing)}"
    yield "call: " + " | ".join(f"call_{place}" for place in range(len(tools)))
    for place, tool in enumerate(tools):
        head, tail = literal(form.head_of(tool.name)), literal(form.tail)
        yield f"call_{place}: {head} arguments_{place} {tail}"
        yield f"arguments_{place}: %json {json.dumps(schemas[place])}"


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
    if reasoning.is_certain:
        begin = "" if reasoning.is_open else f"({begin})?"
    yield f"reasoning: {begin} thoughts {_SPACE}"
    if form.end in control_tokens:
        yield f"thoughts: /(?s:.*)/ <[{control_tokens[form.end]}]>"
    else:
        yield f"thoughts[lazy]: /(?s:.*){_pattern(form.end)}/"


def _pattern(text: str) -> str:
    """A text as a part of a regular expression between slashes."""
    return re.escape(text).replace("/", "\\/")
