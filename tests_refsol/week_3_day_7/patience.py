"""Nothing may hang: what could wait runs in a thread of its own, which a test gives up after a while."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import tiny_llm.engine
from tiny_llm.errors import (
    EngineDeadError,
)

# A thread that does not end is a failure; the end of the run does not wait for it again.
tiny_llm.engine.EXIT_SECONDS = 0.2


# Nothing here may hang: whatever could wait runs in a thread that is given up.


class Patience:
    """How long anything may take. After one wait in vain the next ones are shorter."""

    seconds = 10.0

    def lose(self) -> None:
        """Something did not come."""
        self.seconds = 1.0


PATIENCE = Patience()


def background(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run a function in a thread of its own, which does not hold up the end of the run."""
    outcome: Future[Any] = Future()

    def work() -> None:
        outcome.set_running_or_notify_cancel()  # from now on it cannot be cancelled
        try:
            outcome.set_result(function(*args))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome


def value(outcome: "Future[Any]") -> Any:
    """The value of a future, or what it raises; a failure where it does not come."""
    try:
        return outcome.result(PATIENCE.seconds)
    except EngineDeadError as error:
        raise blank_or(error) from error.__cause__
    except TimeoutError:
        PATIENCE.lose()
        raise AssertionError("it did not end: somebody waits for what never comes") from None


def blank_or(error: BaseException) -> BaseException:
    """What the engine's thread has died of, where that is an exercise that is blank."""
    return error.__cause__ if isinstance(error.__cause__, NotImplementedError) else error


def within(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives, or raises; a failure where it hangs."""
    return value(background(function, *args))


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine gives, in an event loop of its own; a failure where it hangs."""

    async def guarded() -> Any:
        try:
            async with asyncio.timeout(0.8 * PATIENCE.seconds) as limit:
                return await main
        except TimeoutError:
            if not limit.expired():
                raise
            PATIENCE.lose()
            raise AssertionError("it did not end: a coroutine awaits what never comes") from None

    return within(asyncio.run, guarded())


def elsewhere(function: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
    """Something to await: a function that may wait, in a thread of its own."""
    return asyncio.wrap_future(background(function, *args))
