"""Chat messages: which fields are accepted, how templates render them, and in which content format.

Oracles: OpenAI's API reference, vLLM's rules for content parts, transformers' rule for continued messages.
"""

from typing import Any

import pytest

from chat_templates import CHATML, GEMMA, LLAMA2, LLAMA3, MACROS, NAMES, PARTS, REASONING, TEMPLATES
from test_typed_control_tokens import built
from tiny_llm_checkpoints.chat_messages import read_messages
from tiny_llm_checkpoints.chat_template import ChatTemplate
from tiny_llm_checkpoints.plain_json import MAX_VALUES, MessageError
from tiny_llm_checkpoints.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hi"}
TOKENIZER = built()


def template(source: str, content_format: str = "auto") -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>", content_format=content_format)


def prompt(source: str, messages: list[Any], tokenizer: Tokenizer = TOKENIZER, **options: Any) -> str:
    """The prompt that the model receives, decoded to text."""
    ids = template(source).encode(messages, tokenizer, **options)
    return tokenizer.decode(ids, skip_special_tokens=False)


# Content formats.

SPELLINGS = [
    "one\ntwo",
    ["one", "two"],
    [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
    [{"type": "input_text", "text": "one"}, {"type": "output_text", "text": "two", "annotations": []}],
    [{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}, "two"],
]


@pytest.mark.parametrize("content", SPELLINGS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_every_content_format(name: str, content: Any) -> None:
    text = template(TEMPLATES[name]).render([{"role": "user", "content": content}])
    assert text.index("one") < text.index("two")


@pytest.mark.parametrize(
    ("source", "parts"), [(PARTS, True), (CHATML, False), (GEMMA, False), (LLAMA2, False), (MACROS, False)]
)
def test_the_content_format_that_a_template_renders_is_detected(source: str, parts: bool) -> None:
    """A template that renders both formats receives a string."""
    probe = "{% if messages[0].content is string %}text{% else %}parts{% endif %}"
    text = template(probe + source).render([USER])
    assert text.startswith("parts" if parts else "text")


def test_the_content_format_is_detected_for_each_role() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert template(source).render([{"role": "system", "content": "Be brief."}, USER]) == "Be brief.Hi"


def test_the_template_source_decides_the_format_if_every_probe_fails_to_render() -> None:
    loop = "{% for m in messages %}{% for p in m['content'] | list %}{{ p['text'] }}{% endfor %}{% endfor %}"
    source = "{% if messages|length < 5 %}{{ raise_exception('more') }}{% endif %}" + loop
    assert template(source).render([USER] * 5) == "Hi" * 5


def test_the_content_format_can_be_set() -> None:
    kind = "{% for m in messages %}{{ m.content is string }}{{ m.content }}{% endfor %}"
    assert template(kind, "openai").render([USER]).startswith("False")
    assert template(kind, "string").render([USER]).startswith("True")
    with pytest.raises(ValueError, match="chat_template_content_format must be one of auto, string, openai"):
        template(kind, "list")


# Optional and additional fields.


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "reasoning_content": "hm"},
        {"role": "assistant", "reasoning": "hm"},
        {"role": "assistant", "content": None, "name": "ada", "tool_calls": [], "audio": None},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": "", "annotations": [{"type": "url_citation"}]},
        {"role": "tool", "content": None, "tool_call_id": "1"},
        {"role": "assistant", "content": "x", "weight": 1, "cache_control": {"type": "ephemeral"}},
        {"role": "assistant", "content": None, "function_call": None, "own": {"a": [1, 2.5, None, True]}},
    ],
)
def test_assistant_and_tool_messages_may_have_no_content(message: dict[str, Any]) -> None:
    assert "Hi" in prompt(CHATML, [USER, message, USER])


def test_a_refusal_is_rendered_as_the_answers_text() -> None:
    assert "I must not" in prompt(
        CHATML, [USER, {"role": "assistant", "content": None, "refusal": "I must not"}]
    )


def test_templates_receive_reasoning_under_both_names() -> None:
    for name in ("reasoning", "reasoning_content"):
        answer = {"role": "assistant", "content": "Yes", name: "because"}
        assert "<think>\nbecause" in prompt(REASONING, [USER, answer], add_generation_prompt=False)


def test_templates_receive_names_and_tool_call_ids() -> None:
    text = prompt(NAMES, [{**USER, "name": "ada"}, {"role": "tool", "content": "4", "tool_call_id": "c1"}])
    assert "name=ada" in text
    assert "call=c1" in text


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "messages[1].tool_calls[0].function"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages[1].function_call"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[1].content[0].type",
        ),
        ({"role": "user", "content": ["a", {"type": "input_audio"}]}, "messages[1].content[1].type"),
        ({"role": "user", "content": [{"text": "a"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": ["text"], "text": "a"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}, "messages[1].content[0].x"),
        ({"role": "user", "content": {"text": "a"}}, "messages[1].content"),
        ({"role": "user", "content": b"a"}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "system"}, "messages[1].content"),
        ({"role": "", "content": "a"}, "messages[1].role"),
        ({"role": None, "content": "a"}, "messages[1].role"),
        ({"role": "user", "content": "a", "name": 1}, "messages[1].name"),
        ({"role": "user", "content": "a", "name": "\ud800"}, "messages[1].name"),
        ({"role": "user", "content": "a\udfff"}, "messages[1].content"),
        ({"role": "user", "content": "a", "own": {"x": [object()]}}, "messages[1].own.x[0]"),
        ({"role": "user", "content": "a", "own": float("nan")}, "messages[1].own"),
        ({"role": "user", "content": "a", "own": [0] * MAX_VALUES}, "messages[1].own"),
        ({"role": "user", "content": "a", 1: 2}, "messages[1]"),
        (None, "messages[1]"),
    ],
)
def test_an_error_names_the_message_and_the_field(message: Any, field: str) -> None:
    with pytest.raises(MessageError) as caught:
        template(CHATML).encode([USER, message], TOKENIZER)
    assert caught.value.field == field
    assert str(caught.value).startswith(field + ": ")


def test_the_check_stops_at_the_first_bad_message() -> None:
    messages = [None] * 1_000_000
    with pytest.raises(MessageError) as caught:
        read_messages(messages)
    assert caught.value.field == "messages[0]"


# Templates must not drop text.


@pytest.mark.parametrize(
    ("source", "messages", "place"),
    [
        ("END", [USER], 0),
        ("{% for m in messages %}{{ m.content.text }}{% endfor %}", [USER], 0),
        ("{{ messages[0].content }}", [USER, {"role": "user", "content": "and more"}], 1),
        ("{{ messages[0].content }}", [USER, USER], 1),
        ("{{ messages[0].content }}", [{"role": "user", "content": "Hi there"}, USER], 1),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            [USER, {"role": "tool", "content": "42"}],
            1,
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            [{"role": "system", "content": "Be brief."}, USER],
            0,
        ),
        (
            "{% for m in messages %}{{ m.content[:3] }}{% endfor %}",
            [{"role": "user", "content": "a long text"}],
            0,
        ),
    ],
)
def test_a_message_whose_text_the_template_drops_is_rejected(
    source: str, messages: list[Any], place: int
) -> None:
    with pytest.raises(MessageError, match="the chat template drops") as caught:
        template(source, "string").encode(messages, TOKENIZER)
    assert caught.value.field == f"messages[{place}].content"


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "m.content",
            "m.content | trim",
            "m.content | tojson",
            "m.content | upper",
            "m.content.split() | join(' ')",
        ),
        *("{'result': m.content} | tojson", "m.content | replace('\n', ' ')", "m.content | indent(4)"),
        "m.content | tojson(ensure_ascii=true)",
    ],
)
def test_a_template_may_change_white_space_case_and_encoding_of_a_text(expression: str) -> None:
    source = "{% for m in messages %}{{ " + expression + " }};{% endfor %}"
    for text in ('  say "Hi"\n\tto\\Zoë 🙂  ', "<b>", "</s> <|im_end|>", "x"):
        if "ensure_ascii" in expression and "<" in text:
            continue  # rejected: the disguise of a control token does not survive this
        messages = [{"role": "user", "content": text}, {"role": "tool", "content": text}]
        template(source).encode(messages, built())


def test_a_template_may_reorder_texts() -> None:
    source = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": text} for text in ("Hi", "Hi there", "Hi", "there", "Hi there")]
    template(source).encode(messages, TOKENIZER)


def test_a_template_may_merge_the_system_message_into_a_user_message() -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    for source in (LLAMA2, GEMMA):
        assert "Be brief." in prompt(source, messages)


def test_a_template_may_remove_earlier_reasoning() -> None:
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}
    text = prompt(REASONING, [USER, answer, USER])
    assert "Yes" in text
    assert "hm" not in text


# The end of the prompt, and template variables.


@pytest.mark.parametrize("source", [CHATML, LLAMA3, MACROS, PARTS, REASONING, GEMMA])
@pytest.mark.parametrize(
    "answer", ["The answer", "assistant", "ends in a space ", "spells <|im_end|>", "a\n"]
)
def test_the_prompt_can_end_within_the_last_message(source: str, answer: str) -> None:
    """Oracle: transformers, which cuts after the last message's text, with its trailing space if rendered."""
    messages = [USER, {"role": "assistant", "content": answer}]
    whole = template(source).render(messages, add_generation_prompt=False)
    text = prompt(source, messages, add_generation_prompt=False, continue_final_message=True)
    assert whole.startswith(text)
    assert text.endswith((answer, answer.rstrip()))
    with pytest.raises(MessageError, match=r"^continue_final_message: cannot be true together"):
        prompt(source, messages, add_generation_prompt=True, continue_final_message=True)


def test_a_template_that_drops_the_last_answer_cannot_continue_it() -> None:
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(MessageError, match="continue_final_message"):
        prompt(
            source,
            [USER, {"role": "assistant", "content": "a"}],
            add_generation_prompt=False,
            continue_final_message=True,
        )


def test_templates_receive_the_callers_variables() -> None:
    assert prompt(REASONING, [USER], chat_template_kwargs={"enable_thinking": False}).endswith("</think>\n\n")
    assert prompt(REASONING, [USER], chat_template_kwargs={"unknown": 1}).endswith("assistant\n")


@pytest.mark.parametrize(
    "kwargs",
    [
        *(
            {name: []}
            for name in ("messages", "tools", "bos_token", "add_generation_prompt", "tokenize", "range")
        ),
        *({"raise_exception": 1}, {"a": object()}, {"a": "x" * 200_000}, {"a": [0] * 20_000}, ["a"]),
    ],
)
def test_variables_must_be_plain_json_and_not_reserved(kwargs: Any) -> None:
    with pytest.raises(MessageError, match=r"^chat_template_kwargs"):
        prompt(CHATML, [USER], chat_template_kwargs=kwargs)


def test_deeply_nested_variables_are_rejected() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(MessageError, match="levels"):
        prompt(CHATML, [USER], chat_template_kwargs={"a": deep})
