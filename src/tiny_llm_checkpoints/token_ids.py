"""Reads fields of a JSON configuration that are one token id or several."""

from collections.abc import Mapping
from typing import Any

MAX_IDS = 1 << 16  # of one field; real files have up to a dozen


def token_ids(settings: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The ids in a field: one id, or a list of ids; () if it is missing. Raises ValueError for others."""
    value = settings.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > MAX_IDS or not all(type(token) is int and 0 <= token < 1 << 31 for token in ids):
        raise ValueError(f"{name} is {str(value)[:60]!r}, expected a token id or a list of them")
    return tuple(ids)
