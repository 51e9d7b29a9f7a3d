"""The named errors of the engine; errors about a model's files are in `tiny_llm_checkpoints.errors`.

Each message names the offending value and the limit. Errors in a request (its prompt, parameters, id or size)
are also `ValueError`s, so that a front end can catch all of them with `except ValueError`. A call that raises
has changed nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from threading import current_thread, main_thread

from tiny_llm_checkpoints.errors import PromptTooLongError, TinyLLMError


class OutOfBlocksError(TinyLLMError):
    """The pool has fewer free blocks than requested. Nothing was allocated."""


class StuckRequestError(OutOfBlocksError):
    """A request waits for pages that no other request will ever free."""

    def __init__(self, message: str, request_id: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class NotANumberError(TinyLLMError):
    """The model's logits contain NaNs, so no token can be chosen."""


class DoubleFreeError(TinyLLMError):
    """A block that is already free was freed or shared."""


class UnknownBlockError(TinyLLMError, ValueError):
    """A block id is outside the pool."""


class RequestTooLargeError(TinyLLMError, ValueError):
    """A request is too large to ever run; raised at admission. The message has its size and the limit.

    field: the parameter that is too large; None: the prompt, or prompt and output together.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class DuplicateRequestError(TinyLLMError, ValueError):
    """The request id belongs to a request that has not ended, or the request was submitted before."""


class QueueFullError(TinyLLMError):
    """The queue of waiting requests is full; the client may try again later.

    The message has the number of waiting requests and the limit.
    """


class RequestFailedError(TinyLLMError):
    """A whole request has failed through no fault of the caller; `__cause__` is the original error.

    Other requests continue. If only some completions of a request fail, these end with finish_reason "error",
    and this error is not raised.
    """

    def __init__(self, message: str, request_id: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class EngineStoppingError(TinyLLMError):
    """The engine takes no more requests, because it is draining, or has been stopped or closed."""


class WrongThreadError(TinyLLMError, RuntimeError):
    """A call that waits for the engine was made in the engine's own thread, and would wait forever."""


class ForkedProcessError(TinyLLMError, RuntimeError):
    """The engine was used in a forked process, in which its threads do not exist."""


class EngineDeadError(TinyLLMError):
    """The engine's thread has ended with an unexpected error; `__cause__` is that error."""


class SamplingParamsError(TinyLLMError, ValueError):
    """A sampling parameter is unknown or has a value out of range; the message names it and the range."""


class GrammarError(TinyLLMError):
    """A grammar cannot continue: it is too complex at this place, or no token may come next."""


class OutOfResourcesError(TinyLLMError, MemoryError):
    """The operating system has no more memory or threads; the message names the purpose and the limits."""


def is_integer(value: object) -> bool:
    """True for an int or another library's integer; False for a bool."""
    try:
        index(value)  # type: ignore[arg-type]
    except Exception:  # a TypeError, or an error in the value's own method
        return False
    return not isinstance(value, bool)


def ends_process(error: BaseException) -> bool:
    """True for Ctrl-C and `sys.exit` in the main thread, which are meant for the whole process."""
    return isinstance(error, (KeyboardInterrupt, SystemExit)) and current_thread() is main_thread()


def described(error: BaseException) -> str:
    """An error's message, or the name of its type if there is no message. Never raises."""
    try:
        return str(error) or type(error).__name__
    except BaseException:  # from its own __str__
        return type(error).__name__


@contextmanager
def prompt_length_errors() -> Iterator[None]:
    """Turn a `PromptTooLongError` in the `with` block into a `RequestTooLargeError`."""
    try:
        yield
    except PromptTooLongError as error:
        raise RequestTooLargeError(str(error)) from None
