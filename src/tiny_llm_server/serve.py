"""The server process: uvicorn with our application, connection limits and signal handling.

The first SIGTERM or SIGINT drains: new requests get 503, and accepted ones may finish within the grace
period. A second signal aborts them, and a third one exits without closing connections. A client that does not
read its answer is disconnected after a few seconds.
"""

import asyncio
import errno
import logging
import socket
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from tiny_llm_checkpoints.sizes import counted

from .connections import Connections, Listener, raise_file_limit
from .draining import DrainReport
from .service import Service

BACKLOG = 2048  # connections that the system queues until they are accepted
LINGER = 5.0  # seconds that clients have to read the rest of their answers after draining
LINGER_AFTER_ABORT = 0.5  # the same after a second signal
TICKS_PER_CHECK = 5  # uvicorn ticks ten times a second; connections are checked at every fifth tick
LOG = logging.getLogger("uvicorn.error")
_OF_UVICORN = (  # lines about its own phases; our "Listening on ..." and "is ready" say what a user needs
    "Started server process [%d]",
    "Waiting for application startup.",
    "Application startup complete.",
    "Waiting for application shutdown.",
    "Application shutdown complete.",
)


def listen(host: str, port: int) -> list[socket.socket]:
    """Open listening sockets at all addresses of `host`. Raises OSError if that fails.

    An address that this machine lacks is skipped if another one works: "localhost" has an IPv6 address even
    if IPv6 is off.
    """
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, address in _addresses(host, port):
        try:
            sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
        except OSError as error:
            failure = error
            if error.errno != errno.EADDRNOTAVAIL:
                break
    if failure is None or (sockets and failure.errno == errno.EADDRNOTAVAIL):
        return sockets
    for opened in sockets:
        opened.close()
    raise _listen_error(host, port, failure)


def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # ValueError: the name is too long
        raise _listen_error(host, port, error) from error
    return [(family, address[:2]) for family, _, _, _, address in found]


def _listen_error(host: str, port: int, error: Exception) -> OSError:
    reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
    return OSError(f"cannot listen on {host}, port {port}: {reason}; see --host, --port")


def _is_for_users(record: logging.LogRecord) -> bool:
    return record.msg not in _OF_UVICORN


class GracefulServer(uvicorn.Server):
    """Serves until its engine has drained, or until the model has failed to load.

    grace: seconds that accepted requests have to finish after the first signal; None: no limit.
    """

    def __init__(
        self, app: FastAPI, host: str, port: int, grace: float | None = None, log_level: str = "info"
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host,
                port,
                loop="asyncio",  # `Connection` limits how much is read at once, which uvloop ignores
                http="h11",  # httptools, used if it is installed, does not limit headers
                ws="none",
                log_level=log_level,
                lifespan="on",
                access_log=False,  # `RequestLog` writes a line for each request
                server_header=False,
                proxy_headers=False,  # otherwise any local process could claim another client's address
                timeout_keep_alive=app.state.service.config.timeout_keep_alive,
            )
        )
        (LOG.removeFilter if log_level == "debug" else LOG.addFilter)(_is_for_users)
        raise_file_limit()
        self._service: Service = app.state.service
        self._connections = Connections(self, self._service.config)
        self._grace = grace
        self._draining: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: Exception | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve. At the end, raise the error that kept the model from loading, or that of `fail`."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)
        if (failure := self._service.failure or self._failure) is not None:
            raise failure

    def fail(self, error: Exception, grace: float) -> None:
        """Drain as after a signal, and raise the error at the end; does nothing if the server drains already.

        grace: as that of the server, which is used if it is shorter. Any thread may call it, even before the
        server has started.
        """
        if self._draining is None:
            self._failure, self._grace = error, grace if self._grace is None else min(grace, self._grace)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal in the event loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._handle_signal)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen and log the address."""
        listening = listen(self.config.host, self.config.port) if sockets is None else sockets
        await super().startup([])  # uvicorn's own accept loop is not used: see `Listener`
        if self.started:
            self.servers = cast(Any, [Listener(one, self._connections) for one in listening])
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            LOG.info(
                "Listening on http://%s:%d (press Ctrl-C to stop)", f"[{host}]" if ":" in host else host, port
            )

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; uvicorn calls this ten times a second."""
        if counter % TICKS_PER_CHECK == 0:
            self._connections.check()
        if self._failure is not None and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        stops = self._service.failure is not None or await super().on_tick(counter)
        if stops:
            self._service.end()
        return stops

    def _handle_signal(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        elif self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        report = DrainReport(self._num_left, self._grace)
        reporting = asyncio.create_task(report.run())
        try:
            await self._service.drain(self._grace)
        finally:
            reporting.cancel()
            self.should_exit = True
        if self._stopping is None:
            report.finish()
        await asyncio.sleep(LINGER)
        self._close_connections()

    def _num_left(self) -> int:
        return 0 if self._stopping is not None else self._service.num_unfinished_requests

    async def _stop(self) -> None:
        LOG.info("Stopping now: %s aborted", counted(self._service.num_unfinished_requests, "request"))
        await asyncio.to_thread(self._service.stop)
        await asyncio.sleep(LINGER_AFTER_ABORT)
        self._close_connections()

    def _close_connections(self) -> None:
        """Close all connections, even those with an unread answer."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
