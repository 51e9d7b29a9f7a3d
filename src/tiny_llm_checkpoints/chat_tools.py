"""Validates the tools that a client offers to a model, in OpenAI's format, for `LLM.chat` and for HTTP.

Knows nothing of templates or tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chat_names import read_name
from .plain_json import MessageError, check_json, kind_of, size_of

MAX_TOOLS = 128  # OpenAI's limit
MAX_TOOL_CHARS = 400_000  # in all tools of a request, as `size_of` counts them
MAX_TOOL_DEPTH = 50  # nesting in a tool; an object in a schema takes two levels
IGNORED = ("cache_control",)  # fields that templates do not get
EXAMPLE = 'for example {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}'
_LISTS = ("required", "enum", "anyOf", "allOf", "oneOf", "prefixItems")
_OBJECTS = ("properties", "$defs", "definitions", "patternProperties")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    parameters: the JSON schema of its arguments; {} if it takes none. is_strict: its arguments must follow
    the schema even if the model may choose whether to call it. fields: the tool as a template receives it.
    """

    name: str
    parameters: Mapping[str, Any]
    is_strict: bool
    fields: Mapping[str, Any]


def read_tools(tools: Any) -> tuple[Tool, ...]:
    """Check the tools of a request and return them; None and an empty list are no tools.

    Raises `MessageError` for the first problem; it names the tool and the field.
    """
    if tools is None:
        return ()
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise MessageError("tools", f"must be a list of tools, not {kind_of(tools)}")
    if len(tools) > MAX_TOOLS:
        raise MessageError("tools", f"must have at most {MAX_TOOLS} tools, not {len(tools)}")
    found: dict[str, Tool] = {}
    left = MAX_TOOL_CHARS
    for place, fields in enumerate(tools):
        field = f"tools[{place}]"
        check_json(fields, field, MAX_TOOL_DEPTH)
        left -= size_of(fields)
        if left < 0:
            raise MessageError("tools", f"must have at most {MAX_TOOL_CHARS} characters together")
        tool = _read(fields, field)
        if tool.name in found:
            raise MessageError(f"{field}.function.name", f"{tool.name!r} is the name of an earlier tool")
        found[tool.name] = tool
    return tuple(found.values())


def _read(tool: Any, field: str) -> Tool:
    if not isinstance(tool, Mapping):
        raise MessageError(field, f"must be an object, not {kind_of(tool)}; {EXAMPLE}")
    kind = tool.get("type")
    if not isinstance(kind, str):
        raise MessageError(f"{field}.type", f"must be 'function', not {kind_of(kind)}")
    if kind != "function":
        raise MessageError(
            f"{field}.type", f"{kind[:40]!r} is not supported: only function", unsupported=True
        )
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise MessageError(f"{field}.function", f"must be an object, not {kind_of(function)}; {EXAMPLE}")
    name = read_name(function.get("name"), f"{field}.function.name")
    for key, expected in (("description", str), ("strict", bool)):
        value = function.get(key)
        if value is not None and not isinstance(value, expected):
            wanted = "a string" if expected is str else "true or false"
            raise MessageError(f"{field}.function.{key}", f"must be {wanted}, not {kind_of(value)}")
    parameters = function.get("parameters")
    _check_parameters(parameters, f"{field}.function.parameters")
    fields = {**_sent(tool), "function": _sent(function)}
    return Tool(name, parameters or {}, function.get("strict") is True, fields)


def _sent(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a template gets: those that are not null and not in `IGNORED`."""
    return {name: value for name, value in fields.items() if value is not None and name not in IGNORED}


def _check_parameters(parameters: Any, field: str) -> None:
    """Raise `MessageError` if this is not the schema of an object."""
    if parameters is None:
        return
    if not isinstance(parameters, Mapping):
        raise MessageError(field, f"must be a JSON schema, which is an object, not {kind_of(parameters)}")
    if parameters.get("type", "object") != "object":
        raise MessageError(f"{field}.type", f"must be 'object', not {str(parameters['type'])[:40]!r}")
    left: list[tuple[Any, str]] = [(parameters, field)]
    while left:
        schema, place = left.pop()
        left += _parts_of(schema, place)


def _parts_of(schema: Any, field: str) -> list[tuple[Any, str]]:
    """The schemas in a schema, with their places. Raises `MessageError` for keywords of the wrong type."""
    if isinstance(schema, bool):
        return []
    if not isinstance(schema, Mapping):
        raise MessageError(field, f"must be a JSON schema, not {kind_of(schema)}")
    parts: list[tuple[Any, str]] = []
    for key, value in schema.items():
        place = f"{field}.{str(key)[:40]}"
        if key in _LISTS and not isinstance(value, (list, tuple)):
            raise MessageError(place, f"must be a list, not {kind_of(value)}")
        if key in _OBJECTS and not isinstance(value, Mapping):
            raise MessageError(place, f"must be an object, not {kind_of(value)}")
        if key in ("anyOf", "allOf", "oneOf", "prefixItems"):
            parts += [(one, f"{place}[{index}]") for index, one in enumerate(value)]
        elif key in _OBJECTS:
            parts += [(one, f"{place}.{str(name)[:40]}") for name, one in value.items()]
        elif key in ("additionalProperties", "not", "items") and not isinstance(value, (list, tuple)):
            parts.append((value, place))
    return parts
