"""Finds and replaces the directives of a chapter: `{{name arguments}}`, in prose or on a line of their own.

A directive stays as it is inside fenced code and code spans, so that a page can show one.
"""

import re
from collections.abc import Callable, Mapping

from .errors import BookError

Directive = Callable[[str], str]
"""Gets the text after the name, without outer spaces, and returns Markdown or HTML."""

_PARTS = re.compile(
    r"(?P<fence>^(?P<marks>`{3,})[^\n]*\n.*?^(?P=marks)[ \t]*$)"  # a fenced block
    r"|(?P<span>(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"  # a code span
    r"|\{\{(?P<name>\w*)(?P<arguments>[^{}]*)\}\}"  # its arguments may continue on the next line
    r"|(?P<open>\{\{)",
    re.MULTILINE | re.DOTALL,
)


def expand(text: str, directives: Mapping[str, Directive], chapter: str) -> str:
    """Replace every directive of a chapter.

    chapter: the file's name, for errors. Raises `BookError`, with the file and the line, for an unknown
    directive and for one that fails.
    """

    def replacement(found: re.Match[str]) -> str:
        name = found["name"]
        where = f"{chapter}:{text.count(chr(10), 0, found.start()) + 1}: {found[0]}"
        if found["open"]:
            raise BookError(f"{where} is never closed: a directive is {{{{name arguments}}}}")
        if name is None:
            return found[0]
        if name not in directives:
            raise BookError(f"{where}: unknown directive (known: {', '.join(sorted(directives))})")
        try:
            return directives[name](" ".join(found["arguments"].split()))
        except BookError as error:
            raise BookError(f"{where}: {error}") from error

    return _PARTS.sub(replacement, text)
