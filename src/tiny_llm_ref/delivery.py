"""From the engine's thread to whoever listens: what a step has for each of them, handed over at once.

A listener is called in the engine's thread, so it puts what it gets somewhere and returns. Nobody waits for a
slow reader: what it has not read yet lies in its own queue, and is never more than its requests' output.
"""

import asyncio
from collections.abc import Callable

from .errors import TinyLLMError
from .outputs import RequestEvent

Item = RequestEvent | TinyLLMError  # an error is the last that a request gives
Listener = Callable[[list[Item]], None]


class Outbox:
    """What is ready to be delivered, by listener."""

    def __init__(self) -> None:
        self._items: dict[Listener, list[Item]] = {}

    def add(self, listener: Listener, *items: Item) -> None:
        """Keep items for a listener."""
        if items:
            self._items.setdefault(listener, []).extend(items)

    def deliver(self) -> list[Listener]:
        """Call each listener once, with all that there is for it; returns those that raised."""
        items, self._items = self._items, {}
        return [listener for listener, of_listener in items.items() if not _reached(listener, of_listener)]


class AsyncListener:
    """Takes items in the engine's thread; gives them to a coroutine of the event loop that it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[list[Item]] = asyncio.Queue()

    def __call__(self, items: list[Item]) -> None:
        """Wake the event loop, once. RuntimeError where it is closed."""
        self._loop.call_soon_threadsafe(self._items.put_nowait, items)

    async def next(self) -> list[RequestEvent]:
        """The events of the next step that has some; raises the error where one came."""
        return events_of(await self._items.get())


def events_of(items: list[Item]) -> list[RequestEvent]:
    """The items where all are events; raises the first error where there is one."""
    failed = next((place for place, item in enumerate(items) if isinstance(item, TinyLLMError)), None)
    if failed is not None:
        raise items.pop(failed)  # type: ignore[misc]  # no name here may hold it: it holds this frame
    return items  # type: ignore[return-value]


def _reached(listener: Listener, items: list[Item]) -> bool:
    try:
        listener(items)
    except Exception:  # a listener's fault is no reason to stop serving others
        return False
    return True
