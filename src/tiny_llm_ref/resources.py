"""Turns the various errors for a lack of memory or threads into one that names the purpose and the limits.

MLX's allocator, C++ and Python raise different errors if memory or threads run out (`MemoryError`,
RuntimeError, OSError), and none of these errors names the limit.
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
def requiring(what: str, nbytes: int | None = None) -> Iterator[None]:
    """Raise `OutOfResourcesError` if the `with` block runs out of memory or threads.

    what: the name of what needs them, for the message. nbytes: the bytes that the block needs, if that is
    known; if the process's limit leaves fewer, the error is raised before the block runs, because libraries
    in C++ and Rust abort the process when a small allocation fails.
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
    """The resource that an error is about, "memory" or "threads or memory"; None for any other error."""
    message = str(error)
    if isinstance(error, MemoryError) or any(part in message for part in _NO_MEMORY):
        return "memory"
    if any(part in message for part in _NO_THREAD):  # a thread needs memory too: either may have run out
        return "threads or memory"
    return "memory" if isinstance(error, OSError) and error.errno == errno.ENOMEM else None


def return_free_memory() -> None:
    """Give freed memory back to the operating system: MLX's buffers, and glibc's heap if glibc is in use.

    Both keep freed memory for reuse; after a model is freed, that is hundreds of megabytes.
    """
    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def limits() -> str:
    """The limits of this process and their sources, such as "ulimit -v", as a text."""
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
    """Bytes left under the process's memory limit; infinite without a limit or if the usage is unknown."""
    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not pages.exists():
        return math.inf
    return limit - int(pages.read_text().split()[0]) * resource.getpagesize()


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
