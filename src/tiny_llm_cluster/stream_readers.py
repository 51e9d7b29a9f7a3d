"""An ingress's side of shared streams: reads one of each replica, and passes its events on to their calls."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from itertools import count, groupby
from uuid import uuid4

from tiny_llm import RequestEvent

from .answers import ReplicaEndedError, Stream
from .calls import Events, Failure, Moved, OpenStream


class Inbox:
    """The events of one call that come in a shared stream."""

    def __init__(self) -> None:
        self.reader: _Reader | None = None  # that of the stream, when it is known
        self._lists: deque[Events] = deque()
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, events: Events) -> None:
        """Add events."""
        self._lists.append(events)
        self._changed.set()

    def end(self, error: Exception) -> None:
        """Note that no more events will come, and why."""
        self._error = error
        self._changed.set()

    async def read(self) -> AsyncGenerator[Events, None]:
        """Yield the lists of events as they come; raises the error after the last."""
        while True:
            while self._lists:
                yield self._lists.popleft()
            if self._error is not None:
                raise self._error
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
        self._readers: dict[str, _Reader] = {}  # those that read now, by replica

    def add(self, request_ids: Iterable[str]) -> Inbox:
        """Make the inbox of a call; call it before the call is sent."""
        inbox = Inbox()
        self._inboxes.update(dict.fromkeys(request_ids, inbox))
        return inbox

    def remove(self, request_ids: Iterable[str]) -> None:
        """Forget the inbox of a call that has ended; later events of it are ignored."""
        for request_id in request_ids:
            self._inboxes.pop(request_id, None)

    def open(self, replica: str) -> None:
        """Read a replica's shared stream, if this is not done yet. Returns at once."""
        if replica not in self._readers:
            self._readers[replica] = reader = _Reader(replica, next(self._numbers))
            reader.task = asyncio.get_running_loop().create_task(self._read(reader))

    def follow(self, replica: str, moved: Moved, inbox: Inbox) -> None:
        """Note that the further events of a call come in a replica's stream; if it ends, its inbox does."""
        reader = self._readers.get(replica)
        if reader is not None and reader.number == moved.number:
            inbox.reader = reader
        else:
            inbox.end(_ended_early())

    def close(self) -> None:
        """End all streams."""
        for reader in self._readers.values():
            if reader.task is not None:
                reader.task.cancel()

    async def _read(self, reader: "_Reader") -> None:
        """Read a stream to its end."""
        stream, error = self._open_stream(reader.request(self.ingress)), _ended_early()
        try:
            async for events in stream:
                for inbox, of_inbox in groupby(events, self._inbox_of):
                    if inbox is not None:
                        inbox.put(list(of_inbox))
        except Exception as raised:
            error = raised  # the clients of the calls get it
        finally:
            stream.cancel()
            del self._readers[reader.replica]
            for inbox in self._inboxes.values():
                if inbox.reader is reader:
                    inbox.end(error)

    def _inbox_of(self, event: RequestEvent | Failure) -> Inbox | None:
        return self._inboxes.get(event.request_id)


class _Reader:
    """A shared stream that is read, and the task that reads it."""

    def __init__(self, replica: str, number: int) -> None:
        self.replica = replica
        self.number = number
        self.task: asyncio.Task[None] | None = None

    def request(self, ingress: str) -> OpenStream:
        """What opens the stream."""
        return OpenStream(ingress, self.replica, self.number)


def _ended_early() -> Exception:
    return ReplicaEndedError("the replica ended its answer too early")
