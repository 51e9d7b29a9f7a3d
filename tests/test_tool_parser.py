"""Calls of tools and reasoning in answers: what is a call, what is content, and that pieces do not matter.

Oracles: the calls that a text was written from, and Python's json.
"""

import json
import random
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_llm import ConfigError
from tiny_llm_checkpoints.answer_deltas import CallDelta, ContentDelta, Delta, ReasoningDelta
from tiny_llm_checkpoints.answer_markers import num_begun
from tiny_llm_checkpoints.answer_parser import AnswerParser
from tiny_llm_checkpoints.json_scanner import MAX_DEPTH, Expects, JsonScanner, NotJSONError
from tiny_llm_checkpoints.reasoning_parser import (
    DEEPSEEK_R1,
    QWEN3,
    ReasoningFormat,
    ReasoningParser,
    reasoning_named,
)
from tiny_llm_checkpoints.reasoning_parser import MISTRAL as MISTRAL_REASONING
from tiny_llm_checkpoints.tool_formats import (
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_ARGS,
    SMOLLM2,
    Call,
    ToolFormat,
    format_named,
    format_of,
)
from tiny_llm_checkpoints.tool_parser import ToolParser

FORMS = {"hermes": HERMES, "smollm2": SMOLLM2, "llama3": LLAMA3, "mistral": MISTRAL, "args": MISTRAL_ARGS}
NAMES = ["f", "get_weather"]
CALLS = [Call("f", '{"a": "x}\\"<tool_call>[TOOL_CALLS]", "b": [1, {"c": null}]}'), Call("get_weather", "{}")]


class Answer(NamedTuple):
    """An answer's parts: the reasoning, the content, and the calls by number."""

    reasoning: str
    content: str
    calls: dict[int, Call]


def gathered(deltas: list[Delta]) -> Answer:
    """Join the parts; a call has exactly one delta with its name, which is the first."""
    calls: dict[int, Call] = {}
    for delta in deltas:
        if isinstance(delta, CallDelta):
            assert (delta.name is None) == (delta.number in calls)
            before = calls.get(delta.number, Call(delta.name or "", ""))
            calls[delta.number] = before._replace(arguments=before.arguments + delta.arguments)
    assert list(calls) == list(range(len(calls)))
    texts = {
        kind: "".join(one.text for one in deltas if isinstance(one, kind))
        for kind in (ReasoningDelta, ContentDelta)
    }
    return Answer(texts[ReasoningDelta], texts[ContentDelta], calls)


def parsed(parser: ToolParser | ReasoningParser | AnswerParser, pieces: list[str]) -> Answer:
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.push(piece)
    return gathered(deltas + parser.finish())


def parse(form: ToolFormat, text: str, **options: Any) -> Answer:
    return parsed(ToolParser(form, NAMES, **options), [text])


def cut(text: str, rng: random.Random) -> list[str]:
    """Cut a text into pieces of 0 to 6 characters."""
    pieces = []
    while text:
        length = rng.randint(0, 6)
        pieces.append(text[:length])
        text = text[length:]
    return pieces


# What is a call.


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("as_generated", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_what_a_model_writes_in_its_form_is_found(form: ToolFormat, as_generated: bool, count: int) -> None:
    text = form.written(CALLS[:count])
    for pieces in ([text], list(text)):
        answer = parsed(ToolParser(form, NAMES, as_generated=as_generated), pieces)
        assert answer == ("", "", dict(enumerate(CALLS[:count])))


@pytest.mark.parametrize("name", ["hermes", "smollm2", "mistral", "args"])
def test_text_around_calls_is_content_without_the_white_space_beside_them(name: str) -> None:
    text = FORMS[name].written(CALLS)
    answer = parse(FORMS[name], f"Let me look. \n{text}\n")
    assert answer == ("", "Let me look.", dict(enumerate(CALLS)))
    assert parse(FORMS[name], f"{text}\nThat is all. ").content == "\nThat is all. "


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>{"arguments": {}, "name": "f"}'),  # another order, and no end
        (HERMES, '<tool_call>\n[{"name": "f"}]\n</tool_call>'),  # SmolLM2's form, without arguments
        (SMOLLM2, '<tool_call>{"name":"f","parameters":{}}</tool_call>'),
        (
            HERMES,
            '<tool_call>{"id": 1, "type": "function", "name": "f", "arguments": {}, "x": [-1.5e3, true]}',
        ),
        (HERMES, '<tool_call><tool_call>{"name": "f", "arguments": {}}'),
        (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {}}'),
        (LLAMA3, '\n{"type": "function", "name": "f", "parameters": {}}'),
        (MISTRAL, "[TOOL_CALLS]f{}"),
        (MISTRAL_ARGS, '[TOOL_CALLS] [{"name": "f", "arguments": {}}]'),
        (MISTRAL_ARGS, "[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{}"),
        (HERMES, '<tool_call>{"name": "\\u0066", "arguments": {}}</tool_call>'),
    ],
)
def test_near_variants_of_a_form_are_found(form: ToolFormat, text: str) -> None:
    answer = parse(form, text)
    assert answer.calls == {0: Call("f", "{}")}
    assert answer.content in ("", "<tool_call>")


@pytest.mark.parametrize("text", ['{"name": "f", "parameters": {}}\n{"name": "f", "parameters": {}}'])
def test_llamas_calls_may_stand_side_by_side(text: str) -> None:
    assert len(parse(LLAMA3, text).calls) == 2


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": 7, "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}, "parameters": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
        (HERMES, "<tool_call>{}</tool_call>"),
        (HERMES, "<tool_call>[]</tool_call>"),
        (HERMES, "<tool_call>[[{}]]</tool_call>"),
        (HERMES, '<tool_call>"f"</tool_call>'),
        (HERMES, "<tool_call>f(1)</tool_call>"),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 01}}'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}'),
        (HERMES, "<tool_call>{'name': 'f', 'arguments': {}}"),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "x'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}'),
        (HERMES, "<tool_call>"),
        (HERMES, "a <tool_cal"),
        (HERMES, "</tool_call> \n"),
        (HERMES, '{"name": "f", "arguments": {}}'),
        (HERMES, "\ud800<tool_call>\x00"),
        (HERMES, '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 2 * MAX_DEPTH),
        (LLAMA3, 'Sure: {"name": "f", "parameters": {}}'),
        (LLAMA3, '{"name": "Ada", "age": 36}'),
        (LLAMA3, "{1}"),
        (LLAMA3, "<|python_tag|>print(1)"),
        (MISTRAL, '[{"name": "f", "arguments": {}}]'),
        (MISTRAL_ARGS, "[TOOL_CALLS]unknown[ARGS]{}"),
        (MISTRAL_ARGS, "[TOOL_CALLS]f[ARGS]1"),
        (MISTRAL_ARGS, "[TOOL_CALLS]" + "f" * 1000),
        (MISTRAL_ARGS, "[TOOL_CALLS]f"),
        (SMOLLM2, ""),
        (SMOLLM2, " \n"),
    ],
)
def test_what_is_not_a_call_is_content_as_generated(form: ToolFormat, text: str) -> None:
    for pieces in ([text], list(text)):
        assert parsed(ToolParser(form, NAMES), pieces) == ("", text, {})


def test_a_broken_call_after_a_good_one_is_content() -> None:
    text = '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g"}]</tool_call>'
    assert parse(SMOLLM2, text) == ("", ', {"name": "g"}]</tool_call>', {0: Call("f", "{}")})


def test_a_broken_call_does_not_hide_a_good_one() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": oops <tool_call>{"name": "f", "arguments": {}}'
    answer = parse(HERMES, text)
    assert answer.calls == {0: Call("f", "{}")}
    assert answer.content == '<tool_call>{"name": "f", "arguments": {"a": oops'


def test_an_unfinished_mark_after_a_call_is_dropped() -> None:
    """It is a part of the form that max_tokens has cut off."""
    text = '<tool_call>{"name": "f", "arguments": {}}\n</tool_call>'
    for end in range(text.index("\n"), len(text)):
        assert parse(HERMES, text[:end]) == ("", "", {0: Call("f", "{}")})


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_only_one_call_is_passed_on_if_no_more_are_allowed(form: ToolFormat) -> None:
    for as_generated in (False, True):
        answer = parse(form, form.written(CALLS), max_calls=1, as_generated=as_generated)
        assert answer == ("", "", {0: CALLS[0]})


# When it is passed on.


def test_content_is_passed_on_at_once_unless_a_marker_may_have_begun() -> None:
    parser = ToolParser(HERMES, NAMES)
    assert parser.push("Let me") == [ContentDelta("Let me")]
    assert parser.push(" see <to") == [ContentDelta(" see")]
    assert parser.push("day") == [ContentDelta(" <today")]


def test_a_call_is_passed_on_when_it_is_complete() -> None:
    parser = ToolParser(HERMES, NAMES)
    *most, last = '<tool_call>{"name": "f", "arguments": {"a": 1}}'
    assert parser.push("".join(most)) == []
    assert parser.push(last) == [CallDelta(0, "f", '{"a": 1}')]
    assert parser.is_complete


def test_arguments_are_passed_on_as_generated_if_a_grammar_guarantees_them() -> None:
    parser = ToolParser(HERMES, NAMES, as_generated=True)
    assert parser.push('<tool_call>{"name": "f", "arguments": ') == []
    assert parser.push('{"a": "Pa') == [CallDelta(0, "f", '{"a": "Pa')]
    assert parser.push("ris") == [CallDelta(0, None, "ris")]
    assert not parser.is_complete
    assert parser.push('"}}\n') == [CallDelta(0, None, '"}')]
    assert parser.is_complete


def test_a_call_that_max_tokens_ends_keeps_the_arguments_so_far() -> None:
    parser = ToolParser(HERMES, NAMES, as_generated=True)
    answer = parsed(parser, ['<tool_call>{"name": "f", "arguments": {"a": "Pa'])
    assert answer == ("", "", {0: Call("f", '{"a": "Pa')})
    assert not parser.is_complete


# Pieces do not matter.

FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "[CALL_ID]ab12", "<think>"),
    *('{"name": "f", "arguments": {}}', '{"name": "f", "parameters": {"a": 1}}', '{"name":"g"}', "</think>"),
    *('{"name": "f", "arguments": {"x": "', '"}}', "get_weather", "f", "text", " ", "\n", "é", "\U0001f642"),
    *("[", "]", "{", "}", '"', ",", ";", "<", "\\", "{}", "1.5e", "true"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@given(
    st.sampled_from(list(FORMS)),
    TEXTS,
    st.randoms(use_true_random=False),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_calls_and_content_do_not_depend_on_the_pieces(
    form: str, text: str, rng: random.Random, as_generated: bool, max_calls: int | None
) -> None:
    options: dict[str, Any] = {"as_generated": as_generated, "max_calls": max_calls}
    whole = parse(FORMS[form], text, **options)
    assert parsed(ToolParser(FORMS[form], NAMES, **options), cut(text, rng)) == whole
    if not whole.calls:
        assert whole.content == text
    if not as_generated:
        for call in whole.calls.values():
            assert isinstance(json.loads(call.arguments), dict)
            assert call.name in NAMES


@given(TEXTS, st.randoms(use_true_random=False), st.booleans(), st.sampled_from([QWEN3, DEEPSEEK_R1]))
def test_reasoning_does_not_depend_on_the_pieces(
    text: str, rng: random.Random, is_open: bool, form: ReasoningFormat
) -> None:
    def parser() -> AnswerParser:
        return AnswerParser(ReasoningParser(form, is_open=is_open), ToolParser(HERMES, NAMES))

    whole = parsed(parser(), [text])
    assert parsed(parser(), cut(text, rng)) == whole
    assert "</think>" not in whole.reasoning


@pytest.mark.parametrize(
    "unit", ['<tool_call>{"name": "', "<tool_call>[", '<tool_call>{"a": [', '<tool_call>{"']
)
def test_broken_calls_are_read_about_once(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start of a call is given up before the next one starts, so a long answer takes linear time."""
    reads = 0
    push = JsonScanner.push

    def counted(scanner: JsonScanner, char: str) -> None:
        nonlocal reads
        reads += 1
        push(scanner, char)

    monkeypatch.setattr(JsonScanner, "push", counted)
    text = unit * 500
    assert parse(HERMES, text).content == text
    assert reads <= 2 * len(text)


# Reasoning.


@pytest.mark.parametrize(
    ("form", "is_open", "text", "reasoning", "content"),
    [
        (QWEN3, False, "<think>\nHm. \n</think>\n\nYes.", "Hm.", "Yes."),
        (QWEN3, False, "\n<think>Hm</think>Yes", "Hm", "Yes"),
        (QWEN3, False, "Yes <think>no</think>", "", "Yes <think>no</think>"),
        (QWEN3, False, "  Yes", "", "  Yes"),
        (QWEN3, False, "<think>\n\n</think>\n\nYes", "", "Yes"),
        (QWEN3, False, "<thin", "", "<thin"),
        (QWEN3, False, "<think>Hm </thi", "Hm </thi", ""),
        (QWEN3, True, "Hm\n</think>\nYes", "Hm", "Yes"),
        (QWEN3, True, "<think>\nHm</think> Yes", "Hm", "Yes"),
        (QWEN3, True, "Hm", "Hm", ""),
        (DEEPSEEK_R1, False, "Hm</think>Yes", "Hm", "Yes"),
        (MISTRAL_REASONING, False, "[THINK]Hm[/THINK]Yes", "Hm", "Yes"),
    ],
)
def test_reasoning_is_what_stands_between_the_markers(
    form: ReasoningFormat, is_open: bool, text: str, reasoning: str, content: str
) -> None:
    for pieces in ([text], list(text)):
        answer = parsed(ReasoningParser(form, is_open=is_open), pieces)
        assert answer == (reasoning, content, {})


def test_calls_follow_the_reasoning_and_are_not_looked_for_in_it() -> None:
    call = HERMES.written([Call("f", "{}")])
    parser = AnswerParser(ReasoningParser(QWEN3), ToolParser(HERMES, NAMES))
    answer = parsed(parser, [f"<think>Write {call}?</think>\n{call}"])
    assert answer == (f"Write {call}?", "", {0: Call("f", "{}")})


# Names.


def test_parsers_have_vllms_names() -> None:
    assert format_named("hermes") is HERMES
    assert format_named("mistral") is MISTRAL
    assert format_named("mistral", "... [ARGS] ...") is MISTRAL_ARGS
    assert reasoning_named("deepseek_r1") is DEEPSEEK_R1
    with pytest.raises(ConfigError, match="unknown tool-call parser 'herms'; did you mean hermes"):
        format_named("herms")
    with pytest.raises(ConfigError, match="unknown reasoning parser 'x'; known: deepseek_r1, mistral, qwen3"):
        reasoning_named("x")


@pytest.mark.parametrize("template", ["<tool_call><function=f>", "<tool_call>f<arg_key>", "no marker"])
def test_a_form_that_is_not_known_is_not_guessed(template: str) -> None:
    assert format_of(template) is None


# The scanner of JSON.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def scan(text: str) -> JsonScanner:
    scanner = JsonScanner()
    for char in text:
        scanner.push(char)
    return scanner


@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
def test_the_scanner_accepts_json_and_notices_its_end(
    value: Any, ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps([value], ensure_ascii=ascii_only, indent=indent)
    assert scan(text).expects is Expects.NOTHING
    assert scan(text[:-1]).expects is not Expects.NOTHING


@given(VALUES, st.data())
def test_the_scanner_rejects_what_json_rejects(value: Any, data: st.DataObject) -> None:
    """Oracle: Python's json, which also accepts NaN and Infinity. A prefix of JSON is not rejected."""
    text = json.dumps({"key": value})
    place = data.draw(st.integers(0, len(text) - 1))
    broken = text[:place] + data.draw(st.sampled_from('{}[],:"\\ x0-.etfn\n')) + text[place + 1 :]
    try:
        is_complete = scan(broken).expects is Expects.NOTHING
    except NotJSONError:
        is_complete = False
    try:
        json.loads(broken)
    except ValueError:
        assert not is_complete
    else:
        assert is_complete


def test_the_start_of_a_marker_is_the_longest_one_at_the_end() -> None:
    assert num_begun("<<tool", "<tool_call>") == 5
    assert num_begun("<tool_call>", "<tool_call>") == 0
    assert num_begun("aab", "abab") == 2
