"""From the engine's thread to whoever listens: what a step has for each of them, handed over at once.

A listener is called in the engine's thread, so it puts what it gets somewhere and returns. Nobody waits for a
slow reader: what it has not read yet lies in its own queue, and is never more than its requests' output.
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
    """What is ready to be delivered, by listener: by the object itself, whatever it is equal to."""

    def __init__(self) -> None:
        self._items: dict[int, tuple[Listener, list[Item]]] = {}

    def add(self, listener: Listener, *items: Item) -> None:
        """Keep items for a listener."""
        if items:
            self._items.setdefault(id(listener), (listener, []))[1].extend(items)

    def deliver(self) -> list[Listener]:
        """Call each listener once, with all that there is for it; returns those that raised."""
        items, self._items = self._items, {}
        return [listener for listener, of_listener in items.values() if not _reached(listener, of_listener)]


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

    async def next_items(self) -> list[Item]:
        """What the next step that has something gave, errors included."""
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
