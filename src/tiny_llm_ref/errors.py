"""The named errors of the engine; those of a model's files are in `tiny_llm_checkpoints.errors`.

Each message names the offending value and the limit.
Errors that a caller can cause are also `ValueError`s, so that `except ValueError` at a front door
catches every refusal. Nothing past a raised error is half-done: what raised changed nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from threading import current_thread, main_thread

from tiny_llm_checkpoints.errors import PromptTooLongError, TinyLLMError


class OutOfBlocksError(TinyLLMError):
    """The pool has fewer free blocks than were asked for. Nothing was allocated."""


class StuckRequestError(OutOfBlocksError):
    """A request waits for pages that nobody is left to give back."""

    def __init__(self, message: str, request_id: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class NotANumberError(TinyLLMError):
    """The model gave logits that are not numbers: there is no next token."""


class DoubleFreeError(TinyLLMError):
    """A block was given back, or shared, that nobody holds."""


class UnknownBlockError(TinyLLMError, ValueError):
    """A block id lies outside the pool."""


class RequestTooLargeError(TinyLLMError, ValueError):
    """A request could never run, however long it waited: refused at admission, with the figures.

    field: the parameter that is too large; None: the prompt, alone or with its outputs.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class DuplicateRequestError(TinyLLMError, ValueError):
    """A request id is in use by a request that has not ended."""


class QueueFullError(TinyLLMError):
    """As many requests wait as may: refused at once, with the figures. Later there may be room."""


class RequestFailedError(TinyLLMError):
    """A request has failed as a whole, and not by its caller's fault; `__cause__` has the error.

    Other requests go on. Where only some completions of a request fail, they end with the reason "error".
    """

    def __init__(self, message: str, request_id: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class EngineStoppingError(TinyLLMError):
    """The engine takes no more requests: it drains, or has been stopped."""


class WrongThreadError(TinyLLMError, RuntimeError):
    """A call that waits for the engine was made in the engine's own thread, which would wait for itself."""


class ForkedProcessError(TinyLLMError, RuntimeError):
    """The engine is used in a process that was forked from its own: its threads do not exist there."""


class EngineDeadError(TinyLLMError):
    """The engine's thread has ended with an error that nobody foresaw; `__cause__` has it."""


class SamplingParamsError(TinyLLMError, ValueError):
    """A sampling parameter is unknown or has a value out of range; the message names it and the range."""


class OutOfResourcesError(TinyLLMError, MemoryError):
    """The operating system gives no more memory or threads; the message names the purpose and the limits."""


def is_whole(value: object) -> bool:
    """True for a whole number: an int, or another library's; True and False are none."""
    try:
        index(value)  # type: ignore[arg-type]
    except Exception:  # a TypeError, or whatever the value's own method raised
        return False
    return not isinstance(value, bool)


def ends_process(error: BaseException) -> bool:
    """True for Ctrl-C and `sys.exit`, which are meant for the process; in the main thread only."""
    return isinstance(error, (KeyboardInterrupt, SystemExit)) and current_thread() is main_thread()


def described(error: BaseException) -> str:
    """What an error says, or its type where it cannot say it. Never raises."""
    try:
        return str(error) or type(error).__name__
    except BaseException:  # whatever its own text raised
        return type(error).__name__


@contextmanager
def fitting() -> Iterator[None]:
    """A prompt that the tokenizer finds too long in this block is a request that is too large."""
    try:
        yield
    except PromptTooLongError as error:
        raise RequestTooLargeError(str(error)) from None
