"""The ASGI application: routes, middleware and error handlers around one `Service`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tiny_llm import TinyLLMError

from . import chat, completions, live, status
from .body_limit import BodyLimit
from .config import ServerConfig
from .errors import ApiError, ErrorBody, answer
from .guards import CatchAll, HostGuard, KeyGuard, OriginGuard
from .live_page import add_page
from .metrics import CollectRequests
from .paths import PlainPaths
from .request_log import RequestLog
from .served_model import ServedModel
from .service import Service
from .sse import REQUEST_ID, ClientDisconnectedError
from .throughput import ThroughputLog
from .unknown_fields import IgnoredFields

_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorBody, "description": description}
    for code, description in {
        400: "The request is invalid or asks for something unsupported; `param` names the field.",
        401: "No valid API key.",
        403: "The Host header names a host that is not allowed.",
        404: "The model does not exist.",
        408: "The body arrived too slowly.",
        405: "The path does not accept the method; `Allow` lists those that it accepts.",
        413: "The body is too large.",
        415: "The body is compressed or not UTF-8.",
        429: "The queue is full; try again after `Retry-After` seconds.",
        500: "The request failed; other requests continue.",
        503: "The model is loading, the server is draining, or the request timed out.",
    }.items()
}


def make_app(
    load: Callable[[], ServedModel],
    config: ServerConfig | None = None,
    of_requests: CollectRequests | None = None,
) -> FastAPI:
    """Make the application. `load` makes the model; it is called in a thread when the server starts.

    of_requests: as in `Service`. `app.state.service` is the application's `Service`.
    """
    service = Service(load, config or ServerConfig(), of_requests)
    throughput = ThroughputLog(service.metrics, service.engine_stats)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(one) for one in (service.load(), throughput.run())]
        try:
            yield
        finally:
            for task in tasks:  # a model that is not loaded by now is not needed
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if service.failure is None:  # after a failure, there may be no thread left for this
                await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="tiny-llm",
        version=version("tiny-llm"),
        lifespan=lifespan,
        responses=_ERRORS,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # `PlainPaths` removes extra slashes; a redirect would lose the body
    )
    app.state.service = service
    app.state.validation_context = IgnoredFields() if service.config.ignore_unknown_fields else None
    for part in (completions, chat, status):
        app.include_router(part.router(service))
    if service.config.live:
        app.include_router(live.router(service))
        add_page(app)
    for error_type in (ApiError, TinyLLMError, RequestValidationError, HTTPException):
        app.add_exception_handler(error_type, answer)
    app.add_exception_handler(ClientDisconnectedError, _client_closed_request)
    app.add_middleware(
        BodyLimit,
        limit=service.config.max_body_bytes,
        seconds=service.config.body_timeout,
        memory=service.config.body_memory_bytes,
    )
    if service.config.api_keys:
        app.add_middleware(KeyGuard, keys=service.config.api_keys)
    if service.config.allowed_hosts:
        app.add_middleware(HostGuard, hosts=service.config.allowed_hosts)
    app.add_middleware(CatchAll)
    if service.config.allowed_origins:
        app.add_middleware(
            OriginGuard,
            allow_origins=service.config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=[REQUEST_ID, "Retry-After"],
        )
    app.add_middleware(RequestLog)
    app.add_middleware(PlainPaths)
    return app


async def _client_closed_request(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nginx's status for the log; no client is left to read it
