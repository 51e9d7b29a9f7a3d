"""Tools and reasoning over HTTP: the fields of requests, and answers streamed and whole.

The answers are scripted where a test needs a certain one; otherwise the embedded model writes them. Oracles:
OpenAI's client, LangChain, and the form of the same answer without streaming.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import openai
import pytest

from chat_templates import HERMES_TOOLS, MISTRAL_TOOLS, TEXT_ARGUMENTS, THINKING_TOOLS
from scripted_answers import Script, script_answers
from served import Served, serving
from smollm2_server import CHAT, FRANCE, client, sdk
from tiny_llm import LLM, ConfigError, SamplingParams
from tiny_llm_checkpoints.chat_template import ChatTemplate
from tiny_llm_checkpoints.tool_formats import HERMES
from tiny_llm_server import ServerConfig

__all__ = ["client", "sdk"]  # fixtures

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
PARIS = '[{"name": "get_weather", "arguments": {"city": "Paris"}}]'
CALL = f"<tool_call>{PARIS}</tool_call>"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(num_blocks=1024, max_num_seqs=16, generation_config="vllm")


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Served]:
    with serving(lambda: llm, ServerConfig(served_model_name="smollm2")) as here:
        yield here


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> Script:
    return script_answers(monkeypatch, llm)


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The first choice of an answer."""
    body = {"messages": FRANCE, "tools": [WEATHER, NOW], "max_tokens": 200, **fields}
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def stream(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """The choices of all events of a stream."""
    body = {"messages": FRANCE, "tools": [WEATHER, NOW], "max_tokens": 200, "stream": True, **fields}
    events = client.post(CHAT, json=body).text.split("\n\n")
    data = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    assert all("error" not in one for one in data), data
    return [choice for one in data for choice in one["choices"]]


def refused(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(CHAT, json={"messages": FRANCE, **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


# Answers with calls.


def test_an_answer_with_a_call_has_openais_form(client: httpx.Client, answer: Script) -> None:
    answer(CALL)
    choice = ask(client)
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}


def test_a_stream_starts_a_call_with_its_name_and_empty_arguments(
    client: httpx.Client, answer: Script
) -> None:
    answer(f"Let me look.\n{CALL}")
    events = stream(client)
    deltas = [event["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me look."
    first, *more = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert set(first) == {"index", "id", "type", "function"}
    assert (first["index"], first["type"]) == (0, "function")
    assert first["function"] == {"name": "get_weather", "arguments": ""}
    assert all(set(one) == {"index", "function"} and set(one["function"]) == {"arguments"} for one in more)
    assert "".join(one["function"]["arguments"] for one in more) == '{"city": "Paris"}'
    assert [event["finish_reason"] for event in events if event["finish_reason"]] == ["tool_calls"]


TEXTS = [
    CALL,
    f"Let me look. {CALL} Done.",
    '<tool_call>[{"name": "now", "arguments": {}}, {"name": "now"}]</tool_call>',
    "<tool_call>[{broken",
    '<tool_call>[{"name": "unknown", "arguments": {}}]</tool_call>',
    "Just text with é and \U0001f642. ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_adds_up_to_the_answer_without_streaming(
    sdk: openai.OpenAI, answer: Script, text: str
) -> None:
    """Oracle: the official client, which joins the events."""
    answer(text)
    options: Any = {"model": "smollm2", "messages": FRANCE, "tools": [WEATHER, NOW], "max_tokens": 200}
    whole = sdk.chat.completions.create(**options).choices[0]
    with sdk.chat.completions.stream(**options) as events:
        for _ in events:
            pass
        joined = events.get_final_completion().choices[0]
    assert joined.finish_reason == whole.finish_reason
    assert (joined.message.content or "") == (whole.message.content or "")
    for one, other in zip(joined.message.tool_calls or [], whole.message.tool_calls or [], strict=True):
        assert (one.function.name, one.function.arguments) == (other.function.name, other.function.arguments)
    if not whole.message.tool_calls:
        assert whole.message.content == text


def test_each_choice_has_its_own_calls(client: httpx.Client, answer: Script) -> None:
    answer(CALL, "No call.", '<tool_call>[{"name": "now"}, {"name": "now"}]</tool_call>')
    response = client.post(CHAT, json={"messages": FRANCE, "tools": [WEATHER, NOW], "n": 3}).json()
    messages = [choice["message"] for choice in response["choices"]]
    assert [len(message.get("tool_calls", [])) for message in messages] == [1, 0, 2]
    assert messages[1]["content"] == "No call."
    assert [choice["finish_reason"] for choice in response["choices"]] == ["tool_calls", "stop", "tool_calls"]
    ids = [call["id"] for message in messages for call in message.get("tool_calls", [])]
    assert len(set(ids)) == 3
    found: dict[int, str] = {}
    for event in stream(client, n=3):
        for call in event["delta"].get("tool_calls", []):
            found[event["index"]] = found.get(event["index"], "") + call["function"].get("name", "")
    assert found == {0: "get_weather", 2: "nownow"}


def test_later_calls_are_dropped_without_parallel_calls(client: httpx.Client, answer: Script) -> None:
    answer('<tool_call>[{"name": "now"}, {"name": "get_weather"}]</tool_call>')
    for parallel, expected in ((False, ["now"]), (True, ["now", "get_weather"])):
        choice = ask(client, parallel_tool_calls=parallel)
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == expected
        assert choice["message"]["content"] is None
        assert choice["finish_reason"] == "tool_calls"


def test_an_answer_that_max_tokens_ends_says_so(client: httpx.Client, llm: LLM, answer: Script) -> None:
    answer(CALL)
    choice = ask(client, max_tokens=8)
    assert choice["finish_reason"] == "length"
    assert CALL.startswith(choice["message"]["content"])
    answer(f"{CALL} and so on")
    choice = ask(client, max_tokens=len(llm.tokenizer.encode(CALL)) + 1)
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["tool_calls"]) == 1


def test_log_probabilities_cover_all_tokens_of_an_answer_with_calls(
    client: httpx.Client, llm: LLM, answer: Script
) -> None:
    answer(CALL)
    num_tokens = len(llm.tokenizer.encode(CALL))
    streamed = [
        token
        for event in stream(client, logprobs=True, temperature=0)
        for token in (event["logprobs"] or {"content": []})["content"]
    ]
    whole = ask(client, logprobs=True, temperature=0)["logprobs"]["content"]
    assert len(whole) == num_tokens + 1
    assert streamed == whole


def test_without_tools_an_answer_is_text(client: httpx.Client, answer: Script) -> None:
    answer(CALL)
    for fields in ({"tools": []}, {"tools": None}, {"tool_choice": "none"}):
        choice = ask(client, **fields)
        assert choice["message"] == {"role": "assistant", "content": CALL, "refusal": None}
        assert choice["finish_reason"] == "stop"


def test_the_choice_none_hides_the_tools_from_the_model(client: httpx.Client) -> None:
    def num_tokens(**fields: Any) -> int:
        body = {"messages": FRANCE, "max_tokens": 1, **fields}
        usage = client.post(CHAT, json=body).json()["usage"]
        return int(usage["prompt_tokens"])

    plain = num_tokens()
    assert num_tokens(tools=[WEATHER], tool_choice="none") == plain
    assert num_tokens(tools=[WEATHER], tool_choice="auto") == num_tokens(tools=[WEATHER]) > plain


def test_tokenize_and_python_make_the_same_prompt(client: httpx.Client, llm: LLM) -> None:
    body = {"messages": FRANCE, "tools": [WEATHER]}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    usage = client.post(CHAT, json={**body, "max_tokens": 1}).json()["usage"]
    params = SamplingParams(max_tokens=1)
    [output] = llm.chat(FRANCE, params, use_tqdm=False, tools=[WEATHER])
    assert list(output.prompt_token_ids) == tokens
    assert usage["prompt_tokens"] == len(tokens)
    [delta] = llm.stream_chat(FRANCE, SamplingParams(temperature=0, max_tokens=1), tools=[WEATHER])
    assert len(delta.token_ids) == 1


# Other templates.


def set_template(monkeypatch: pytest.MonkeyPatch, llm: LLM, source: str) -> None:
    monkeypatch.setattr(llm, "chat_template", ChatTemplate(source, bos_token="", eos_token=""))


def configure(monkeypatch: pytest.MonkeyPatch, served: Served, **options: Any) -> None:
    monkeypatch.setattr(served.service, "config", replace(served.service.config, **options))


def test_calls_in_the_form_of_the_template_are_found(
    client: httpx.Client, llm: LLM, answer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_template(monkeypatch, llm, MISTRAL_TOOLS)
    answer(f"[TOOL_CALLS]{PARIS}")
    [call] = ask(client)["message"]["tool_calls"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "It rains."}
    answer("It rains in Paris.")
    assert ask(client, messages=[*FRANCE, called, result])["message"]["content"] == "It rains in Paris."


def test_markers_that_are_control_tokens_are_found(
    client: httpx.Client, llm: LLM, answer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other control tokens stay out of the content. Here <file_sep> plays the part of the marker."""
    set_template(monkeypatch, llm, HERMES_TOOLS)
    form = replace(HERMES, begin="<file_sep>", end="<filename>")
    monkeypatch.setattr(llm.chat_template, "tool_format", form)
    answer('Look.<jupyter_code><file_sep>{"name": "now"}<filename>', special_tokens=True)
    choice = ask(client)
    assert choice["message"]["content"] == "Look."
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "now"
    assert ask(client, tools=None)["message"]["content"] == 'Look.{"name": "now"}'


def test_a_form_that_is_not_known_is_refused_unless_the_operator_names_it(
    client: httpx.Client, llm: LLM, served: Served, answer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_template(monkeypatch, llm, TEXT_ARGUMENTS)
    for parser in ("auto", "none"):
        configure(monkeypatch, served, tool_call_parser=parser)
        error = refused(client, tools=[WEATHER])
        assert (error["param"], error["code"]) == ("tools", "unsupported_field")
        assert "--tool-call-parser" in error["message"]
    configure(monkeypatch, served, tool_call_parser="hermes")
    answer(f"<tool_call>{PARIS[1:-1]}</tool_call>")
    assert len(ask(client)["message"]["tool_calls"]) == 1


def test_an_unknown_parser_is_refused_before_the_server_starts() -> None:
    with pytest.raises(ConfigError, match="did you mean hermes"):
        ServerConfig(tool_call_parser="herms")
    with pytest.raises(ConfigError, match="did you mean qwen3"):
        ServerConfig(reasoning_parser="qwen")


# Reasoning.


def test_reasoning_is_separate_from_the_content(
    client: httpx.Client, llm: LLM, answer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_template(monkeypatch, llm, THINKING_TOOLS)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    answer(f"I should look.\n</think>\n\nOne moment.\n{call}")
    message = ask(client)["message"]
    assert message["reasoning_content"] == message["reasoning"] == "I should look."
    assert message["content"] == "One moment."
    assert message["tool_calls"][0]["function"]["name"] == "now"
    deltas = [event["delta"] for event in stream(client)]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == "I should look."
    assert "".join(delta.get("content") or "" for delta in deltas) == "One moment."


def test_reasoning_that_max_tokens_ends_leaves_no_content(
    client: httpx.Client, llm: LLM, answer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_template(monkeypatch, llm, THINKING_TOOLS)
    answer("I should look at everything first.")
    choice = ask(client, max_tokens=4, tools=None)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    assert "I should look at everything".startswith(choice["message"]["reasoning_content"])


def test_reasoning_can_be_left_out_or_kept_in_the_content(
    client: httpx.Client, llm: LLM, served: Served, answer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_template(monkeypatch, llm, THINKING_TOOLS)
    answer("Hm.</think>Yes.")
    hidden = ask(client, include_reasoning=False)["message"]
    assert hidden == {"role": "assistant", "content": "Yes.", "refusal": None}
    assert all("reasoning" not in event["delta"] for event in stream(client, include_reasoning=False))
    configure(monkeypatch, served, reasoning_parser="none")
    assert ask(client)["message"]["content"] == "Hm.</think>Yes."


def test_a_template_that_closes_the_reasoning_leaves_it_closed(
    client: httpx.Client, llm: LLM, answer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_template(monkeypatch, llm, THINKING_TOOLS)
    answer("Yes.")
    kwargs = {"enable_thinking": False}
    assert ask(client, chat_template_kwargs=kwargs)["message"]["content"] == "Yes."
    assert ask(client)["message"]["reasoning_content"] == "Yes."


def test_reasoning_that_the_client_has_begun_continues(
    client: httpx.Client, llm: LLM, answer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_template(monkeypatch, llm, THINKING_TOOLS)
    answer(" more.</think>Yes.")
    for begun, reasoning in (("<think>Let me think", "more."), ("<think>Hm</think>", None)):
        messages = [*FRANCE, {"role": "assistant", "content": begun}]
        message = ask(client, messages=messages, continue_final_message=True)["message"]
        assert message.get("reasoning_content") == reasoning


def test_a_user_who_types_the_marker_does_not_open_the_reasoning(
    client: httpx.Client, llm: LLM, answer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_template(monkeypatch, llm, THINKING_TOOLS)
    answer("Yes.")
    messages = [{"role": "user", "content": "What does <think>"}]
    kwargs = {"enable_thinking": False}
    assert ask(client, messages=messages, chat_template_kwargs=kwargs)["message"]["content"] == "Yes."


# What is refused.


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{}]}, "tools[0].type", "must be 'function', not null"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type", "not supported: only function"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name", "is the name of an earlier tool"),
        ({"tools": [WEATHER] * 129}, "tools", "must have at most 128 items"),
        ({"tools": "f"}, "tools", "must be a list"),
        ({"tools": [{}], "tool_choice": "none"}, "tools[0].type", "must be 'function'"),
        ({"tool_choice": "required"}, "tool_choice", "tools is required with 'required'"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "tools is required with a function",
        ),
        (
            {"tools": [WEATHER, NOW], "tool_choice": {"type": "function", "function": {"name": "then"}}},
            "tool_choice",
            "'then' is not the name of a tool: get_weather, now",
        ),
        ({"tools": [NOW], "tool_choice": "always"}, "tool_choice", "not 'always'"),
        (
            {"tools": [NOW], "tool_choice": 1},
            "tool_choice",
            "must be none, auto, required or a function, not 1",
        ),
        ({"tools": [NOW], "tool_choice": {}}, "tool_choice", "is not supported; supported: function"),
        ({"tools": [NOW], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "'allowed_tools' is not"),
        ({"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice", "must name a function"),
        ({"tools": [NOW], "parallel_tool_calls": 1}, "parallel_tool_calls", "must be true or false"),
        (
            {"messages": [*FRANCE, {"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]}]},
            "messages[1].tool_calls[0].function.name",
            "not 'a b'",
        ),
    ],
)
def test_a_bad_field_is_refused_by_name(
    client: httpx.Client, fields: dict[str, Any], param: str, message: str
) -> None:
    error = refused(client, **fields)
    assert error["param"] == param
    assert message in error["message"]


# Clients.


def test_the_official_clients_loop_of_calls_and_results(sdk: openai.OpenAI, answer: Script) -> None:
    messages: list[Any] = [{"role": "user", "content": "Is it raining in Paris?"}]
    options: Any = {"model": "smollm2", "tools": [WEATHER, NOW], "max_tokens": 100}
    answer(CALL)
    message = sdk.chat.completions.create(messages=messages, **options).choices[0].message
    assert message.tool_calls
    messages.append(message)
    for call in message.tool_calls:
        city = json.loads(call.function.arguments)["city"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"It rains in {city}."})
    answer("Yes, it rains.")
    last = sdk.chat.completions.create(messages=messages, **options).choices[0]
    assert (last.message.content, last.finish_reason) == ("Yes, it rains.", "stop")


def test_langchains_loop_of_calls_and_results(served: Served, answer: Script) -> None:
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage

    model = langchain.ChatOpenAI(base_url=f"{served.url}/v1", api_key="x", model="smollm2", max_tokens=100)
    bound = model.bind_tools([WEATHER, NOW])
    answer(CALL)
    messages: list[Any] = [HumanMessage("Is it raining in Paris?")]
    whole = bound.invoke(messages)
    streamed = None
    for chunk in bound.stream(messages):
        streamed = chunk if streamed is None else streamed + chunk
    for message in (whole, streamed):
        [call] = message.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
        assert not message.invalid_tool_calls
    messages += [whole, ToolMessage("It rains.", tool_call_id=whole.tool_calls[0]["id"])]
    answer("Yes, it rains.")
    assert bound.invoke(messages).content == "Yes, it rains."


def test_the_embedded_model_may_call_or_answer(sdk: openai.OpenAI) -> None:
    """Its answers may be silly; their form never is."""
    example = f"Example:\nuser: What is the weather in Rome?\nassistant: {CALL}"
    for question in ("What is the weather in Paris?", "Weather in Tokyo please"):
        messages: list[Any] = [
            {"role": "system", "content": example},
            {"role": "user", "content": question},
        ]
        choices = sdk.chat.completions.create(
            model="smollm2", messages=messages, tools=[WEATHER], n=4, seed=1, max_tokens=40, temperature=0.7
        ).choices
        for choice in choices:
            for call in choice.message.tool_calls or []:
                assert call.function.name == "get_weather"
                assert isinstance(json.loads(call.function.arguments), dict)
            assert (choice.finish_reason == "tool_calls") <= bool(choice.message.tool_calls)
