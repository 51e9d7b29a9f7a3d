"""Answers that a client may walk away from: streams of server-sent events, and single ones.

A client that leaves is noticed at once, also while nothing is sent to it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from .errors import UNEXPECTED, api_error
from .request_log import track_stream_error

T = TypeVar("T")

LOG = logging.getLogger("uvicorn.error")

REQUEST_ID = "X-Request-Id"  # the answer's id, by which the log and `/live` know the request
KEEP_ALIVE = b": still here\n\n"  # a comment: clients pass over it
DONE = b"data: [DONE]\n\n"

STREAMED: dict[int | str, dict[str, Any]] = {  # what the document says of an answer that may be a stream
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


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


class EventStream(Response):
    """Server-sent events, then `[DONE]`; an error that comes in between is the last event before it.

    chunks: what is sent, as a model or as JSON, and None where nothing has come for a while; closed when the
    client leaves. end: called at the very end, also where `chunks` was never asked for anything.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[BaseModel | str | None, None],
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
        leaving = asyncio.ensure_future(self._left(receive, send))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            writing.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
            self._end()

    async def _left(self, receive: Receive, send: Send) -> None:
        """Return when the client has left. One that sends no more gets a comment, which shows if it has."""
        while (await receive())["type"] != "http.disconnect":
            if self._is_open:
                await _send_part(send, KEEP_ALIVE)

    async def _write(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._is_open = True
            try:
                async for chunk in chunks:
                    await _send_part(send, KEEP_ALIVE if chunk is None else _event(chunk))
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException as error:  # also a panic of a library: the status is sent, so say it here
                sent = api_error(error)
                track_stream_error(scope, sent.body.error.code)
                if sent.body.error.code == UNEXPECTED:
                    LOG.error("a stream failed", exc_info=error)
                await _send_part(send, _event(sent.body))
            self._is_open = False
            await _send_part(send, DONE, more=False)


async def unless_left(request: Request, work: Coroutine[None, None, T], end: Callable[[], None]) -> T:
    """What `work` returns. Where the client leaves first it is cancelled; raises `ClientLeftError` then.

    end: called at the very end, also where `work` never began.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
        end()


async def _left(receive: Receive) -> None:
    """Returns when the client has left. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(chunk: BaseModel | str) -> bytes:
    # exclude_unset: events have only the fields that OpenAI sends
    text = chunk if isinstance(chunk, str) else chunk.model_dump_json(exclude_unset=True)
    return b"data: " + text.encode() + b"\n\n"


async def _send_part(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
