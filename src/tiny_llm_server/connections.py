"""Limits on connections: how many may be open, and how long each may wait for its client.

uvicorn closes connections that are idle between two requests. This module adds a limit on open connections,
time limits for headers, bodies and unread answers, a limit on the chunks of a body, and an accept loop that
pauses when file descriptors run out. It knows nothing about paths or models.
"""

import asyncio
import logging
import resource
import socket
from collections.abc import Sequence
from enum import Enum
from http import HTTPStatus
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .config import ServerConfig
from .errors import ApiError

MAX_FILES = 65_536  # highest limit on file descriptors to request from the system
SPARE_FILES = 64  # file descriptors reserved for everything other than connections
MAX_CHUNKS = 32_768  # in one body; a client that writes JSON in small chunks needs fewer
READ_BYTES = 16_384  # read from a socket at once, so that one connection cannot delay the others
PROGRESS_BYTES = 16_384  # a client must read this much of its answer every `unread_timeout` seconds
KERNEL_BYTES = 262_144  # the kernel's buffer for a connection in each direction; its default is megabytes
BODY_GRACE = 5.0  # seconds after `body_timeout` that the application has to answer 408 itself
ACCEPT_PAUSE = 0.5  # seconds to pause accepting after file descriptors ran out
QUIET_SECONDS = 60.0  # between two log lines about the same shortage
LOG = logging.getLogger("uvicorn.error")


def raise_file_limit() -> None:
    """Raise the soft limit on file descriptors to the hard limit or `MAX_FILES`, whichever is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connection_limit(wanted: int) -> int:
    """Return `wanted`, or less if the limit on file descriptors requires it; at least 1."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - SPARE_FILES))


class Phase(Enum):
    """What a connection waits for: a request's head, its body, the answer, or the client to read it."""

    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    UNREAD = "unread"


class _Parser(h11.Connection):
    """h11's parser, which also refuses bodies in too many chunks and heads with an ambiguous length.

    refusal: the error that stopped parsing.
    """

    refusal: h11.RemoteProtocolError | None = None

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self._num_chunks = 0
        self._sends_chunks = False  # an answer of unknown length has begun

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """Return the bytes of an event, which `send` joins.

        The parts of a streamed answer, one for each token, do not change the state. So they need only the
        framing of a chunk, which takes h11 itself several times as long.
        """
        if self._sends_chunks and isinstance(event, h11.Data) and event.data:
            return [b"%x\r\n" % len(event.data), event.data, b"\r\n"]
        parts = super().send_with_data_passthrough(event)
        if isinstance(event, h11.Response):
            head = b"".join(parts or ())
            self._sends_chunks = b"\r\nTransfer-Encoding: chunked\r\n" in head
        elif isinstance(event, h11.EndOfMessage):
            self._sends_chunks = False
        return parts

    def next_event(self) -> Any:
        """Return the next event. Raises `h11.RemoteProtocolError`."""
        try:
            return self._checked(super().next_event())
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise

    def _checked(self, event: Any) -> Any:
        if isinstance(event, h11.Request):
            self._num_chunks = 0
            _check_framing(event)
        elif isinstance(event, h11.Data):
            self._num_chunks += 1
            if self._num_chunks > MAX_CHUNKS:
                raise h11.RemoteProtocolError(f"the body has more than {MAX_CHUNKS} chunks")
        return event


def _check_framing(request: h11.Request) -> None:
    """Refuse other HTTP versions, and lengths that two servers could read differently (RFC 9112, 6.1)."""
    if not request.http_version.startswith(b"1."):
        raise h11.RemoteProtocolError("only HTTP/1.0 and HTTP/1.1 are supported", error_status_hint=505)
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" not in names:
        return
    if b"content-length" in names:
        raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
    if request.http_version < b"1.1":
        raise h11.RemoteProtocolError("Transfer-Encoding in HTTP/1.0")


class Connection(H11Protocol):
    """One client's connection.

    A client that shuts down its sending side after its request still gets the answer. A client that has
    closed the whole connection looks the same until something is sent, so `eof_received` sends something.
    """

    def __init__(self, limits: ServerConfig, **options: Any) -> None:
        super().__init__(**options)
        self.conn: _Parser = _Parser()
        self.since = self.loop.time()
        self._limits = limits
        self._state: tuple[object, ...] = ()
        self._is_half_closed = False

    @property
    def phase(self) -> Phase:
        """The phase that the connection is in."""
        if self.transport.is_closing() or self.flow.write_paused:
            return Phase.UNREAD
        if self.conn.their_state is h11.SEND_BODY:
            return Phase.BODY
        if self.conn.their_state is h11.IDLE:
            return Phase.HEAD if self.transport.get_write_buffer_size() == 0 else Phase.UNREAD
        return Phase.ANSWER

    @property
    def is_idle(self) -> bool:
        """Whether it is between two requests, with nothing of the next one received."""
        return self.cycle is not None and self.phase is Phase.HEAD and not self.conn.trailing_data[0]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Limit how much is read at once."""
        super().connection_made(transport)
        cast(Any, transport).max_size = READ_BYTES  # an attribute of asyncio's socket transport

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether to stay open for a client that sends no more but may still read its answer."""
        is_waiting = self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body)
        if is_waiting:
            self._is_half_closed = True
            self._probe_client()
        return is_waiting

    def on_response_complete(self) -> None:
        """Close the connection after an answer if the client sends no more."""
        super().on_response_complete()
        if self._is_half_closed and self.cycle.response_complete:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with the parser's status or 400, unless an answer has started; then close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR) and not self._has_started:
            refusal = self.conn.refusal
            status = 400 if refusal is None else refusal.error_status_hint
            self.transport.write(plain_answer(status, f"not valid HTTP: {refusal}", "invalid_http"))
        self.transport.close()

    def check(self, now: float) -> None:
        """Close the connection if it has waited too long; called twice a second."""
        if self._is_half_closed and self._is_broken():
            self.transport.abort()
            return
        phase = self.phase
        unread = self.transport.get_write_buffer_size() // PROGRESS_BYTES if phase is Phase.UNREAD else 0
        state = (phase, self.cycle, self.is_idle, unread)
        if state != self._state:
            self._state, self.since = state, now if self._state else self.since
        elif now - self.since > self._seconds(phase):
            self._expire(phase)

    def _seconds(self, phase: Phase) -> float:
        """Return how long a phase may last; uvicorn's own timer closes idle connections."""
        match phase:
            case Phase.HEAD:
                return float("inf") if self.is_idle else self._limits.header_timeout
            case Phase.BODY:
                return self._limits.body_timeout + BODY_GRACE
            case Phase.UNREAD:
                return self._limits.unread_timeout
        return float("inf")

    def _expire(self, phase: Phase) -> None:
        if phase is not Phase.HEAD:
            self.transport.abort()
            return
        seconds = f"{self._limits.header_timeout:g} seconds (--header-timeout)"
        self.transport.write(
            plain_answer(408, f"no complete request head arrived within {seconds}", "header_too_slow")
        )
        self.transport.close()

    @property
    def _has_started(self) -> bool:
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete

    def _probe_client(self) -> None:
        """Send something, so that the client's system resets the connection if the client is gone.

        An interim answer may be sent at any time (RFC 9110, section 15.2). If the answer has started, the
        application is woken up instead, because a stream can send a comment.
        """
        if self.cycle.response_started:
            self.cycle.message_event.set()
        elif self.scope["http_version"] == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _is_broken(self) -> bool:
        """Return whether the client's system has reset the connection."""
        broken = self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return bool(broken)

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: a client may offer an upgrade, and gets its answer without one."""


def plain_answer(status: int, message: str, code: str, *headers: str) -> bytes:
    """Return a whole HTTP answer with an error in OpenAI's format, after which the connection closes."""
    body = ApiError(status, message, code=code).response().body
    head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "content-type: application/json", *headers]
    lines = [*head, f"content-length: {len(body)}", "connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1") + bytes(body)


class Connections:
    """All connections of a server: accepts them, counts them and closes those that wait too long."""

    def __init__(self, server: uvicorn.Server, limits: ServerConfig) -> None:
        self._server = server
        self._limits = limits
        self._limit = connection_limit(limits.max_connections)
        self._quiet_until: dict[str, float] = {}

    async def admit(self, client: socket.socket) -> None:
        """Serve a client that has connected; answer 503 if all connections are busy."""
        if len(self._open) >= self._limit and not self.evict(idle=True):
            message = "all %d connections are busy (--max-connections): new clients get 503"
            self.log_shortage(message, self._limit)
            _refuse(client)
            return
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, client)
        except OSError:  # the client has disconnected
            client.close()

    def evict(self, *, idle: bool) -> bool:
        """Close the connection that has waited longest for the head of its first request.

        idle: if there is none, close the one that has been idle longest. Returns whether one was closed.
        """
        waiting = [one for one in self._open if one.phase is Phase.HEAD and (idle or one.cycle is None)]
        if waiting:
            min(waiting, key=lambda one: (one.cycle is not None, one.since)).transport.abort()
        return bool(waiting)

    def check(self) -> None:
        """Close the connections that have waited too long."""
        now = asyncio.get_running_loop().time()
        for connection in list(self._open):
            connection.check(now)

    def log_shortage(self, message: str, *values: object) -> None:
        """Log a warning, the same one at most once a minute."""
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until.get(message, 0.0):
            self._quiet_until[message] = now + QUIET_SECONDS
            LOG.warning(message, *values)

    @property
    def _open(self) -> set[Connection]:
        return cast(set[Connection], self._server.server_state.connections)

    def _protocol(self) -> Connection:
        return Connection(
            self._limits,
            config=self._server.config,
            server_state=self._server.server_state,
            app_state=self._server.lifespan.state,
        )


def _refuse(client: socket.socket) -> None:
    """Answer 503 and close the connection without waiting for the request."""
    answer = plain_answer(503, "too many connections are open", "too_many_connections", "retry-after: 1")
    try:
        client.send(answer)
        client.shutdown(socket.SHUT_WR)
    except OSError:  # the client has disconnected
        pass
    finally:
        client.close()


class Listener:
    """Accepts connections at one socket, with the interface of `asyncio.Server` that uvicorn uses.

    When no file descriptor is left, asyncio's own loop retries at once, 2,048 times, and logs each attempt.
    This one pauses, unless it can close a connection whose first request has not arrived.
    """

    def __init__(self, listening: socket.socket, connections: Connections) -> None:
        listening.setblocking(False)
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # accepted connections inherit the sizes
            listening.setsockopt(socket.SOL_SOCKET, buffer, KERNEL_BYTES)
        self._socket = listening
        self._connections = connections
        self._task = asyncio.create_task(self._accept())

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """The socket, as a list; empty after it is closed."""
        return [self._socket] if self.is_serving() else []

    def is_serving(self) -> bool:
        """Return whether clients can connect."""
        return not self._task.done() and self._socket.fileno() >= 0

    def close(self) -> None:
        """Stop accepting connections."""
        self._task.cancel()
        self._socket.close()

    async def wait_closed(self) -> None:
        """Wait until the accept loop has stopped."""
        await asyncio.gather(self._task, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(self._socket)
            except OSError as error:
                self._connections.log_shortage("cannot accept connections: %s", error.strerror)
                has_closed_one = self._connections.evict(idle=False)
                await asyncio.sleep(0 if has_closed_one else ACCEPT_PAUSE)
            else:
                await self._connections.admit(client)
