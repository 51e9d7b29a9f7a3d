"""Conversations in files: a JSON object whose "messages" are those of a chat completion request."""

import json
import os
from pathlib import Path

_ROLES = ("system", "user", "assistant")


def write_messages(path: Path, model_name: str, messages: list[dict[str, str]]) -> None:
    """Write a conversation as JSON, in one step: a failure leaves an earlier file as it was.

    Raises OSError if the file cannot be written.
    """
    text = json.dumps({"model": model_name, "messages": messages}, ensure_ascii=False, indent=2)
    content = (text + "\n").encode()
    if path.exists() and not path.is_file():  # a pipe or a device cannot be replaced
        path.write_bytes(content)
        return
    target = path.resolve()  # a link stays a link
    other = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        other.write_bytes(content)
        os.replace(other, target)
    finally:
        other.unlink(missing_ok=True)


def read_messages(path: Path) -> list[dict[str, str]]:
    """Read the messages of a saved conversation, or of a JSON list of messages.

    Raises OSError if the file cannot be read, and ValueError if it is not JSON, or if a message does
    not have the role system, user or assistant and a string as its content.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a number with thousands of digits raises ValueError
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list):
        raise ValueError(f'{path} has no list of "messages"')
    return [_message(f"{path}: messages[{index}]", message) for index, message in enumerate(messages)]


def _message(name: str, found: object) -> dict[str, str]:
    role, content = (found.get("role"), found.get("content")) if isinstance(found, dict) else (None, None)
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(f'{name} needs a "role" ({", ".join(_ROLES)}) and a "content" that is a string')
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise ValueError(f"{name} has half of a character (a lone surrogate)")
    return {"role": role, "content": content}
