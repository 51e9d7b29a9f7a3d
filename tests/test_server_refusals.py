"""Requests that the HTTP API refuses, with errors in OpenAI's format: fields, bodies, abuse of HTTP.

Refusing one client does not affect others, and fields that request the default behaviour are accepted.
"""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import pytest

from served import Served, serving
from smollm2_server import CHAT, COMPLETE, FRANCE, client, connected, generate_text, llm, served
from tiny_llm import LLM
from tiny_llm_server import ServerConfig, body_limit

__all__ = ["client", "llm", "served"]


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        (CHAT, {"messages": []}, "messages", "^messages: must not be empty$"),
        (CHAT, {}, "messages", "^messages is required$"),
        (CHAT, {"messages": FRANCE, "functions": [{}]}, "functions", "functions is not supported"),
        (CHAT, {"messages": FRANCE, "store": 0}, "store", "must be true or false$"),
        (CHAT, {"messages": FRANCE, "n": 17}, "n", r"at most 16 \(--max-n\), not 17"),
        (CHAT, {"messages": FRANCE, "n": 0}, "n", "^n: must be at least 1$"),
        (CHAT, {"messages": FRANCE, "n": "2"}, "n", "^n: must be a whole number$"),
        (CHAT, {"messages": FRANCE, "temperature": -1}, "temperature", "must be at least 0$"),
        (CHAT, {"messages": FRANCE, "temperature": 2.5}, "temperature", "must be at most 2$"),
        (CHAT, {"messages": FRANCE, "seed": 10**400}, "seed", "must be at most 9223372036854775807$"),
        (
            CHAT,
            {"messages": FRANCE, "top_logprobs": 2},
            "top_logprobs",
            "^top_logprobs: only allowed with logprobs",
        ),
        (
            CHAT,
            {"messages": FRANCE, "stream_options": {}},
            "stream_options",
            "only allowed with stream: true",
        ),
        (CHAT, {"messages": FRANCE, "stop": 3}, "stop", "^stop: must be a string or a list$"),
        (CHAT, {"messages": FRANCE, "stop": [3]}, "stop.0", "^stop.0: must be a string$"),
        (CHAT, {"messages": FRANCE, "temperature": "x"}, "temperature", "^temperature: must be a number$"),
        (CHAT, {"messages": FRANCE, "top_p": 0}, "top_p", "^top_p: must be above 0$"),
        (CHAT, {"messages": FRANCE, "tools": [1] * 129}, "tools", "^tools: must have at most 128 items$"),
        (
            CHAT,
            {"messages": FRANCE, "tool_choice": 1},
            "tool_choice",
            "^tool_choice: must be none, auto, required or a function, not 1$",
        ),
        (CHAT, {"messages": FRANCE, "max_tokens": 9000}, "max_tokens", "exceed the context of 8192"),
        (CHAT, {"messages": FRANCE, "stop": ["x"] * 17}, "stop", r"at most 16 \(--max-stop\), not 17"),
        (CHAT, {"messages": FRANCE, "stop": ""}, "stop", "non-empty"),
        (CHAT, {"messages": FRANCE, "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        (CHAT, {"messages": FRANCE, "logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
        (
            CHAT,
            {"messages": FRANCE, "logit_bias": {"999999": 1}},
            "logit_bias",
            "token id 999999, which is outside",
        ),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "system"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, None, "not JSON: .*hex escape at byte"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "text"),
        (COMPLETE, {"prompt": "x", "suffix": "y"}, "suffix", "suffix is not supported"),
        (COMPLETE, {"prompt": "x", "best_of": 2}, "best_of", "^best_of: must equal n \\(1\\)"),
        (COMPLETE, {"prompt": [[1], "x"]}, "prompt", "only strings or only token ids"),
        (COMPLETE, {"prompt": []}, "prompt", "the list must not be empty"),
        (COMPLETE, {"prompt": ""}, "prompt", "empty|no tokens"),
        (COMPLETE, {"prompt": [49152]}, "prompt", "49152 is outside the vocabulary"),
        (COMPLETE, {"prompt": ["x"] * 65}, "prompt", "at most 64 prompts"),
        (COMPLETE, {"prompt": ["x"] * 40, "n": 4}, "n", "at most 128 sequences .*, not 160"),
        (
            COMPLETE,
            {"prompt": "x", "stop_token_ids": [999999]},
            "stop_token_ids",
            "token id 999999, which is outside",
        ),
        (COMPLETE, {"prompt": "x", "logit_bias": {"9" * 5000: 1}}, "logit_bias", "keys must be token ids"),
        (
            COMPLETE,
            {"prompt": "x", "max_tokens": 0},
            "max_tokens",
            "^max_tokens: must be at least 1, or 0 with echo",
        ),
        (COMPLETE, {"prompt": "x", "logprobs": 21}, "logprobs", "must be at most 20$"),
        (COMPLETE, {"prompt": "x", "min_tokens": 17}, "min_tokens", "from 0 to max_tokens \\(16\\), not 17"),
        ("/tokenize", {}, "prompt", "send either prompt or messages"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0", "must be at least 0$"),
        ("/detokenize", {"tokens": [2**31 - 1]}, "tokens", "outside the vocabulary"),
    ],
)
def test_an_invalid_field_is_refused_by_name(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str | None, message: str
) -> None:
    refused = client.post(path, content=json.dumps(fields), headers={"Content-Type": "application/json"})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error
    if param is not None:
        assert error["param"] == param, error


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (
            {"tools": [], "tool_choice": "none", "store": False, "modalities": ["text"], "metadata": {}},
            FRANCE,
        ),
        ({"seed": -1, "model": "", "service_tier": "auto", "temperature": 0}, FRANCE),
        (
            {},
            [
                FRANCE[0],
                {"role": "assistant", "content": "Paris.", "tool_calls": [], "refusal": None},
                FRANCE[0],
            ],
        ),
    ],
)
def test_fields_that_request_the_default_behavior_are_accepted(
    client: httpx.Client, fields: dict[str, Any], messages: list[Any]
) -> None:
    answer = client.post(CHAT, json={"messages": messages, "max_tokens": 1, **fields})
    assert answer.status_code == 200, answer.text


def test_a_request_that_never_fits_has_no_retry_after() -> None:
    llm = LLM(num_blocks=64, max_num_seqs=4, max_num_waiting=2)
    with serving(lambda: llm) as here, here.client() as client:
        refused = client.post(COMPLETE, json={"prompt": ["x"] * 8, "max_tokens": 1})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
        assert "Retry-After" not in refused.headers
        assert client.post(COMPLETE, json={"prompt": ["x"] * 6, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "f"}]},
        {"guided_json": {}},
        {"response_format": {"type": "structural_tag"}},
        {"structured_outputs": {"structural_tag": "x"}},
    ],
    ids=["functions", "guided_json", "structural_tag", "vllm's structural_tag"],
)
def test_unsupported_features_are_refused_with_the_same_code(
    client: httpx.Client, fields: dict[str, Any]
) -> None:
    refused = client.post(CHAT, json={"messages": FRANCE, **fields})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (
        400,
        next(iter(fields)),
        "unsupported_field",
    )
    assert "not supported" in error["message"]


def test_a_function_call_without_content_is_refused_because_of_the_call(client: httpx.Client) -> None:
    message = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    error = client.post(CHAT, json={"messages": [*FRANCE, message, *FRANCE]}).json()["error"]
    assert (error["param"], error["code"]) == ("messages[1].function_call", "unsupported_field")
    assert "content" not in error["message"]


INVALID_BODIES = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"{",
    b"\xff\xfe{}",
    b'{"prompt": "\xc3\x28"}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "top_p": 1e999}',
    b'{"prompt": "x", "seed": ' + b"9" * 6000 + b"}",
    b"[" * 50_000,
    b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"a":' * 9_000 + b"1" + b"}" * 9_000,
    b'{"prompt": {"__class__": "x"}}',
]


@pytest.mark.parametrize("body", INVALID_BODIES, ids=range(len(INVALID_BODIES)))
@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/tokenize", "/detokenize"])
def test_an_invalid_body_is_refused_with_a_reason(client: httpx.Client, path: str, body: bytes) -> None:
    refused = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["message"]


def test_invalid_bodies_do_not_change_the_answers_of_others(
    client: httpx.Client, served: Served, llm: LLM
) -> None:
    """A stream continues unchanged while many invalid bodies arrive."""
    expected = generate_text(llm, "Once upon a time", temperature=0, max_tokens=200, ignore_eos=True)
    body = {
        "prompt": "Once upon a time",
        "temperature": 0,
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
    }

    def send(body: bytes) -> int:
        with served.client() as other:
            return other.post(
                COMPLETE, content=body, headers={"Content-Type": "application/json"}
            ).status_code

    with client.stream("POST", COMPLETE, json=body) as answer, ThreadPoolExecutor(8) as pool:
        lines = answer.iter_lines()
        received = [next(lines)]
        statuses = pool.map(send, INVALID_BODIES * 3)
        received += [line for line in lines if line]
        assert set(statuses) == {400}
    events = [json.loads(line.removeprefix("data: ")) for line in received[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == expected


def test_unknown_paths_and_methods_are_errors_in_openais_format(client: httpx.Client) -> None:
    assert client.get("/v2/anything").json()["error"]["type"] == "not_found_error"
    assert client.delete(CHAT).status_code == 405
    assert client.delete(CHAT).json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("with_length", [True, False])
def test_an_oversized_body_is_refused(client: httpx.Client, with_length: bool) -> None:
    """With a Content-Length, and in chunks without one."""
    body = b'{"prompt": "' + b"x" * 200_000 + b'"}'
    pieces = body if with_length else iter([body[i : i + 5000] for i in range(0, len(body), 5000)])
    refused = client.post(COMPLETE, content=pieces, headers={"Content-Type": "application/json"})
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "body_too_large"
    assert "100000 bytes" in refused.json()["error"]["message"]


LONG_BODY = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_client_that_is_still_sending_an_oversized_body_gets_the_answer(served: Served) -> None:
    """The connection is not reset: a client may send the whole body before it reads."""
    with connected(served) as connection:
        connection.sendall(LONG_BODY + b"Content-Length: 300000\r\n\r\n" + b"x" * 150_000)
        time.sleep(0.2)
        connection.sendall(b"x" * 150_000)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_an_oversized_body_is_refused_before_it_is_sent_with_expect_100_continue(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(LONG_BODY + b"Content-Length: 300000\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"Content-Length: 300\r\n\r\n", b"x"),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"78\r\n%b\r\n" % (b"x" * 120)),
    ],
    ids=["content-length", "chunked"],
)
def test_an_oversized_slow_body_gets_413_not_408(head: bytes, piece: bytes) -> None:
    config = ServerConfig(max_body_bytes=100, body_timeout=0.3)
    with serving(lambda: LLM(num_blocks=64), config) as here, connected(here) as connection:
        connection.sendall(LONG_BODY + head + piece)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_an_endless_body_is_not_read_forever(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "MAX_DISCARDED", 200_000)
    sent = 0
    with connected(served) as connection, suppress(ConnectionError):
        connection.sendall(LONG_BODY + b"Transfer-Encoding: chunked\r\n\r\n")
        while sent < 50_000_000:
            connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            sent += 65536
    assert sent < 20_000_000, "the whole body was read"


JSON = b"Content-Type: application/json\r\n"
VALID_BODY = b'{"prompt": "x", "max_tokens": 1}'
VALID_LENGTH = b"Content-Length: %d\r\n" % len(VALID_BODY)


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"Content-Length: -5\r\n", b"{}"),
        (b"Content-Length: nine\r\n", b"{}"),
        (b"Content-Length: 2\r\nContent-Length: 3\r\n", b"{}"),
        (b"Transfer-Encoding: chunked\r\n", b"zz\r\n{}\r\n0\r\n\r\n"),
        (b"Transfer-Encoding: chunked\r\n", b"fffffffffffffffffffffff\r\n{}"),
        (b"Transfer-Encoding: gzip\r\n", b"{}"),
        (VALID_LENGTH + b"Bad Header: x\r\n", VALID_BODY),
        (b"Content-Length: 9\r\n", b"{}"),
    ],
    ids=range(8),
)
def test_malformed_or_incomplete_http_is_refused(head: bytes, body: bytes) -> None:
    """Invalid lengths, chunks and headers, and a body that never arrives; others are served meanwhile."""
    llm = LLM(num_blocks=64)
    with serving(lambda: llm, ServerConfig(body_timeout=1.0)) as here, here.client() as client:
        with connected(here) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON + head + b"\r\n" + body)
            assert client.post(COMPLETE, json={"prompt": "x", "max_tokens": 1}).status_code == 200
            answer = connection.recv(65536)
        assert re.match(rb"HTTP/1.1 (4\d\d|501) ", answer), answer[:200]


@pytest.mark.parametrize("piece", [b"y" * 10_000, b"X: y\r\n" * 2_000], ids=["one", "many"])
def test_endless_headers_are_not_buffered(served: Served, piece: bytes) -> None:
    sent = 0
    with connected(served) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX: ")
        with suppress(ConnectionError):
            while sent < 20_000_000:
                sent += connection.send(piece)
    assert sent < 10_000_000, "all headers were read"
