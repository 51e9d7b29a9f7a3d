"""StructuredOutputsParams: vLLM's names; exactly one form, checked and bounded when it is made."""

import dataclasses
from typing import Any

import pytest
from pydantic import BaseModel
from tiny_llm.structured_outputs import MAX_CHARACTERS, MAX_CHOICES, MAX_DEPTH

from tiny_llm import SamplingParams, SamplingParamsError, StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}
AS_TEXT = '{"type":"object","properties":{"größe":{"type":"integer"}}}'


class Person(BaseModel):
    name: str
    age: int


def test_the_fields_are_those_of_vllm() -> None:
    """Except `structural_tag`, which is not supported."""
    names = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    assert names == [
        *("json", "regex", "choice", "grammar", "json_object"),
        *("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"),
    ]


@pytest.mark.parametrize("given", [SCHEMA, AS_TEXT, f" {AS_TEXT}\n", AS_TEXT.replace("ö", "\\u00f6")])
def test_a_schema_becomes_its_compact_text_in_the_order_of_its_properties(given: Any) -> None:
    params = StructuredOutputsParams(json=given)
    assert params.json == AS_TEXT
    assert params == StructuredOutputsParams(json=SCHEMA)
    assert hash(params) == hash(StructuredOutputsParams(json=SCHEMA))


class Open(BaseModel, extra="allow"):
    name: str


def test_a_pydantic_model_stands_for_its_schema_without_other_properties() -> None:
    """As OpenAI's client does; a model may otherwise add properties until `max_tokens`."""
    schema = {**Person.model_json_schema(), "additionalProperties": False}
    assert StructuredOutputsParams(json=Person) == StructuredOutputsParams(json=schema)
    assert StructuredOutputsParams(json=Open) == StructuredOutputsParams(json=Open.model_json_schema())


def test_a_list_of_choices_becomes_a_tuple() -> None:
    assert StructuredOutputsParams(choice=["a", "b"]).choice == ("a", "b")


def test_sampling_params_take_a_mapping_of_the_fields() -> None:
    params = SamplingParams(structured_outputs={"json": SCHEMA, "disable_any_whitespace": True})
    expected = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    assert params.structured_outputs == expected
    assert dataclasses.replace(params, n=2).structured_outputs == expected


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, not none"),
        ({"regex": "a", "choice": ["b"]}, "not regex and choice"),
        ({"json": 3}, "structured_outputs.json must be a JSON schema: .* not 3"),
        ({"json": [SCHEMA]}, "structured_outputs.json must be a JSON schema"),
        ({"json": "[1]"}, r"structured_outputs.json must be a JSON schema, which is an object, not \[1\]"),
        ({"json": "true"}, "structured_outputs.json must be .*, not True"),
        ({"json": "{"}, "structured_outputs.json is not a JSON schema: Expecting"),
        ({"json": '{"minimum": NaN}'}, "NaN is not JSON"),
        ({"json": '{"minimum": 1e999}'}, "not a JSON schema"),
        ({"json": {"const": float("inf")}}, "not a JSON schema"),
        ({"json": {"const": {1, 2}}}, "not a JSON schema"),
        ({"json": {"const": "\ud800"}}, "structured_outputs.json must be valid Unicode"),
        ({"json": r'{"const": "\ud800"}'}, "structured_outputs.json must be valid Unicode"),
        ({"json": nested(MAX_DEPTH + 1)}, "at most 64 levels"),
        ({"json": nested(100_000)}, "at most 64 levels"),
        ({"json": "[" * 100_000}, "at most 64 levels"),
        ({"json": f'{{"const": "{"a" * MAX_CHARACTERS}"}}'}, "at most 262144 characters, not"),
        ({"json": {"const": "a" * MAX_CHARACTERS}}, "at most 262144 characters, not"),
        ({"regex": "a" * (MAX_CHARACTERS + 1)}, "structured_outputs.regex must have at most 262144"),
        ({"regex": 3}, "structured_outputs.regex must be a string, not 3"),
        ({"grammar": b"start: a"}, "structured_outputs.grammar must be a string"),
        ({"choice": "yes"}, "structured_outputs.choice must be a list of strings"),
        ({"choice": []}, "structured_outputs.choice must be a list with at least one string"),
        ({"choice": ["a", 1]}, r"structured_outputs.choice\[1\] must be a string, not 1"),
        ({"choice": ["a", ""]}, "structured_outputs.choice must be a list of strings that are not empty"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "at most 4096 strings, not 4097"),
        ({"choice": ["a" * 1000] * 300}, "at most 262144 characters, not 300000"),
        ({"json_object": False}, "json_object must be true or left out, not False"),
        ({"json_object": 1}, "json_object must be true or left out, not 1"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern is only for json and json_object"),
        ({"choice": ["a"], "disable_any_whitespace": True}, "only for json and json_object, not for choice"),
        ({"json": {}, "disable_any_whitespace": 1}, "disable_any_whitespace must be true or false, not 1"),
        ({"json": {}, "whitespace_pattern": "a" * 1025}, "whitespace_pattern must have at most 1024"),
        (
            {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True},
            "whitespace_pattern needs disable_any_whitespace=False",
        ),
    ],
)
def test_a_wrong_form_is_rejected_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(SamplingParamsError, match=f"^(?=structured_outputs).*{named}"):
        StructuredOutputsParams(**fields)
    with pytest.raises(SamplingParamsError, match=f"^(?=structured_outputs).*{named}"):
        SamplingParams(structured_outputs=fields)


def test_the_deepest_schema_is_accepted() -> None:
    assert StructuredOutputsParams(json=nested(MAX_DEPTH)).kind == "json"


class BrokenModel:
    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        raise RuntimeError("no schema for a callable")


def test_an_error_of_a_pydantic_model_is_quoted() -> None:
    with pytest.raises(SamplingParamsError, match="no schema for a callable"):
        StructuredOutputsParams(json=BrokenModel)


def test_an_unknown_field_is_rejected_with_a_suggestion() -> None:
    with pytest.raises(TypeError, match="no field 'regexp'; did you mean regex"):
        StructuredOutputsParams(regexp="a")  # type: ignore[call-arg]
    with pytest.raises(SamplingParamsError, match="structured_outputs has no field 'regexp'; did you mean"):
        SamplingParams(structured_outputs={"regexp": "a"})


@pytest.mark.parametrize("given", ["a+", 3, ["a"], True])
def test_anything_but_a_mapping_is_rejected(given: Any) -> None:
    with pytest.raises(SamplingParamsError, match="structured_outputs must be StructuredOutputsParams or a"):
        SamplingParams(structured_outputs=given)
