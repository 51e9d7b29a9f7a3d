"""What a forked process may do: threads do not survive a fork, neither the engine's nor MLX's.

A child of a process that had an engine is refused at once, where it would wait for ever: a step may have been
under way when it was forked, and held locks that nothing releases. A child of any other process may begin.
"""

import os

import mlx.core as mx

from .errors import ForkedProcessError


class _Lineage:
    """Facts about this process and those that it was forked from, by process id; one for the interpreter."""

    def __init__(self) -> None:
        self.computing = os.getpid()  # where MLX's default stream has its thread
        self.with_engine: int | None = None


_LINEAGE = _Lineage()


def forked_from(process: int | None) -> ForkedProcessError | None:
    """The error for what was made in a process, by its id, and is used here; None where that is this one."""
    if process in (None, os.getpid()):
        return None
    return ForkedProcessError(
        "this process was forked from one that has an engine, and threads do not survive a fork: start it "
        "with multiprocessing's 'spawn' or 'forkserver' method, or make the engine in the child only"
    )


def prepare_to_compute() -> None:
    """Let MLX compute in this process. Raises `ForkedProcessError` in a child of one that has an engine."""
    if (refusal := forked_from(_LINEAGE.with_engine)) is not None:
        raise refusal
    if _LINEAGE.computing != os.getpid():
        _LINEAGE.computing = os.getpid()
        mx.set_default_stream(mx.new_stream(mx.default_device()))  # the inherited one has no thread


def note_engine() -> None:
    """From now on this process has an engine, and children that are forked from it cannot have one."""
    _LINEAGE.with_engine = os.getpid()
