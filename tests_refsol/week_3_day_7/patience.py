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


def value(outcome: "Future[Any]", missing: str) -> Any:
    """The value of a future, or what it raises; a failure with the text `missing` where it does not come."""
    try:
        return outcome.result(PATIENCE.seconds)
    except EngineDeadError as error:
        raise blank_or(error) from error.__cause__
    except TimeoutError:
        PATIENCE.lose()
        raise AssertionError(missing) from None


def queued(outcome: "Future[Any]") -> Any:
    """The value of the future that `submit` has returned."""
    return value(outcome, "the future that `submit` returned is not done: the requests are never queued")


def cancelled(outcome: "Future[Any]") -> Any:
    """The value of the future that `cancel` has returned."""
    return value(outcome, "the future that `cancel` returned is not done: nothing is ever cancelled")


def blank_or(error: BaseException) -> BaseException:
    """What the engine's thread has died of, where that is an exercise that is blank."""
    return error.__cause__ if isinstance(error.__cause__, NotImplementedError) else error


def within(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives, or raises; a failure where it hangs."""
    name = getattr(function, "__qualname__", repr(function)).rpartition("<locals>.")[2]
    return value(background(function, *args), f"`{name}` does not return: it waits for what never comes")


def run(main: Coroutine[Any, Any, Any], missing: str = "an event of `generate`") -> Any:
    """What a coroutine gives, in an event loop of its own; a failure where `missing` never comes."""

    async def guarded() -> Any:
        try:
            async with asyncio.timeout(0.8 * PATIENCE.seconds) as limit:
                return await main
        except TimeoutError:
            if not limit.expired():
                raise
            PATIENCE.lose()
            raise AssertionError(f"a coroutine still awaits {missing}, which never comes") from None

    stands = "the event loop stands still: a coroutine waits in it without `await`"
    return value(background(asyncio.run, guarded()), stands)


def elsewhere(function: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
    """Something to await: a function that may wait, in a thread of its own."""
    return asyncio.wrap_future(background(function, *args))
