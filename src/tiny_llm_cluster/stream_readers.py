"""An ingress's side of shared streams: reads one of each replica, and passes its events on to their calls."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextvars import Context
from itertools import count, groupby
from uuid import uuid4

from tiny_llm.errors import described

from tiny_llm import RequestEvent

from .answers import ReplicaEndedError, Stream
from .calls import Events, Failure, Moved, OpenStream

ENDED_EARLY = "the replica ended its answer too early"


class Inbox:
    """The events of one call that come in shared streams.

    number: that of the stream to which the call has moved; None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._lists: deque[tuple[int, Events]] = deque()
        self._end: str | None = None
        self._changed = asyncio.Event()

    def put(self, number: int, events: Events) -> None:
        """Add events that came in the stream of this number."""
        self._lists.append((number, events))
        self._changed.set()

    def end(self, reason: str) -> None:
        """Note that no more events will come, and why."""
        self._end = reason
        self._changed.set()

    async def read(self) -> AsyncGenerator[Events, None]:
        """Yield the events as they come. Raises `ReplicaEndedError` after the last.

        Events of another stream are of a replica that the call has left.
        """
        while True:
            while self._lists:
                number, events = self._lists.popleft()
                if number == self.number:
                    yield events
            if self._end is not None:
                raise ReplicaEndedError(self._end)
            self._changed.clear()
            await self._changed.wait()


class StreamReaders:
    """Reads a shared stream of each replica. Belongs to one event loop.

    open_stream: opens a shared stream.
    """

    def __init__(self, open_stream: Callable[[OpenStream], Stream]) -> None:
        self.ingress = uuid4().hex  # by which the replicas know this reader
        self._open_stream = open_stream
        self._numbers = count()
        self._inboxes: dict[str, Inbox] = {}  # by request id
        self._open: dict[str, int] = {}  # the number of the stream that is read, by replica
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, request_ids: Iterable[str]) -> Inbox:
        """Make the inbox of a call.

        Call it before the call is sent: a shared stream may bring its events before its own stream says that
        it has moved.
        """
        inbox = Inbox()
        self._inboxes.update(dict.fromkeys(request_ids, inbox))
        return inbox

    def remove(self, request_ids: Iterable[str]) -> None:
        """Forget the inbox of a call that has ended; later events of it are ignored."""
        for request_id in request_ids:
            self._inboxes.pop(request_id, None)

    def open(self, replica: str) -> None:
        """Read a replica's shared stream, if this is not done yet. Returns at once."""
        if replica not in self._open:
            self._open[replica] = number = next(self._numbers)
            # Without a context of its own, Serve would end the stream with the HTTP request that opened it.
            task = asyncio.get_running_loop().create_task(self._read(replica, number), context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def follow(self, moved: Moved, inbox: Inbox) -> None:
        """Note in which stream the further events of a call come.

        When that stream ends, the inbox ends; if it has ended already, at once.
        """
        inbox.number = moved.number
        if moved.number not in self._open.values():
            inbox.end(ENDED_EARLY)

    def close(self) -> None:
        """End all streams."""
        for task in self._tasks:
            task.cancel()

    async def _read(self, replica: str, number: int) -> None:
        """Read a stream to its end."""
        stream, reason = None, ENDED_EARLY
        try:
            stream = self._open_stream(OpenStream(self.ingress, replica, number))
            async for events in stream:
                for inbox, of_inbox in groupby(events, self._inbox_of):
                    if inbox is not None:
                        inbox.put(number, list(of_inbox))
        except Exception as error:
            reason = described(error)  # the clients of the calls get it
        finally:
            if stream is not None:
                stream.cancel()
            del self._open[replica]
            for inbox in self._inboxes.values():
                if inbox.number == number:
                    inbox.end(reason)

    def _inbox_of(self, event: RequestEvent | Failure) -> Inbox | None:
        return self._inboxes.get(event.request_id)
