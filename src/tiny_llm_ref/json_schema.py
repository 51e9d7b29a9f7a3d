"""JSON schemas before they become grammars: what cannot be enforced is rejected, with its place.

The library llguidance rejects what it cannot enforce, with a few exceptions, which `check_schema` rejects.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from .errors import SamplingParamsError

Schema = Mapping[str, Any]

MAX_DEPTH = 64  # levels of a schema (`depth_of`); the library parses at most 127
MAX_EXACT = 2**53  # the library reads bounds as 64-bit floats, which represent all integers up to here
MAX_PLACES = 500  # subschemas that are tried to find the place of an error

MAX_COPIED = 1 << 18  # characters by which copies of definitions may lengthen a schema

_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_DEFINITIONS = ("$defs", "definitions")
_MAPS = ("properties", "patternProperties", *_DEFINITIONS)
_SINGLE = ("additionalProperties", "items")
_INSIDE = (*_LISTS, *_MAPS, *_SINGLE)
_LOWEST, _HIGHEST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


class Subschema(NamedTuple):
    """A schema within a schema. place: a JSON pointer from the root, such as "#/properties/name"."""

    place: str
    schema: Schema


def subschemas(schema: Schema, place: str = "#") -> Iterator[Subschema]:
    """Yield a schema and all schemas in it, each before those that it contains; true and false are left out.

    Those of a schema come in the order of the keywords in `_INSIDE`. place: the schema's own place.

    >>> [one.place for one in subschemas({"items": {}, "anyOf": [{}, True], "properties": {"a/b": {}}})]
    ['#', '#/anyOf/0', '#/properties/a~1b', '#/items']
    """
    yield Subschema(place, schema)
    for keyword in _INSIDE:
        for inner_place, inner in _children(keyword, schema.get(keyword)):
            if isinstance(inner, dict):
                yield from subschemas(inner, f"{place}/{keyword}{inner_place}")


def _children(keyword: str, value: object) -> list[tuple[str, object]]:
    """The schemas in the value of a keyword, each with its place in the value."""
    if keyword in _SINGLE:
        return [("", value)]
    if keyword in _LISTS and isinstance(value, list):
        return [(f"/{index}", one) for index, one in enumerate(value)]
    if keyword in _MAPS and isinstance(value, dict):
        return [(f"/{_escaped(name)}", one) for name, one in value.items()]
    return []


def _escaped(name: str) -> str:
    """A name in a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def check_schema(schema: Schema, field: str) -> None:
    """Raise `SamplingParamsError`, with the place, for what the grammar library would accept but not enforce.

    In any subschema: a list as `items`; `additionalItems`; a bound of a number beyond ±`MAX_EXACT`; a
    `minProperties` above 1 + the number of `required` properties; an exclusive bound that is a whole number,
    with an opposite bound less than 1 away (if a value may have to satisfy two schemas: of any subschema). In
    the schema itself: "x-guidance", which sets the library's options.

    field: the name of the parameter, with which messages start.
    """
    if "x-guidance" in schema:
        raise SamplingParamsError(f"{field} must not have 'x-guidance': use the fields beside it")
    found = list(subschemas(schema))
    intersects = any(_intersects(one) for _, one in found)
    for place, one in found:
        others = [other for _, other in found] if intersects else [one]
        problem = _list_of_items(one) or _bound_too_large(one) or _too_few_properties(one)
        if (problem := problem or _narrow_bounds(one, others)) is not None:
            raise SamplingParamsError(f"{field} at {place}: {problem}")


def _intersects(schema: Schema) -> bool:
    """Whether a value must satisfy two schemas at once."""
    alternatives = schema.get("allOf")
    several = isinstance(alternatives, list) and len(alternatives) > 1
    applies = any(keyword in schema for keyword in ("$ref", "allOf", "anyOf", "oneOf"))
    return several or (applies and any(bound in schema for bound in (*_LOWEST, *_HIGHEST)))


def _list_of_items(schema: Schema) -> str | None:
    """A list of schemas as `items`, the form of earlier drafts."""
    if isinstance(schema.get("items"), list) or "additionalItems" in schema:
        return "a list of items is not supported: use prefixItems, and items for the others"
    return None


def _bound_too_large(schema: Schema) -> str | None:
    for bound in (*_LOWEST, *_HIGHEST):
        if (value := _number(schema, bound)) is not None and abs(value) > MAX_EXACT:
            return f"{bound} must be from -2**53 to 2**53, not {str(schema[bound])[:40]}"
    return None


def _too_few_properties(schema: Schema) -> str | None:
    """A `minProperties` that a repeated name would satisfy, because the library counts it twice."""
    required, least = schema.get("required"), schema.get("minProperties")
    most = 1 + (len(required) if isinstance(required, list) else 0)
    if isinstance(least, int) and least > most:
        return f"minProperties must be at most 1 + the number of required properties, {most}, not {least}"
    return None


def _narrow_bounds(schema: Schema, others: Seq[Schema]) -> str | None:
    """A whole exclusive bound that the library would allow itself, because another bound is less than 1 away.

    others: the schemas that the value may have to satisfy too.
    """
    for own, sign, opposite in (("exclusiveMinimum", 1, _HIGHEST), ("exclusiveMaximum", -1, _LOWEST)):
        value = _number(schema, own)
        if value is None or value % 1 != 0:
            continue
        for bound in opposite:
            distances = [sign * (end - value) for one in others if (end := _number(one, bound)) is not None]
            if any(0 < distance < 1 for distance in distances):
                return f"{own} {schema[own]} is not supported with a {bound} that is less than 1 away"
    return None


def _number(schema: Schema, keyword: str) -> float | None:
    """The value of a keyword; None if it is not a number."""
    value = schema.get(keyword)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def with_closed_objects(schema: Any) -> Any:
    """Return a copy in which schemas with `properties` but not `additionalProperties` allow no others.

    >>> with_closed_objects({"properties": {"a": {"additionalProperties": {}, "properties": {}}}})
    {'properties': {'a': {'additionalProperties': {}, 'properties': {}}}, 'additionalProperties': False}
    """

    def close(one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "additionalProperties": False} if "properties" in one else one

    return _changed(schema, lambda one: one if "additionalProperties" in one else close(one))


def with_alternatives_in_place(schema: Schema) -> Any:
    """Return a copy in which the alternatives of each `oneOf` are schemas instead of references.

    The library must see that alternatives exclude each other, and does not follow references for that. An
    alternative is replaced if it is only a "$ref" to one of the schema's `$defs` or `definitions`, as long as
    the definitions that are copied have at most `MAX_COPIED` characters of JSON together.

    >>> schema = {"$defs": {"a": {"const": 1}}, "oneOf": [{"$ref": "#/$defs/a"}, {"const": 2}]}
    >>> with_alternatives_in_place(schema)["oneOf"]
    [{'const': 1}, {'const': 2}]
    """
    definitions = {
        f"#/{keyword}/{name}": one
        for keyword in _DEFINITIONS
        if isinstance(schema.get(keyword), dict)
        for name, one in schema[keyword].items()
    }
    sizes = {reference: len(json.dumps(one)) for reference, one in definitions.items()}
    left = MAX_COPIED

    def in_place(alternative: Any) -> Any:
        nonlocal left
        reference = (
            alternative.get("$ref") if isinstance(alternative, dict) and len(alternative) == 1 else None
        )
        if not isinstance(reference, str) or sizes.get(reference, left + 1) > left:
            return alternative
        left -= sizes[reference]
        return definitions[reference]

    def follow(one: dict[str, Any]) -> dict[str, Any]:
        alternatives = one.get("oneOf")
        return {**one, "oneOf": [*map(in_place, alternatives)]} if isinstance(alternatives, list) else one

    return _changed(schema, follow)


def _changed(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Return a copy in which each subschema is replaced by `change` of it, the inner ones first."""
    if not isinstance(schema, dict):
        return schema
    return change({keyword: _changed_value(keyword, value, change) for keyword, value in schema.items()})


def _changed_value(keyword: str, value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if keyword in _SINGLE:
        return _changed(value, change)
    if keyword in _LISTS and isinstance(value, list):
        return [_changed(one, change) for one in value]
    if keyword in _MAPS and isinstance(value, dict):
        return {name: _changed(one, change) for name, one in value.items()}
    return value


def place_of_error(schema: Schema, reason: str, reason_for: Callable[[Schema], str]) -> str | None:
    """Return the place of the subschema that the grammar library rejects for a reason; None if not found.

    reason_for: returns the library's reason to reject a schema, or "". It gets the first `MAX_PLACES`
    subschemas, each without the schemas in it and its "$ref", so that a search takes little longer than the
    schema itself. A subschema whose "$ref" stands in the reason, in quotes and without "#", is the place too.
    """
    for number, (place, one) in enumerate(subschemas(schema)):
        if number == MAX_PLACES:
            return None
        reference = one.get("$ref")
        if isinstance(reference, str) and f"'{reference.removeprefix('#')}'" in reason:
            return place
        own = {keyword: value for keyword, value in one.items() if keyword not in (*_INSIDE, "$ref")}
        if reason_for(own) == reason:
            return place
    return None


def depth_of(value: object) -> int:
    """The number of levels of a JSON value, counted without recursion, which deep values would overflow.

    >>> depth_of(1), depth_of([]), depth_of({"a": [1, 2]})
    (1, 1, 3)
    """
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [inner for outer in level for inner in _inside(outer)]
    return depth


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def parsed(text: object) -> Schema:
    """The schema of a JSON text that `StructuredOutputsParams` has checked."""
    assert isinstance(text, str)
    schema: Schema = json.loads(text)
    return schema
