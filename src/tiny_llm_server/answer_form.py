"""The form that an answer must have, and which of the request's fields is at fault if it cannot be compiled.

Tools, reasoning and a format become one grammar. The engine's error is about this grammar, so the parts that
the client has sent are compiled one by one to find the wrong one.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from tiny_llm.json_schema import with_closed_objects
from tiny_llm.lark_schemas import ESCAPED, KEYWORD

from tiny_llm import SamplingParamsError, StructuredOutputsParams
from tiny_llm_checkpoints.tool_grammar import arguments_schema

from .errors import ApiError, refused
from .structured_fields import RESPONSE_FORMAT, SCHEMA, STRUCTURED_OUTPUTS
from .tool_use import ToolUse

SEARCH_SECONDS = 1.0  # for the part at fault; the last one may take another second

Compile = Callable[[StructuredOutputsParams], object]


@dataclass(frozen=True)
class Part:
    """A part of a request that sets a form.

    field: its name in messages. param: its name in an error's `param`. options: the arguments of its
    `StructuredOutputsParams`.
    """

    field: str
    param: str
    options: Mapping[str, Any]

    def refused(self, error: SamplingParamsError) -> ApiError:
        """Return the `ApiError` for the engine's error about this part; it has the client's field name."""
        message = str(error)
        if self.param != STRUCTURED_OUTPUTS:
            message = message.replace(f"{STRUCTURED_OUTPUTS}.json", self.field, 1)
        return refused(message, self.param)


@dataclass(frozen=True)
class AnswerForm:
    """The form of a request's answer, for the engine, and the parts of the request that it is made from.

    is_composed: the form is a grammar made from the parts; otherwise it is the only part.
    """

    params: StructuredOutputsParams
    parts: Sequence[Part]
    is_composed: bool = False

    def refused(self, error: SamplingParamsError, compile_form: Compile) -> ApiError:
        """Return the `ApiError` for the engine's error about this form.

        compile_form: compiles another form, or raises `SamplingParamsError`.
        """
        if not self.is_composed:
            return self.parts[0].refused(error)
        return self._find_fault(compile_form) or _refused_together(self.parts, error)

    def _find_fault(self, compile_form: Compile) -> ApiError | None:
        """Compile the parts one by one, for a second; return the `ApiError` of the first that fails."""
        end = monotonic() + SEARCH_SECONDS
        for part in self.parts:
            if monotonic() > end:
                return None
            try:
                compile_form(StructuredOutputsParams(**part.options))
            except SamplingParamsError as error:
                return part.refused(error)
        return None


def _refused_together(parts: Sequence[Part], error: SamplingParamsError) -> ApiError:
    """Return the `ApiError` for an error of the parts together."""
    param = parts[0].param.partition("[")[0]
    reason = str(error).removeprefix(f"{STRUCTURED_OUTPUTS}.grammar").lstrip(": ")
    return refused(f"{param}: the grammar of the answer is refused: {reason}", param)


def plain_form(form: StructuredOutputsParams | None, field: str) -> AnswerForm | None:
    """Return the form of an answer that is only text. field: the request's field that sets it."""
    return None if form is None else AnswerForm(form, [_of_format(form, field)])


def composed_form(grammar: str, form: StructuredOutputsParams | None, field: str, use: ToolUse) -> AnswerForm:
    """Return the form of an answer that follows a grammar of calls, reasoning and a format.

    form: the format in the grammar; None if it has none. field: the request's field that sets it. Raises
    `ApiError` for a grammar that is too long.
    """
    parts = [*_of_tools(use), *([] if form is None else [_of_format(form, field)])]
    try:
        return AnswerForm(StructuredOutputsParams(grammar=grammar), parts, is_composed=True)
    except SamplingParamsError as error:
        raise _refused_together(parts, error) from error


def _of_format(form: StructuredOutputsParams, field: str) -> Part:
    name = f"{RESPONSE_FORMAT}.{SCHEMA}" if field == RESPONSE_FORMAT else f"{STRUCTURED_OUTPUTS}.{form.kind}"
    return Part(name, field, {**vars(form)})


def _of_tools(use: ToolUse) -> Iterator[Part]:
    """The parameters of the tools that a grammar enforces."""
    for place, tool in enumerate(use.offered):
        if tool in use.callable and (use.is_forced or tool.is_strict):
            name = f"tools[{place}].function.parameters"
            schema = {key: value for key, value in arguments_schema(tool).items() if key != "x-guidance"}
            yield Part(name, name, {"json": schema})


def in_lark(form: StructuredOutputsParams) -> str:
    """Return the right side of a Lark rule for texts of a form."""
    if form.regex is not None:
        return f"/{_with_escaped_slashes(form.regex)}/" if form.regex else '""'
    if form.choice is not None:
        return " | ".join(json.dumps(one).replace(KEYWORD, ESCAPED) for one in form.choice)
    if form.grammar is not None:
        return f"%lark {{\n{form.grammar}\n}}"
    schema = {"type": "object"} if form.json is None else json.loads(str(form.json))
    if form.disable_additional_properties:
        schema = with_closed_objects(schema)
    return f"%json {json.dumps({**schema, **_layout(form)})}"


def _layout(form: StructuredOutputsParams) -> dict[str, Any]:
    """The keyword "x-guidance" for the white space of a schema's texts, or no keyword."""
    if form.disable_any_whitespace:
        return {"x-guidance": {"whitespace_flexible": False}}
    if form.whitespace_pattern is not None:
        return {"x-guidance": {"whitespace_pattern": form.whitespace_pattern}}
    return {}


def _with_escaped_slashes(pattern: str) -> str:
    """A regular expression in which no slash ends it.

    >>> _with_escaped_slashes("a/b"), _with_escaped_slashes("a\\\\/b")
    ('a\\\\/b', 'a\\\\/b')
    """
    return re.sub(r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
