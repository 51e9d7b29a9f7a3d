"""Tasks from other threads for the engine's: functions, run in order, each with a future of its answer.

Posting never waits and takes no lock, so a finalizer or a signal handler may post as well. No task is lost:
it runs, or is refused once the inbox is closed. Knows nothing of what the tasks do.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import Any, Generic, NamedTuple, TypeVar, cast

from tiny_llm_checkpoints.errors import TinyLLMError

from .errors import EngineDeadError, EngineStoppingError, ForkedProcessError, WrongThreadError, described
from .forking import forked_from

T = TypeVar("T")
Refusal = Callable[[], TinyLLMError]


class Answer(Future[T]):
    """A future that refuses to be waited for where that would never end; elsewhere like any other."""

    def __init__(self, inbox: "Inbox") -> None:
        super().__init__()
        self._inbox = inbox

    def result(self, timeout: float | None = None) -> T:
        """Wait for the value, or raise what the task raised; may raise like `refuse_to_wait` before."""
        self._refuse_to_wait("result", timeout)
        try:
            return super().result(timeout)
        finally:
            del self  # which holds what is raised, which holds this frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As `Future.exception`. Raises what `Inbox.refuse_to_wait` raises while it is not done."""
        self._refuse_to_wait("exception", timeout)
        return super().exception(timeout)

    def _refuse_to_wait(self, call: str, timeout: float | None) -> None:
        if not self.done() and timeout != 0:
            self._inbox.refuse_to_wait(f"{call}() of an unfinished future", "add_done_callback")


class Task(NamedTuple, Generic[T]):
    """A function to run in the engine's thread, and the future that gets its value, or what it raised."""

    function: Callable[[], T]
    answer: Answer[T]


class Inbox:
    """Any thread posts, one runs. refusal: makes what tasks are answered with; None: it is open."""

    def __init__(self) -> None:
        self.refusal: Refusal | None = None
        self._tasks: SimpleQueue[Task[Any]] = SimpleQueue()
        self._process = os.getpid()
        self._runner: int | None = None  # the thread that runs the tasks

    def post(self, function: Callable[[], T]) -> Answer[T]:
        """Let the engine's thread run a function; returns a future at once. It fails in a forked process."""
        task = Task(function, Answer[T](self))
        if (refusal := self.forked()) is not None:
            fail(task.answer, refusal)
            return task.answer
        self._tasks.put(cast(Task[Any], task))
        if self.refusal is not None:  # closed before, or just now: then both sides see to what is left
            self._refuse_all()
        return task.answer

    def run(self, *, wait: bool) -> None:
        """Run all tasks that have come; with `wait`, first wait until there is one."""
        self._runner = get_ident()
        tasks = deque(self._take(wait=wait))
        while tasks:
            _run(tasks.popleft())  # which no name here may hold: an error's frames hold this one

    def close(self, refusal: Refusal) -> None:
        """Refuse every task that is here, and every later one."""
        self.refusal = refusal
        self._refuse_all()

    def forked(self) -> ForkedProcessError | None:
        """The error for whatever is asked in a forked process; None in the inbox's own."""
        return forked_from(self._process)

    @property
    def is_mine(self) -> bool:
        """True in the thread that runs the tasks."""
        return get_ident() == self._runner

    def refuse_to_wait(self, call: str, instead: str) -> None:
        """Refuse a call that waits for this inbox where nothing would ever run the tasks.

        Raises `WrongThreadError` in the thread that runs them, `ForkedProcessError` in a forked process.
        """
        if (refusal := self.forked()) is not None:
            raise refusal
        if self.is_mine and self.refusal is None:
            raise WrongThreadError(
                f"{call} in the engine's own thread would wait for itself: in listeners, watchers, callbacks "
                f"and functions for `call` use {instead}, or another thread"
            )

    def _refuse_all(self) -> None:
        assert self.refusal is not None
        for task in self._take(wait=False):
            fail(task.answer, self.refusal())

    def _take(self, *, wait: bool) -> list[Task[Any]]:
        taken: list[Task[Any]] = []
        try:
            taken.append(self._tasks.get(block=wait))
            while True:
                taken.append(self._tasks.get_nowait())
        except Empty:
            return taken


def _run(task: Task[Any]) -> None:
    """Run a task, even if its answer is not waited for any more."""
    try:
        value = task.function()
    except BaseException as error:  # whatever it is, it belongs to the caller
        fail(task.answer, error)
    else:
        resolve(task.answer, value)
    finally:
        del task


def resolve(future: Future[T], value: T) -> None:
    """Give a future its value, unless it was cancelled, or its owner has set it. Never raises."""
    with suppress(BaseException):  # what callbacks raise, and an owner that has set the future
        if future.set_running_or_notify_cancel():
            future.set_result(value)


def fail(future: Future[Any], error: BaseException) -> None:
    """Let a future raise, unless it was cancelled, or its owner has set it. Never raises."""
    with suppress(BaseException):  # as above
        if future.set_running_or_notify_cancel():
            future.set_exception(error)


def draining() -> TinyLLMError:
    """The error of requests that come while the engine drains."""
    return EngineStoppingError("the engine is draining: it takes no more requests")


def stopped() -> TinyLLMError:
    """The error of all requests and tasks after the engine has been stopped."""
    return EngineStoppingError("the engine has been stopped")


def dead(error: BaseException) -> TinyLLMError:
    """The error of all requests and tasks once the thread has ended with an error."""
    told = EngineDeadError(f"the engine has died of {type(error).__name__}: {described(error)}")
    told.__cause__ = error
    return told
