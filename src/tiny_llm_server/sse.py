"""Answers that stop when the client disconnects: streams of server-sent events, and single answers.

A disconnect is noticed at once, even while nothing is being sent.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic_core import to_json
from starlette.types import Message, Receive, Scope, Send

from .errors import UNEXPECTED, api_error
from .request_log import track_stream_error

T = TypeVar("T")

LOG = logging.getLogger("uvicorn.error")

REQUEST_ID = "X-Request-Id"  # the answer's id, which the log and `/live` show too
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients ignore
DONE = b"data: [DONE]\n\n"

STREAMED: dict[int | str, dict[str, Any]] = {  # the OpenAPI description of an answer that may be a stream
    200: {
        "description": "The answer; with `stream`, an event for each of its chunks, then `[DONE]`.",
        "content": {
            "text/event-stream": {
                "itemSchema": {
                    "type": "object",
                    "properties": {"data": {"type": "string", "description": "A chunk, as JSON."}},
                    "required": ["data"],
                }
            }
        },
    }
}


class ClientDisconnectedError(Exception):
    """The client disconnected before its answer was complete."""


class EventStream(Response):
    """Server-sent events, then `[DONE]`. An error in between is sent as the last event before `[DONE]`.

    chunks: the events, each a dict or JSON text; None sends a keep-alive comment. `chunks` is closed when
    the client disconnects. end: called at the very end, even if `chunks` was never started.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[Mapping[str, object] | str | None, None],
        end: Callable[[], None] = lambda: None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._chunks = chunks
        self._end = end
        self._is_open = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        writing = asyncio.ensure_future(self._write(scope, send))
        disconnecting = asyncio.ensure_future(self._disconnected(receive, send))
        try:
            await asyncio.wait({writing, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            disconnecting.cancel()
            writing.cancel()
            await asyncio.gather(writing, disconnecting, return_exceptions=True)
            self._end()

    async def _disconnected(self, receive: Receive, send: Send) -> None:
        """Return when the client has disconnected.

        If it has only closed its sending side, a comment is sent, which fails if the client is gone.
        """
        while (await receive())["type"] != "http.disconnect":
            if self._is_open:
                await send(_part(KEEP_ALIVE))

    async def _write(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._is_open = True
            try:
                async for chunk in chunks:
                    await send(_part(KEEP_ALIVE if chunk is None else _event(chunk)))
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException as error:  # including a panic in a library; the status has been sent already
                sent = api_error(error)
                track_stream_error(scope, sent.body.error.code)
                if sent.body.error.code == UNEXPECTED:
                    LOG.error("a stream failed", exc_info=error)
                await send(_part(_event(sent.body.model_dump())))
            self._is_open = False
            await send(_part(DONE, more=False))


async def unless_disconnected(request: Request, work: Coroutine[None, None, T], end: Callable[[], None]) -> T:
    """Return the result of `work`.

    If the client disconnects first, cancel `work` and raise `ClientDisconnectedError`. end: called at
    the very end, even if `work` never started.
    """
    working = asyncio.ensure_future(work)
    disconnecting = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return working.result()
    finally:
        disconnecting.cancel()
        working.cancel()
        await asyncio.gather(working, disconnecting, return_exceptions=True)
        end()


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(chunk: Mapping[str, object] | str) -> bytes:
    text = chunk.encode() if isinstance(chunk, str) else to_json(chunk, inf_nan_mode="null")
    return b"data: " + text + b"\n\n"


def _part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
