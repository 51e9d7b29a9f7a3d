"""A replica's side of shared streams: one carries the events of many calls of an ingress.

A message between processes costs more than the events in it. In one step each running sequence gets a token,
and a shared stream sends the events of all of them as one message.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence

from tiny_llm import RequestEvent

from .calls import Events, Failure

MOST_EVENTS = 256  # in one message; gRPC limits its bytes
IDLE = 1.0  # seconds of silence after which a shared stream without calls ends


class StreamClosedError(Exception):
    """The reader of a shared stream has gone."""


class SharedStream:
    """The events of the calls that have joined it, for one reader. Belongs to one event loop.

    number: tells it from the ingress's other streams. idle: it ends after so many seconds without an event if
    no call uses it.
    """

    def __init__(self, number: int, idle: float = IDLE) -> None:
        self.number = number
        self.is_closed = False
        self._idle = idle
        self._num_calls = 0
        self._events: list[RequestEvent | Failure] = []
        self._changed = asyncio.Event()

    def join(self) -> None:
        """Add a call; until it leaves, the stream does not end by itself."""
        self._num_calls += 1

    def leave(self, last: Iterable[Failure] = ()) -> None:
        """Remove a call that has put its last events, or whose last events these are."""
        self._num_calls -= 1
        if not self.is_closed:
            self.put([*last])

    def put(self, events: Sequence[RequestEvent | Failure]) -> None:
        """Add events of a call. Raises `StreamClosedError` if the reader has gone."""
        if self.is_closed:
            raise StreamClosedError
        self._events += events
        self._changed.set()

    async def read(self) -> AsyncGenerator[Events, None]:
        """Yield what has been put since the last time, as one list if it is not too long. For one reader."""
        try:
            while True:
                if self._events:
                    events, self._events = self._events[:MOST_EVENTS], self._events[MOST_EVENTS:]
                    yield events
                elif not await self._has_changed():
                    return
        finally:
            self.is_closed = True

    async def _has_changed(self) -> bool:
        """Wait for events, but not longer than `idle`; False if the stream has ended."""
        self._changed.clear()
        try:
            return await asyncio.wait_for(self._changed.wait(), self._idle)
        except TimeoutError:
            return bool(self._num_calls or self._events)


class SharedStreams:
    """The open stream of each ingress. Belongs to one event loop. idle: as in `SharedStream`."""

    def __init__(self, idle: float = IDLE) -> None:
        self._idle = idle
        self._of: dict[str, SharedStream] = {}

    async def read(self, ingress: str, number: int) -> AsyncGenerator[Events, None]:
        """Open a stream and yield its events until it ends; the calls of the ingress can join it."""
        self._of[ingress] = stream = SharedStream(number, self._idle)
        try:
            async for events in stream.read():
                yield events
        finally:
            stream.is_closed = True  # also if its first event was not reached
            if self._of.get(ingress) is stream:
                del self._of[ingress]

    def join(self, ingress: str) -> SharedStream | None:
        """Add a call to the ingress's open stream; None if there is none."""
        stream = self._of.get(ingress)
        if stream is not None:
            stream.join()
        return stream
