"""ASGI middleware that normalizes the path of a request before a guard or the router sees it.

Duplicate and trailing slashes are removed, and a target that is a whole URL becomes its path. `HEAD` is
answered as `GET` without a body.
"""

import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ABSOLUTE = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)


class PlainPaths:
    """Normalizes the path of every request, and answers `HEAD` with the head of the answer to `GET`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            scope = {**scope, "headers": list(scope["headers"])}
            if (absolute := _ABSOLUTE.fullmatch(scope["path"])) is not None:
                MutableHeaders(scope=scope)["host"] = absolute[1]  # RFC 9112, section 3.2.2
                scope["path"] = absolute[2]
            scope["path"] = plain_path(scope["path"])
            if scope["method"] == "HEAD":
                scope["method"], send = "GET", _head_only(send)
        await self._app(scope, receive, send)


def plain_path(path: str) -> str:
    """`//v1/models/` -> `/v1/models`."""
    return re.sub(r"/+", "/", path).rstrip("/") or "/"


def _head_only(send: Send) -> Send:
    """Send the head of an answer and end it there, without its body."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return send_head
