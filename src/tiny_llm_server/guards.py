"""At the door, before anybody else sees a request: who asks, and how much. Plain ASGI."""

import asyncio
import hmac
import logging
import re
from collections.abc import Sequence
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RETRY_SECONDS, ApiError, api_error

GUARDED = (
    "/v1/",
    "/tokenize",
    "/detokenize",
    "/live",
)  # what needs a key; the rest says nothing about anybody

LOG = logging.getLogger("uvicorn.error")
UNCOUNTED = 16_384  # bytes of every body that need no share of the memory for bodies
PASSED_OVER = 64 << 20  # bytes of a body that is too long: as many are read, and not kept


class LastResort:
    """Answers 500 for what nothing else has caught, also for a panic of a library, and logs it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if has_begun or scope["type"] != "http":
                raise  # uvicorn closes the connection
            LOG.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            await api_error(error).response()(scope, receive, send)


class OriginGuard(CORSMiddleware):
    """Starlette's CORS, which gives another origin's preflight no permission of any kind."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks before it sends."""
        origin = request_headers["origin"]
        if self.is_allowed_origin(origin):
            return super().preflight_response(request_headers)
        message = f"{origin} may not send requests from a browser (see --allowed-origin)"
        return ApiError(403, message, code="origin_not_allowed", headers={"Vary": "Origin"}).response()


class KeyGuard:
    """Lets only those in who bring one of the keys, as `Authorization: Bearer KEY`.

    Inside, `request.state.client` is the same for all requests of a key, and does not tell what it is.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and scope["path"].startswith(GUARDED):
            kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not self._knows(given.strip()):
                refusal = ApiError(
                    401,
                    "no valid API key: send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal.response()(scope, receive, send)
                return
            scope.setdefault("state", {})["client"] = sha256(given.strip().encode("latin-1")).hexdigest()
        await self._app(scope, receive, send)

    def _knows(self, given: str) -> bool:
        """Compares with every key, in a time that does not tell how much of one was right."""
        attempt = given.encode("latin-1")  # as it came
        return sum(hmac.compare_digest(attempt, key) for key in self._keys) > 0


class HostGuard:
    """Answers only requests for hosts that it knows, whatever name the sender has given to this machine.

    A request without a Host, which HTTP/1.0 allows, does not come from a browser, and is answered.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.lower().rstrip(".") for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host")
            if host is not None and _name_of(host) not in self._hosts:
                refusal = ApiError(
                    403, f"this server is not known as {host!r} (see --allowed-host)", code="host_not_allowed"
                )
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name_of(host: str) -> str | None:
    """The name in a Host header: `[::1]:8000` is ::1, `Localhost.` is localhost; None if it is malformed."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s:/?#@\[\]]+?)\.?)(?::[0-9]*)?", host.lower())
    return None if found is None else found[1] or found[2]


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
