"""What is wrong with a field of a request, in the words of the other error messages."""

from collections.abc import Mapping
from typing import Any

# The validation's own names of errors, and what the field must be.
_RULES = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "string_type": "must be a string",
    "too_long": "must have at most {max_length} items",
    "too_short": "must not be empty",
}


def invalid(error: Mapping[str, Any]) -> str:
    """Describe one of pydantic's errors without the field's name; unknown types keep pydantic's message.

    >>> invalid({"type": "less_than_equal", "ctx": {"le": 2.0}, "msg": "Input should be less than ..."})
    'must be at most 2'
    >>> invalid({"type": "bytes_type", "msg": "Input should be a valid bytes"})
    'Input should be a valid bytes'
    """
    rule = _RULES.get(error["type"])
    if rule is None:
        return str(error["msg"])
    return rule.format_map({name: _plain(value) for name, value in error.get("ctx", {}).items()})


def _plain(value: Any) -> Any:
    """A whole number without its decimals: 2 for a limit of 2.0. Other values stay as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
