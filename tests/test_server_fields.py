"""Every field of a request is supported, accepted without effect, or refused by name.

Oracles: docs/server.md, the fields of OpenAI's client library, and the engine without HTTP.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import httpx2 as httpx
import openai
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from tiny_llm.loader import load_chat_template

from chat_templates import PARTS, REASONING
from served import Served, serving
from tiny_llm import LLM, ModelFileError, SamplingParams
from tiny_llm_checkpoints.chat_template import ChatTemplate
from tiny_llm_server import ServerConfig
from tiny_llm_server.schema import FIELDS, REJECTED, ChatCompletionRequest, CompletionRequest, Generation

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
DOCUMENT = (Path(__file__).parents[1] / "docs" / "server.md").read_text("utf-8")
ENDPOINTS: dict[str, type[Generation]] = {"chat": ChatCompletionRequest, "completions": CompletionRequest}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(num_blocks=256, max_num_seqs=4)


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Served]:
    with serving(lambda: llm, ServerConfig(served_model_name="smollm2")) as here:
        yield here


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


@pytest.fixture
def sdk(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="anything", max_retries=0) as client:
        yield client


# The document.


def documented(section: str, endpoint: str) -> set[str]:
    """Return the fields that a section lists for an endpoint."""
    [text] = re.findall(rf"^### {section}$(.*?)(?=^##|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| `")]
    place = 2 if section == "Accepted at one value" else 1
    other = "completions" if endpoint == "chat" else "chat"
    ours = [row for row in rows if not row[place].startswith(other)]
    return {name for row in ours for name in re.findall(r"`(\w+)`", row[0])}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_document_lists_the_fields_of_the_schema(endpoint: str) -> None:
    model = ENDPOINTS[endpoint]
    without_effect = set(model.WITHOUT_EFFECT)
    assert documented("Accepted without effect", endpoint) == without_effect
    assert documented("Supported", endpoint) == set(model.model_fields) - without_effect
    assert documented("Accepted at one value", endpoint) == set(model.IDLE)


@pytest.mark.parametrize(
    ("endpoint", "params"),
    [("chat", chat_create_params), ("completions", completion_create_params)],
)
def test_every_field_of_openai_is_documented(endpoint: str, params: Any) -> None:
    known = set(get_type_hints(params.CompletionCreateParamsStreaming))
    sections = ("Supported", "Accepted without effect", "Accepted at one value")
    listed = {name for section in sections for name in documented(section, endpoint)}
    assert known <= listed | documented_as_rejected()


def documented_as_rejected() -> set[str]:
    [rejected] = re.findall(r"^### Rejected$(.*?)(?=^##)", DOCUMENT, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`(\w+)`", rejected))


def test_the_document_lists_the_known_fields_that_no_endpoint_accepts() -> None:
    assert REJECTED <= documented_as_rejected() <= FIELDS | REJECTED


# Fields without effect.

WITHOUT_EFFECT: dict[str, Any] = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "safety_identifier": "s",
    "service_tier": "flex",
    "session_id": "s",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "implicit"},
    "prediction": {"type": "content", "content": "Paris"},
}


def test_every_field_without_effect_is_tested() -> None:
    assert set(WITHOUT_EFFECT) == set(ChatCompletionRequest.WITHOUT_EFFECT)
    assert set(CompletionRequest.WITHOUT_EFFECT) < set(WITHOUT_EFFECT)


def test_fields_without_effect_change_nothing(client: httpx.Client) -> None:
    """All of them together, and the idle values, at both endpoints."""
    for path, model, body in (
        (CHAT, ChatCompletionRequest, {"messages": FRANCE}),
        (COMPLETE, CompletionRequest, {"prompt": "The sky is"}),
    ):
        ask = {**body, "temperature": 0, "max_tokens": 6}
        fields = {name: WITHOUT_EFFECT[name] for name in model.WITHOUT_EFFECT}
        idle = {name: values[0] for name, values in model.IDLE.items()}
        answers = [client.post(path, json={**ask, **more}) for more in ({}, fields, idle)]
        assert [answer.status_code for answer in answers] == [200] * 3, [answer.text for answer in answers]
        first, *others = [answer.json()["choices"] for answer in answers]
        assert others == [first, first]


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_field_without_effect_must_have_the_right_type(client: httpx.Client, name: str) -> None:
    wrong = 1 if not isinstance(WITHOUT_EFFECT[name], bool) else "yes"
    refused = client.post(CHAT, json={"messages": FRANCE, name: wrong})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


def test_metadata_has_limits(client: httpx.Client) -> None:
    for wrong in ({"a": 1}, {str(i): "x" for i in range(17)}):
        refused = client.post(CHAT, json={"messages": FRANCE, "metadata": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "metadata")


def test_the_official_client_may_send_fields_without_effect(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="smollm2",
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "You are helpful."}], "name": "boss"},
            {"role": "user", "content": [{"type": "text", "text": "What is the capital"}], "name": "ada"},
            {"role": "assistant", "content": None, "refusal": "No."},
            {"role": "user", "content": "of France?"},
        ],
        metadata={"run": "1"},
        store=True,
        user="ada",
        safety_identifier="x",
        prompt_cache_key="y",
        service_tier="auto",
        reasoning_effort="low",
        parallel_tool_calls=False,
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice="none",
        max_completion_tokens=4,
    )
    assert answer.choices[0].message.content


# Fields that change the prompt.


def tokens(client: httpx.Client, **fields: Any) -> list[int]:
    answer = client.post("/tokenize", json=fields)
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["tokens"]
    return found


def test_tokenize_takes_the_fields_of_a_chat(client: httpx.Client, llm: LLM) -> None:
    answered = [*FRANCE, {"role": "assistant", "content": "The capital"}]
    whole = tokens(client, messages=answered, add_generation_prompt=False)
    open_ended = tokens(client, messages=answered, continue_final_message=True)
    asked = tokens(client, messages=answered)
    assert asked[: len(whole)] == whole
    assert whole[: len(open_ended)] == open_ended
    assert llm.tokenizer.decode(open_ended).endswith("The capital")
    assert (
        tokens(client, messages=answered, continue_final_message=True, add_generation_prompt=False)
        == open_ended
    )


def test_python_and_http_make_the_same_prompt(client: httpx.Client, llm: LLM) -> None:
    messages = [*FRANCE, {"role": "assistant", "content": ["The capital"], "name": "x"}]
    params = SamplingParams(temperature=0, max_tokens=3)
    [output] = llm.chat(messages, params, use_tqdm=False, continue_final_message=True)
    assert list(output.prompt_token_ids) == tokens(client, messages=messages, continue_final_message=True)
    ask = {"messages": messages, "temperature": 0, "max_tokens": 3, "continue_final_message": True}
    said = client.post(CHAT, json=ask).json()["choices"][0]["message"]["content"]
    assert said == output.outputs[0].text
    assert said == "".join(d.text for d in llm.stream_chat(messages, params, continue_final_message=True))


def test_a_template_that_takes_content_parts_gets_all_text(
    client: httpx.Client, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the model's own template, which makes the same prompt of strings."""
    messages = [{"role": "system", "content": "Be brief."}, *FRANCE]
    whole = tokens(client, messages=messages)
    monkeypatch.setattr(llm, "chat_template", ChatTemplate(PARTS, bos_token="", eos_token=""))
    assert tokens(client, messages=messages) == whole


def test_template_variables_come_from_their_fields(
    client: httpx.Client, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = REASONING + "{% if reasoning_effort %}effort {{ reasoning_effort }}{% endif %}"
    monkeypatch.setattr(llm, "chat_template", ChatTemplate(source, bos_token="", eos_token=""))
    ask = {"messages": FRANCE, "max_tokens": 1}
    lengths = [
        client.post(CHAT, json={**ask, **more}).json()["usage"]["prompt_tokens"]
        for more in ({}, {"reasoning_effort": "low"}, {"chat_template_kwargs": {"enable_thinking": False}})
    ]
    assert lengths[0] < lengths[1]
    assert lengths[0] < lengths[2]


def test_a_request_can_leave_out_special_tokens(client: httpx.Client) -> None:
    answer = client.post(
        COMPLETE, json={"prompt": "The sky", "add_special_tokens": False, "echo": True, "max_tokens": 1}
    )
    assert answer.json()["choices"][0]["text"].startswith("The sky")


# The field that an error names.


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        (CHAT, {"n": 5}, "n", None),
        (COMPLETE, {"n": 5}, "n", None),
        (COMPLETE, {"n": 17, "best_of": 17}, "n", None),
        (COMPLETE, {"best_of": 2}, "best_of", None),
        (CHAT, {"max_tokens": 1_000_000}, "max_tokens", "context_length_exceeded"),
        (COMPLETE, {"max_tokens": 1_000_000}, "max_tokens", "context_length_exceeded"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "a " * 9000}]},
            "messages",
            "context_length_exceeded",
        ),
        (COMPLETE, {"prompt": "a " * 9000}, "prompt", "context_length_exceeded"),
        (COMPLETE, {"prompt": [-1]}, "prompt", None),
        (COMPLETE, {"prompt": [1, "a"]}, "prompt", None),
        (COMPLETE, {"prompt": [[1], [-1]]}, "prompt", None),
        (COMPLETE, {"prompt": [[[1]]]}, "prompt", None),
        (COMPLETE, {"prompt": [[]]}, "prompt", None),
        (COMPLETE, {"prompt": []}, "prompt", None),
        (COMPLETE, {"prompt": ""}, "prompt", None),
        (COMPLETE, {"prompt": None}, "prompt", None),
        (COMPLETE, {"prompt": {}}, "prompt", None),
        (COMPLETE, {"prompt": [True]}, "prompt", None),
        (COMPLETE, {"prompt": [1.0]}, "prompt", None),
        (COMPLETE, {"prompt": [10**30]}, "prompt", None),
        (CHAT, {"messages": "Hi"}, "messages", None),
        (CHAT, {"messages": ["Hi"]}, "messages[0]", None),
        (
            CHAT,
            {"messages": [*FRANCE, {"role": "assistant", "tool_calls": [{}]}]},
            "messages[1].tool_calls[0].function",
            None,
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": ["a", {"type": "image_url"}]}]},
            "messages[0].content[1].type",
            "unsupported_field",
        ),
        (CHAT, {"messages": [{"role": "function", "content": "a"}]}, "messages[0].role", None),
        (CHAT, {"audio": {}}, "audio", "unsupported_field"),
        (CHAT, {"verbosity": "low"}, "verbosity", "unsupported_field"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities", "unsupported_field"),
        (CHAT, {"chat_template": "x"}, "chat_template", "unsupported_field"),
        (CHAT, {"tool_choice": "required"}, "tool_choice", None),
        (CHAT, {"tools": [{}]}, "tools[0].type", None),
        (CHAT, {"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_field"),
        (CHAT, {"reasoning_effort": "huge"}, "reasoning_effort", None),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", None),
        (CHAT, {"chat_template_kwargs": []}, "chat_template_kwargs", None),
        (
            CHAT,
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            None,
        ),
    ],
)
def test_an_error_names_its_field(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str, code: str | None
) -> None:
    body = {"messages": FRANCE} if path == CHAT else {"prompt": "x"}
    refused = client.post(
        path, content=json.dumps({**body, **fields}), headers={"Content-Type": "application/json"}
    )
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error


def test_the_error_for_a_bad_token_id_names_its_index(client: httpx.Client) -> None:
    error = client.post(COMPLETE, json={"prompt": [[5, -1]]}).json()["error"]
    assert error["message"] == "prompt: [0][1] is -1: a token id is at least 0 and in the vocabulary"


def test_the_error_names_n_if_the_pool_is_too_small_for_it() -> None:
    llm = LLM(num_blocks=8, max_num_seqs=16, max_model_len=100, preemption_mode="none")
    with serving(lambda: llm) as here, here.client() as client:
        error = client.post(COMPLETE, json={"prompt": "x", "n": 8, "max_tokens": 90}).json()["error"]
        assert (error["param"], error["code"]) == ("n", None)


def test_a_model_with_a_bad_template_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer: Any = SimpleNamespace(chat_template="{% if %}", tool_template=None, bos_token="", eos_token="")
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json"):
        load_chat_template(tmp_path, tokenizer, "auto")
