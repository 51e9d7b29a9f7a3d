"""Chooses between a readable reference function and a fast function that replaces it.

On MLX's CPU device the fast functions are the compiled kernels of `tiny_llm_kernels`. On other devices, or
without these kernels, they are MLX's own fused operators, if MLX has one. A fast function replaces only a
*reference* function: a learner's function in the overlay always runs. The readable function (the fast one's
readable twin) is available as `function.__wrapped__`, for tests and for devices without a kernel.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import mlx.core as mx

P = ParamSpec("P")
T = TypeVar("T")

REFERENCE_FOLDER = Path(__file__).parent
_twins_only: ContextVar[bool] = ContextVar("twins_only", default=False)


class KernelInfo(NamedTuple):
    """Whether the compiled kernels run here, and how; `why_unavailable` is None if they do."""

    available: bool
    instruction_set: str | None
    num_threads: int | None
    why_unavailable: str | None


def kernel_info() -> KernelInfo:
    """Return whether the compiled kernels run here, and how. Does not warn if they do not."""
    if mx.default_device() != mx.Device(mx.cpu):
        return KernelInfo(False, None, None, f"they run on the CPU; MLX's device is {mx.default_device()}")
    import tiny_llm_kernels

    if not tiny_llm_kernels.available():
        return KernelInfo(False, None, None, tiny_llm_kernels.why_unavailable())
    return KernelInfo(True, tiny_llm_kernels.instruction_set(), tiny_llm_kernels.num_threads(), None)


@cache
def compiled_available() -> bool:
    """True if the compiled kernels can run: they are built, and MLX's default device is the CPU.

    The first call that returns False on a CPU warns how much slower MLX's own operators are.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return False
    import tiny_llm_kernels

    if tiny_llm_kernels.available():
        return True
    if os.environ.get("TINY_LLM_KERNELS") != "off":
        warnings.warn(
            f"no compiled kernels ({tiny_llm_kernels.why_unavailable()}): running on MLX's own operators, "
            "about 20 times slower in decoding and 50 times slower in prefill; install a C++ compiler and "
            "run the install again",
            RuntimeWarning,
            stacklevel=2,
        )
    return False


def use_compiled() -> bool:
    """True if compiled kernels run now: they are available, and this is not inside `twins()`."""
    return not _twins_only.get() and compiled_available()


def is_reference(function: Callable[..., object]) -> bool:
    """True if `function` is the reference's, so that a fast one may replace it."""
    return hasattr(function, "__wrapped__")


@contextmanager
def twins() -> Iterator[None]:
    """Run the readable functions in this `with` block, even if fast ones are available."""
    token = _twins_only.set(True)
    try:
        yield
    finally:
        _twins_only.reset(token)


@cache
def compiled_kernel(name: str) -> Callable[..., Any]:
    """Return the compiled function of that name; call it only if `use_compiled()` is True."""
    import tiny_llm_kernels

    return getattr(tiny_llm_kernels, name)  # type: ignore[no-any-return]


def accelerated(
    *,
    compiled: str | Callable[..., Any] | None = None,
    fused: Callable[..., Any] | None = None,
    takes: Callable[..., bool] | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Replace the decorated reference function by a fast function with the same signature.

    compiled: a compiled kernel by name, or a function that calls one. It runs if compiled kernels are
    available and `takes` accepts the arguments; with `takes` None, the first argument must be float32.
    fused: MLX's own operator; it runs if `compiled` does not.
    """
    accepts = takes or _is_float32

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        if Path(inspect.getfile(function)).parent != REFERENCE_FOLDER:
            return function

        @wraps(function)
        def dispatch(*args: P.args, **kwargs: P.kwargs) -> T:
            if not _twins_only.get():
                if compiled is not None and compiled_available() and accepts(*args, **kwargs):
                    fast = compiled_kernel(compiled) if isinstance(compiled, str) else compiled
                    return fast(*args, **kwargs)  # type: ignore[no-any-return]
                if fused is not None:
                    return fused(*args, **kwargs)  # type: ignore[no-any-return]
            return function(*args, **kwargs)

        return dispatch

    return decorate


def _is_float32(x: object, *_: object, **__: object) -> bool:
    return isinstance(x, mx.array) and x.dtype == mx.float32
