"""A real server for tests: it runs in a new thread and listens on a free port of 127.0.0.1."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2 as httpx

from tiny_llm import LLM
from tiny_llm_server import ServerConfig, make_app
from tiny_llm_server.serve import GracefulServer
from tiny_llm_server.service import Service

SECONDS = 120  # a timeout against hanging, not a requirement on speed


@dataclass(frozen=True)
class Served:
    """A running server: its URL, its service and its Uvicorn server."""

    url: str
    service: Service
    server: GracefulServer

    def client(self, **options: object) -> httpx.Client:
        """Return a client of this server."""
        return httpx.Client(base_url=self.url, timeout=SECONDS, **options)  # type: ignore[arg-type]


@contextmanager
def serving(
    load: Callable[[], LLM], config: ServerConfig | None = None, *, wait: bool = True
) -> Iterator[Served]:
    """Run a server of the engine that `load` returns; with `wait`, until the engine is loaded.

    On leaving the block the server stops, and its thread has finished.
    """
    app = make_app(load, config)
    server = GracefulServer(app, "127.0.0.1", 0, grace=5.0, log_level="warning")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started and bool(server.servers))
    port = server.servers[0].sockets[0].getsockname()[1]
    service: Service = app.state.service
    try:
        if wait:
            until(lambda: service.status.value == "ready")
        yield Served(f"http://127.0.0.1:{port}", service, server)
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server has not stopped"


def until(holds: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Wait until `holds()` is true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.005)
