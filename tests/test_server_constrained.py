"""Answers that a grammar composes from tools, reasoning and a format, written by the embedded model.

Oracles: jsonschema, OpenAI's client, LangChain, and the same answer without streaming.
"""

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import httpx2 as httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field
from tiny_llm.grammar import Grammar
from tiny_llm.grammar_compiler import GrammarCompiler

from chat_templates import HERMES_TOOLS, MISTRAL_TOOLS, REASONING, THINKING_TOOLS
from served import Served, until
from smollm2_server import CHAT, COMPLETE, FRANCE, client, llm, sdk, served
from tiny_llm import LLM, StructuredOutputsParams
from tiny_llm_checkpoints.chat_template import ChatTemplate
from tiny_llm_checkpoints.reasoning_parser import DEEPSEEK_R1, QWEN3, ReasoningFormat
from tiny_llm_checkpoints.tool_formats import SMOLLM2
from tiny_llm_server.chat_format import ChatFormat

__all__ = ["client", "llm", "sdk", "served"]

CITY: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
NAMED: Any = {"type": "function", "function": {"name": "now"}}
AS_CITY = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}


def tool(name: str, parameters: Any = None, **fields: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


WEATHER, NOW = tool("get_weather", CITY), tool("now")


def ask(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """The choices of an answer."""
    body = {"messages": FRANCE, "max_tokens": 300, "temperature": 1.0, "seed": 1, **fields}
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def refused(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(CHAT, json={"messages": FRANCE, **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def calls_of(choice: dict[str, Any]) -> list[dict[str, str]]:
    return [call["function"] for call in choice["message"].get("tool_calls", [])]


# Calls that the client requires.


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """The schema of a value, whose texts are short."""
    least = rng.randint(-9, 9)
    simple: list[dict[str, Any]] = [
        {"type": "string", "maxLength": rng.randint(1, 12)},
        {"enum": rng.sample(["red", "green", 1, 2.5, None, True, 'a "b"', "ü"], 3)},
        {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 90)},
        {"type": "boolean"},
    ]
    if depth == 0 or rng.random() < 0.5:
        return rng.choice(simple)
    inner = random_schema(rng, depth - 1)
    nullable = {"anyOf": [{"type": "null"}, inner]}
    return rng.choice(
        [nullable, {"type": "array", "items": inner, "maxItems": 2}, random_parameters(rng, depth - 1)]
    )


def random_parameters(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    names = rng.sample(["city", "days", "unit", "a-b", "größe"], rng.randint(0, 3))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


@pytest.mark.parametrize("template", [None, HERMES_TOOLS, MISTRAL_TOOLS], ids=["text", "hermes", "mistral"])
def test_the_arguments_of_required_calls_are_valid_for_any_tools(
    client: httpx.Client, llm: LLM, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    if template is not None:
        monkeypatch.setattr(llm, "chat_template", ChatTemplate(template, bos_token="", eos_token=""))

    def ask_with(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        rng = random.Random(seed)
        schemas = {f"tool_{number}": random_parameters(rng) for number in range(rng.randint(1, 3))}
        tools = [tool(name, schema) for name, schema in schemas.items()]
        return schemas, ask(client, tools=tools, tool_choice="required", n=3, seed=seed)

    num_finished = 0
    with ThreadPoolExecutor(12) as pool:  # together: the engine computes them in few batches
        answers = list(pool.map(ask_with, range(12)))
    for schemas, choices in answers:
        for choice in choices:
            assert choice["message"]["content"] is None
            if choice["finish_reason"] == "length":
                continue
            num_finished += 1
            assert choice["finish_reason"] == "tool_calls"
            assert calls_of(choice)
            for call in calls_of(choice):
                jsonschema.validate(json.loads(call["arguments"]), schemas[call["name"]])
    assert num_finished >= 30


def test_a_named_function_is_called_once(client: httpx.Client) -> None:
    for choice in ask(client, tools=[WEATHER, NOW], tool_choice=NAMED, n=6):
        assert calls_of(choice) == [{"name": "now", "arguments": "{}"}]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] is None


@pytest.mark.parametrize("parallel", [True, False])
def test_several_calls_are_required_only_with_parallel_calls(client: httpx.Client, parallel: bool) -> None:
    choices = ask(client, tools=[NOW], tool_choice="required", parallel_tool_calls=parallel, n=12)
    numbers = {len(calls_of(choice)) for choice in choices if choice["finish_reason"] != "length"}
    assert min(numbers) == 1
    assert (max(numbers) > 1) == parallel


def test_a_stop_string_after_the_arguments_does_not_hide_the_call(client: httpx.Client) -> None:
    """It ends the answer before the marker that ends the call."""
    city = {"type": "object", "properties": {"city": {"const": "Paris"}}, "required": ["city"]}
    fields = {"tools": [tool("weather", city)], "tool_choice": "required", "max_tokens": 40}
    [choice] = ask(client, **fields, stop="}", include_stop_str_in_output=True)
    assert [one["arguments"] for one in calls_of(choice)] == ['{"city": "Paris"}']
    assert choice["finish_reason"] == "tool_calls"
    [choice] = ask(client, **fields, stop="Par")
    assert choice["finish_reason"] == "stop", "the arguments are cut off"


def test_a_stream_of_required_calls_adds_up_to_the_answer(sdk: openai.OpenAI) -> None:
    for seed in range(4):
        options: Any = {
            "model": "smollm2", "messages": FRANCE, "tools": [WEATHER, NOW], "tool_choice": "required",
            "max_tokens": 200, "temperature": 1.0, "seed": seed,
        }  # fmt: skip
        whole = sdk.chat.completions.create(**options).choices[0]
        with sdk.chat.completions.stream(**options) as events:
            joined = events.get_final_completion().choices[0]
        assert joined.finish_reason == whole.finish_reason
        pairs = zip(joined.message.tool_calls or [], whole.message.tool_calls or [], strict=True)
        for one, other in pairs:
            assert (one.function.name, one.function.arguments) == (
                other.function.name, other.function.arguments,
            )  # fmt: skip


def test_arguments_that_a_grammar_enforces_are_streamed_as_generated(client: httpx.Client) -> None:
    body = {"messages": FRANCE, "tools": [WEATHER], "tool_choice": "required", "stream": True, "seed": 1}
    events = client.post(CHAT, json=body).text.split("\n\n")
    data = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    deltas = [choice["delta"] for one in data for choice in one["choices"]]
    pieces = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", [])]
    assert len(pieces) > 3


def test_strict_tools_bind_the_arguments_of_a_free_choice(
    client: httpx.Client, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control token starts the calls here, so that a bias makes the model call."""
    form = replace(
        SMOLLM2, opening="<file_sep>[", closing="]<filename>", begin="<file_sep>", end="<filename>"
    )
    monkeypatch.setattr(llm.chat_template, "tool_format", form)
    bias = {str(llm.tokenizer.control_token_ids()["<file_sep>"]): 16.0}
    tools = [tool("get_weather", CITY, strict=True), tool("now", {})]
    called = set()
    for choice in ask(client, tools=tools, logit_bias=bias, n=12):
        for call in calls_of(choice) if choice["finish_reason"] == "tool_calls" else []:
            called.add(call["name"])
            arguments = json.loads(call["arguments"])
            if call["name"] == "get_weather":
                jsonschema.validate(arguments, CITY)
            assert isinstance(arguments, dict)
    assert called == {"get_weather", "now"}


# Tools beside a format.


def test_with_tools_and_a_format_an_answer_is_calls_or_content(client: httpx.Client) -> None:
    kinds = set()
    for choice in ask(client, tools=[WEATHER, NOW], response_format=AS_CITY, n=16):
        if choice["finish_reason"] == "length":
            continue
        if calls := calls_of(choice):
            assert choice["message"]["content"] is None
            assert all(isinstance(json.loads(call["arguments"]), dict) for call in calls)
        else:
            jsonschema.validate(json.loads(choice["message"]["content"]), CITY)
        kinds.add(bool(calls))
    assert kinds == {True, False}


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "/[a-z]{3}/"},
        {"choice": ["/a", 'b"c']},
        {"grammar": 'start: answer\nanswer: %json {"const": 1}'},
        {"json_object": True, "disable_any_whitespace": True},
        {"json": CITY, "whitespace_pattern": " "},
    ],
)
def test_every_form_can_stand_beside_tools(client: httpx.Client, llm: LLM, form: dict[str, Any]) -> None:
    """Oracle: the same form without tools accepts the content."""
    options = {"structured_outputs": form, "logit_bias": without_markers(llm), "max_tokens": 80}
    compiler = llm.engine._grammars
    assert compiler is not None
    finished = 0
    for choice in ask(client, tools=[NOW], n=8, **options):
        grammar = compiler.compile(StructuredOutputsParams(**form))
        for token in llm.tokenizer.encode(choice["message"]["content"]):
            assert token in grammar.allowed()
            grammar.accept(token)
        ends = grammar.has_ended or any(end in grammar.allowed() for end in llm.model_config.eos_token_ids)
        assert ends >= (choice["finish_reason"] == "stop")
        finished += choice["finish_reason"] == "stop"
    assert finished


def without_markers(llm: LLM) -> dict[str, float]:
    """A bias against all tokens that start the marker of calls or of reasoning."""
    tokens = range(llm.tokenizer.vocab_size)
    return {str(token): -100.0 for token in tokens if llm.tokenizer.token_bytes(token).startswith(b"<")}


def test_a_required_call_leaves_no_place_for_the_format(client: httpx.Client) -> None:
    for choice in ask(client, tools=[NOW], tool_choice="required", response_format=AS_CITY, n=4):
        assert choice["message"]["content"] is None


# Reasoning before a format or calls. Here a control token ends it, so that a bias makes the model write it.


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> Iterator[dict[str, float]]:
    """A model that reasons a little; the fixture is the bias that makes it end the reasoning."""
    template = ChatTemplate(THINKING_TOOLS, bos_token="", eos_token="")
    monkeypatch.setattr(llm, "chat_template", template)
    monkeypatch.setattr(template, "reasoning", replace(QWEN3, end="<file_sep>"))
    return {str(llm.tokenizer.control_token_ids()["<file_sep>"]): 18.0}


def test_a_format_holds_after_the_reasoning(client: httpx.Client, reasons: dict[str, float]) -> None:
    choices = ask(client, response_format=AS_CITY, logit_bias=reasons, n=8)
    thoughts = [choice["message"].get("reasoning_content") for choice in choices]
    assert any(thoughts)
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), CITY)


def test_a_format_holds_without_reasoning_if_the_template_closes_it(
    client: httpx.Client, llm: LLM, reasons: dict[str, float]
) -> None:
    options = {"chat_template_kwargs": {"enable_thinking": False}, "logit_bias": without_markers(llm)}
    for choice in ask(client, response_format=AS_CITY, **options, n=4):
        jsonschema.validate(json.loads(choice["message"]["content"]), CITY)


@pytest.mark.parametrize("form", [QWEN3, DEEPSEEK_R1], ids=["qwen3", "deepseek_r1"])
def test_an_answer_has_no_reasoning_after_a_prompt_that_has_ended_it(
    client: httpx.Client, llm: LLM, monkeypatch: pytest.MonkeyPatch, form: ReasoningFormat
) -> None:
    """The model here likes to begin with "<", with which a grammar would force it to spell the marker."""
    template = ChatTemplate(REASONING, bos_token="", eos_token="")
    monkeypatch.setattr(llm, "chat_template", template)
    monkeypatch.setattr(template, "reasoning", form)
    [less] = llm.tokenizer.encode("<")
    options = {"chat_template_kwargs": {"enable_thinking": False}, "logit_bias": {str(less): 100}}
    for choice in ask(client, structured_outputs={"choice": ["yes", "no"]}, **options, n=4):
        assert (choice["finish_reason"], choice["message"]["content"]) in {("stop", "yes"), ("stop", "no")}
    for choice in ask(client, chat_template_kwargs={"enable_thinking": False}, max_tokens=8, n=2):
        assert choice["message"]["content"]
        assert not choice["message"].get("reasoning_content")


NONE, OPEN, PAST = "may begin", "open", "past"


@pytest.mark.parametrize(
    ("continued", "state", "implied"),
    [
        ("", NONE, NONE),
        ("  ", NONE, NONE),
        ("<think>", OPEN, OPEN),
        ("<think>\nSure", OPEN, OPEN),
        ("<think>\nSure.\n</think>", PAST, PAST),
        ("<think>\nSure.\n</think>\n\nThe answer is", PAST, PAST),
        ("The tag <think> is", PAST, OPEN),
        ("The answer is", PAST, OPEN),
        ("Sure.</think> The answer", PAST, PAST),
    ],
)
def test_a_continued_answer_is_within_its_reasoning_or_past_it(
    llm: LLM, continued: str, state: str, implied: str
) -> None:
    for form, expected in ((QWEN3, state), (DEEPSEEK_R1, implied)):
        after, is_open = ChatFormat(None, form).after([], llm.tokenizer, continued)
        assert (after.reasoning is None, is_open) == (expected == PAST, expected == OPEN)


def test_a_format_holds_after_reasoning_that_nothing_begins(
    client: httpx.Client, llm: LLM, reasons: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.chat_template, "reasoning", replace(DEEPSEEK_R1, end="<file_sep>"))
    kwargs = {"enable_thinking": False}  # the prompt does not begin it either
    choices = ask(client, response_format=AS_CITY, logit_bias=reasons, chat_template_kwargs=kwargs, n=8)
    for choice in choices:
        jsonschema.validate(json.loads(choice["message"]["content"]), CITY)


def test_required_calls_follow_the_reasoning(client: httpx.Client, reasons: dict[str, float]) -> None:
    for choice in ask(client, tools=[WEATHER], tool_choice="required", logit_bias=reasons, n=4):
        assert choice["message"]["content"] is None
        for call in calls_of(choice):
            jsonschema.validate(json.loads(call["arguments"]), CITY)
        assert calls_of(choice)


# Errors name the part that the client has sent.


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"properties": {"a": {"not": {}}}}, ' at #/properties/a: "not" is not supported'),
        ({"properties": {"a": {"items": []}}}, " at #/properties/a: a list of items is not supported"),
        ({"properties": {"a": {"type": "strin"}}}, " at #/properties/a: Invalid type: strin"),
    ],
)
@pytest.mark.parametrize(
    "fields", [{"tool_choice": "required"}, {"strict": True}], ids=["required", "strict"]
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_its_tool(
    client: httpx.Client, parameters: Any, reason: str, fields: dict[str, Any]
) -> None:
    strict = fields.get("strict", False)
    choice = fields.get("tool_choice", "auto")
    tools = [NOW, tool("f", {"type": "object", **parameters}, strict=strict)]
    error = refused(client, tools=tools, tool_choice=choice)
    where = "tools[1].function.parameters"
    assert error["param"] == where
    assert error["message"].startswith(where + reason)
    assert "structured_outputs" not in error["message"]


def test_a_schema_that_is_not_enforced_need_not_be_enforceable(client: httpx.Client) -> None:
    parameters = {"type": "object", "properties": {"a": {"not": {}}}}
    assert ask(client, tools=[tool("f", parameters)], max_tokens=2)


def test_a_format_beside_tools_is_refused_under_its_own_name(client: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {}}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = refused(client, tools=[NOW], response_format=form)
    assert error["param"] == "response_format"
    assert error["message"].startswith("response_format.json_schema.schema at #/properties/a: ")
    error = refused(client, tools=[NOW], structured_outputs={"regex": "("})
    assert error["param"] == "structured_outputs"
    assert error["message"].startswith("structured_outputs.regex: ")


def test_a_costly_tool_is_refused_and_the_server_goes_on(client: httpx.Client) -> None:
    hostile = [{"type": "string", "pattern": f"a{i}"} for i in range(40)]
    tools = [NOW, tool("g", {"type": "object", "properties": {"a": {"allOf": hostile}}})]
    error = refused(client, tools=tools, tool_choice="required")
    assert error["param"] == "tools[1].function.parameters"
    assert "too large or too deep" in error["message"]
    assert ask(client, tools=[NOW], tool_choice="required")


def test_requests_without_a_form_or_with_a_known_one_do_not_wait_for_grammars(
    served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, compile_form = threading.Event(), GrammarCompiler.compile
    known = {"prompt": "x", "structured_outputs": {"choice": ["known"]}}
    assert client.post(COMPLETE, json=known).status_code == 200

    def compile_late(self: GrammarCompiler, params: StructuredOutputsParams) -> Grammar:
        assert self.is_compiled(params) or release.wait(60)
        return compile_form(self, params)

    monkeypatch.setattr(GrammarCompiler, "compile", compile_late)

    def constrained(number: int) -> int:
        with served.client() as own:
            body = {"prompt": "x", "structured_outputs": {"choice": [f"{number}"]}}
            return own.post(COMPLETE, json=body).status_code

    with ThreadPoolExecutor(40) as pool:
        waiting = [pool.submit(constrained, number) for number in range(40)]
        try:
            until(lambda: served.service._compiling._work_queue.qsize() >= 39)
            assert client.post(COMPLETE, json={"prompt": "x"}, timeout=30).status_code == 200
            assert client.post(COMPLETE, json=known, timeout=30).status_code == 200
        finally:
            release.set()
        assert {one.result() for one in waiting} == {200}


# Clients.


class Forecast(BaseModel):
    """The weather of a day."""

    city: str = Field(max_length=12)
    sky: Literal["sunny", "cloudy", "rainy"]
    degrees: int = Field(ge=-40, le=50)


def test_openais_client_parses_the_arguments_of_strict_tools(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.parse(
        model="smollm2",
        messages=FRANCE,  # type: ignore[arg-type]
        tools=[openai.pydantic_function_tool(Forecast)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1.0,
        seed=3,
        max_tokens=200,
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Forecast)


def chat_model(served: Served, **options: Any) -> Any:
    langchain = pytest.importorskip("langchain_openai")
    url = f"{served.url}/v1"
    return langchain.ChatOpenAI(
        base_url=url, api_key="x", model="smollm2", max_tokens=300, max_retries=0, seed=1, **options
    )


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
@pytest.mark.parametrize("strict", [True, False, None])
def test_langchains_structured_output_is_a_model(served: Served, method: str, strict: bool | None) -> None:
    model = chat_model(served, temperature=1.0)
    structured = model.with_structured_output(Forecast, method=method, strict=strict)
    assert isinstance(structured.invoke("The weather in Paris"), Forecast)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # LangChain's own
def test_langchains_default_method_works(served: Served) -> None:
    structured = chat_model(served, temperature=0.0).with_structured_output(Forecast)
    assert isinstance(structured.invoke("The weather in Paris"), Forecast)
    *_, last = structured.stream("The weather in Paris")
    assert isinstance(last, Forecast)


@pytest.mark.parametrize("choice", ["any", "required", True, "get_weather"])
def test_langchains_tool_choices_lead_to_calls(served: Served, choice: str | bool) -> None:
    bound = chat_model(served, temperature=1.0).bind_tools([WEATHER], tool_choice=choice, strict=True)
    message = bound.invoke("The weather in Paris")
    assert message.tool_calls
    assert not message.invalid_tool_calls
    for call in message.tool_calls:
        jsonschema.validate(call["args"], CITY)
