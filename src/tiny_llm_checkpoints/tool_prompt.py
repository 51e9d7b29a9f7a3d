"""Writes tools, calls and results into a conversation as plain text, for templates that cannot.

Models call tools by such a text too, but less reliably than in their own form.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from .chat_messages import ChatMessage
from .chat_tools import Tool
from .tool_formats import Call, ToolFormat

_EXAMPLE = Call("NAME", '{"ARGUMENT": VALUE}')


def describe_tools(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], form: ToolFormat
) -> list[ChatMessage]:
    """Return messages, of which there is at least one, with a text about the tools and how to call them.

    The text is the last part of the first message, if that is the system's or developer's; otherwise it is a
    new system message before it.
    """
    text = _description(tools, form)
    first, *others = messages
    if first.role not in ("system", "developer"):
        return [ChatMessage("system", (text,), {"role": "system", "content": None}), *messages]
    return [replace(first, parts=(*first.parts, text)), *others]


def spell_calls(messages: Sequence[ChatMessage], form: ToolFormat) -> list[ChatMessage]:
    """Return messages without calls and results: calls become the last part of their message's text.

    Results that follow each other become one message of the user, with one part for each.
    """
    found: list[ChatMessage] = []
    for message in messages:
        if message.calls:
            found.append(_with_calls_spelled(message, form))
        elif message.role != "tool":
            found.append(message)
        elif found and found[-1].role == "tool":
            found[-1] = replace(found[-1], parts=(*found[-1].parts, *_result(message)))
        else:
            found.append(replace(message, parts=tuple(_result(message))))
    return [_as_user(message) if message.role == "tool" else message for message in found]


def _description(tools: Sequence[Tool], form: ToolFormat) -> str:
    functions = [tool.fields["function"] for tool in tools]
    return (
        "You can call functions to get information or to act. These are the functions:\n"
        f"<tools>{json.dumps(functions, ensure_ascii=False)}</tools>\n"
        "To call one or more of them, write only this, and the results will be sent to you:\n"
        f"{form.written([_EXAMPLE])}\n"
        "Use only these functions and their own arguments. If none of them helps, answer directly."
    )


def _with_calls_spelled(message: ChatMessage, form: ToolFormat) -> ChatMessage:
    text = form.written(Call(call.name, call.text) for call in message.calls)
    fields = {name: value for name, value in message.fields.items() if name != "tool_calls"}
    return replace(message, parts=(*message.parts, text), fields={**fields, "content": None}, calls=())


def _result(message: ChatMessage) -> Iterator[str]:
    yield f"<tool_response>\n{chr(10).join(message.parts)}\n</tool_response>"


def _as_user(message: ChatMessage) -> ChatMessage:
    return ChatMessage("user", message.parts, {"role": "user", "content": None})
