"""Unknown fields of requests: the error for one, or, if the operator wants, a warning in the log."""

import logging
from collections.abc import Iterable

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from tiny_llm_checkpoints.suggestions import did_you_mean

UNKNOWN = "unknown_field"  # the type of the error
MAX_LOGGED = 100  # names, because clients choose them
LONGEST_LOGGED = 60  # characters of a name
INSTEAD = {  # older names, and names of other servers, for what the server supports
    "functions": "tools",
    "function_call": "tool_choice",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_whitespace_pattern": "structured_outputs.whitespace_pattern",
    "json_schema": "response_format",
    "grammar": "structured_outputs.grammar",
    "regex": "structured_outputs.regex",
}
LOG = logging.getLogger("uvicorn.error")


class IgnoredFields:
    """Logs the name of each unknown field that the server ignores, once, and at most 100 names."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def log(self, names: Iterable[str]) -> None:
        """Log the names that have not been logged before."""
        for name in names:
            if len(self._logged) == MAX_LOGGED:
                return
            shown = repr(name[:LONGEST_LOGGED])
            if shown not in self._logged:
                self._logged.add(shown)
                LOG.warning("Ignored the unknown field %s of a request; this is logged once per name", shown)


def unknown_field(name: str, model: str, known: Iterable[str]) -> ValidationError:
    """The error for an unknown field, which suggests another one. known: all fields. model: for the title."""
    hint = f"; use {INSTEAD[name]}" if name in INSTEAD else did_you_mean(name, known)
    error = PydanticCustomError(UNKNOWN, "is not supported{hint}", {"hint": hint})
    return ValidationError.from_exception_data(model, [InitErrorDetails(type=error, loc=(name,), input=None)])
