"""Standard input, which may be a terminal, a pipe, a file, or closed (Python then has None for it)."""

import sys


def stdin_is_terminal() -> bool:
    """Whether somebody can type there."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_stdin() -> str:
    """All of it; empty where it is closed."""
    return "" if sys.stdin is None else sys.stdin.read()
