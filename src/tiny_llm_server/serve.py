"""The process: uvicorn around the application, and what signals do to it.

The first SIGTERM or SIGINT drains: new requests get 503, accepted ones go on to their end, or until the grace
period is over. A second one ends them at once, a third one does not wait for anybody. A client that does not
read its answer is hung up on.
"""

import asyncio
import errno
import logging
import socket
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from .connections import Connections, Listener, raise_file_limit
from .draining import DrainReport, counted
from .service import Service

BACKLOG = 2048  # connections that the system holds until they are accepted
LINGER = 5.0  # seconds that clients have to read what there is for them, once nothing more comes
LINGER_AT_ONCE = 0.5  # the same, after a second signal
TICKS_PER_CHECK = 5  # of uvicorn's, ten a second, between two looks at connections that wait too long
LOG = logging.getLogger("uvicorn.error")


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets at the addresses of a host that this machine has. Raises OSError where they cannot be had."""
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, address in _addresses(host, port):
        try:
            sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
        except OSError as error:
            failure = error
            if error.errno != errno.EADDRNOTAVAIL:  # names have an address of IPv6 also where that is off
                break
    if failure is None or (sockets and failure.errno == errno.EADDRNOTAVAIL):
        return sockets
    for opened in sockets:
        opened.close()
    raise _refusal(host, port, failure)


def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # ValueError: no name could be so long
        raise _refusal(host, port, error) from error
    return [(family, address[:2]) for family, _, _, _, address in found]


def _refusal(host: str, port: int, error: Exception) -> OSError:
    why = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
    return OSError(f"cannot listen on {host}, port {port}: {why}; see --host, --port")


class GracefulServer(uvicorn.Server):
    """Serves until its engine has drained, or until it is clear that there will be no engine.

    grace: seconds that accepted requests have after the first signal; None: as many as they need.
    """

    def __init__(
        self, app: FastAPI, host: str, port: int, grace: float | None = None, log_level: str = "info"
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host,
                port,
                loop="asyncio",  # `Connection` reads less at once than uvloop would
                http="h11",  # httptools, if it is installed, takes headers without end
                ws="none",
                log_level=log_level,
                lifespan="on",
                access_log=False,  # `RequestLog` writes a line for each request
                server_header=False,
                proxy_headers=False,  # any local process could claim to be any client
                timeout_keep_alive=app.state.service.config.timeout_keep_alive,
            )
        )
        raise_file_limit()
        self._service: Service = app.state.service
        self._connections = Connections(self, self._service.config)
        self._grace = grace
        self._draining: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, then raise what kept the model from being loaded, if something did."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)
        if self._service.failure is not None:
            raise self._service.failure

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._leave)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        listening = listen(self.config.host, self.config.port) if sockets is None else sockets
        await super().startup([])  # uvicorn's own accept loop is not used: see `Listener`
        if self.started:
            self.servers = cast(Any, [Listener(one, self._connections) for one in listening])
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            LOG.info(
                "Listening on http://%s:%d (press Ctrl-C to stop)", f"[{host}]" if ":" in host else host, port
            )

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: uvicorn asks ten times a second."""
        if counter % TICKS_PER_CHECK == 0:
            self._connections.check()
        ends = self._service.failure is not None or await super().on_tick(counter)
        if ends:
            self._service.end()
        return ends

    def _leave(self) -> None:
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
        self._hang_up()

    def _num_left(self) -> int:
        return 0 if self._stopping is not None else self._service.num_unfinished_requests

    async def _stop(self) -> None:
        LOG.info("Stopping now: %s aborted", counted(self._service.num_unfinished_requests, "request"))
        await asyncio.to_thread(self._service.stop)
        await asyncio.sleep(LINGER_AT_ONCE)
        self._hang_up()

    def _hang_up(self) -> None:
        """End all connections: whoever has not read his answer by now does not get it."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
