"""Validates and normalizes the messages of a conversation as clients send them.

This is the only module that defines what a message may contain, for `LLM.chat` and for HTTP. The first error
ends the check; it names the message and the field. Knows nothing of templates or tokens.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chat_tool_calls import ToolCall, read_tool_calls
from .errors import shown
from .plain_json import MessageError, check_json, check_value, kind_of, size_of

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
IGNORED = ("annotations", "cache_control", "prompt_cache_breakpoint")  # these do not change the prompt
IGNORED_IN_PARTS = (*IGNORED, "logprobs", "id", "index")  # the parts of an answer have these as well
UNSUPPORTED = {
    "function_call": "is not supported; use tool_calls",
    "tools": "a message cannot have tools; send them beside the messages",
    "audio": "audio is not supported",
    "images": "images are not supported",
    "videos": "videos are not supported",
}
MAX_FIELDS = 100  # per message
MAX_CALL_CHARS = 1_000_000  # in the arguments of all calls of a conversation, roughly
EXAMPLE = '; for example [{"role": "user", "content": "Hello"}]'
_MAY_BE_EMPTY = ("assistant", "tool")  # roles whose content may be null or missing


@dataclass(frozen=True)
class ChatMessage:
    """One message.

    parts: the text parts of the content; empty if the content is null or missing.
    calls: the calls of tools; empty if the message has none. fields: all fields that a template receives, in
    the order in which they were sent. If the message has a content or calls, `content` and `tool_calls` are
    None here and mark their places in that order.
    """

    role: str
    parts: tuple[str, ...]
    fields: Mapping[str, Any]
    calls: tuple[ToolCall, ...] = ()


def read_messages(messages: Any, *, roles: Collection[str] | None = None) -> list[ChatMessage]:
    """Check a conversation and return its messages.

    roles: the accepted roles; None accepts any non-empty string.

    Raises `MessageError` for the first problem.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise MessageError("messages", f"must be a list of messages, not {kind_of(messages)}{EXAMPLE}")
    if not messages:
        raise MessageError("messages", "must contain at least one message")
    found, left = [], MAX_CALL_CHARS
    for place, message in enumerate(messages):
        found.append(_read(message, f"messages[{place}]", roles))
        left -= sum(size_of(call.arguments) for call in found[-1].calls)
        if left < 0:
            reason = f"the calls up to here have more than {MAX_CALL_CHARS} characters together"
            raise MessageError(f"messages[{place}].tool_calls", reason)
    return found


def _read(message: Any, field: str, roles: Collection[str] | None) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise MessageError(field, f"must be an object, not {kind_of(message)}")
    role = _text(message.get("role"), f"{field}.role") if "role" in message else None
    if not role:
        raise MessageError(f"{field}.role", "is required")
    if roles is not None and role not in roles:
        raise MessageError(f"{field}.role", f"must be one of {', '.join(roles)}, not {role[:40]!r}")
    fields = dict(_fields(message, field))
    calls = _calls(message, role, field)
    parts = _parts(message.get("content"), f"{field}.content")
    if not parts and role == "assistant" and isinstance(message.get("refusal"), str):
        parts = (message["refusal"],)  # the model's answer, in another field
    if not parts and role not in _MAY_BE_EMPTY:
        raise MessageError(f"{field}.content", f"a message with role {role[:40]!r} needs text")
    return ChatMessage(role, parts, fields, calls)


def _fields(message: Mapping[Any, Any], field: str) -> Iterator[tuple[str, Any]]:
    """The fields that a template receives. Reasoning has two names; templates use either, so pass both."""
    if len(message) > MAX_FIELDS:
        raise MessageError(field, f"has {len(message)} fields, expected at most {MAX_FIELDS}")
    for key, value in message.items():
        if not isinstance(key, str):
            raise MessageError(field, f"a key must be a string, not {kind_of(key)}")
        if key in UNSUPPORTED and not _is_empty(value):
            raise MessageError(f"{field}.{key}", UNSUPPORTED[key], unsupported=True)
        if key in UNSUPPORTED or key in IGNORED or (value is None and key != "content"):
            continue
        if key == "tool_calls" and _is_empty(value):
            continue
        if key in ("name", "tool_call_id", "refusal", "reasoning", "reasoning_content"):
            _text(value, f"{field}.{key}")
        if key in ("content", "tool_calls"):
            yield key, None
        else:
            yield key, check_json(value, f"{field}.{key[:40]}")
    for one, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
        if isinstance(message.get(one), str) and message.get(other) is None:
            yield other, message[one]


def _calls(message: Mapping[str, Any], role: str, field: str) -> tuple[ToolCall, ...]:
    calls = message.get("tool_calls")
    if _is_empty(calls):
        return ()
    if role != "assistant":
        raise MessageError(f"{field}.tool_calls", f"a message with role {role[:40]!r} cannot have calls")
    return read_tool_calls(calls, f"{field}.tool_calls")


def _parts(content: Any, field: str) -> tuple[str, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (_text(content, field),)
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise MessageError(field, f"must be a string or a list of text parts, not {kind_of(content)}")
    return tuple(_part(part, f"{field}[{place}]") for place, part in enumerate(content))


def _part(part: Any, field: str) -> str:
    """The text of a part: `{"type": "text", "text": ...}`, or a plain string."""
    if isinstance(part, str):
        return _text(part, field)
    if not isinstance(part, Mapping):
        raise MessageError(field, f"must be a text part, not {kind_of(part)}")
    kind = part.get("type")
    if kind is None:
        raise MessageError(f"{field}.type", "is required")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        known = ", ".join(TEXT_PARTS)
        raise MessageError(
            f"{field}.type", f"{shown(kind)} is not supported: text only ({known})", unsupported=True
        )
    for key, value in part.items():
        if value is not None and key not in ("type", TEXT_PARTS[kind], *IGNORED_IN_PARTS):
            raise MessageError(f"{field}.{str(key)[:40]}", "is not supported", unsupported=True)
    return _text(part.get(TEXT_PARTS[kind]), f"{field}.{TEXT_PARTS[kind]}")


def _is_empty(value: Any) -> bool:
    """True for null and for an empty string, list or object."""
    return value is None or (isinstance(value, (str, Mapping, list, tuple)) and not value)


def _text(value: Any, field: str) -> str:
    if value is None:
        raise MessageError(field, "is required")
    if not isinstance(value, str):
        raise MessageError(field, f"must be a string, not {kind_of(value)}")
    check_value(value, field)
    return value
