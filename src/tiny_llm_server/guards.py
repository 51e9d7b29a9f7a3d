"""Checks of a request before its route sees it: its host, its origin and its key. Plain ASGI."""

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
)  # what needs a key; the rest says nothing about anybody

LOG = logging.getLogger("uvicorn.error")


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
