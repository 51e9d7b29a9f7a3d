"""Reads bodies before their routes do, within limits on bytes, seconds and memory. Plain ASGI."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RETRY_SECONDS, ApiError

UNCOUNTED = 16_384  # bytes of every body that need no share of the memory for bodies
PASSED_OVER = 64 << 20  # bytes of a body that is refused: as many are read, and not kept


class BodyLimit:
    """Reads a body before any other code does; refuses more than `most` bytes or `seconds`.

    memory: bytes that all bodies together may hold until their requests have ended; more is 503. The first
    `UNCOUNTED` bytes of a body need none of it, so that small requests are served beside large ones.

    A refusal may be lost if the connection closes while the client still sends. So the rest of a body that is
    refused is read first, as far as `PASSED_OVER` bytes beyond the limit, and not kept.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float, memory: int) -> None:
        self._app = app
        self._most = most
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
            share.give_back()

    def take(self, size: int) -> bool:
        """Reserve memory for bodies, or give it back if `size` is negative; whether there was enough."""
        if size > self._free:
            return False
        self._free -= size
        return True

    async def _body(self, headers: Headers, receive: Receive, share: "_Share") -> bytes | ApiError | None:
        """The body, or why it is refused; None if the client has left."""
        said = headers.get("content-length", "")
        refusal = _refusal_of_coding(headers) or (self._too_long(said) if self._is_more(said) else None)
        if refusal is not None and headers.get("expect", "").lower() == "100-continue":
            return refusal  # the client waits with the body until it is told to send it
        return await self._read(receive, share, refusal)

    async def _read(
        self, receive: Receive, share: "_Share", refusal: ApiError | None
    ) -> bytes | ApiError | None:
        body, size, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(self._seconds):
                while more and size <= self._most + PASSED_OVER:
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
        """Why a body of which so much has come is refused, if it is."""
        if size > self._most:
            return self._too_long("more")
        return None if share.grow(size) else _NO_MEMORY

    def _is_more(self, said: str) -> bool:
        return said.isdecimal() and (len(said) > 18 or int(said) > self._most)

    def _too_long(self, said: str) -> ApiError:
        size = f"{said} bytes" if said.isdecimal() else said
        message = f"a body may have {self._most} bytes, this one has {size}"
        return ApiError(413, message, code="body_too_large", headers=_CLOSE)

    def _too_slow(self) -> ApiError:
        message = f"the body has not come within {self._seconds:g} seconds"
        return ApiError(408, message, code="body_too_slow", headers=_CLOSE)


_CLOSE = {"Connection": "close"}
_NO_MEMORY = ApiError(
    503,
    "other requests' bodies leave no memory for this one",
    code="too_many_bodies",
    headers={**_CLOSE, "Retry-After": str(RETRY_SECONDS)},
)


class _Share:
    """What one body has reserved of the memory for bodies."""

    def __init__(self, memory: BodyLimit) -> None:
        self._memory = memory
        self._size = 0

    def grow(self, size: int) -> bool:
        """Reserve enough for `size` bytes; whether that was possible."""
        more = max(0, size - UNCOUNTED) - self._size
        if not self._memory.take(more):
            return False
        self._size += more
        return True

    def give_back(self) -> None:
        """Reserve nothing any more."""
        self._memory.take(-self._size)
        self._size = 0


def _refusal_of_coding(headers: Headers) -> ApiError | None:
    """415 for a compressed body (RFC 9110, sections 12.5.3 and 15.5.16)."""
    codings = {one.strip().lower() for one in ",".join(headers.getlist("content-encoding")).split(",")}
    if codings <= {"", "identity"}:
        return None
    message = f"the body is compressed ({', '.join(sorted(codings))}); send it as it is"
    accepted = {**_CLOSE, "Accept-Encoding": "identity"}
    return ApiError(415, message, code="unsupported_content_encoding", headers=accepted)


def _once(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then whatever else comes: that the client has left."""
    pieces = [body]

    async def next_message() -> Message:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(), "more_body": False}
        return await receive()

    return next_message
