"""JSON schemas: every finished text satisfies its schema, or the schema is rejected by name and place.

Oracle: the `jsonschema` package, Draft 2020-12.
"""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from tiny_llm.errors import SamplingParamsError
from tiny_llm.json_schema import subschemas, with_alternatives_in_place, with_closed_objects

from grammars import byte_grammar, random_text

KIND = {"type": "object", "required": ["k"], "maxProperties": 2}
TEXT, NUMBER, NULL = {"type": "string", "maxLength": 3}, {"type": "integer"}, {"type": "null"}


def check_random_texts(schema: dict[str, Any], count: int = 25) -> int:
    """Check that random texts of a schema satisfy it; returns how many have ended."""
    validator = Draft202012Validator(schema, format_checker=FormatChecker())
    texts = [random_text(byte_grammar(json=schema).fork(), seed) for seed in range(count)]
    finished = [json.loads(text) for text in texts if text is not None]
    for value in finished:
        validator.validate(value)
    return len(finished)


# One schema or more for each keyword.
SCHEMAS: dict[str, dict[str, Any]] = {
    "minimum": {"type": "integer", "minimum": -5, "maximum": 1007},
    "exclusive": {"type": "integer", "exclusiveMinimum": 9.5, "exclusiveMaximum": 11},
    "number": {"type": "number", "minimum": 0.1, "maximum": 0.3},
    "tiny number": {"type": "number", "exclusiveMinimum": 1e-12, "maximum": 1e-9},
    "exclusive number": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "any number": {"type": "number"},
    "multipleOf": {"type": "integer", "multipleOf": 7, "minimum": 1},
    "fraction": {"type": "number", "multipleOf": 0.5},
    "largest integers": {"type": "integer", "minimum": 2**53 - 2, "maximum": 2**53},
    "length": {"type": "string", "minLength": 2, "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^[a-c]+$"},
    "unanchored pattern": {"type": "string", "pattern": "b", "maxLength": 5},
    "pattern with escapes": {"type": "string", "pattern": r'^["\\/\n]\d\w\s$'},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "uuid": {"type": "string", "format": "uuid"},
    "enum": {"enum": [1, "a", None, True, {"a": [1, 2]}, 1.5]},
    "enum of a type": {"type": "string", "enum": ["a", 1]},
    "const": {"const": {"a": 1, "b": [None]}},
    "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "prefixItems": {"type": "array", "prefixItems": [NUMBER, NULL], "items": TEXT, "maxItems": 4},
    "no more items": {"type": "array", "prefixItems": [NUMBER, NULL], "items": False},
    "additionalProperties": {
        "type": "object", "properties": {"a": NUMBER}, "additionalProperties": TEXT,
    },
    "patternProperties": {
        "type": "object",
        "properties": {"xa": {"minimum": 3, "type": "integer"}},
        "patternProperties": {"^x": NUMBER, "^y": NULL},
        "additionalProperties": False,
    },
    "required": {"type": "object", "required": ["z"], "additionalProperties": NULL},
    "minProperties": {"type": "object", "minProperties": 1, "additionalProperties": NULL},
    "minProperties and required": {
        "type": "object", "required": ["a"], "minProperties": 2, "additionalProperties": NULL,
    },
    "forbidden property": {"type": "object", "properties": {"a": False}, "additionalProperties": NULL},
    "anyOf": {"anyOf": [{"type": "integer", "maximum": 3}, TEXT]},
    "oneOf": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": name}}, "required": ["k"], "maxProperties": 2}
            for name in ("a", "b")
        ]
    },
    "oneOf of references": {
        "$defs": {name: {**KIND, "properties": {"k": {"const": name}}} for name in ("a", "b")},
        "type": "array",
        "items": {
            "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "discriminator": {"propertyName": "k"},
        },
        "maxItems": 2,
    },
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": NUMBER}, "required": ["a"]},
            {"properties": {"b": NULL}, "required": ["b"], "additionalProperties": NUMBER},
        ]
    },
    "anyOf beside properties": {
        "type": "object", "properties": {"a": NUMBER}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "additionalProperties": NULL,
    },
    "types": {"type": ["integer", "null"], "minimum": 3},
    "no type": {"minimum": 3, "maxLength": 2, "maxItems": 1, "maxProperties": 1},
    "reference": {"$defs": {"n": NUMBER}, "$ref": "#/$defs/n", "minimum": 5},
    "escaped reference": {"$defs": {"a/b~c d": NULL}, "$ref": "#/$defs/a~1b~0c%20d"},
    "anchor": {"$defs": {"a": {"$anchor": "here", "type": "null"}}, "$ref": "#here"},
    "recursion": {
        "$defs": {"l": {"anyOf": [NULL, {"type": "array", "items": {"$ref": "#/$defs/l"}, "maxItems": 1}]}},
        "$ref": "#/$defs/l",
    },
    "root": {"type": "object", "properties": {"c": {"$ref": "#"}}, "additionalProperties": False},
    "annotations": {
        "title": "T", "description": "D", "default": 1, "examples": [1], "deprecated": True, "readOnly": True,
        "$comment": "C", "nullable": True, "x-own": 1, "type": "integer",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_finished_text_satisfies_the_schema(name: str) -> None:
    assert check_random_texts(SCHEMAS[name]) >= 15


@pytest.mark.parametrize(
    ("schema", "place", "named"),
    [
        ({"not": {}}, "#", '"not" is not supported'),
        ({"if": {}, "then": {}}, "#", '"if", "then" is not supported'),
        ({"contains": {}}, "#", '"contains" is not supported'),
        ({"uniqueItems": True}, "#", '"uniqueItems" is not supported'),
        ({"propertyNames": {}}, "#", '"propertyNames" is not supported'),
        ({"dependentRequired": {"a": ["b"]}}, "#", '"dependentRequired" is not supported'),
        ({"dependentSchemas": {"a": {}}}, "#", '"dependentSchemas" is not supported'),
        ({"unevaluatedProperties": False}, "#", '"unevaluatedProperties" is not supported'),
        ({"$dynamicRef": "#a"}, "#", r'"\$dynamicRef" is not supported'),
        ({"type": "strin"}, "#", "Invalid type: strin"),
        ({"type": "string", "pattern": "("}, "#", "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "#", "look-around"),
        ({"type": "string", "format": "color"}, "#", "Unknown format: color"),
        ({"type": "string", "minLength": -1}, "#", "minLength"),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "#", "exclusiveMinimum 0 is not supported with a maximum"),
        (
            {"exclusiveMaximum": -3, "exclusiveMinimum": -3.5},
            "#",
            "exclusiveMaximum -3 is not supported with",
        ),
        ({"type": "integer", "minimum": "3"}, "#", "minimum"),
        ({"type": "integer", "maximum": 2**53 + 1}, "#", r"maximum must be from -2\*\*53 to 2\*\*53"),
        ({"type": "number", "exclusiveMinimum": -1e300}, "#", "exclusiveMinimum must be"),
        ({"type": "object", "minProperties": 2}, "#", "minProperties must be at most"),
        ({"type": "object", "required": ["a"], "minProperties": 3}, "#", "minProperties must be at most"),
        ({"items": [NULL]}, "#", "a list of items is not supported: use prefixItems"),
        ({"items": NULL, "additionalItems": False}, "#", "a list of items is not supported"),
        ({"enum": 3}, "#", "enum must be an array"),
        ({"$ref": "#/$defs/none"}, "#", "does not exist"),
        ({"$ref": "http://example.com/schema"}, "#", "not present in a registry"),
    ],
)
@pytest.mark.parametrize(
    ("outer", "prefix"),
    [
        (lambda schema: schema, ""),
        (lambda schema: {"type": "object", "properties": {"a/b": schema, "c": {}}}, "/properties/a~1b"),
        (lambda schema: {"anyOf": [NULL, {"prefixItems": [NULL, schema]}]}, "/anyOf/1/prefixItems/1"),
        (lambda schema: {"$defs": {"d": schema}, "items": {"$ref": "#/$defs/d"}}, "/$defs/d"),
        (lambda schema: {"type": "object", "additionalProperties": schema}, "/additionalProperties"),
    ],
    ids=["root", "property", "alternative", "definition", "additional property"],
)
def test_what_cannot_be_enforced_is_rejected_with_its_place(
    schema: dict[str, Any], place: str, named: str, outer: Any, prefix: str
) -> None:
    with pytest.raises(SamplingParamsError, match=named) as error:
        byte_grammar(json=outer(schema))
    assert str(error.value).startswith(f"structured_outputs.json at {place}{prefix}: ")


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"x-guidance": {"lenient": True}, "not": {}}, "must not have 'x-guidance'"),
        ({"oneOf": [NUMBER, {"type": "number"}]}, "oneOf needs alternatives that exclude each other"),
        ({"allOf": [NUMBER, TEXT]}, "Unsatisfiable schema"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum .3."),
        (
            {"allOf": [{"exclusiveMinimum": 1}, {"maximum": 1.5}]},
            "exclusiveMinimum 1 is not supported with a",
        ),
        ({"maximum": 1.5, "$ref": "#/$defs/a", "$defs": {"a": {"exclusiveMinimum": 1}}}, "is not supported"),
        ({"type": "string", "pattern": "^a$", "minLength": 3}, "Unsatisfiable schema"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "Unsatisfiable schema"),
        ({"$ref": "#"}, "no text satisfies it"),
    ],
)
def test_a_schema_that_is_wrong_as_a_whole_is_rejected(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(SamplingParamsError, match=f"structured_outputs.json.*{named}"):
        byte_grammar(json=schema)


def test_the_schemas_in_a_schema_are_found_with_their_places() -> None:
    schema = {
        "properties": {"a~b": {"items": {"title": "deep"}}, "c": True},
        "enum": [{"properties": {"x": {}}}],
        "anyOf": [{"title": "one"}, False],
    }
    assert [place for place, _ in subschemas(schema)] == [
        *("#", "#/anyOf/0", "#/properties/a~0b", "#/properties/a~0b/items")
    ]


def test_objects_with_properties_are_closed_unless_they_say_otherwise() -> None:
    inner = {"properties": {"a": {}}}
    schema = {
        "properties": {
            "x": inner,
            "y": {"properties": {}, "additionalProperties": NULL},
            "z": {"type": "object"},
        },
        "items": [],
        "anyOf": [inner],
        "const": inner,
    }
    shut = {"properties": {"a": {}}, "additionalProperties": False}
    assert with_closed_objects(schema) == {
        "properties": {
            "x": shut,
            "y": {"properties": {}, "additionalProperties": NULL},
            "z": {"type": "object"},
        },
        "items": [],
        "anyOf": [shut],
        "const": inner,
        "additionalProperties": False,
    }
    assert "additionalProperties" not in inner, "the schema itself must not change"


def test_the_copies_of_definitions_in_a_schema_are_bounded() -> None:
    """A large definition that is an alternative a thousand times."""
    alternatives = [{"$ref": "#/$defs/large"}, {"$ref": "#/$defs/small"}]
    schema = {
        "$defs": {"large": {"const": "a" * 100_000}, "small": {"const": 1}},
        "prefixItems": [{"oneOf": alternatives}] * 1000,
    }
    copy = with_alternatives_in_place(schema)
    assert copy["prefixItems"][0]["oneOf"] == [{"const": "a" * 100_000}, {"const": 1}]
    assert copy["prefixItems"][999]["oneOf"] == [{"$ref": "#/$defs/large"}, {"const": 1}]
    assert len(json.dumps(copy)) < 500_000
