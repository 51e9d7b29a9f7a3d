"""The result of a failed check of the course."""

from typing import NamedTuple

LAST_LINES = 15


class Problem(NamedTuple):
    """A broken rule: its name, the place, and what was found."""

    rule: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.what}"


def last_lines(output: str) -> str:
    """The last lines of a process's output, indented, for a problem's text."""
    return "\n".join(f"    {line}" for line in output.splitlines()[-LAST_LINES:])
