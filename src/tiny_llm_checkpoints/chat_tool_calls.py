"""The calls of tools in the messages of a conversation: the `tool_calls` of assistant messages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chat_names import read_name
from .plain_json import MessageError, check_json, kind_of, parse_object

MAX_CALLS = 128  # in one message
MAX_DEPTH = 50  # nesting of the arguments


@dataclass(frozen=True)
class ToolCall:
    """A call of a function. arguments: an object. others: the call's other fields, such as its id."""

    name: str
    arguments: Mapping[str, Any]
    others: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The arguments as JSON text, with the white space that `tojson` writes in templates."""
        return json.dumps(self.arguments, ensure_ascii=False)

    def as_template(self, *, takes_objects: bool) -> dict[str, Any]:
        """The call in the form that a template takes: arguments as an object, or as a JSON text."""
        arguments = self.arguments if takes_objects else self.text
        function = {"name": self.name, "arguments": arguments}
        return {**self.others, "type": "function", "function": function}


def read_tool_calls(calls: Any, field: str) -> tuple[ToolCall, ...]:
    """Check the `tool_calls` of a message and return them. Raises `MessageError` for the first problem.

    field: where they are, such as "messages[2].tool_calls". Arguments may be JSON text or an object; an empty
    text and None count as {}.
    """
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
        raise MessageError(field, f"must be a list of calls, not {kind_of(calls)}")
    if len(calls) > MAX_CALLS:
        raise MessageError(field, f"must have at most {MAX_CALLS} calls, not {len(calls)}")
    return tuple(_read(call, f"{field}[{place}]") for place, call in enumerate(calls))


def _read(call: Any, field: str) -> ToolCall:
    if not isinstance(call, Mapping):
        raise MessageError(field, f"must be an object, not {kind_of(call)}")
    kind = call.get("type", "function")
    if kind not in ("function", None):
        raise MessageError(
            f"{field}.type", f"{str(kind)[:40]!r} is not supported: only function", unsupported=True
        )
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise MessageError(f"{field}.function", f"must be an object, not {kind_of(function)}")
    name = read_name(function.get("name"), f"{field}.function.name")
    arguments = _arguments(function.get("arguments"), f"{field}.function.arguments")
    others = {
        key: value for key, value in call.items() if key not in ("type", "function") and value is not None
    }
    if not isinstance(others.get("id", ""), str):
        raise MessageError(f"{field}.id", f"must be a string, not {kind_of(others['id'])}")
    return ToolCall(name, arguments, check_json(others, field))


def _arguments(arguments: Any, field: str) -> Mapping[str, Any]:
    """The arguments as an object."""
    if isinstance(arguments, str):
        return parse_object(arguments, field, MAX_DEPTH)
    if arguments is None or isinstance(arguments, Mapping):
        found: Mapping[str, Any] = check_json(arguments or {}, field, MAX_DEPTH)
        return found
    raise MessageError(field, f"must be the text of a JSON object, not {kind_of(arguments)}")
