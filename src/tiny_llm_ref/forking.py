"""Checks for forked processes: threads do not survive a fork, neither the engine's nor MLX's.

A process that was forked from one with an engine gets an error at once. Otherwise it could wait forever: a
step may have been running during the fork, and the locks of that step are never released. A child of any
other process may create an engine.
"""

import os

import mlx.core as mx

from .errors import ForkedProcessError


class _Lineage:
    """The ids of the process that computes and of the last that made an engine; a fork inherits both."""

    def __init__(self) -> None:
        self.computing = os.getpid()  # the process in which MLX's default stream has its thread
        self.with_engine: int | None = None  # the last one that has made an engine


_LINEAGE = _Lineage()


def forked_from(process: int | None) -> ForkedProcessError | None:
    """Return the error for using, in this process, an object that another process made.

    process: the id of the process that made the object. Returns None if `process` is None or this process.
    """
    if process in (None, os.getpid()):
        return None
    return ForkedProcessError(
        "this process was forked from one that has an engine, and threads do not survive a fork: start "
        "the process with multiprocessing's 'spawn' or 'forkserver' method, or create the engine only in "
        "the child"
    )


def prepare_to_compute() -> None:
    """Let MLX compute in this process.

    Raises `ForkedProcessError` if this process was forked from one with an engine.
    """
    if (refusal := forked_from(_LINEAGE.with_engine)) is not None:
        raise refusal
    if _LINEAGE.computing != os.getpid():
        _LINEAGE.computing = os.getpid()
        mx.set_default_stream(mx.new_stream(mx.default_device()))  # the inherited stream has no thread


def note_engine() -> None:
    """Record that this process has an engine, so that processes forked from it cannot make one."""
    _LINEAGE.with_engine = os.getpid()
