"""The fields that ask for structured output: OpenAI's `response_format` and vLLM's `structured_outputs`.

Each becomes `StructuredOutputsParams`, or None if any text is allowed. What a schema says is checked later,
when the engine compiles it.
"""

from dataclasses import fields
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from tiny_llm.structured_outputs import FIELD

from tiny_llm import SamplingParamsError, StructuredOutputsParams
from tiny_llm_checkpoints.errors import shown
from tiny_llm_checkpoints.suggestions import did_you_mean

UNSUPPORTED = "unsupported_field"  # the type of the error
STRUCTURED_OUTPUTS, RESPONSE_FORMAT, SCHEMA = FIELD, "response_format", "json_schema.schema"
TYPES = ("text", "json_object", "json_schema")
LONGEST_NAME = 64  # of a schema; OpenAI's limit
_FORMS = tuple(field.name for field in fields(StructuredOutputsParams))


def _response_format(value: Any) -> StructuredOutputsParams | None:
    """Read `response_format`. Raises ValueError, or `PydanticCustomError` for what is not supported."""
    _check_object(value, "")
    kind = value.get("type")
    if kind not in TYPES:
        message = f"type {shown(kind)} is not supported; supported: {', '.join(TYPES)}"
        raise PydanticCustomError(UNSUPPORTED, "response_format: {message}", {"message": message})
    _check_names(value, ("type", "json_schema"), f"{RESPONSE_FORMAT}.")
    if kind != "json_schema":
        if value.get("json_schema") is not None:
            raise ValueError(f"json_schema is only allowed with type json_schema, not {kind}")
        return None if kind == "text" else StructuredOutputsParams(json_object=True)
    return _json_schema(value.get("json_schema"))


def _json_schema(value: Any) -> StructuredOutputsParams:
    """Read the schema of a `response_format`. It is enforced with `strict` true and false alike."""
    _check_object(value, "json_schema")
    _check_names(value, ("name", "schema", "strict", "description"), f"{RESPONSE_FORMAT}.json_schema.")
    name, strict, about = (value.get(key) for key in ("name", "strict", "description"))
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        found = "" if name is None else f", not {shown(name)}"
        raise ValueError(f"json_schema.name must be a string of 1 to {LONGEST_NAME} characters{found}")
    if not (strict is None or isinstance(strict, bool)):
        raise ValueError(f"json_schema.strict must be true or false, not {shown(strict)}")
    if not (about is None or isinstance(about, str)):
        raise ValueError(f"json_schema.description must be a string, not {shown(about)}")
    schema = value.get("schema")
    _check_object(schema, SCHEMA)
    try:
        return StructuredOutputsParams(json=schema)
    except SamplingParamsError as error:
        raise ValueError(str(error).replace(f"{STRUCTURED_OUTPUTS}.json", SCHEMA)) from None


def _structured_outputs(value: Any) -> StructuredOutputsParams | None:
    """Read `structured_outputs`; its fields that are null or false count as not sent. None: any text."""
    _check_object(value, "")
    given = {name: one for name, one in value.items() if one is not None and one is not False}
    _check_names(given, _FORMS, f"{STRUCTURED_OUTPUTS}.")
    if not given:
        return None
    try:
        return StructuredOutputsParams(**given)
    except SamplingParamsError as error:
        raise ValueError(str(error).removeprefix(STRUCTURED_OUTPUTS).lstrip(". ")) from None


def _check_object(value: Any, name: str) -> None:
    if value is None:
        raise ValueError(f"{name} is required")
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, not {shown(value)}".strip())


def _check_names(value: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    """Raise an error for the first field that is not known."""
    for name, one in value.items():
        if name not in known and one is not None:
            message = f"{place}{shown(name)} is not supported{did_you_mean(name, known)}"
            raise PydanticCustomError(UNSUPPORTED, "{message}", {"message": message})


_SCHEMA = {"type": "object"}
ResponseFormat = Annotated[
    Any,
    BeforeValidator(_response_format),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "required": ["type"],
                    "properties": {"type": {"enum": ["text", "json_object"]}},
                },
                {
                    "type": "object",
                    "required": ["type", "json_schema"],
                    "properties": {
                        "type": {"const": "json_schema"},
                        "json_schema": {
                            "type": "object",
                            "required": ["name", "schema"],
                            "properties": {
                                "name": {"type": "string", "minLength": 1, "maxLength": LONGEST_NAME},
                                "description": {"type": "string"},
                                "schema": _SCHEMA,
                                "strict": {"type": "boolean"},
                            },
                        },
                    },
                },
            ]
        }
    ),
]
StructuredOutputs = Annotated[
    Any,
    BeforeValidator(_structured_outputs),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "json": {"anyOf": [_SCHEMA, {"type": "string"}]},
                "regex": {"type": "string"},
                "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                "grammar": {"type": "string"},
                "json_object": {"const": True},
                "disable_any_whitespace": {"type": "boolean"},
                "disable_additional_properties": {"type": "boolean"},
                "whitespace_pattern": {"type": "string"},
            },
        }
    ),
]
