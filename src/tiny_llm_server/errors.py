"""What goes wrong, as OpenAI's clients expect it: a status, and one shape of body that names the fault."""

from collections.abc import Mapping

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

LONGEST_MESSAGE = 1000  # characters; a message may quote what was sent
LONGEST_PARAM = 200
UNEXPECTED = "internal_error"  # the code of an error that no part of the server expects
RETRY_SECONDS = 1  # after which it is worth trying again, where the queue was full
UNSUPPORTED = "unsupported_field"
_CHAT = "is not supported; use /v1/chat/completions"
_NO_EMBEDDINGS = "is not supported: this server only generates text"
_INSTEAD = {  # what a client that knows another server or a newer API asks for
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
    """What was wrong. param: the field at fault. code: a name for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that ends with an error. param: the field at fault; code: a name for programs."""

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
        """The answer."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be done, however often it is sent."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: BaseException) -> ApiError:
    """What an error of the engine, of the web framework or of a request's fields is to a client."""
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
            found = ApiError(500, "the server met an unexpected error", code=UNEXPECTED)
    return found


def load_error(error: BaseException) -> Exception:
    """Why a model cannot be loaded, as an error that the command line shows in one line."""
    if isinstance(error, TinyLLMError | ValueError | ImportError | OSError):
        return error
    found = TinyLLMError(f"the model cannot be loaded: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found


async def answer(request: Request, error: Exception) -> Response:
    """FastAPI's handler for all of them."""
    if not isinstance(error, HTTPException):
        return api_error(error).response()
    if error.status_code == 405:
        return _other_method(request, error)
    if error.status_code == 404:
        return _no_such_path(request).response()
    return api_error(error).response()


def _other_method(request: Request, error: HTTPException) -> Response:
    """405, or the methods that there are if that was the question."""
    known = (error.headers or {}).get("Allow", "GET").split(", ")
    allowed = ", ".join(dict.fromkeys([*known, *["HEAD"] * ("GET" in known), "OPTIONS"]))
    if request.method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": allowed})
    methods = [one for one in known if one not in ("HEAD", "OPTIONS")]
    message = f"{request.url.path} does not accept {request.method}; use {' or '.join(methods)}"
    return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed}).response()


def _no_such_path(request: Request) -> ApiError:
    """404, with what to use instead and the paths that exist."""
    paths = request.app.openapi()["paths"]
    known = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    path = _shortened(request.url.path, LONGEST_PARAM)
    hint = _INSTEAD.get(request.url.path, "does not exist")
    message = f"{path} {hint}. Available: {', '.join([*known, 'GET /openapi.json'])}"
    return ApiError(404, message, code="unknown_path")


def _shortened(text: str, most: int) -> str:
    """At most `most` characters of a text, with its middle left out."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first field that does not fit, by its path."""
    of_field = [one for one in error.errors() if one["loc"][1:2] == error.errors()[0]["loc"][1:2]]
    # Of a field's forms the one that fits best: wrong deep inside it, or else not in its type.
    first = max(of_field, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    path = [str(part) for part in first["loc"][1:] if part != "str" and "[" not in str(part)]
    field = ".".join(path) or None
    if first["type"] == UNSUPPORTED:
        return refused(first["msg"], field, UNSUPPORTED)
    if first["type"] == "extra_forbidden":
        return refused(f"{field} is not supported", field, UNSUPPORTED)
    if first["type"] != "value_error":
        return refused(f"{field}: {first['msg']}", field)
    message = str(first["ctx"]["error"])
    named, _, _ = message.partition(":")  # as rules across fields say theirs
    return refused(message, named) if field is None else refused(f"{field}: {message}", field)
