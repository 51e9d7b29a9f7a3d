"""ASGI middleware that reads request bodies within limits on bytes, seconds and memory."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RETRY_SECONDS, ApiError

UNCOUNTED = 16_384  # bytes of each body that do not count towards the memory for bodies
MAX_DISCARDED = 64 << 20  # bytes of a refused body that are read and discarded


class BodyLimit:
    """Reads each body before its route runs: 413 for more than `limit` bytes, 408 after `seconds`.

    memory: bytes that all bodies together may hold until their requests finish; beyond it, a request gets
    503. The first `UNCOUNTED` bytes of each body do not count: large bodies must not block small requests.

    A client that is still sending might not receive an error, because the connection closes. So the rest of a
    refused body, up to `MAX_DISCARDED` bytes beyond the limit, is read and discarded first.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float, memory: int) -> None:
        self._app = app
        self._limit = limit
        self._seconds = seconds
        self._free = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        share = _Share(self)
        try:
            body = await self._body(Headers(scope=scope), receive, share)
            if isinstance(body, ApiError):
                await body.response()(scope, receive, send)
            elif body is not None:
                await self._app(scope, _once(body, receive), send)
        finally:
            share.free()

    def take(self, size: int) -> bool:
        """Reserve memory for bodies, or free it if `size` is negative. Returns whether there was enough."""
        if size > self._free:
            return False
        self._free -= size
        return True

    async def _body(self, headers: Headers, receive: Receive, share: "_Share") -> bytes | ApiError | None:
        """Return the body, or the error that refuses it; None if the client has disconnected."""
        length = headers.get("content-length", "")
        refusal = _coding_error(headers) or (self._too_large(length) if self._exceeds_limit(length) else None)
        if refusal is not None and headers.get("expect", "").lower() == "100-continue":
            return refusal  # the client has not sent the body: it waits for 100 (Continue)
        return await self._read(receive, share, refusal)

    async def _read(
        self, receive: Receive, share: "_Share", refusal: ApiError | None
    ) -> bytes | ApiError | None:
        body, size, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(self._seconds):
                while more and size <= self._limit + MAX_DISCARDED:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    size += len(piece)
                    refusal = refusal or self._refusal(size, share)
                    if refusal is None:
                        body += piece
                    else:
                        body.clear()
                    more = message.get("more_body", False)
        except TimeoutError:
            return refusal or self._too_slow()
        return refusal or bytes(body)

    def _refusal(self, size: int, share: "_Share") -> ApiError | None:
        """Return the error for a body that has `size` bytes so far, if it must be refused."""
        if size > self._limit:
            return self._too_large(None)
        return None if share.grow(size) else _NO_MEMORY

    def _exceeds_limit(self, length: str) -> bool:
        return length.isdecimal() and (len(length) > 18 or int(length) > self._limit)

    def _too_large(self, length: str | None) -> ApiError:
        found = "" if length is None else f": {length} bytes"
        message = f"the body is too large{found}; at most {self._limit} bytes are allowed (--max-body)"
        return ApiError(413, message, code="body_too_large", headers=_CLOSE)

    def _too_slow(self) -> ApiError:
        message = f"the body did not arrive within {self._seconds:g} seconds (--body-timeout)"
        return ApiError(408, message, code="body_too_slow", headers=_CLOSE)


_CLOSE = {"Connection": "close"}
_NO_MEMORY = ApiError(
    503,
    "the bodies of other requests take all the memory for bodies (--body-memory)",
    code="too_many_bodies",
    headers={**_CLOSE, "Retry-After": str(RETRY_SECONDS)},
)


class _Share:
    """The memory that one body has reserved."""

    def __init__(self, memory: BodyLimit) -> None:
        self._memory = memory
        self._size = 0

    def grow(self, size: int) -> bool:
        """Reserve enough for `size` bytes. Returns whether that was possible."""
        more = max(0, size - UNCOUNTED) - self._size
        if not self._memory.take(more):
            return False
        self._size += more
        return True

    def free(self) -> None:
        """Free the memory."""
        self._memory.take(-self._size)
        self._size = 0


def _coding_error(headers: Headers) -> ApiError | None:
    """Return a 415 for a compressed body (RFC 9110, sections 12.5.3 and 15.5.16)."""
    codings = {one.strip().lower() for one in ",".join(headers.getlist("content-encoding")).split(",")}
    if codings <= {"", "identity"}:
        return None
    message = f"the body is compressed ({', '.join(sorted(codings))}); send it without Content-Encoding"
    accepted = {**_CLOSE, "Accept-Encoding": "identity"}
    return ApiError(415, message, code="unsupported_content_encoding", headers=accepted)


def _once(body: bytes, receive: Receive) -> Receive:
    """Make a `receive` that returns the body in one piece, then later messages, such as a disconnect."""
    pieces = [body]

    async def next_message() -> Message:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(), "more_body": False}
        return await receive()

    return next_message
