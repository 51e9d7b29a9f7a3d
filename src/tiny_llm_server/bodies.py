"""Parses and validates request bodies, at a cost that is bounded before any object is built.

A few bytes of JSON can become an object of hundreds of bytes, so a body with more values than any request
needs is refused before it is parsed. Long bodies are parsed in a thread. This module knows nothing of field
names.
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

SHORT = 16_384  # bytes; longer bodies are parsed in a thread instead of the event loop
# Limits for characters outside of strings. They count objects, lists, fields, and all values after the first.
MAX_COUNTS = {
    b"{": 50_000,
    b"[": 50_000,
    b":": 100_000,
    b",": 1_000_000,
}
BOM = b"\xef\xbb\xbf"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """A route whose body, if it has one, is parsed by `read_json`."""

    def get_route_handler(self) -> Handler:
        """Return FastAPI's handler, which receives the validated body."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model = cast(type[BaseModel], self.body_field.field_info.annotation)
        reading = asyncio.Lock()  # one long body at a time on each route: parsed bodies are large

        async def read_and_handle(request: Request) -> Response:
            check_type(request.headers.get("content-type", ""))
            body, context = await request.body(), request.app.state.validation_context
            if len(body) <= SHORT:
                value = read_json(body, model, context)
            else:
                async with reading:
                    value = await asyncio.to_thread(read_json, body, model, context)
            return await handle(_ParsedRequest(request, value))

        return read_and_handle


class _ParsedRequest(Request):
    """A request with a validated body, which FastAPI uses without parsing it again."""

    def __init__(self, request: Request, value: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._json = value

    async def body(self) -> bytes:
        """Return a body that is not empty, so that FastAPI calls `json`."""
        return b"{}"


def check_type(content_type: str) -> None:
    """Raise `ApiError` for a Content-Type that is not JSON in UTF-8."""
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if kind != "application/json" and not re.fullmatch(r"application/[\w.+-]+\+json", kind):
        found = f"not {kind[:100]!r}" if kind else "but the header is missing"
        raise refused(f"Content-Type must be application/json, {found}", code="invalid_content_type")
    charsets = [one.partition("=")[2].strip('"') for one in parameters if one.startswith("charset=")]
    if not {*charsets} <= {"utf-8", "utf8", "us-ascii"}:
        raise ApiError(415, f"JSON must be UTF-8, not {charsets[0][:100]}", code="unsupported_charset")


def read_json(body: bytes, model: type[BaseModel], context: object = None) -> BaseModel:
    """Parse a body. Raises `ApiError` if it is not JSON, `RequestValidationError` for invalid fields.

    context: an object for the model's validators.
    """
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
        return model.model_validate(fields, context=context)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from None


def _check_size(body: bytes) -> None:
    """Raise `ApiError` for more values than any request needs. Characters inside strings do not count."""
    if any(body.count(sign) > limit for sign, limit in MAX_COUNTS.items()):
        escaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
        outside = b"".join(escaped.split(b'"')[::2])
        for sign, limit in MAX_COUNTS.items():
            if (count := outside.count(sign)) > limit:
                found = f"{sign.decode()!r} occurs {count} times outside strings, expected at most {limit}"
                raise refused(f"the body has too many values: {found}", code="body_too_complex")


def _where(body: bytes, message: str) -> str:
    """Return the parser's message with the byte, counted from 0, at which it stopped."""
    found = re.fullmatch(r"(.*) at line (\d+) column (\d+)", message, re.DOTALL)
    if found is None:
        return message
    reason, line, column = found[1], int(found[2]), int(found[3])
    if reason.startswith("EOF"):
        return f"{reason}: the body has only {len(body)} byte{'' if len(body) == 1 else 's'}"
    if (bad := _first_bad_byte(body)) is not None:
        return f"byte 0x{body[bad]:02x} at byte {bad} is not UTF-8"
    start = sum(len(one) + 1 for one in body.split(b"\n", line - 1)[: line - 1])
    return f"{reason} at byte {start + column - 1} (line {line}, column {column})"


def _first_bad_byte(body: bytes) -> int | None:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None
