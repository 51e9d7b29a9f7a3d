"""Structured output over HTTP: OpenAI's client and LangChain work unmodified; errors name field and place."""

import json
import re
from typing import Any, Literal

import httpx2 as httpx
import openai
import pytest
from jsonschema import validate
from pydantic import BaseModel, Field

from served import Served
from smollm2_server import CHAT, COMPLETE, FRANCE, client, llm, sdk, served

__all__ = ["client", "llm", "sdk", "served"]

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "size": {"enum": ["small", "large"]}},
    "required": ["city", "size"],
    "additionalProperties": False,
}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}


class Street(BaseModel):
    name: str = Field(max_length=20)
    number: int = Field(ge=1, le=99)


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    kind: Literal["village", "town", "capital"]
    streets: list[Street] = Field(max_length=2)
    mayor: str | None = Field(max_length=20)


def ask(client: httpx.Client, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    """The first choice of an answer."""
    body = {"messages": FRANCE} if path == CHAT else {"prompt": "As JSON: "}
    answer = client.post(path, json={**body, "max_tokens": 200, "temperature": 1.0, "seed": 7, **fields})
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
@pytest.mark.parametrize("strict", [True, False, None])
def test_an_answer_satisfies_its_schema_strict_or_not(
    client: httpx.Client, path: str, strict: bool | None
) -> None:
    wanted = {"type": "json_schema", "json_schema": {**AS_SCHEMA["json_schema"], "strict": strict}}  # type: ignore[dict-item]
    for seed in range(4):
        choice = ask(client, path, response_format=wanted, seed=seed)
        assert choice["finish_reason"] == "stop"
        validate(json.loads(text_of(choice)), SCHEMA)


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_a_json_object_is_an_object(client: httpx.Client, path: str) -> None:
    wanted = {"response_format": {"type": "json_object"}, "max_tokens": 400}
    choices = [ask(client, path, seed=seed, **wanted) for seed in range(6)]
    finished = [text_of(choice) for choice in choices if choice["finish_reason"] == "stop"]
    assert finished
    assert all(isinstance(json.loads(text), dict) for text in finished)


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"json": SCHEMA}, r'\{\s?"city".*\}'),
        ({"json": json.dumps(SCHEMA), "disable_any_whitespace": True}, r'\{"city":".*","size":"\w+"\}'),
        ({"regex": "[a-z]{3}-[0-9]{2}"}, "[a-z]{3}-[0-9]{2}"),
        ({"choice": ["red", "green"]}, "red|green"),
        ({"grammar": 'start: "x=" /[0-9]{2}/'}, "x=[0-9]{2}"),
        ({"json_object": True, "regex": None, "disable_any_whitespace": False}, r"\{.*\}"),
    ],
)
def test_vllms_forms_are_enforced(
    client: httpx.Client, path: str, form: dict[str, Any], pattern: str
) -> None:
    choice = ask(client, path, structured_outputs=form, temperature=0.5)
    assert choice["finish_reason"] == "stop"
    assert re.fullmatch(pattern, text_of(choice), re.DOTALL)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"structured_outputs": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False, "json": None}},
        {"response_format": {"type": "text", "json_schema": None}, "structured_outputs": None},
    ],
)
def test_no_form_is_the_same_as_leaving_the_field_out(client: httpx.Client, fields: dict[str, Any]) -> None:
    assert ask(client, max_tokens=5, **fields) == ask(client, max_tokens=5)


def test_all_choices_have_the_form_and_differ(client: httpx.Client) -> None:
    answer = client.post(
        CHAT,
        json={
            "messages": FRANCE,
            "n": 4,
            "temperature": 1.5,
            "seed": 1,
            "structured_outputs": {"regex": "[a-z]{8}"},
        },
    )
    texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert all(re.fullmatch("[a-z]{8}", text) for text in texts)
    assert len(set(texts)) > 1


def test_a_stream_has_the_same_text(sdk: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "smollm2",
        "messages": FRANCE,
        "response_format": AS_SCHEMA,
        "seed": 3,
        "temperature": 1.0,
    }
    whole = sdk.chat.completions.create(**fields).choices[0]
    chunks = [chunk.choices[0] for chunk in sdk.chat.completions.create(**fields, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert (chunks[-1].finish_reason, whole.finish_reason) == ("stop", "stop")


def test_log_probabilities_have_the_tokens_of_the_text(sdk: openai.OpenAI) -> None:
    choice = sdk.chat.completions.create(
        model="smollm2", messages=FRANCE, response_format=AS_SCHEMA, logprobs=True, top_logprobs=2
    ).choices[0]  # type: ignore[call-overload]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(token.logprob <= 0 for token in tokens)


# Clients.


QUESTION = [{"role": "user", "content": "Describe Paris as JSON."}]


def test_openais_client_parses_pydantic_models(sdk: openai.OpenAI) -> None:
    for parse in (sdk.chat.completions.parse, sdk.beta.chat.completions.parse):
        answer = parse(model="smollm2", messages=QUESTION, response_format=City, seed=1, temperature=0.7)  # type: ignore[arg-type]
        assert isinstance(answer.choices[0].message.parsed, City)


def test_openais_client_streams_pydantic_models(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(
        model="smollm2", messages=QUESTION, response_format=City, seed=1
    ) as stream:  # type: ignore[arg-type]
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)


def test_openais_client_is_told_that_an_answer_was_cut(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        sdk.chat.completions.parse(model="smollm2", messages=QUESTION, response_format=City, max_tokens=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_langchains_structured_output_works(
    served: Served, method: Literal["json_schema", "json_mode"]
) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    options = {"temperature": 0, "seed": 1, "max_retries": 0, "max_tokens": 500}
    url = f"{served.url}/v1"
    model = langchain_openai.ChatOpenAI(model="smollm2", base_url=url, api_key="any", **options)
    if method == "json_schema":
        assert isinstance(model.with_structured_output(City, method=method).invoke("Describe Paris."), City)
    else:
        schema = {"title": "Anything", "type": "object", "properties": {}}
        found = model.with_structured_output(schema, method=method).invoke("Describe Paris as JSON.")
        assert isinstance(found, dict)


# Errors.


def error_of(client: httpx.Client, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    body = {"messages": FRANCE} if path == CHAT else {"prompt": "x"}
    answer = client.post(path, json={**body, "max_tokens": 4, **fields})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def schema(**of: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": "json_object"}, "response_format", "must be an object, not 'json_object'"),
        (
            {"response_format": {}},
            "response_format",
            "type None is not supported; supported: text, json",
        ),
        ({"response_format": {"type": "json"}}, "response_format", "type 'json' is not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is required$"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "json_schema.schema is required$",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format",
            "json_schema.name must be a string of 1 to 64",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {}, "strict": 1},
                }
            },
            "response_format",
            "json_schema.strict must be true or false, not 1",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "scheme": {}}}},
            "response_format",
            "^response_format.json_schema.'scheme' is not supported; did you mean schema",
        ),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}},
            "response_format",
            "json_schema is only allowed with type json_schema",
        ),
        (
            {"response_format": {"type": "text", "schema": {}}},
            "response_format",
            "^response_format.'schema' is not supported",
        ),
        (
            {"response_format": schema(type="strin")},
            "response_format",
            r"response_format.json_schema.schema at #: Invalid type: strin",
        ),
        (
            {"response_format": schema(properties={"a": {"not": {}}})},
            "response_format",
            r'json_schema.schema at #/properties/a: "not" is not supported',
        ),
        ({"structured_outputs": []}, "structured_outputs", "must be an object"),
        (
            {"structured_outputs": {"jsn": {}}},
            "structured_outputs",
            "structured_outputs.'jsn' is not supported; did you mean json",
        ),
        (
            {"structured_outputs": {"json": {}, "regex": "a"}},
            "structured_outputs",
            "exactly one of .*, not json and regex",
        ),
        (
            {"structured_outputs": {"disable_any_whitespace": True}},
            "structured_outputs",
            "exactly one of .*, not none",
        ),
        (
            {"structured_outputs": {"regex": "("}},
            "structured_outputs",
            "structured_outputs.regex: .*unclosed group",
        ),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs", "choice must be a list of strings"),
        (
            {"structured_outputs": {"json": {"items": {"type": "x"}}}},
            "structured_outputs",
            "structured_outputs.json at #/items: Invalid type: x",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "not allowed together with response_format",
        ),
        ({"guided_json": {}}, "guided_json", "is not supported; use structured_outputs.json"),
        ({"json_schema": {}}, "json_schema", "is not supported; use response_format"),
    ],
)
def test_a_wrong_form_is_refused_with_its_field_and_place(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(client, path, **fields)
    assert error["param"] == param
    assert re.search(message, error["message"]), error["message"]
    assert not error["message"].startswith("structured_outputs") or "structured_outputs" in fields


def test_a_server_goes_on_after_a_schema_that_cannot_be_compiled(client: httpx.Client) -> None:
    """Compiled in this process, it would take hours."""
    intersections = [{"type": "string", "pattern": f"a{i}"} for i in range(40)]
    error = error_of(client, response_format=schema(allOf=intersections))
    assert "too large or too deep" in error["message"]
    assert text_of(ask(client, structured_outputs={"choice": ["still here"]})) == "still here"
