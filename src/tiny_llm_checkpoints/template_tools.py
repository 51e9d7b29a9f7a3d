"""Finds out by rendering what a chat template does with tools, calls and results.

A template may ignore them, and templates differ in the form that they take: arguments as an object or as a
JSON text, an empty content or null.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probes.",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "A probe."}},
            "required": ["probe_key"],
        },
    },
}
_OBJECT = {"probe_key": "probe_value"}
_TEXT = '{"probe_key": "probe_value"}'
_ID = "probe0001"  # Mistral's templates want nine letters and digits
_USER = {"role": "user", "content": "Hi"}

# Renders messages with variables; raises ValueError if the template does.
Render = Callable[[list[dict[str, Any]], Mapping[str, Any]], str]


class CallStyle(NamedTuple):
    """How a template takes a message with calls.

    takes_objects: arguments are an object; otherwise JSON text. takes_null: an empty content is null.
    """

    takes_objects: bool
    takes_null: bool


class ToolSupport(NamedTuple):
    """What a template writes itself: tools, and calls with their results (None: it does not)."""

    writes_tools: bool
    calls: CallStyle | None


def find_tool_support(render: Render, parts_of: Callable[[str, str], Any], reads_tools: bool) -> ToolSupport:
    """Find out what a template writes, by rendering short conversations with a tool, a call and a result.

    parts_of: makes the content of a message, in the form that the template takes, from a role and a text.
    reads_tools: whether the template has a variable `tools`. Styles of calls are tried in this order: objects
    before texts, and for both an empty content before null; the first that shows the call and its result is
    taken. If the template fails (ValueError), it shows nothing.
    """
    user = {**_USER, "content": parts_of("user", "Hi")}
    writes = reads_tools and "probe_tool" in _rendered(render, [user], [_TOOL])
    tools = [_TOOL] if writes else None
    styles = (CallStyle(objects, null) for objects in (True, False) for null in (False, True))
    for style in styles:
        if _shows_calls(_rendered(render, _conversation(style, user, parts_of), tools)):
            return ToolSupport(writes, style)
    return ToolSupport(writes, None)


def _rendered(render: Render, messages: list[dict[str, Any]], tools: Sequence[Any] | None) -> str:
    """The prompt; "" if the template fails."""
    try:
        return render(messages, {"tools": tools})
    except ValueError:
        return ""


def _conversation(
    style: CallStyle, user: dict[str, Any], parts_of: Callable[[str, str], Any]
) -> list[dict[str, Any]]:
    arguments = _OBJECT if style.takes_objects else _TEXT
    call = {"id": _ID, "type": "function", "function": {"name": "probe_tool", "arguments": arguments}}
    content = None if style.takes_null else parts_of("assistant", "")
    return [
        user,
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {
            "role": "tool",
            "content": parts_of("tool", "probe_result"),
            "tool_call_id": _ID,
            "name": "probe_tool",
        },
    ]


def _shows_calls(prompt: str) -> bool:
    """Whether a prompt has the call and its result, with arguments as JSON that is not escaped once more."""
    has_all = all(one in prompt for one in ("probe_tool", "probe_value", "probe_result"))
    return has_all and "'probe_key'" not in prompt and '\\"probe_key' not in prompt
