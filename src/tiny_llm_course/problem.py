"""What a check of the course finds."""

from typing import NamedTuple

LAST_LINES = 15


class Problem(NamedTuple):
    """A rule that does not hold: which, where, and what was found."""

    rule: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.what}"


def last_lines(output: str) -> str:
    """The end of what a process printed, indented, for a problem's text."""
    return "\n".join(f"    {line}" for line in output.splitlines()[-LAST_LINES:])
