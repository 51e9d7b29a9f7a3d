"""Results as lines of JSON."""

import json
from collections.abc import Mapping
from typing import Any


def json_line(value: Mapping[str, Any]) -> str:
    """A line of JSON, with characters as they are; with escapes if one cannot be written.

    >>> print(json_line({"a": "é"}), json_line({"a": "é\\ud800"}))
    {"a": "é"} {"a": "\\u00e9\\ud800"}
    """
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # a lone surrogate, such as in an id
        return json.dumps(value)
    return line
