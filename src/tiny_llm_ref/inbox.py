"""Tasks for the engine's thread: functions that other threads post, run in order, each with a future.

Posting never waits and takes no lock, so finalizers and signal handlers may post too. No task is lost: it
runs, or its future raises once the inbox is closed.
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
    """A future that raises instead of waiting if the wait could never end."""

    def __init__(self, inbox: "Inbox") -> None:
        super().__init__()
        self._inbox = inbox

    def result(self, timeout: float | None = None) -> T:
        """Wait for the value, or raise what the task raised.

        If the task is not done, also raises the errors of `Inbox.refuse_to_wait`.
        """
        self._refuse_to_wait("result", timeout)
        try:
            return super().result(timeout)
        finally:
            del self  # breaks a reference cycle: self -> the error -> its traceback -> this frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Like `Future.exception`; if the task is not done, raises the errors of `Inbox.refuse_to_wait`."""
        self._refuse_to_wait("exception", timeout)
        return super().exception(timeout)

    def _refuse_to_wait(self, call: str, timeout: float | None) -> None:
        if not self.done() and timeout != 0:
            self._inbox.refuse_to_wait(f"{call}() on an unfinished future", "add_done_callback")


class Task(NamedTuple, Generic[T]):
    """A function to run in the engine's thread, and the future for its value or its error."""

    function: Callable[[], T]
    answer: Answer[T]


class Inbox:
    """A queue of tasks: any thread posts, one thread runs them.

    refusal: a function that makes the error for a task once the inbox is closed; None while it is open.
    """

    def __init__(self) -> None:
        self.refusal: Refusal | None = None
        self._tasks: SimpleQueue[Task[Any]] = SimpleQueue()
        self._process = os.getpid()
        self._runner: int | None = None  # the thread that runs the tasks

    def post(self, function: Callable[[], T]) -> Answer[T]:
        """Post a function; returns its future at once. In a forked process, the future raises."""
        task = Task(function, Answer[T](self))
        if (refusal := self.forked()) is not None:
            fail(task.answer, refusal)
            return task.answer
        self._tasks.put(cast(Task[Any], task))
        if self.refusal is not None:  # closed before or just now: close() may have missed this task
            self._refuse_all()
        return task.answer

    def run(self, *, wait: bool) -> None:
        """Run all posted tasks; with `wait`, first wait until there is one."""
        self._runner = get_ident()
        tasks = deque(self._take(wait=wait))
        while tasks:
            # No variable here may hold the task: the traceback of its error holds this frame.
            _run(tasks.popleft())

    def close(self, refusal: Refusal) -> None:
        """Fail every task that has not run, and every later one, with the error that `refusal` makes."""
        self.refusal = refusal
        self._refuse_all()

    def forked(self) -> ForkedProcessError | None:
        """The error for calls in a forked process; None in the process that made the inbox."""
        return forked_from(self._process)

    @property
    def is_mine(self) -> bool:
        """True in the thread that runs the tasks."""
        return get_ident() == self._runner

    def refuse_to_wait(self, call: str, instead: str) -> None:
        """Raise if a call would wait for this inbox forever, because nothing would run the tasks.

        call, instead: the call's name and its alternative, for the message. Raises `WrongThreadError` in the
        thread that runs the tasks, `ForkedProcessError` in a forked process.
        """
        if (refusal := self.forked()) is not None:
            raise refusal
        if self.is_mine and self.refusal is None:
            raise WrongThreadError(
                f"{call} in the engine's own thread would wait for itself: use {instead} in listeners, "
                "watchers, callbacks and functions for `call`, or use another thread"
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
    """Run a task, even if its future was cancelled."""
    try:
        value = task.function()
    except BaseException as error:  # for the caller, who gets it from the future
        fail(task.answer, error)
    else:
        resolve(task.answer, value)
    finally:
        del task


def resolve(future: Future[T], value: T) -> None:
    """Set a future's value, unless it was cancelled or is already set. Never raises."""
    with suppress(BaseException):  # from callbacks of the future, or because it is already set
        if future.set_running_or_notify_cancel():
            future.set_result(value)


def fail(future: Future[Any], error: BaseException) -> None:
    """Set a future's error, unless it was cancelled or is already set. Never raises."""
    with suppress(BaseException):  # as in `resolve`
        if future.set_running_or_notify_cancel():
            future.set_exception(error)


def draining_error() -> TinyLLMError:
    """The error for a request that arrives while the engine drains."""
    return EngineStoppingError("the engine is shutting down and accepts no more requests")


def stopped_error() -> TinyLLMError:
    """The error for all requests and tasks after the engine has been stopped."""
    return EngineStoppingError("the engine has been stopped")


def dead_error(error: BaseException) -> TinyLLMError:
    """The error for all requests and tasks once the engine's thread has ended with `error`."""
    made = EngineDeadError(f"the engine has died of {type(error).__name__}: {described(error)}")
    made.__cause__ = error
    return made
