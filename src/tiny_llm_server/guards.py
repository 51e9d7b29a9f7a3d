"""At the door, before anybody else sees a request: who asks, and how much. Plain ASGI."""

import asyncio
import hmac
from collections.abc import Sequence
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

GUARDED = (
    "/v1/",
    "/tokenize",
    "/detokenize",
    "/live",
)  # what needs a key; the rest says nothing about anybody

PASSED_OVER = 64 << 20  # bytes of a body that is too long: as many are read, and not kept


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
    """Answers only under names that it knows, whatever name the sender has given to this machine."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            if _without_port(host) not in self._hosts:
                refusal = ApiError(
                    403, f"this server is not known as {host!r} (see --allowed-host)", code="host_not_allowed"
                )
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _without_port(host: str) -> str:
    """The name in a Host header: `[::1]:8000` is ::1."""
    name, colon, port = host.lower().rpartition(":")
    return (name if colon and port.isdecimal() else host.lower()).strip("[]")


class BodyLimit:
    """Reads a body before anybody else does; turns away what is longer than `most` bytes or `seconds`.

    Where a connection is closed on somebody who still sends, the answer may be lost with it. So of a body
    that is too long the rest is passed over first, as far as `PASSED_OVER` bytes beyond the limit.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        said = headers.get("content-length", "")
        is_more = self._is_more(said)
        waits = headers.get("expect", "").lower() == "100-continue"  # with the body, for our leave
        try:
            body = None if waits and is_more else await self._read(receive, is_more)
        except TimeoutError:
            late = ApiError(
                408, f"the body has not come within {self._seconds:g} seconds", code="body_too_slow"
            )
            await late.response()(scope, receive, send)
            return
        if body is None:
            await self._refusal(said).response()(scope, receive, send)
            return
        await self._app(scope, _once(body, receive), send)

    async def _read(self, receive: Receive, is_more: bool) -> bytes | None:
        """The body, or what has come of it when the client leaves; None where it is too long.

        is_more: its length says so. Raises TimeoutError where it is slow, and not too long so far.
        """
        body, size, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(self._seconds):
                while more and size <= self._most + PASSED_OVER:
                    message = await receive()
                    piece = message.get("body", b"")
                    size += len(piece)
                    is_more = is_more or size > self._most
                    if not is_more:
                        body += piece
                    more = message.get("more_body", False)
        except TimeoutError:
            if not is_more:
                raise
        return None if is_more else bytes(body)

    def _is_more(self, said: str) -> bool:
        return said.isdecimal() and (len(said) > 18 or int(said) > self._most)

    def _refusal(self, said: str) -> ApiError:
        size = f"{said} bytes" if self._is_more(said) else "more"
        message = f"a body may have {self._most} bytes, this one has {size}"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def _once(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then whatever else comes: that the client has left."""
    pieces = [body]

    async def next_message() -> Message:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(), "more_body": False}
        return await receive()

    return next_message
