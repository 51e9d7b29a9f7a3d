"""Random schemas: every finished text satisfies its schema. Oracle: the `jsonschema` package.

The many walk through the grammar at random, byte by byte. Some are answered by the embedded model at
temperature 1, which finishes nearly all of them.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from grammars import byte_grammar, random_text
from random_schemas import check_text, random_schema
from tiny_llm import LLM, SamplingParams, StructuredOutputsParams
from tiny_model import examples

MOST_TOKENS = 512
ENOUGH = 0.9  # of the answers must finish within `MOST_TOKENS`


def test_the_schemas_are_valid_and_use_every_kind_of_keyword() -> None:
    text = str([random_schema(seed) for seed in range(200)])
    for seed in range(200):
        Draft202012Validator.check_schema(random_schema(seed))
    for keyword in (
        *("properties", "required", "additionalProperties", "maxProperties", "items", "prefixItems"),
        *(
            "minItems",
            "maxItems",
            "enum",
            "const",
            "anyOf",
            "allOf",
            "$ref",
            "$defs",
            "minLength",
            "maxLength",
        ),
        *("pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    ):
        assert f"'{keyword}'" in text, f"no schema has {keyword}"


@pytest.mark.drawn
def test_random_walks_end_in_texts_that_satisfy_their_schemas() -> None:
    finished = 0
    for seed in range(examples(400)):
        schema = random_schema(seed)
        grammar = byte_grammar(json=schema)
        for walk in range(4):
            text = random_text(grammar.fork(), walk, most=600)
            if text is not None:
                finished += 1
                check_text(schema, text.decode())
    assert finished > 2 * examples(400)


def test_the_check_finds_a_text_that_does_not_satisfy_its_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "number", "exclusiveMinimum": 0.1}}}
    check_text(schema, '{"a": 0.1000000000000000000001}')
    for text in ('{"a": 0.1}', '{"a": "b"}', "[]"):
        with pytest.raises(ValidationError):
            check_text(schema, text)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_num_seqs=16, max_model_len=1024) as llm:
        yield llm


def check_answers(llm: LLM, seeds: range) -> None:
    """Answer a question in each schema's form, 16 at a time."""
    forms = [random_schema(seed) for seed in seeds]
    each = [
        SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=MOST_TOKENS,
            structured_outputs=StructuredOutputsParams(json=form),
        )
        for seed, form in zip(seeds, forms, strict=True)
    ]
    question: list[Any] = [{"role": "user", "content": "Describe something you like, in JSON."}]
    answers = [one.outputs[0] for one in llm.chat([question] * len(forms), each, use_tqdm=False)]
    finished = [(form, one) for form, one in zip(forms, answers, strict=True) if one.finish_reason == "stop"]
    for form, answer in finished:
        check_text(form, answer.text)
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    assert len(finished) >= ENOUGH * len(forms), f"only {len(finished)} of {len(forms)} answers finished"


def test_sampled_answers_satisfy_their_schemas(llm: LLM) -> None:
    check_answers(llm, range(40))


@pytest.mark.deep
def test_many_sampled_answers_satisfy_their_schemas(llm: LLM) -> None:
    """A thousand with HYPOTHESIS_PROFILE=deep."""
    check_answers(llm, range(1000, 1000 + examples(50)))
