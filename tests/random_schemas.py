"""Random JSON schemas of all kinds that structured output supports. Every schema can be satisfied."""

import json
from collections.abc import Callable
from decimal import Decimal
from random import Random
from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]

WORDS = ["name", "size", "tags", "größe", "a/b", "x y", "id", '"q"']
PATTERNS = ["^[a-z]+$", r"^\d{2,4}$", "^(yes|no)$", "[A-C]", r"^\w{1,8}$", "^é?x+$"]


def random_schema(seed: int) -> Schema:
    """An object or an array, three levels deep or less; a quarter has definitions.

    One in thirty is recursive: a small model may repeat itself there until `max_tokens`.
    """
    rng = Random(seed)
    schema = rng.choice([_object, _object, _array])(rng, 3)
    if rng.random() < 0.25:
        inner = {"$ref": "#/$defs/tree" if rng.random() < 0.13 else "#/$defs/leaf"}
        tree = {"value": _scalar(rng, 0), "next": {"anyOf": [{"type": "null"}, inner]}}
        required = {"type": "object", "properties": tree, "required": ["value", "next"]}
        schema = {
            "$defs": {"tree": {**required, "additionalProperties": False}, "leaf": _scalar(rng, 0)},
            "type": "object",
            "properties": {"tree": {"$ref": "#/$defs/tree"}, "leaf": {"$ref": "#/$defs/leaf"}, "own": schema},
            "required": ["tree", "leaf"],
            "additionalProperties": False,
        }
    return schema


def _any(rng: Random, depth: int) -> Schema:
    kinds: list[Callable[[Random, int], Schema]] = [_scalar] * 3
    kinds += [_object, _array, _any_of, _all_of] if depth else []
    return rng.choice(kinds)(rng, depth)


def _object(rng: Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(1, 4))
    schema: Schema = {
        "type": "object",
        "properties": {name: _any(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    rest = rng.random()
    if rest < 0.8:
        schema["additionalProperties"] = False
    elif rest < 0.9:
        schema |= {
            "additionalProperties": _scalar(rng, 0),
            "required": names,
            "maxProperties": len(names) + 1,
        }
    return schema


def _array(rng: Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    schema: Schema = {"type": "array", "minItems": least, "maxItems": rng.randint(max(1, least), 3)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_any(rng, depth - 1) for _ in range(rng.randint(1, 2))]
    return {**schema, "items": _any(rng, depth - 1)}


def _any_of(rng: Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def _all_of(rng: Random, depth: int) -> Schema:
    """Two objects with different properties."""
    some = {"type": "object", "properties": {"left": _any(rng, depth - 1)}, "required": ["left"]}
    rest = {"properties": {"right": _any(rng, depth - 1)}, "required": ["right"], "maxProperties": 2}
    return {"allOf": [some, rest]}


def _scalar(rng: Random, _: int) -> Schema:
    kinds = [_text, _text, _pattern, _whole, _number, _enum, _const, _format]
    plain = [
        {"type": "boolean"},
        {"type": "null"},
        {"type": ["integer", "null"], "maximum": 99, "minimum": 0},
    ]
    return rng.choice([*(kind(rng) for kind in kinds), rng.choice(plain)])


def _text(rng: Random) -> Schema:
    least = rng.choice([0, 0, 1, 5])
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(1, 20)}


def _pattern(rng: Random) -> Schema:
    return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 12}


def _whole(rng: Random) -> Schema:
    least = rng.randint(-1000, 1000)
    schema: Schema = {"type": "integer", "minimum": least, "maximum": least + rng.randint(20, 10**6)}
    return schema | ({"multipleOf": rng.randint(2, 12)} if rng.random() < 0.3 else {})


def _number(rng: Random) -> Schema:
    least = rng.randint(-200, 200) / 4
    low, high = rng.choice(["minimum", "exclusiveMinimum"]), rng.choice(["maximum", "exclusiveMaximum"])
    schema: Schema = {"type": "number", low: least, high: least + rng.randint(4, 400) / 4}
    return schema | ({"multipleOf": 0.25} if rng.random() < 0.5 else {})


def _enum(rng: Random) -> Schema:
    return {"enum": rng.sample(["red", "green", 3, -1.5, True, None, {"a": [1, None]}, "", 'q"\\'], 3)}


def _const(rng: Random) -> Schema:
    return {"const": rng.choice(["fixed", 42, False, None, [1, "x"], {"k": {"v": 0.5}}])}


def _format(rng: Random) -> Schema:
    return {"type": "string", "format": rng.choice(["date", "time", "date-time", "uuid", "ipv4"])}


def check_text(schema: Schema, text: str) -> None:
    """Raise unless a text is JSON that satisfies a schema. Numbers are exact, as they are written."""
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    Draft202012Validator(exact).validate(json.loads(text, parse_float=Decimal))
