"""What goes wrong, as OpenAI's clients expect it: a status, and one shape of body that names the fault."""

from collections.abc import Mapping

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tiny_llm import (
    EngineDeadError,
    EngineStoppingError,
    QueueFullError,
    RequestFailedError,
)

RETRY_SECONDS = 1  # after which it is worth trying again, where the queue was full
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


def api_error(error: Exception) -> ApiError:
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
            found = ApiError(500, "the server has met an error that nobody foresaw", code="internal_error")
    return found


async def answer(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for all of them."""
    return api_error(error).response()


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first field that does not fit, by its path; a body that is no JSON has none."""
    of_field = [one for one in error.errors() if one["loc"][1:2] == error.errors()[0]["loc"][1:2]]
    # Of a field's forms the one that fits best: wrong deep inside it, or else not in its type.
    first = max(of_field, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    path = [str(part) for part in first["loc"][1:] if part != "str" and "[" not in str(part)]
    field = ".".join(path) or None
    if first["type"] == "json_invalid":
        return refused(
            f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="invalid_json"
        )
    if not path and first["type"] != "value_error":
        return refused("the body must be a JSON object, with Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        return refused(f"{field} is not supported", field, "unsupported_field")
    if first["type"] != "value_error":
        return refused(f"{field}: {first['msg']}", field)
    message = str(first["ctx"]["error"])
    named, _, _ = message.partition(":")  # as rules across fields say theirs
    return refused(message, named) if field is None else refused(f"{field}: {message}", field)
