"""What the operating system refuses: memory and threads. Its errors become one that says what they were for.

The allocator of MLX, C++ and Python each raise an error of their own where memory or threads run out
(`MemoryError`, a RuntimeError, an OSError), and none names the limit. Knows nothing of what is allocated.
"""

import ctypes
import errno
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from .errors import OutOfResourcesError

_NO_MEMORY = ("[malloc]", "Unable to allocate", "std::bad_alloc", "Cannot allocate memory")
_NO_THREAD = ("Resource temporarily unavailable", "can't start new thread", "can't allocate lock")


@contextmanager
def needing(what: str, nbytes: int | None = None) -> Iterator[None]:
    """Raise `OutOfResourcesError` where the block runs out of memory or threads; `what` says what needs them.

    nbytes: how many bytes it takes, where that is known: where the limit leaves less, the block is not begun.
    Libraries in C++ and Rust end the process where a small allocation fails.
    """
    needs = "" if nbytes is None else f": needs {_megabytes(nbytes)}"
    if (nbytes or 0) > _bytes_left():
        raise OutOfResourcesError(f"not enough memory for {what}{needs} ({limits()})")
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        missing = missing_resource(error)
        if missing is None:
            raise
        raise OutOfResourcesError(f"not enough {missing} for {what}{needs} ({limits()})") from error


def missing_resource(error: BaseException) -> str | None:
    """What an error says that the system did not give, in words; None for an error about something else."""
    message = str(error)
    if isinstance(error, MemoryError) or any(part in message for part in _NO_MEMORY):
        return "memory"
    if any(part in message for part in _NO_THREAD):  # a thread takes memory too: either may be what is short
        return "threads or memory"
    return "memory" if isinstance(error, OSError) and error.errno == errno.ENOMEM else None


def return_free_memory() -> None:
    """Give freed memory back to the operating system: MLX's buffers, and the heap of glibc where it is in use.

    Both keep freed memory for reuse: after a model is freed, hundreds of megabytes.
    """
    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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


def _bytes_left() -> float:
    """Bytes that the limit on memory leaves; infinite without a limit, and where the use is not known."""
    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not pages.exists():
        return math.inf
    return limit - int(pages.read_text().split()[0]) * resource.getpagesize()


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
