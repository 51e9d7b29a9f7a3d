"""What other threads ask of the engine's: errands in order, each with a future for its answer.

Posting never waits and takes no lock, so a finalizer or a signal handler may post as well. No errand is lost:
it runs, or is refused once the inbox is closed. Knows nothing of what the errands do.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar, cast

from .errors import EngineDeadError, EngineStoppingError, TinyLLMError

T = TypeVar("T")
Refusal = Callable[[], TinyLLMError]


class Errand(NamedTuple, Generic[T]):
    """A function to run in the engine's thread, and the future that gets its value, or what it raised."""

    function: Callable[[], T]
    answer: Future[T]


class Inbox:
    """Any thread posts, one runs. refusal: makes what errands are answered with; None: it is open."""

    def __init__(self) -> None:
        self.refusal: Refusal | None = None
        self._errands: SimpleQueue[Errand[Any]] = SimpleQueue()

    def post(self, function: Callable[[], T]) -> Future[T]:
        """Ask for a function to be run; the future of its answer."""
        errand = Errand(function, Future[T]())
        self._errands.put(cast(Errand[Any], errand))
        if self.refusal is not None:  # closed before, or just now: then both sides see to what is left
            self._refuse_all()
        return errand.answer

    def run(self, *, wait: bool) -> None:
        """Run all errands that have come; with `wait` at least one, however long it takes to come."""
        errands = deque(self._take(wait=wait))
        while errands:
            _run(errands.popleft())  # which no name here may hold: an error's frames hold this one

    def close(self, refusal: Refusal) -> None:
        """Refuse every errand that is here, and every later one."""
        self.refusal = refusal
        self._refuse_all()

    def _refuse_all(self) -> None:
        assert self.refusal is not None
        for errand in self._take(wait=False):
            fail(errand.answer, self.refusal())

    def _take(self, *, wait: bool) -> list[Errand[Any]]:
        taken: list[Errand[Any]] = []
        try:
            taken.append(self._errands.get(block=wait))
            while True:
                taken.append(self._errands.get_nowait())
        except Empty:
            return taken


def _run(errand: Errand[Any]) -> None:
    """Run an errand, even if nobody waits for its answer any more."""
    try:
        value = errand.function()
    except BaseException as error:  # whatever it is, it is the asker's
        fail(errand.answer, error)
    else:
        resolve(errand.answer, value)
    finally:
        del errand


def resolve(future: Future[T], value: T) -> None:
    """Give a future its value, unless whoever waited has cancelled it."""
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def fail(future: Future[Any], error: BaseException) -> None:
    """Let a future raise, unless whoever waited has cancelled it."""
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def draining() -> TinyLLMError:
    """What requests are refused with that come while the others end."""
    return EngineStoppingError("the engine is draining: it takes no more requests")


def stopped() -> TinyLLMError:
    """What everything is refused with after the end."""
    return EngineStoppingError("the engine has been stopped")


def dead(error: BaseException) -> TinyLLMError:
    """What everybody is told when the thread has ended with an error, now and later."""
    told = EngineDeadError(f"the engine has died of {type(error).__name__}: {error}")
    told.__cause__ = error
    return told
