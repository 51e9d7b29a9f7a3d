"""A pytest plugin: turns the garbage collector off while `ast.parse` runs.

Up to Python 3.11.7 and 3.12.1, `ast.parse` fails with "AST constructor recursion depth mismatch" if a second
parse runs during the first (CPython issue 106905). The garbage collector can cause that: when it destroys a
future with an unread error, the error is logged with a traceback, and Python parses the source to underline
the position. A failing day about threads leaves many such futures while pytest parses files to show failures.
"""

import ast
import gc
import threading
from collections.abc import Generator
from typing import Any

import pytest

_parse = ast.parse
_one_at_a_time = threading.RLock()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, object, object]:
    """Replace `ast.parse` during the run."""
    ast.parse = steady_parse
    try:
        return (yield)
    finally:
        ast.parse = _parse


def steady_parse(*arguments: Any, **options: Any) -> Any:
    """Run `ast.parse` without garbage collection or a second parse at the same time."""
    with _one_at_a_time:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return _parse(*arguments, **options)
        finally:
            if was_enabled:
                gc.enable()
