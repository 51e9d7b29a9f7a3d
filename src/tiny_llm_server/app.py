"""The application: routes, guards and errors around one service."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tiny_llm import LLM, TinyLLMError

from . import chat, completions, live, status
from .body_limit import BodyLimit
from .config import ServerConfig
from .errors import ApiError, ErrorBody, answer
from .guards import HostGuard, KeyGuard, LastResort, OriginGuard
from .live_page import add_page
from .paths import PlainPaths
from .request_log import RequestLog
from .service import Service
from .sse import REQUEST_ID, ClientLeftError
from .throughput import ThroughputLog

_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorBody, "description": what}
    for code, what in {
        400: "The request cannot be done; `param` names the field.",
        401: "No valid API key.",
        403: "The server is not known under this name.",
        404: "There is no such model.",
        408: "The body has come too slowly.",
        405: "The path has no such method; `Allow` says which there are.",
        413: "The body is too large.",
        415: "The body is compressed, or not in UTF-8.",
        429: "The queue is full; `Retry-After` says when to try again.",
        500: "The request has failed, and others go on.",
        503: "The model loads, the server drains, or the request took too long.",
    }.items()
}


def make_app(load: Callable[[], LLM], config: ServerConfig | None = None) -> FastAPI:
    """The server of the model that `load` makes, which is called in a thread when the server starts.

    `app.state.service` is the `Service` behind it.
    """
    service = Service(load, config or ServerConfig())
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
            if service.failure is None:  # a thread may be what the system did not give
                await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="tiny-llm",
        version=version("tiny-llm"),
        lifespan=lifespan,
        responses=_ERRORS,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # `PlainPaths` has removed them, and a redirect would lose the body
    )
    app.state.service = service
    for part in (completions, chat, status):
        app.include_router(part.router(service))
    if service.config.live:
        app.include_router(live.router(service))
        add_page(app)
    for kind in (ApiError, TinyLLMError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientLeftError, _nobody_is_there)
    app.add_middleware(
        BodyLimit,
        most=service.config.max_body_bytes,
        seconds=service.config.body_timeout,
        memory=service.config.body_memory_bytes,
    )
    if service.config.api_keys:
        app.add_middleware(KeyGuard, keys=service.config.api_keys)
    if service.config.allowed_hosts:
        app.add_middleware(HostGuard, hosts=service.config.allowed_hosts)
    app.add_middleware(LastResort)
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


async def _nobody_is_there(_: Request, __: Exception) -> Response:
    return Response(status_code=499)
