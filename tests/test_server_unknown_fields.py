"""Fields of a request that are in no API: rejected with a suggestion, or ignored if the operator says so."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest

from served import Served, serving
from smollm2_server import CHAT, COMPLETE, FRANCE
from tiny_llm import LLM
from tiny_llm_server import ServerConfig
from tiny_llm_server.unknown_fields import MAX_LOGGED, IgnoredFields

SHORT = {"temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(num_blocks=256, max_num_seqs=4)


@pytest.fixture(scope="module")
def strict(llm: LLM) -> Iterator[Served]:
    with serving(lambda: llm) as here:
        yield here


@pytest.fixture(scope="module")
def tolerant(llm: LLM) -> Iterator[Served]:
    with serving(lambda: llm, ServerConfig(ignore_unknown_fields=True)) as here:
        yield here


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 400, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "temprature is not supported; did you mean temperature?"),
        ({"maxTokens": 1}, "maxTokens", "maxTokens is not supported; did you mean max_tokens?"),
        ({"xyzzy": 1}, "xyzzy", "xyzzy is not supported"),
        ({"a[0]": 1}, "a[0]", "a[0] is not supported"),
        (
            {"stream": True, "stream_options": {"include_usge": True}},
            "stream_options.include_usge",
            "stream_options.include_usge is not supported; did you mean include_usage?",
        ),
    ],
)
def test_an_unknown_field_is_rejected_with_the_one_that_was_meant(
    strict: Served, fields: dict[str, Any], param: str, message: str
) -> None:
    with strict.client() as client:
        error = error_of(client.post(CHAT, json={"messages": FRANCE, **fields}))
    assert (error["param"], error["code"], error["message"]) == (param, "unsupported_field", message)


def test_a_misspelled_required_field_is_reported_as_misspelled(strict: Served) -> None:
    with strict.client() as client:
        error = error_of(client.post(CHAT, json={"mesages": FRANCE}))
    assert error["message"] == "mesages is not supported; did you mean messages?"


@pytest.mark.parametrize("field", ["chat_template", "prompt_logprobs", "prompt"])
def test_nothing_is_suggested_for_a_field_that_is_spelled_correctly(strict: Served, field: str) -> None:
    with strict.client() as client:
        error = error_of(client.post(CHAT, json={"messages": FRANCE, field: "x"}))
    assert error["message"] == f"{field} is not supported"


def test_ignored_fields_do_not_change_the_answer(strict: Served, tolerant: Served) -> None:
    unknown = {"xyzzy": {"a": [1]}, "": 1, "provider": None, "temprature": 1.5}
    with strict.client() as client:
        expected = client.post(CHAT, json={"messages": FRANCE, **SHORT})
    with tolerant.client() as client:
        answer = client.post(CHAT, json={"messages": FRANCE, **SHORT, **unknown})
        assert client.post(COMPLETE, json={"prompt": "x", **SHORT, **unknown}).status_code == 200
        assert client.post("/tokenize", json={"prompt": "x", **unknown}).status_code == 200
        stream = {"stream": True, "stream_options": {"include_usage": True, "xyzzy": 1}}
        assert client.post(COMPLETE, json={"prompt": "x", **SHORT, **stream}).status_code == 200
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == expected.json()["choices"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"guided_json": {}}),
        (CHAT, {"audio": {}}),
        (CHAT, {"verbosity": "low"}),
        (CHAT, {"prompt": "x"}),
        (COMPLETE, {"messages": FRANCE}),
    ],
)
def test_known_fields_that_are_not_supported_are_never_ignored(
    tolerant: Served, path: str, fields: dict[str, Any]
) -> None:
    body = {"messages": FRANCE} if path == CHAT else {"prompt": "x"}
    with tolerant.client() as client:
        error = error_of(client.post(path, json={**body, "xyzzy": 1, **fields}))
    assert (error["param"], error["code"]) == (next(iter(fields)), "unsupported_field")


def test_a_misspelled_required_field_is_missing_if_unknown_fields_are_ignored(tolerant: Served) -> None:
    with tolerant.client() as client:
        assert error_of(client.post(CHAT, json={"mesages": FRANCE}))["message"] == "messages is required"


class Warnings(logging.Handler):
    """Collects the warnings of the server's log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def warnings_of_the_server() -> Iterator[list[str]]:
    handler, log = Warnings(), logging.getLogger("uvicorn.error")
    log.addHandler(handler)
    yield handler.lines
    log.removeHandler(handler)


def test_each_ignored_name_is_logged_once(tolerant: Served) -> None:
    with warnings_of_the_server() as lines, tolerant.client() as client:
        for _ in range(2):
            body = {"prompt": "x", "max_tokens": 1, "plugh\n": 1, "plover" * 20: 2}
            assert client.post(COMPLETE, json=body).status_code == 200
    assert lines == [
        f"Ignored the unknown field {name!r} of a request; this is logged once per name"
        for name in ("plugh\n", ("plover" * 20)[:60])
    ]


def test_the_number_of_logged_names_is_limited() -> None:
    with warnings_of_the_server() as lines:
        IgnoredFields().log(f"field_{number}" for number in range(2 * MAX_LOGGED))
    assert len(lines) == MAX_LOGGED
