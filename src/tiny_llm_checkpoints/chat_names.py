"""The names of functions that a model may call."""

import re
from typing import Any

from .plain_json import MessageError, kind_of

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def read_name(name: Any, field: str) -> str:
    """Check the name of a function, by OpenAI's rule. Raises `MessageError`."""
    if name is None:
        raise MessageError(field, "is required")
    if not isinstance(name, str):
        raise MessageError(field, f"must be a string, not {kind_of(name)}")
    if not NAME.fullmatch(name):
        rule = "must have 1 to 64 letters, digits, underscores and dashes"
        raise MessageError(field, f"{rule}, not {name[:80]!r}")
    return name
