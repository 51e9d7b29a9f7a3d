"""A line on the terminal that says what a command waits for."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

PATIENCE = 1.0  # seconds


@contextmanager
def loading_notice() -> Iterator[None]:
    """Print one line on standard error, if that is a terminal, when this block takes more than a second.

    The first run after an installation takes longest: Python compiles the modules, and the system reads the
    libraries and the model from disk.
    """
    if not sys.stderr.isatty():
        yield
        return
    timer = Timer(PATIENCE, print, ["Loading the model ..."], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
