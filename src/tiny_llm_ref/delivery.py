"""Deliver events from the engine's thread to listeners: callbacks that get a list of events per iteration.

A listener is called in the engine's thread, so it must store the list and return. The engine never waits for
a slow client: unread events stay in the client's own queue, which is never longer than the output of its
requests.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol
from weakref import WeakKeyDictionary, ref

from tiny_llm_checkpoints.errors import TinyLLMError

from .errors import RequestFailedError
from .outputs import RequestEvent

Item = RequestEvent | TinyLLMError  # an error is the last item of a request
Listener = Callable[[list[Item]], None]


class Outbox:
    """Events and errors that are not delivered yet, by listener. Listeners are told apart by identity."""

    def __init__(self) -> None:
        self._items: dict[int, tuple[Listener, list[Item]]] = {}

    def add(self, listener: Listener, *items: Item) -> None:
        """Add events or errors for a listener."""
        if items:
            self._items.setdefault(id(listener), (listener, []))[1].extend(items)

    def deliver(self) -> list[Listener]:
        """Call each listener once, with the list of its items; returns the listeners that raised."""
        items, self._items = self._items, {}
        return [listener for listener, of_listener in items.values() if not _reached(listener, of_listener)]


class AsyncListener:
    """A listener for one coroutine: passes items on to the event loop in which it was created."""

    def __init__(self) -> None:
        self._deliveries = _Deliveries.of(asyncio.get_running_loop())
        self._lists: deque[list[Item]] = deque()
        self._reading: asyncio.Future[None] | None = None

    def __call__(self, items: list[Item]) -> None:
        """Take a list in the engine's thread and wake the event loop; RuntimeError if the loop is closed."""
        self._deliveries.post(self, items)

    def put(self, items: list[Item]) -> None:
        """Add a list, in the event loop. It may be empty."""
        self._lists.append(items)
        if self._reading is not None and not self._reading.done():
            self._reading.set_result(None)

    async def next(self) -> list[RequestEvent]:
        """Wait for the next list of events; raises the error if the list has one."""
        return events_of(await self.next_items())

    async def next_items(self) -> list[Item]:
        """Wait for the next list, errors included."""
        if not self._lists:
            self._reading = asyncio.get_running_loop().create_future()
            await self._reading
        return self._lists.popleft()


class _Deliveries:
    """Lists that are being passed on to the listeners of one event loop.

    Waking an event loop costs a system call, and in one step all clients of a server get a list. So the loop
    is woken for the first list only, and then takes all that have arrived.
    """

    _of_loops: ClassVar["WeakKeyDictionary[asyncio.AbstractEventLoop, _Deliveries]"] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._arrived: deque[tuple[AsyncListener, list[Item]]] = deque()
        self._is_woken = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> "_Deliveries":
        """The deliveries of a loop. Call it in the loop's thread."""
        if loop not in cls._of_loops:
            cls._of_loops[loop] = cls(loop)
        return cls._of_loops[loop]

    def post(self, listener: AsyncListener, items: list[Item]) -> None:
        """Have the loop give `items` to a listener; called in any thread. RuntimeError if it is closed."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise RuntimeError("the event loop is closed")
        self._arrived.append((listener, items))
        if not self._is_woken:
            self._is_woken = True
            loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        self._is_woken = False  # first: a list that arrives from now on wakes the loop again
        while self._arrived:
            listener, items = self._arrived.popleft()
            listener.put(items)


class Served(Protocol):
    """The part of a request that `Gathering` uses."""

    @property
    def request_id(self) -> str:
        """The id that its events have."""

    @property
    def has_failed(self) -> bool:
        """True when all of its completions have failed."""

    def fail(self, error: BaseException) -> list[RequestEvent]:
        """End all unfinished completions with an error; returns their last events."""


class Gathering:
    """Collects the events of several requests; a request that fails does not end the others.

    unfinished: the requests that have not ended, by id.
    """

    def __init__(self, requests: Iterable[Served]) -> None:
        self.unfinished = {request.request_id: request for request in requests}
        self._num_left_to_fail = len(self.unfinished)
        self._error: TinyLLMError | None = None

    def take(self, items: list[Item]) -> list[RequestEvent]:
        """The events of one delivery; a failed request's last events have the finish_reason "error"."""
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
        """Raise `RequestFailedError` if all requests have failed, or the error that has ended the engine."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # breaks a reference cycle: the error's traceback holds this frame

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
    """The items, if all of them are events; otherwise raises the first error."""
    failed = next((place for place, item in enumerate(items) if isinstance(item, TinyLLMError)), None)
    if failed is not None:
        raise items.pop(failed)  # type: ignore[misc]  # no variable may hold it: its traceback holds this frame
    return items  # type: ignore[return-value]


def _reached(listener: Listener, items: list[Item]) -> bool:
    try:
        listener(items)
    except BaseException:  # SystemExit too: a listener's error must not stop the engine
        return False
    return True
