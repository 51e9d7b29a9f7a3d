"""A request's body: from bytes to a model of `schema`, at a cost that is bounded before anything is built.

JSON of a few bytes can stand for an object of hundreds, so a body is refused if it has more values than a
request can need. What is left is parsed and validated, away from the event loop if it is long. Knows nothing
of which fields there are.
"""

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any, cast

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from .errors import ApiError, refused

SHORT = 16_384  # bytes that are parsed at once, on the event loop
MOST = {  # of each sign outside of texts: objects, lists, fields, and values that follow another one
    b"{": 50_000,
    b"[": 50_000,
    b":": 100_000,
    b",": 1_000_000,
}
BOM = b"\xef\xbb\xbf"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """A route whose body, if it has one, is read by `read_json`."""

    def get_route_handler(self) -> Handler:
        """FastAPI's handler, given a body that is validated already."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model = cast(type[BaseModel], self.body_field.field_info.annotation)
        reading = asyncio.Lock()  # one long body at a time: what it becomes is large

        async def read_and_handle(request: Request) -> Response:
            check_type(request.headers.get("content-type", ""))
            body = await request.body()
            if len(body) <= SHORT:
                value = read_json(body, model)
            else:
                async with reading:
                    value = await asyncio.to_thread(read_json, body, model)
            return await handle(_Read(request, value))

        return read_and_handle


class _Read(Request):
    """A request with a validated body, which FastAPI takes as it is."""

    def __init__(self, request: Request, value: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._json = value

    async def body(self) -> bytes:
        """Something, so that `json` is asked for."""
        return b"{}"


def check_type(content_type: str) -> None:
    """Refuse a body that does not claim to be JSON in UTF-8."""
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if kind != "application/json" and not re.fullmatch(r"application/[\w.+-]+\+json", kind):
        said = f"not {kind[:100]!r}" if kind else "and this one has none"
        raise refused(
            f"the body must have Content-Type: application/json, {said}", code="invalid_content_type"
        )
    charsets = [one.partition("=")[2].strip('"') for one in parameters if one.startswith("charset=")]
    if not {*charsets} <= {"utf-8", "utf8", "us-ascii"}:
        raise ApiError(415, f"JSON is UTF-8, not {charsets[0][:100]}", code="unsupported_charset")


def read_json(body: bytes, model: type[BaseModel]) -> BaseModel:
    """The body as `model`. Raises `ApiError` if it is not JSON, `RequestValidationError` for wrong fields."""
    body = body.removeprefix(BOM)
    _check_size(body)
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise refused(f"the body is not JSON: {_where(body, str(error))}", code="invalid_json") from None
    if not isinstance(fields, dict):
        kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
        raise refused(f"the body must be a JSON object, not {kinds.get(type(fields), 'a number')}")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from None


def _check_size(body: bytes) -> None:
    """Refuse more values than any request needs. Signs inside of texts do not count."""
    if any(body.count(sign) > most for sign, most in MOST.items()):
        escaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
        outside = b"".join(escaped.split(b'"')[::2])
        for sign, most in MOST.items():
            if (count := outside.count(sign)) > most:
                what = f"{count} times {sign.decode()!r} outside of strings, and at most {most} are read"
                raise refused(f"the body has too many values: {what}", code="body_too_complex")


def _where(body: bytes, said: str) -> str:
    """The parser's message with the byte, counted from 0, at which it stopped."""
    found = re.fullmatch(r"(.*) at line (\d+) column (\d+)", said, re.DOTALL)
    if found is None:
        return said
    what, line, column = found[1], int(found[2]), int(found[3])
    if what.startswith("EOF"):
        return f"it ends after {len(body)} bytes: {what}"
    if (bad := _first_bad_byte(body)) is not None:
        return f"byte 0x{body[bad]:02x} at byte {bad} is not UTF-8"
    start = sum(len(one) + 1 for one in body.split(b"\n", line - 1)[: line - 1])
    return f"{what} at byte {start + column - 1} (line {line}, column {column})"


def _first_bad_byte(body: bytes) -> int | None:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None
