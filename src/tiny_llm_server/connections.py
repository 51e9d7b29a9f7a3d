"""Limits of connections: how many are open, and how long each may wait for its client.

uvicorn closes connections that are idle between two requests. This module adds what it lacks: a cap on open
connections, a time limit for headers, for bodies and for answers that are not read, a limit on the pieces of
a body, and an accept loop that pauses when file descriptors run out. It knows nothing of paths or models.
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

MOST_FILES = 65_536  # file descriptors that are asked for at most
SPARE_FILES = 64  # descriptors that are kept for everything but connections
MOST_PIECES = 32_768  # of one body: a client that writes JSON piece by piece needs fewer
READ_BYTES = 16_384  # taken from a socket at once, which bounds the work between two other connections
PROGRESS_BYTES = 16_384  # an answer is being read while this much of it goes every `unread_timeout` seconds
KERNEL_BYTES = 262_144  # that the system may hold of one connection, each way; it would take megabytes
BODY_GRACE = 5.0  # seconds after `body_timeout` in which the application may answer 408 itself
ACCEPT_PAUSE = 0.5  # seconds without accepting after the system refused a descriptor
QUIET_SECONDS = 60.0  # between two log lines about the same shortage
LOG = logging.getLogger("uvicorn.error")


def raise_file_limit() -> None:
    """Raise the soft limit on file descriptors to the hard one, or to `MOST_FILES` if that is less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections(wanted: int) -> int:
    """The cap on connections: `wanted`, or fewer if the limit on file descriptors is lower. At least 1."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - SPARE_FILES))


class Phase(Enum):
    """What a connection waits for: a request's head, its body, the application, or the client's reading."""

    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    UNREAD = "unread"


class _Parser(h11.Connection):
    """h11's parser, which also refuses bodies in too many pieces and heads whose length is ambiguous.

    refusal: the error that ended parsing.
    """

    refusal: h11.RemoteProtocolError | None = None

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self._num_pieces = 0

    def next_event(self) -> Any:
        """The next event. Raises `h11.RemoteProtocolError`."""
        try:
            return self._checked(super().next_event())
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise

    def _checked(self, event: Any) -> Any:
        if isinstance(event, h11.Request):
            self._num_pieces = 0
            _check_framing(event)
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            if self._num_pieces > MOST_PIECES:
                raise h11.RemoteProtocolError(f"the body comes in more than {MOST_PIECES} pieces")
        return event


def _check_framing(request: h11.Request) -> None:
    """Refuse another version, and a length that two servers could read differently (RFC 9112, 6.1)."""
    if not request.http_version.startswith(b"1."):
        raise h11.RemoteProtocolError("only HTTP/1 is spoken here", error_status_hint=505)
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" not in names:
        return
    if b"content-length" in names:
        raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
    if request.http_version < b"1.1":
        raise h11.RemoteProtocolError("Transfer-Encoding in HTTP/1.0")


class Connection(H11Protocol):
    """One client's connection.

    A client that has sent its request and shut down its sending side still gets the answer. A client that
    has closed the whole connection looks the same until something is sent to it; `eof_received` sends it
    something.
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
        """What the connection waits for."""
        if self.transport.is_closing() or self.flow.write_paused:
            return Phase.UNREAD
        if self.conn.their_state is h11.SEND_BODY:
            return Phase.BODY
        if self.conn.their_state is h11.IDLE:
            return Phase.HEAD if self.transport.get_write_buffer_size() == 0 else Phase.UNREAD
        return Phase.ANSWER

    @property
    def is_idle(self) -> bool:
        """Between two requests, with nothing of the next one received."""
        return self.cycle is not None and self.phase is Phase.HEAD and not self.conn.trailing_data[0]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        cast(Any, transport).max_size = READ_BYTES  # asyncio's own attribute

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to stay open: the client sends no more, but may still read the answer it waits for."""
        is_waiting = self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body)
        if is_waiting:
            self._is_half_closed = True
            self._provoke()
        return is_waiting

    def on_response_complete(self) -> None:
        """An answer has been written."""
        super().on_response_complete()
        if self._is_half_closed and self.cycle.response_complete:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, if no answer has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR) and not self._has_begun:
            refusal = self.conn.refusal
            status = 400 if refusal is None else refusal.error_status_hint
            self.transport.write(plain_answer(status, f"not valid HTTP: {refusal}", "invalid_http"))
        self.transport.close()

    def check(self, now: float) -> None:
        """End the connection if it has waited too long. Called again and again."""
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
        """How long a phase may last; uvicorn's own timer ends idle connections."""
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
        seconds = f"{self._limits.header_timeout:g} seconds"
        self.transport.write(plain_answer(408, f"no request has come within {seconds}", "header_too_slow"))
        self.transport.close()

    @property
    def _has_begun(self) -> bool:
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete

    def _provoke(self) -> None:
        """Have the client's system say if the client is gone.

        An interim answer may come at any time (RFC 9110, section 15.2). If the answer has begun, the
        application is woken up instead: a stream can send a comment.
        """
        if self.cycle.response_started:
            self.cycle.message_event.set()
        elif self.scope["http_version"] == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _is_broken(self) -> bool:
        """Whether the client's system has reset the connection."""
        broken = self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return bool(broken)

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a client may offer an upgrade, and gets its answer without one."""


def plain_answer(status: int, message: str, code: str, *headers: str) -> bytes:
    """An error in OpenAI's shape as the bytes of a whole HTTP answer, after which the connection closes."""
    body = ApiError(status, message, code=code).response().body
    head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "content-type: application/json", *headers]
    lines = [*head, f"content-length: {len(body)}", "connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1") + bytes(body)


class Connections:
    """All connections of a server: accepts them, counts them and ends those that wait too long."""

    def __init__(self, server: uvicorn.Server, limits: ServerConfig) -> None:
        self._server = server
        self._limits = limits
        self._most = most_connections(limits.max_connections)
        self._quiet_until: dict[str, float] = {}

    async def admit(self, client: socket.socket) -> None:
        """Serve a client that has connected, or refuse it with 503 if all connections are busy."""
        if len(self._open) >= self._most and not self.evict(idle=True):
            self.say("all %d connections are busy (--max-connections): new clients get 503", self._most)
            _refuse(client)
            return
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, client)
        except OSError:  # the client has gone
            client.close()

    def evict(self, *, idle: bool) -> bool:
        """Close the connection that has waited longest for its first request's head; whether there is one.

        idle: if there is none, close the one that has been idle for longest.
        """
        waiting = [one for one in self._open if one.phase is Phase.HEAD and (idle or one.cycle is None)]
        if waiting:
            min(waiting, key=lambda one: (one.cycle is not None, one.since)).transport.abort()
        return bool(waiting)

    def check(self) -> None:
        """End connections that have waited too long."""
        now = asyncio.get_running_loop().time()
        for connection in list(self._open):
            connection.check(now)

    def say(self, message: str, *values: object) -> None:
        """Log a shortage, at most once a minute."""
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
    """Answer 503 and close, without waiting for the request."""
    answer = plain_answer(503, "too many connections are open", "too_many_connections", "retry-after: 1")
    try:
        client.send(answer)
        client.shutdown(socket.SHUT_WR)
    except OSError:  # it has gone already
        pass
    finally:
        client.close()


class Listener:
    """Accepts connections at one socket; to uvicorn what `asyncio.Server` is.

    asyncio's own loop tries again at once, 2,048 times, when no file descriptor is left, and logs each
    attempt. This one pauses, unless it can close a connection whose first request has not come.
    """

    def __init__(self, listening: socket.socket, connections: Connections) -> None:
        listening.setblocking(False)
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # connections inherit them
            listening.setsockopt(socket.SOL_SOCKET, buffer, KERNEL_BYTES)
        self._socket = listening
        self._connections = connections
        self._task = asyncio.create_task(self._accept())

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """The socket, until it is closed."""
        return [self._socket] if self.is_serving() else []

    def is_serving(self) -> bool:
        """Whether clients can connect."""
        return not self._task.done() and self._socket.fileno() >= 0

    def close(self) -> None:
        """Accept no more."""
        self._task.cancel()
        self._socket.close()

    async def wait_closed(self) -> None:
        """Return when nothing more is accepted."""
        await asyncio.gather(self._task, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(self._socket)
            except OSError as error:
                self._connections.say("cannot accept connections: %s", error.strerror)
                can_go_on = self._connections.evict(idle=False)
                await asyncio.sleep(0 if can_go_on else ACCEPT_PAUSE)
            else:
                await self._connections.admit(client)
