"""One log line for each finished HTTP request: sizes, times and how it ended, never any text of the request.

`RequestLog` writes the lines. A route tells it with `track` which completions belong to its request.
"""

import json
import logging
from collections import Counter
from time import monotonic
from urllib.parse import quote

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiny_llm_checkpoints.sizes import counted

from .metrics import RequestStats
from .schema import FIELDS

LOG = logging.getLogger("uvicorn.error")  # the logger that uvicorn sets up; its own access log is off
REQUEST_ID_HEADER = b"x-request-id"
QUIET_PATHS = ("/", "/page", "/live", "/health", "/metrics", "/favicon.ico")  # logged at level debug
LONGEST_PATH = 100  # characters
LONGEST_ERROR = 8192  # bytes of an error's body; `ApiError` writes fewer


class RequestLog:
    """ASGI middleware that logs each request when its answer has been sent or its client has left.

    Requests for the page, its files and stream, and for /metrics are logged at level debug unless they are
    refused; requests for /health always have that level, because a load balancer sends one every few seconds.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or not LOG.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        answer, start = _Answer(), monotonic()

        async def observed_send(message: Message) -> None:
            answer.observe(message)
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        finally:
            level = logging.DEBUG if _is_quiet(scope["path"], answer.status) else logging.INFO
            if LOG.isEnabledFor(level):
                LOG.log(level, "%s", _line(scope, answer, monotonic() - start))


def track(request: Request, stats: RequestStats) -> None:
    """Have the line of `request` show the figures of its completions."""
    request.scope.setdefault("state", {})["stats"] = stats


def track_stream_error(scope: Scope, code: str | None) -> None:
    """Have the line show the code of an error that was sent as an event: the status was sent before it."""
    scope.setdefault("state", {})["stream_error"] = code


class _Answer:
    """What the log shows of an answer. status: None if none was sent."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.request_id: str | None = None
        self.error: str | None = None

    def observe(self, message: Message) -> None:
        """Take a message on its way to the client."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            ids = [value for name, value in message["headers"] if name.lower() == REQUEST_ID_HEADER]
            self.request_id = ids[0].decode("latin-1") if ids else None
        elif self.status is not None and self.status >= 400 and self.error is None:
            self.error = _described_error(message.get("body", b""))


def _described_error(body: bytes) -> str | None:
    """The code of an error in OpenAI's shape, and the field at fault if we know its name.

    The message is left out, because it may quote the request, and so is a field that the client invented.
    """
    try:
        error = json.loads(body[:LONGEST_ERROR])["error"]
        code, field = error["code"] or error["type"], error["param"]
    except (ValueError, LookupError, TypeError):
        return None
    name = str(field).partition(".")[0].partition("[")[0]
    return f"{code} ({name})" if name in FIELDS else str(code)


def _is_quiet(path: str, status: int | None) -> bool:
    is_page = path in QUIET_PATHS or path.startswith("/page/")
    return path == "/health" or (is_page and (status or 0) < 400)


def _line(scope: Scope, answer: _Answer, seconds: float) -> str:
    """`127.0.0.1 POST /v1/completions 200 in 0.53 s: cmpl-1f, 12 prompt tokens (0 cached), ...`."""
    client = scope.get("client")
    path = quote(scope["path"][:LONGEST_PATH])
    status = "no answer" if answer.status is None else answer.status
    head = f"{client[0] if client else '-'} {scope['method']} {path} {status} in {_seconds(seconds)}"
    parts = [answer.request_id, *_figures(scope["state"].get("stats"))]
    parts += [answer.error, scope["state"].get("stream_error")]
    details = ", ".join(part for part in parts if part)
    return f"{head}: {details}" if details else head


def _figures(stats: RequestStats | None) -> list[str]:
    """The tokens, speeds and finish reasons of a request's completions, as far as they are known."""
    if stats is None:
        return []
    cached = stats.num_cached_tokens
    figures = [
        counted(stats.num_prompt_tokens, "prompt token") + ("" if cached is None else f" ({cached} cached)"),
        counted(stats.num_output_tokens, "output token"),
    ]
    if stats.ttft is not None:
        figures.append(f"TTFT {_seconds(stats.ttft)}")
    if stats.tokens_per_second is not None:
        figures.append(f"{stats.tokens_per_second:.1f} tokens/s")
    return [*figures, _reasons(stats.finish_reasons)]


def _reasons(reasons: Counter[str]) -> str:
    """`stop` for one completion, `2 stop, 1 length` for several."""
    if reasons.total() == 1:
        return next(iter(reasons))
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def _seconds(seconds: float) -> str:
    """`45 ms`, `1.52 s`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
