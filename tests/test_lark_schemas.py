"""Schemas and control tokens in a client's grammar: what is enforced, and what is rejected with its line.

Oracles: the texts themselves, and the same schema without a grammar.
"""

import json

import pytest
from tiny_llm.errors import SamplingParamsError
from tiny_llm.grammar_compiler import GrammarCompiler
from tiny_llm.json_schema import MAX_DEPTH
from tiny_llm.lark_schemas import with_checked_schemas

from grammars import accepts, allowed_ids, byte_grammar, byte_tokenizer
from tiny_llm import StructuredOutputsParams
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.gguf_format import read_gguf_header
from tiny_llm_checkpoints.gguf_tokenizer import gguf_tokenizer

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


def refusal(grammar: str) -> str:
    with pytest.raises(SamplingParamsError) as error:
        byte_grammar(grammar=grammar)
    return str(error.value)


def test_a_schema_in_a_grammar_is_enforced() -> None:
    grammar = byte_grammar(grammar=f'start: "at " point\npoint: %json {json.dumps(POINT)}')
    assert accepts(grammar, 'at {"x": 1}')
    assert not accepts(grammar, 'at {"x": "1"}')
    assert not accepts(grammar, 'at {"x": 1}}')


def test_alternatives_that_are_references_exclude_each_other_in_a_grammar_too() -> None:
    """As pydantic writes discriminated unions."""
    kinds = {
        name: {"type": "object", "properties": {"k": {"const": name}}, "required": ["k"]} for name in "ab"
    }
    schema = {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": kinds}
    grammar = byte_grammar(grammar=f"start: %json {json.dumps(schema)}")
    assert accepts(grammar, '{"k": "b"}')
    assert not accepts(grammar, '{"k": "c"}')


@pytest.mark.parametrize(
    "rule",
    ['a[temperature=0.7]: "x"', "  a [lazy, temperature = 2]: /x/", '?a[max_tokens=3,temperature=0]: "x"'],
)
def test_a_temperature_of_a_rule_is_refused_instead_of_ignored(rule: str) -> None:
    message = refusal(f"start: a\n{rule}")
    assert "structured_outputs.grammar at line 2" in message
    assert "must not have a temperature" in message


def test_the_word_temperature_in_a_text_is_no_temperature() -> None:
    assert accepts(byte_grammar(grammar='start: "a[temperature=1]"'), "a[temperature=1]")


def test_white_space_is_bounded_as_without_a_grammar() -> None:
    inside = byte_grammar(grammar=f"start: %json {json.dumps(POINT)}")
    alone = byte_grammar(json=POINT)
    for blanks in ("", " ", "  ", "\n", "\n" + 16 * " ", "\n" + 17 * " ", "\n\n", "\t"):
        text = f'{{{blanks}"x":1}}'
        assert accepts(inside, text) == accepts(alone, text)


def test_a_schema_may_say_its_layout() -> None:
    schema = {**POINT, "x-guidance": {"whitespace_flexible": False, "key_separator": " = "}}
    grammar = byte_grammar(grammar=f"start: %json {json.dumps(schema)}")
    assert accepts(grammar, '{"x" = 1}')
    assert not accepts(grammar, '{"x": 1}')


def test_errors_after_a_schema_of_several_lines_have_the_right_line() -> None:
    schema = json.dumps(POINT, indent=2)
    assert with_checked_schemas(f"start: a\na: %json {schema}\nb: c", "f", "x").count("\n") == (
        schema.count("\n") + 2
    )
    assert f"(line {schema.count(chr(10)) + 3})" in refusal(f"start: a b\na: %json {schema}\nb: c")


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        # What `check_schema` rejects, everywhere.
        ('start: "a"\nb: %json {"items": [1]}', "at line 2 at #: a list of items is not supported"),
        ('start: %json{"type": "integer", "minimum": 1e300}', "at line 1 at #: minimum must be from -2**53"),
        ('start: %json\n\t {"properties": {"a": {"items": []}}}', "at line 1 at #/properties/a: a list"),
        ('start: b\nb: %lark {\nstart: %json {"items": []}\n}\n', "at line 3 at #: a list of items"),
        # What would weaken a schema.
        ('start: %json {"x-guidance": {"coerce_one_of": true}}', "x-guidance may have whitespace_flexible,"),
        ('start: %json {"x-guidance": true}', "x-guidance may have whitespace_flexible, "),
        # What is not JSON, or is for Python and not for the library.
        ("start: %json {", "at line 1: what follows %json is not JSON"),
        ('start: %json {"minimum": NaN}', "NaN is not JSON"),
        ('start: "a" # %json {x}', "what follows %json is not JSON"),
        ("start: %json " + '{"a":' * 40_000, "at most 64 levels"),
        ("start: %json " + '{"items":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH, "at most 64 levels"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_enforced_is_rejected(grammar: str, reason: str) -> None:
    message = refusal(grammar)
    assert message.startswith("structured_outputs.grammar at line ")
    assert reason in message
    assert len(message) < 500


def test_a_schema_that_only_the_library_would_see_is_not_taken() -> None:
    """For the library, the second schema is outside of the expression; for us, it is in the first schema."""
    hidden = '"not": {"type": "integer"}, "x-guidance": {"lenient": true}}'
    message = refusal('start: /%json {"a":"/%json {"}": 1, ' + hidden)
    assert "lexer error" in message


@pytest.mark.parametrize("word", ["%json {", "\\u0025json {"])
def test_a_schema_may_have_the_word(word: str) -> None:
    grammar = byte_grammar(grammar=f'start: %json {{"const": "{word}"}}')
    assert accepts(grammar, '"%json {"')
    assert not accepts(grammar, '"json {"')


def test_the_word_in_a_string_or_comment_is_no_schema() -> None:
    grammar = byte_grammar(grammar='start: "%json" b // %json embeds a schema\nb: /%json[a-z]/')
    assert accepts(grammar, "%json%jsonx")


# Control tokens.

TOKENIZER = gguf_tokenizer(read_gguf_header(embedded_model_path()).metadata)
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, TOKENIZER.eos_token_ids)
MARK = TOKENIZER.control_token_ids()["<file_sep>"]


@pytest.mark.parametrize("name", [f"<[{MARK}]>", "<file_sep>"])
def test_a_grammar_names_control_tokens_by_id_or_name(name: str) -> None:
    grammar = COMPILER.compile(StructuredOutputsParams(grammar=f'start: "a" {name} "b"'))
    for text in ("a", None, "b"):
        [token] = [MARK] if text is None else TOKENIZER.encode(text)
        allowed = allowed_ids(grammar.allowed(), TOKENIZER.vocab_size)
        assert allowed == [token]
        grammar.accept(token)
    assert grammar.has_ended


def test_any_other_token_can_be_named_too_as_with_a_logit_bias() -> None:
    grammar = COMPILER.compile(StructuredOutputsParams(grammar="start: <[1000]> <[30-32]>"))
    assert allowed_ids(grammar.allowed(), TOKENIZER.vocab_size) == [1000]
    grammar.accept(1000)
    assert allowed_ids(grammar.allowed(), TOKENIZER.vocab_size) == [30, 31, 32]


@pytest.mark.parametrize("name", ["<[49152]>", "<[0-49152]>", "<|nope|>"])
def test_a_token_that_the_model_does_not_have_is_rejected(name: str) -> None:
    with pytest.raises(SamplingParamsError, match=r"^structured_outputs\.grammar: "):
        COMPILER.compile(StructuredOutputsParams(grammar=f'start: "a" {name}'))


def test_a_vocabulary_without_an_end_takes_grammars() -> None:
    grammar = GrammarCompiler(byte_tokenizer(), 257, []).compile(StructuredOutputsParams(choice=["ab"]))
    for byte in b"ab":
        assert allowed_ids(grammar.allowed(), 257) == [byte]
        grammar.accept(byte)
    assert grammar.has_ended
