"""Finds files of the learner's that do not compile, before a suite imports them.

Otherwise pytest would show its own import frames above the line. `ast.parse` is not enough: it accepts a
`break` outside of a loop.
"""

import re
import warnings
from pathlib import Path

_HEADER = re.compile(r"^(|    )(?:async )?(def|class) (\w+)", re.MULTILINE)
_OUTSIDE = re.compile(r"(?!async |def |class |@)\S")  # how a line at the top level begins


def syntax_error(file: Path) -> SyntaxError | None:
    """The error that Python raises when it compiles a file; None if the file compiles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import shows them
        try:
            compile(file.read_text(encoding="utf-8"), file, "exec", dont_inherit=True)
        except SyntaxError as error:
            return error
    return None


def function_at(source: str, error: SyntaxError) -> str:
    """The function that contains a syntax error, as `function` or `Class.method`; empty outside of all.

    It is the last function that begins before the error's position. Headers are searched as text, because
    the source does not parse.
    """
    lines = source.split("\n")
    at = (error.lineno or 1) - 1
    line = lines[at] if at < len(lines) else ""
    if _OUTSIDE.match(line):
        return ""
    owner = name = ""
    for header in _HEADER.finditer("\n".join([*lines[:at], line[: (error.offset or 1) - 1]])):
        column, kind, called = header.groups()
        if not column:
            owner, name = (called, "") if kind == "class" else ("", called)
        elif owner and kind == "def":
            name = f"{owner}.{called}"
    return name
