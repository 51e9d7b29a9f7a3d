"""From the engine's thread to its listeners: callbacks that get a list of what an iteration has for them.

A listener is called in the engine's thread, so it stores what it gets and returns. The engine never waits for
a slow client: what that has not read yet lies in its own queue, and is never more than its requests' output.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from tiny_llm_checkpoints.errors import TinyLLMError

from .errors import RequestFailedError
from .outputs import RequestEvent

Item = RequestEvent | TinyLLMError  # an error is the last that a request gives
Listener = Callable[[list[Item]], None]


class Outbox:
    """Events and errors that are not delivered yet, by listener: by the object, whatever it is equal to."""

    def __init__(self) -> None:
        self._items: dict[int, tuple[Listener, list[Item]]] = {}

    def add(self, listener: Listener, *items: Item) -> None:
        """Keep events, or errors, for a listener until they are delivered."""
        if items:
            self._items.setdefault(id(listener), (listener, []))[1].extend(items)

    def deliver(self) -> list[Listener]:
        """Call each listener once, with the list of all that is kept for it; returns those that raised."""
        items, self._items = self._items, {}
        return [listener for listener, of_listener in items.values() if not _reached(listener, of_listener)]


class AsyncListener:
    """A listener for coroutines: brings what it gets into the event loop in which it was made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[list[Item]] = asyncio.Queue()

    def __call__(self, items: list[Item]) -> None:
        """Take a list in the engine's thread, and wake the event loop. RuntimeError where that is closed."""
        self._loop.call_soon_threadsafe(self._items.put_nowait, items)

    async def next(self) -> list[RequestEvent]:
        """Wait for the next list of events; raises the error where one came instead."""
        return events_of(await self._items.get())

    async def next_items(self) -> list[Item]:
        """Wait for the next list, errors included."""
        return await self._items.get()


class Served(Protocol):
    """A request as those who wait for it see it."""

    @property
    def request_id(self) -> str:
        """What its items are known by."""

    @property
    def has_failed(self) -> bool:
        """True where nothing of it has come to its own end."""

    def fail(self, error: BaseException) -> list[RequestEvent]:
        """End what has not ended with an error; the last events."""


class Gathering:
    """The events of several requests that are waited for together: one that fails does not end the others.

    unfinished: by id, the requests that have not ended.
    """

    def __init__(self, requests: Iterable[Served]) -> None:
        self.unfinished = {request.request_id: request for request in requests}
        self._num_left_to_fail = len(self.unfinished)
        self._error: TinyLLMError | None = None

    def take(self, items: list[Item]) -> list[RequestEvent]:
        """The events of one delivery; a failed request gives its last ones, with the reason "error"."""
        events: list[RequestEvent] = []
        for item in items:
            if isinstance(item, RequestEvent):
                events.append(item)
                if item.usage is not None:
                    self.unfinished.pop(item.request_id, None)
            else:
                events += self._failed(item)
        return events

    def check(self) -> None:
        """Raise where nothing came of any request: `RequestFailedError`; or what has ended the engine."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # whose frames hold this one

    def _failed(self, error: TinyLLMError) -> list[RequestEvent]:
        if not isinstance(error, RequestFailedError):
            self._error = error
            return []
        request = self.unfinished.pop(error.request_id)
        events = request.fail(error.__cause__ or error)
        self._num_left_to_fail -= request.has_failed
        if not self._num_left_to_fail:
            self._error = error
        return events


def events_of(items: list[Item]) -> list[RequestEvent]:
    """The items where all are events; raises the first error where there is one."""
    failed = next((place for place, item in enumerate(items) if isinstance(item, TinyLLMError)), None)
    if failed is not None:
        raise items.pop(failed)  # type: ignore[misc]  # no name here may hold it: it holds this frame
    return items  # type: ignore[return-value]


def _reached(listener: Listener, items: list[Item]) -> bool:
    try:
        listener(items)
    except BaseException:  # SystemExit among them: a listener's fault must not stop the engine
        return False
    return True
