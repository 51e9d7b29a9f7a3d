"""Validates and normalizes the messages of a conversation as clients send them.

This is the only module that defines what a message may contain, for `LLM.chat` and for HTTP. The first error
ends the check; it names the message and the field. Knows nothing of templates or tokens.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from .errors import TinyLLMError, shown

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
IGNORED = ("annotations", "cache_control", "prompt_cache_breakpoint")  # these do not change the prompt
IGNORED_IN_PARTS = (*IGNORED, "logprobs", "id", "index")  # the parts of an answer have these as well
UNSUPPORTED = {
    "tool_calls": "tool calls are not supported",
    "function_call": "function calls are not supported",
    "tools": "tool calls are not supported",
    "audio": "audio is not supported",
    "images": "images are not supported",
    "videos": "videos are not supported",
}
MAX_DEPTH = 20  # nesting of lists and objects in the fields that a template receives
MAX_VALUES = 10_000  # values nested in one of these fields; `content` has no such limit
MAX_FIELDS = 100  # per message
EXAMPLE = '; for example [{"role": "user", "content": "Hello"}]'
_MAY_BE_EMPTY = ("assistant", "tool")  # roles whose content may be null or missing


class MessageError(TinyLLMError, ValueError):
    """A message, or an argument of a template, is not usable. `field` locates it: "messages[2].role"."""

    def __init__(self, field: str, reason: str, *, unsupported: bool = False) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.unsupported = unsupported


@dataclass(frozen=True)
class ChatMessage:
    """One message.

    parts: the text parts of the content; empty if the content is null or missing.
    fields: all fields that a template receives, in the order in which they were sent. If the message has a
    content, `content` is None here and marks its place in that order.
    """

    role: str
    parts: tuple[str, ...]
    fields: Mapping[str, Any]

    def with_content(self, content: str | list[dict[str, str]]) -> dict[str, Any]:
        """The message as a mapping for a template, with this content."""
        return {**self.fields, "content": content}


def read_messages(messages: Any, *, roles: Collection[str] | None = None) -> list[ChatMessage]:
    """Check a conversation and return its messages.

    roles: the accepted roles; None accepts any non-empty string.

    Raises `MessageError` for the first problem.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise MessageError("messages", f"must be a list of messages, not {_kind(messages)}{EXAMPLE}")
    if not messages:
        raise MessageError("messages", "must contain at least one message")
    return [_read(message, f"messages[{place}]", roles) for place, message in enumerate(messages)]


def check_json(value: Any, field: str) -> Any:
    """Return `value` if it is plain JSON of bounded depth and size, with valid Unicode strings.

    Raises a `MessageError` that locates the first value that is not.
    """
    count = 1
    for item, place, depth in _walk(value, field):
        _check_value(item, place)
        count += len(item) if isinstance(item, (Mapping, list, tuple)) else 0
        if depth > MAX_DEPTH:
            raise MessageError(field, f"is nested more than {MAX_DEPTH} levels deep")
        if count > MAX_VALUES:
            raise MessageError(field, f"has more than {MAX_VALUES} values")
    return value


def _read(message: Any, field: str, roles: Collection[str] | None) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise MessageError(field, f"must be an object, not {_kind(message)}")
    role = _text(message.get("role"), f"{field}.role") if "role" in message else None
    if not role:
        raise MessageError(f"{field}.role", "is required")
    if roles is not None and role not in roles:
        raise MessageError(f"{field}.role", f"must be one of {', '.join(roles)}, not {role[:40]!r}")
    fields = dict(_fields(message, field))
    parts = _parts(message.get("content"), f"{field}.content")
    if not parts and role == "assistant" and isinstance(message.get("refusal"), str):
        parts = (message["refusal"],)  # the model's answer, in another field
    if not parts and role not in _MAY_BE_EMPTY:
        raise MessageError(f"{field}.content", f"a message with role {role[:40]!r} needs text")
    return ChatMessage(role, parts, fields)


def _fields(message: Mapping[Any, Any], field: str) -> Iterator[tuple[str, Any]]:
    """The fields that a template receives. Reasoning has two names; templates use either, so pass both."""
    if len(message) > MAX_FIELDS:
        raise MessageError(field, f"has {len(message)} fields, expected at most {MAX_FIELDS}")
    for key, value in message.items():
        if not isinstance(key, str):
            raise MessageError(field, f"a key must be a string, not {_kind(key)}")
        if key in UNSUPPORTED and not _is_empty(value):
            raise MessageError(f"{field}.{key}", UNSUPPORTED[key], unsupported=True)
        if key in UNSUPPORTED or key in IGNORED or (value is None and key != "content"):
            continue
        if key in ("name", "tool_call_id", "refusal", "reasoning", "reasoning_content"):
            _text(value, f"{field}.{key}")
        if key == "content":
            yield key, None
        else:
            yield key, check_json(value, f"{field}.{key[:40]}")
    for one, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
        if isinstance(message.get(one), str) and message.get(other) is None:
            yield other, message[one]


def _parts(content: Any, field: str) -> tuple[str, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (_text(content, field),)
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise MessageError(field, f"must be a string or a list of text parts, not {_kind(content)}")
    return tuple(_part(part, f"{field}[{place}]") for place, part in enumerate(content))


def _part(part: Any, field: str) -> str:
    """The text of a part: `{"type": "text", "text": ...}`, or a plain string."""
    if isinstance(part, str):
        return _text(part, field)
    if not isinstance(part, Mapping):
        raise MessageError(field, f"must be a text part, not {_kind(part)}")
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
        raise MessageError(field, f"must be a string, not {_kind(value)}")
    _check_value(value, field)
    return value


def _walk(value: Any, field: str) -> Iterator[tuple[Any, str, int]]:
    """Every value nested in `value`, itself included, with its location and depth."""
    left = [(value, field, 1)]
    while left:
        item, place, depth = left.pop()
        yield item, place, depth
        if isinstance(item, Mapping):
            for key, one in item.items():
                left += [(key, place, depth + 1), (one, f"{place}.{str(key)[:40]}", depth + 1)]
        elif isinstance(item, (list, tuple)):
            left += [(one, f"{place}[{index}]", depth + 1) for index, one in enumerate(item)]


def _check_value(value: Any, field: str) -> None:
    """Reject values that JSON cannot represent, and strings with lone surrogates."""
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            reason = f"not Unicode: a lone surrogate at character {error.start}"
            raise MessageError(field, reason) from None
    elif not isinstance(value, (Mapping, list, tuple, bool, int, float, type(None))):
        raise MessageError(field, f"must be plain JSON, not {_kind(value)}")
    elif isinstance(value, float) and not isfinite(value):
        raise MessageError(field, f"must be a finite number, not {json.dumps(value)}")


def _kind(value: Any) -> str:
    """The type of a value for an error message: "null" for None, otherwise Python's name."""
    return "null" if value is None else type(value).__name__
