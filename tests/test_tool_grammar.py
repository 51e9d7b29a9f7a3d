"""Grammars of calls: under one, a model writes calls only in its form, with arguments that follow the schema.

Oracles: llguidance, which enforces the grammars, and jsonschema. The vocabulary is the 256 bytes, and the
markers as control tokens.
"""

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from test_tool_parser import FORMS, parsed
from tiny_llm_checkpoints.chat_tools import Tool, read_tools
from tiny_llm_checkpoints.reasoning_parser import QWEN3
from tiny_llm_checkpoints.tool_formats import Call, ToolFormat
from tiny_llm_checkpoints.tool_grammar import Reasoning, arguments_schema, tool_grammar
from tiny_llm_checkpoints.tool_parser import ToolParser

MARKERS = ["<eos>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>"]
CONTROL = {name: place for place, name in enumerate(MARKERS)}
REASONING = [None, Reasoning(QWEN3, is_open=False), Reasoning(QWEN3, is_open=True)]


class Vocabulary:
    """The markers, then the bytes."""

    eos_token_id = 0
    bos_token_id = None
    special_token_ids = list(range(len(MARKERS)))  # noqa: RUF012
    tokens = [b"\xff" + name.encode() for name in MARKERS] + [bytes([byte]) for byte in range(256)]

    def __call__(self, text: str | bytes) -> list[int]:
        return [len(MARKERS) + byte for byte in (text.encode() if isinstance(text, str) else text)]


TOKENIZER = LLTokenizer(TokenizerWrapper(Vocabulary()))


def function(name: str, parameters: Any = None, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


TOOLS = read_tools(
    [
        function(
            "get_weather",
            {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1}},
                "required": ["city"],
                "$defs": {"City": {"enum": ["Paris", 'the "Hague"', "Köln"]}},
            },
        ),
        function("now"),
    ]
)
ONE = [Call("get_weather", '{"city": "Paris", "days": 3}')]
TWO = [Call("get_weather", '{"city": "Köln"}'), Call("now", "{}")]


def matcher(grammar: str) -> LLMatcher:
    found = LLMatcher(TOKENIZER, grammar)
    assert not found.is_error(), found.get_error()
    return found


def tokens(text: str, control: dict[str, int]) -> list[int]:
    parts = re.split(f"({'|'.join(map(re.escape, control))})", text) if control else [text]
    found: list[int] = []
    for place, part in enumerate(parts):
        found += [control[part]] if place % 2 else Vocabulary()(part)
    return found


def accepts(grammar: str, text: str, control: dict[str, int]) -> bool:
    """Whether the grammar allows a text, and allows it to end there."""
    found, ids = matcher(grammar), tokens(text, control)
    return bool(found.try_consume_tokens(ids) == len(ids) and found.is_accepting())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("control", [{}, CONTROL], ids=["text", "tokens"])
@pytest.mark.parametrize("reasoning", REASONING, ids=["direct", "may reason", "reasons"])
def test_a_grammar_allows_only_calls_with_valid_arguments(
    form: ToolFormat, control: dict[str, int], reasoning: Reasoning | None
) -> None:
    grammar = tool_grammar(
        form, TOOLS, is_forced=True, parallel=True, control_tokens=control, reasoning=reasoning
    )
    start = "Hm, <b>\n</think>\n\n" if reasoning is not None and reasoning.is_open else ""
    assert accepts(grammar, start + form.written(ONE), control)
    assert accepts(grammar, start + form.written(TWO), control)
    assert not accepts(grammar, start, control)
    assert not accepts(grammar, start + "Hello", control)
    assert not accepts(grammar, f"{start}{form.written(ONE)} and", control)
    assert not accepts(grammar, f"{start}Hello {form.written(ONE)}", control)
    if reasoning is not None and not reasoning.is_open:
        assert accepts(grammar, "<think>Hm, <b> </th\n</think>" + form.written(ONE), control)
    for name, arguments in (
        ("get_weather", "{}"),
        ("get_weather", '{"city": "Rome"}'),
        ("get_weather", '{"city": "Paris", "days": 0}'),
        ("get_weather", '{"city": "Paris", "more": 1}'),
        ("now", '{"a": 1}'),
        ("unknown", "{}"),
    ):
        assert not accepts(grammar, start + form.written([Call(name, arguments)]), control)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_grammar_may_allow_one_call_only(form: ToolFormat) -> None:
    grammar = tool_grammar(form, TOOLS, is_forced=True, parallel=False, control_tokens={})
    assert accepts(grammar, form.written(ONE), {})
    assert not accepts(grammar, form.written(TWO), {})


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("control", [{}, CONTROL], ids=["text", "tokens"])
@pytest.mark.parametrize("reasoning", REASONING, ids=["direct", "may reason", "reasons"])
def test_strict_tools_bind_only_the_calls_of_a_free_answer(
    form: ToolFormat, control: dict[str, int], reasoning: Reasoning | None
) -> None:
    strict = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tools = read_tools([function("f", strict, strict=True), function("g", strict)])
    grammar = tool_grammar(
        form, tools, is_forced=False, parallel=True, control_tokens=control, reasoning=reasoning
    )
    start = "Hm\n</think>\n\n" if reasoning is not None and reasoning.is_open else ""
    before = start + ("Let me <look>: {} [1]. " if form.begin else "")
    good, free = Call("f", '{"n": 1}'), Call("g", '{"n": "x"}')
    for text in ("", "No call.", "A list: [1] {", " \n<b>"):
        assert accepts(grammar, start + text, control)
    assert accepts(grammar, before + form.written([good]), control)
    assert accepts(grammar, before + form.written([free, good]), control)
    for bad in (Call("f", "{}"), Call("f", '{"n": "x"}'), Call("h", "{}"), Call("g", "1")):
        assert not accepts(grammar, before + form.written([bad]), control)
        assert not accepts(grammar, before + form.written([good, bad]), control)


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}, "b": {"type": "boolean"}}},
    {"type": "object", "properties": {"n": {"type": ["integer", "null"]}}, "required": ["n"]},
    {"properties": {"list": {"type": "array", "items": {"enum": [1, "x", None]}, "maxItems": 3}}},
    {"anyOf": [{"properties": {"x": {"const": 1}}, "required": ["x"]}, {"properties": {"y": {"const": 2}}}]},
    {"$ref": "#/$defs/T", "$defs": {"T": {"type": "object", "properties": {"a": {"type": "number"}}}}},
    {
        "type": "object",
        "properties": {"child": {"$ref": "#"}, "name": {"type": "string", "pattern": "^[a-z]{1,4}$"}},
        "additionalProperties": False,
    },
    {},
]


def drawn(grammar: str, rng: random.Random) -> str | None:
    """A text of random allowed tokens, as a model without any sense writes it; None if it does not end."""
    found, written = matcher(grammar), b""
    for _ in range(600):
        mask = found.compute_bitmask()
        allowed = [token for token in range(len(Vocabulary.tokens)) if mask[token // 8] >> token % 8 & 1]
        # Such a model would rarely end a string: prefer to.
        quote = Vocabulary()('"')[0]
        token = quote if quote in allowed and rng.random() < 0.3 else rng.choice(allowed)
        if token == Vocabulary.eos_token_id:
            return written.decode()
        found.consume_token(token)
        written += MARKERS[token].encode() if token < len(MARKERS) else Vocabulary.tokens[token]
        if found.is_stopped():
            return written.decode()
    return None


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_a_grammar_allows_is_parsed_and_valid(form: ToolFormat) -> None:
    """Ten random texts for each schema; most of them end."""
    ended = 0
    for number, schema in enumerate(SCHEMAS):
        tools = read_tools([function("f", schema)])
        grammar = tool_grammar(form, tools, is_forced=True, parallel=True, control_tokens=CONTROL)
        for seed in range(10):
            text = drawn(grammar, random.Random(100 * number + seed))
            if text is None:
                continue
            ended += 1
            answer = parsed(ToolParser(form, ["f"], as_generated=True), list(text))
            assert answer.content == ""
            assert answer.calls
            for call in answer.calls.values():
                jsonschema.validate(json.loads(call.arguments), {"type": "object", **schema})
    assert ended >= 6 * len(SCHEMAS)


@pytest.mark.parametrize(
    ("parameters", "closed"),
    [
        ({}, True),
        ({"type": "object", "properties": {}}, True),
        ({"type": "object"}, False),  # any object
        ({"properties": {"a": {}}, "additionalProperties": True}, False),
        ({"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]}, False),
    ],
)
def test_only_listed_parameters_are_allowed_unless_the_schema_says_otherwise(
    parameters: dict[str, Any], closed: bool
) -> None:
    schema = arguments_schema(Tool("f", parameters, is_strict=False, fields={}))
    assert (schema.get("additionalProperties") is False) == closed
    assert schema["type"] == "object"
