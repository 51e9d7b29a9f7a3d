"""Errors in OpenAI's format: an HTTP status and a JSON body with message, type, param and code."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tiny_llm import (
    EngineDeadError,
    EngineStoppingError,
    QueueFullError,
    RequestFailedError,
    TinyLLMError,
)

from .invalid_fields import invalid
from .unknown_fields import UNKNOWN

LONGEST_MESSAGE = 1000  # characters; a message may quote the request
LONGEST_PARAM = 200
UNEXPECTED = "internal_error"  # the code of an error that no part of the server expects
RETRY_SECONDS = 1  # in the header Retry-After of a temporary error, such as a full queue
UNSUPPORTED = "unsupported_field"
# The length of ("body", field, type), the location that pydantic reports if a value fits no type of a union.
_UNION_DEPTH = 3
_CHAT = "is not supported; use /v1/chat/completions"
_NO_EMBEDDINGS = "is not supported: this server only generates text"
_INSTEAD = {  # paths of other servers or newer APIs, and what to tell a client that asks for one
    "/v1/responses": _CHAT,
    "/v1/messages": _CHAT,
    "/api/chat": _CHAT,
    "/chat/completions": "does not exist; use /v1/chat/completions",
    "/completions": "does not exist; use /v1/completions",
    "/models": "does not exist; use /v1/models",
    "/api/generate": "is not supported; use /v1/completions",
    "/v1/embeddings": _NO_EMBEDDINGS,
    "/api/embed": _NO_EMBEDDINGS,
    "/v1": "is the base URL of the API, not an endpoint",
    "/docs": "does not exist; the API is described in /openapi.json and docs/server.md",
    "/redoc": "does not exist; the API is described in /openapi.json and docs/server.md",
}
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ErrorDetail(BaseModel):
    """An error. param: the field at fault. code: a machine-readable name."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error answer."""

    error: ErrorDetail


class ApiError(Exception):
    """An error to answer a request with. param: the field at fault; code: a machine-readable name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = _shortened(message, LONGEST_MESSAGE)
        param = None if param is None else _shortened(param, LONGEST_PARAM)
        super().__init__(message)
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status = status
        self.headers = dict(headers or {})
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self) -> JSONResponse:
        """Make the HTTP answer."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Make an error of status 400: the same request would fail again."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: BaseException) -> ApiError:
    """Translate an error of the engine, the web framework or the validation into an `ApiError`."""
    later = {"Retry-After": str(RETRY_SECONDS)}
    match error:
        case ApiError():
            found = error
        case QueueFullError():
            found = ApiError(429, str(error), code="queue_full", headers=later)
        case EngineStoppingError():
            found = ApiError(503, str(error), code="stopping", headers=later)
        case RequestFailedError() | EngineDeadError():
            found = ApiError(500, str(error), code="request_failed")
        case RequestValidationError():
            found = _of_validation(error)
        case HTTPException():
            found = ApiError(error.status_code, str(error.detail), headers=error.headers)
        case _:
            found = ApiError(
                500, "an unexpected error occurred; the server's log has the details", code=UNEXPECTED
            )
    return found


def load_error(error: BaseException) -> Exception:
    """Turn an error from loading the model into one that the command line shows in one line."""
    if isinstance(error, TinyLLMError | ValueError | ImportError | OSError):
        return error
    found = TinyLLMError(f"the model cannot be loaded: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found


async def answer(request: Request, error: Exception) -> Response:
    """FastAPI's exception handler for all these errors."""
    if not isinstance(error, HTTPException):
        return api_error(error).response()
    if error.status_code == 405:
        return _method_not_allowed(request, error)
    if error.status_code == 404:
        return _unknown_path(request).response()
    return api_error(error).response()


def _method_not_allowed(request: Request, error: HTTPException) -> Response:
    """Answer 405; answer OPTIONS with the methods that the path accepts."""
    known = (error.headers or {}).get("Allow", "GET").split(", ")
    allowed = ", ".join(dict.fromkeys([*known, *["HEAD"] * ("GET" in known), "OPTIONS"]))
    if request.method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": allowed})
    methods = [one for one in known if one not in ("HEAD", "OPTIONS")]
    message = f"{request.url.path} does not accept {request.method}; use {' or '.join(methods)}"
    return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed}).response()


def _unknown_path(request: Request) -> ApiError:
    """Make a 404 that says what to use instead and which paths exist."""
    paths = request.app.openapi()["paths"]
    known = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    path = _shortened(request.url.path, LONGEST_PARAM)
    hint = _INSTEAD.get(request.url.path, "does not exist")
    message = f"{path} {hint}. Available: {', '.join([*known, 'GET /openapi.json'])}"
    return ApiError(404, message, code="unknown_path")


def _shortened(text: str, limit: int) -> str:
    """Replace the middle of a text longer than `limit` characters with `...`."""
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 4 :]}"


def _of_types(first: Mapping[str, Any], of_field: Sequence[Mapping[str, Any]]) -> str:
    """Describe an error; if the field may have several types, name them all: `must be a string or a list`."""
    others = [
        one for one in of_field if one["type"].endswith("_type") and len(one["loc"]) == len(first["loc"])
    ]
    if not first["type"].endswith("_type") or len(first["loc"]) > _UNION_DEPTH:
        return invalid(first)
    kinds = dict.fromkeys(invalid(one).removeprefix("must be ") for one in others)
    return f"must be {' or '.join(kinds)}"


def _of_validation(error: RequestValidationError) -> ApiError:
    """Describe the first invalid field, by its path."""
    of_field = [one for one in error.errors() if one["loc"][1:2] == error.errors()[0]["loc"][1:2]]
    # If a field may have several types, report the one that fits best: the error that is nested deepest, or
    # else one that is not about the type itself.
    first = max(of_field, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    path = [str(part) for part in first["loc"][1:] if part != "str" and "[" not in str(part)]
    field = ".".join(path) or None
    if first["type"] == UNSUPPORTED:
        return refused(first["msg"], field, UNSUPPORTED)
    if first["type"] == "missing":
        return refused(f"{field} is required", field)
    if first["type"] == UNKNOWN:
        field = ".".join(map(str, first["loc"][1:]))
        return refused(f"{field} {first['msg']}", field, UNSUPPORTED)
    if first["type"] != "value_error":
        return refused(f"{field}: {_of_types(first, of_field)}", field)
    message = str(first["ctx"]["error"])
    named, _, _ = message.partition(":")  # validators of several fields start their message with the name
    return refused(message, named) if field is None else refused(f"{field}: {message}", field)
