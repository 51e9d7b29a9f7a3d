"""A server for tests: a real one, on a port of 127.0.0.1 that nobody else has, in a thread of its own."""

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

SECONDS = 120  # a guard against hanging, not a speed that is asked for


@dataclass(frozen=True)
class Served:
    """A server that runs: where it is, and what is behind it."""

    url: str
    service: Service
    server: GracefulServer

    def client(self, **options: object) -> httpx.Client:
        """A client of it."""
        return httpx.Client(base_url=self.url, timeout=SECONDS, **options)  # type: ignore[arg-type]


@contextmanager
def serving(
    load: Callable[[], LLM], config: ServerConfig | None = None, *, wait: bool = True
) -> Iterator[Served]:
    """A server of what `load` makes; wait: until that is there. It has ended when this is left."""
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
        assert not thread.is_alive(), "the server has not ended"


def until(holds: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.005)
