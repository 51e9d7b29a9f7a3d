"""ASGI middleware that checks the host, the origin and the API key of a request before its route runs."""

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

from .errors import ApiError, api_error

GUARDED = (
    "/v1/",
    "/tokenize",
    "/detokenize",
    "/live",
)  # paths that need a key; the others reveal nothing about requests

LOG = logging.getLogger("uvicorn.error")


class CatchAll:
    """Answers 500 to an exception that nothing else caught, including a panic in a library, and logs it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        has_started = False

        async def observed_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if has_started or scope["type"] != "http":
                raise  # uvicorn closes the connection
            LOG.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            await api_error(error).response()(scope, receive, send)


class OriginGuard(CORSMiddleware):
    """Starlette's CORS middleware, but a preflight from an origin that is not allowed gets no permission."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser's preflight request."""
        origin = request_headers["origin"]
        if self.is_allowed_origin(origin):
            return super().preflight_response(request_headers)
        message = f"{origin} may not send requests from a browser (see --allowed-origin)"
        return ApiError(403, message, code="origin_not_allowed", headers={"Vary": "Origin"}).response()


class KeyGuard:
    """Accepts only requests with one of the keys, sent as `Authorization: Bearer KEY`.

    It sets `request.state.client` to a hash of the key, which identifies the client but not the key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and scope["path"].startswith(GUARDED):
            kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not self._is_known(given.strip()):
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

    def _is_known(self, given: str) -> bool:
        """Compare with every key in constant time, so that timing reveals nothing about a key."""
        attempt = given.encode("latin-1")  # the bytes that were sent
        return sum(hmac.compare_digest(attempt, key) for key in self._keys) > 0


class HostGuard:
    """Accepts only requests whose Host header names an allowed host, which stops DNS rebinding.

    A request without a Host header, which HTTP/1.0 allows, is accepted: no browser sends one.
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
                    403, f"the host {host!r} is not allowed (see --allowed-host)", code="host_not_allowed"
                )
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name_of(host: str) -> str | None:
    """Return the name in a Host header, None if it is malformed.

    `[::1]:8000` is ::1, and `Localhost.` is localhost.
    """
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s:/?#@\[\]]+?)\.?)(?::[0-9]*)?", host.lower())
    return None if found is None else found[1] or found[2]
