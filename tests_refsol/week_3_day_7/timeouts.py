"""Time limits: calls that might block run in separate threads, which a test abandons after a while."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import tiny_llm.engine
from tiny_llm.errors import (
    EngineDeadError,
)

# A thread that does not end already failed a test; do not wait for it again at exit.
tiny_llm.engine.EXIT_SECONDS = 0.2


class WaitLimit:
    """The time limit of every wait. After one timeout the limit is shorter."""

    seconds = 10.0

    def shorten(self) -> None:
        """Shorten the limit after a timeout."""
        self.seconds = 1.0


WAIT_LIMIT = WaitLimit()


def background(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run a function in a daemon thread and return its future."""
    outcome: Future[Any] = Future()

    def work() -> None:
        outcome.set_running_or_notify_cancel()  # from now on it cannot be cancelled
        try:
            outcome.set_result(function(*args))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome


def value(outcome: "Future[Any]", missing: str) -> Any:
    """The value of a future, or its error; fails with the text `missing` on a timeout."""
    try:
        return outcome.result(WAIT_LIMIT.seconds)
    except EngineDeadError as error:
        raise unwrap_blank(error) from error.__cause__
    except TimeoutError:
        if outcome.done():  # a timeout of the function itself
            raise
        WAIT_LIMIT.shorten()
        raise AssertionError(missing) from None


def queued(outcome: "Future[Any]") -> Any:
    """The value of the future that `submit` returned."""
    return value(outcome, "the future that `submit` returned is never done: the requests are not queued")


def cancelled(outcome: "Future[Any]") -> Any:
    """The value of the future that `cancel` returned."""
    return value(outcome, "the future that `cancel` returned is never done: nothing is cancelled")


def unwrap_blank(error: BaseException) -> BaseException:
    """The cause of an error if that is a blank exercise, else the error itself."""
    return error.__cause__ if isinstance(error.__cause__, NotImplementedError) else error


def with_timeout(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a thread: return its value or raise its error; fails on a timeout."""
    name = getattr(function, "__qualname__", repr(function)).rpartition("<locals>.")[2]
    return value(background(function, *args), f"`{name}` does not return: it waits forever")


NO_EVENT = "an event of `generate` (was the request rejected? then the future of `submit` has the error)"
TOO_LONG = object()  # the value of a coroutine that was ended by the time limit


def run(main: Coroutine[Any, Any, Any], missing: str = NO_EVENT) -> Any:
    """Run a coroutine in a new event loop and return its value.

    Fails with the text `missing` on a timeout.
    """

    async def guarded() -> Any:
        try:
            async with asyncio.timeout(0.8 * WAIT_LIMIT.seconds) as limit:
                return await main
        except TimeoutError:
            if not limit.expired():
                raise
            return TOO_LONG

    blocked = "the event loop is blocked: a coroutine waits without `await`"
    found = value(background(asyncio.run, guarded()), blocked)
    if found is TOO_LONG:
        WAIT_LIMIT.shorten()
        raise AssertionError(f"a coroutine waits forever for {missing}")
    return found


def in_thread(function: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
    """Run a function that may block in a separate thread; returns an awaitable."""
    return asyncio.wrap_future(background(function, *args))
