"""A pytest plugin: Python source is parsed with the garbage collector held off.

Up to Python 3.11.7 and 3.12.1, `ast.parse` fails with "AST constructor recursion depth mismatch" when a
second parse runs in the middle of the first (CPython issue 106905). That happens when garbage is collected
meanwhile: a future that is destroyed with an unread error logs it with a traceback, which Python parses to
underline. A day about threads leaves many such futures when it fails, while pytest parses files to show the
failures.
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
    """For the whole of a run."""
    ast.parse = steady_parse
    try:
        return (yield)
    finally:
        ast.parse = _parse


def steady_parse(*arguments: Any, **options: Any) -> Any:
    """What `ast.parse` gives; nothing else runs in the meantime."""
    with _one_at_a_time:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return _parse(*arguments, **options)
        finally:
            if was_enabled:
                gc.enable()
