"""What the operating system refuses: memory and threads. Its errors become one that says what they were for.

The allocator of MLX, C++ and Python each raise an error of their own where memory or threads run out
(`MemoryError`, a RuntimeError, an OSError), and none names the limit. Knows nothing of what is allocated.
"""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import OutOfResourcesError

_NO_MEMORY = ("[malloc]", "Unable to allocate", "std::bad_alloc", "Cannot allocate memory")
_NO_THREAD = ("Resource temporarily unavailable", "can't start new thread", "can't allocate lock")


@contextmanager
def needing(what: str, nbytes: int | None = None) -> Iterator[None]:
    """Raise `OutOfResourcesError` where the block runs out of memory or threads; `what` says what needs them.

    nbytes: how many bytes it takes, where that is known.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        missing = missing_resource(error)
        if missing is None:
            raise
        size = "" if nbytes is None else f": needs {_megabytes(nbytes)}"
        raise OutOfResourcesError(f"not enough {missing} for {what}{size} ({limits()})") from error


def missing_resource(error: BaseException) -> str | None:
    """What an error says that the system did not give, in words; None for an error about something else."""
    message = str(error)
    if isinstance(error, MemoryError) or any(part in message for part in _NO_MEMORY):
        return "memory"
    if any(part in message for part in _NO_THREAD):  # a thread takes memory too: either may be what is short
        return "threads or memory"
    return "memory" if isinstance(error, OSError) and error.errno == errno.ENOMEM else None


def limits() -> str:
    """The limits of this process, and where they come from."""
    memory, processes = (
        resource.getrlimit(resource.RLIMIT_AS)[0],
        resource.getrlimit(resource.RLIMIT_NPROC)[0],
    )
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [f"machine {_megabytes(machine)}"]
    if memory != resource.RLIM_INFINITY:
        found.append(f"limit {_megabytes(memory)}, ulimit -v")
    if processes != resource.RLIM_INFINITY:
        found.append(f"limit {processes} threads, ulimit -u")
    return "; ".join(found)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
