"""HTTP as clients, browsers and load balancers use it: methods, paths, hosts, origins and bodies.

Oracles: RFC 9110 and 9112, the Fetch standard's CORS protocol, OpenAI's format of errors.
"""

import codecs
import gzip
import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import pytest

from served import SECONDS, Served, serving
from tiny_llm import LLM
from tiny_llm_cli.serve import ServerOptions, server_config
from tiny_llm_server import ServerConfig

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
ORIGIN = "https://example.org"
GETS = ["/", "/health", "/version", "/v1/models", "/v1/models/a/b", "/page/live.js", "/openapi.json"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server like `tiny-llm serve` without options: only loopback hosts are allowed."""
    hosts = server_config(ServerOptions(), "127.0.0.1").allowed_hosts
    with serving(
        lambda: LLM(num_blocks=64), ServerConfig(served_model_name="a/b", allowed_hosts=hosts)
    ) as here:
        yield here


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    """A server with a key and an allowed origin."""
    config = ServerConfig(api_keys=("k",), allowed_origins=(ORIGIN,), max_body_bytes=1000)
    with serving(lambda: LLM(num_blocks=64), config) as here:
        yield here


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


def raw(served: Served, sent: bytes) -> bytes:
    """Send bytes and return the answer, until the server closes the connection."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        connection.sendall(sent)
        parts = []
        with suppress(ConnectionError):
            while part := connection.recv(65536):
                parts.append(part)
    return b"".join(parts)


def get(target: str, *headers: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"GET {target} HTTP/{version}", *headers, "Connection: close", "", ""]).encode()


def status(answer: bytes) -> int:
    return int(answer[9:12])


# Methods and paths.


@pytest.mark.parametrize("path", GETS)
def test_head_answers_like_get_without_a_body(client: httpx.Client, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert whole.status_code == head.status_code
    assert head.content == b""
    drop = {"date", "content-length"} if path == "/openapi.json" else {"date"}
    assert {k: v for k, v in head.headers.items() if k not in drop} == {
        k: v for k, v in whole.headers.items() if k not in drop
    }


def test_a_head_request_for_a_stream_returns_at_once(client: httpx.Client) -> None:
    assert client.head("/live").status_code == 200
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/models", "GET, HEAD, OPTIONS"),
        ("POST", "/health", "GET, HEAD, OPTIONS"),
        ("POST", "/", "GET, HEAD, OPTIONS"),
        ("PUT", "/page/live.js", "GET, HEAD, OPTIONS"),
        ("GET", CHAT, "POST, OPTIONS"),
        ("HEAD", COMPLETE, "POST, OPTIONS"),
        ("PATCH", "/tokenize/", "POST, OPTIONS"),
        ("BREW", "/detokenize", "POST, OPTIONS"),
    ],
)
def test_a_wrong_method_gets_405_and_a_list_of_allowed_methods(
    client: httpx.Client, method: str, path: str, allowed: str
) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
    if method != "HEAD":
        assert answer.json()["error"]["type"] == "invalid_request_error"
    asked = client.options(path)
    assert (asked.status_code, asked.headers["Allow"], asked.content) == (204, allowed, b"")


EXTRA_SLASHES = [
    "/v1/models/",
    "//v1//models",
    "/v1/models//",
    "///v1/models",
    "/v1/models/a/b/",
    "//v1/models/a%2Fb",
]


@pytest.mark.parametrize("path", EXTRA_SLASHES)
def test_extra_slashes_name_the_same_resource(served: Served, path: str) -> None:
    assert status(raw(served, get(path, "Host: localhost"))) == 200


@pytest.mark.parametrize("path", [COMPLETE + "/", "//v1//completions", "/v1/completions//"])
def test_extra_slashes_do_not_lose_the_body(served: Served, client: httpx.Client, path: str) -> None:
    answer = client.post(served.url + path, json={"prompt": "x", "max_tokens": 1}, follow_redirects=False)
    assert answer.status_code == 200, answer.text


UNKNOWN = [
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/audio/speech",
    "/api/generate",
    "/v1",
    "/page/x",
]


@pytest.mark.parametrize("path", UNKNOWN)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_gets_404_with_the_known_paths(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, path, json={})
    if path == "/page/x" and method == "POST":
        assert answer.status_code == 405
        return
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (404, "not_found_error", "unknown_path")
    assert error["message"].startswith(f"{path} ")
    assert f"POST {CHAT}" in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/v1/responses", "/v1/responses is not supported; use /v1/chat/completions. Available: POST /v1/"),
        ("/v1/messages", "/v1/messages is not supported; use /v1/chat/completions. "),
        ("/v1/embeddings", "/v1/embeddings is not supported: this server only generates text. "),
        ("/v1", "/v1 is the base URL of the API, not an endpoint. "),
        ("/docs", "/docs does not exist; the API is described in /openapi.json and docs/server.md. "),
        ("/nowhere", "/nowhere does not exist. Available: "),
    ],
)
def test_the_error_for_a_path_of_another_api_names_what_to_use_instead(
    client: httpx.Client, path: str, hint: str
) -> None:
    assert client.get(path).json()["error"]["message"].startswith(hint)
    assert client.get("/openapi.json").status_code == 200


def test_the_error_for_a_wrong_method_names_the_right_one(client: httpx.Client) -> None:
    error = client.get(CHAT).json()["error"]
    assert error["message"] == "/v1/chat/completions does not accept GET; use POST"
    error = client.delete("/v1/models").json()["error"]
    assert error["message"] == "/v1/models does not accept DELETE; use GET"


PROTECTED_PATH_SPELLINGS = [
    r"/v1/models",
    r"//v1/models",
    r"/v1//models",
    r"/v1/models/",
    r"/V1/models",
    r"/%761/models",
    r"/v1%2Fmodels",
    r"/%2Fv1/models",
    r"/v1/../v1/models",
    r"/health/../v1/models",
    r"/./v1/models",
    r"/health/..%2Fv1/models",
    r"/%2e/v1/models",
    r"/v1/models?x=/health",
    r"/v1/models#/health",
    r"/v1/models;x",
    r"/v1/models%00",
    r"/v1/models%20",
    r"http://localhost/v1/models",
    r"HTTP://localhost//v1/models",
    r"http://x/http://x/v1/models",
    r"http:///v1/models",
    r"https://localhost/v1/models",
    r"/page/../v1/models",
    r"/page/..%2F..%2Fv1/models",
    r"/page//v1/models",
    r"*",
    r"/live",
    r"//live",
    r"/live/",
    r"/%6cive",
    r"/tokenize/",
    r"\v1\models",
    r"/v1\models",
    r"/v1/models/x",
    r"v1/models",
]


@pytest.mark.parametrize("target", PROTECTED_PATH_SPELLINGS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "QUERY"])
def test_no_spelling_of_a_path_bypasses_the_key(locked: Served, method: str, target: str) -> None:
    """Without a key, every answer is an error."""
    sent = get(target, "Host: localhost").replace(b"GET", method.encode(), 1)
    answer = raw(locked, sent)
    assert status(answer) in (400, 401, 404, 405), answer
    assert b'"object":"list"' not in answer


# Hosts.


OWN = ["localhost", "LOCALHOST:8000", "localhost.", "localhost.:80", "localhost:", "127.0.0.1", "127.0.0.1."]
OTHER = [
    "",
    "evil",
    "localhost.evil",
    "localhost..",
    "localhost@evil",
    "evil@localhost",
    "[localhost]",
    "[::1",
]
OTHER += [
    "::1",
    "localhost:80:80",
    "localhost:x",
    "localhost/",
    "2130706433",
    "localhost, evil",
    "127.1",
    "0",
]
OTHER += ["localhost evil", "[::1]evil", "localhost#", "localhost?", "\tevil", "[::1]:8000:1"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [*((one, 200) for one in [*OWN, "[::1]", "[::1]:8000"]), *((one, 403) for one in OTHER)],
)
def test_allowed_hosts_are_accepted_in_any_spelling_and_others_are_rejected(
    served: Served, host: str, expected: int
) -> None:
    answer = raw(served, get("/v1/models", f"Host: {host}"))
    assert status(answer) in ({200} if expected == 200 else {400, 403}), answer


def test_a_host_in_the_target_overrides_the_header(served: Served) -> None:
    assert status(raw(served, get("http://evil/v1/models", "Host: localhost"))) == 403
    assert status(raw(served, get("http://localhost:1/v1/models", "Host: localhost"))) == 200


def test_exactly_one_host_header_is_required_except_in_http_1_0(served: Served) -> None:
    """Load balancers may send health checks in HTTP/1.0; browsers do not."""
    assert status(raw(served, get("/health", "Host: localhost", "Host: localhost"))) == 400
    assert status(raw(served, get("/health"))) == 400
    assert status(raw(served, get("/health", version="1.0"))) == 200
    assert status(raw(served, get("/health", "Host: evil", version="1.0"))) == 403


# Browsers.


def preflight(client: httpx.Client, origin: str, **more: str) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", **more}
    return client.options(COMPLETE, headers=asked)


PRIVATE = {"Access-Control-Request-Private-Network": "true"}


def test_an_allowed_origin_may_access_a_private_network(locked: Served) -> None:
    """A preflight needs no key: browsers do not send one."""
    with locked.client() as client:
        wanted = {"Access-Control-Request-Headers": "authorization, content-type"}
        answer = preflight(client, ORIGIN, **PRIVATE, **wanted)
        assert answer.status_code == 200
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert answer.headers["Access-Control-Allow-Private-Network"] == "true"
        assert "authorization" in answer.headers["Access-Control-Allow-Headers"]
        assert "Access-Control-Allow-Private-Network" not in preflight(client, ORIGIN).headers


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "https://example.org.evil", "http://example.org", ""]
)
def test_another_origin_gets_no_permission(locked: Served, served: Served, origin: str) -> None:
    for here in (locked, served):
        with here.client() as client:
            answer = preflight(client, origin, **PRIVATE)
        assert not [name for name in answer.headers if name.lower().startswith("access-control-allow")]


def test_a_page_can_read_errors_and_the_headers_x_request_id_and_retry_after(
    locked: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked.client(headers={"Origin": ORIGIN}) as client:
        key = {"Authorization": "Bearer k"}
        answers = [
            client.post(COMPLETE, json={"prompt": "x"}),
            client.post(COMPLETE, json={"prompt": "x" * 2000}, headers=key),
            client.post(COMPLETE, json={}, headers=key),
            client.get("/nowhere"),
        ]
        monkeypatch.setattr(locked.service, "check", lambda *_: 1 / 0)
        answers.append(client.post(COMPLETE, json={"prompt": "x"}, headers=key))
    assert [answer.status_code for answer in answers] == [401, 413, 400, 404, 500]
    for answer in answers:
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert answer.headers["Access-Control-Expose-Headers"] == "X-Request-Id, Retry-After"
        assert answer.json()["error"]["message"]


# Bodies.

VALID_BODY = b'{"prompt": "x", "max_tokens": 1}'


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd", "gzip, identity", "GZIP", "unknown"])
def test_a_compressed_body_gets_415_with_the_accepted_codings(client: httpx.Client, coding: str) -> None:
    answer = client.post(
        COMPLETE, content=gzip.compress(VALID_BODY), headers={**JSON, "Content-Encoding": coding}
    )
    assert (answer.status_code, answer.headers["Accept-Encoding"]) == (415, "identity")
    assert answer.json()["error"]["code"] == "unsupported_content_encoding"


@pytest.mark.parametrize("coding", ["identity", "", "Identity"])
def test_a_body_with_the_coding_identity_is_accepted(client: httpx.Client, coding: str) -> None:
    answer = client.post(COMPLETE, content=VALID_BODY, headers={**JSON, "Content-Encoding": coding})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=UTF-8", 200),
        ('application/json;charset="utf-8"', 200),
        ("application/vnd.api+json", 200),
        ("application/json; charset=utf-16", 415),
        ("application/json; charset=latin-1", 415),
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
        ("multipart/form-data; boundary=x", 400),
        ("", 400),
    ],
)
def test_only_json_in_utf_8_is_accepted(client: httpx.Client, kind: str, expected: int) -> None:
    answer = client.post(COMPLETE, content=VALID_BODY, headers={"Content-Type": kind})
    assert answer.status_code == expected
    assert expected == 200 or "application/json" in answer.text or "UTF-8" in answer.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": x}', r"at byte 11 \(line 1, column 12\)"),
        (b'{"prompt": "x",\n "n": }', r"at byte 22 \(line 2, column 7\)"),
        ('{"prompt": "\u00e9\u00e9" x}'.encode(), "at byte 18 "),
        (b'{"prompt": "x"} x', "trailing characters at byte 16"),
        (b"{'prompt': 1}", "at byte 1 "),
        (b'{"prompt": "x"', "has only 14 bytes"),
        (b"", "has only 0 bytes"),
        (b'{"prompt": "\xff"}', "byte 0xff at byte 12 is not UTF-8"),
        (b'{"prompt": NaN}', "at byte 11 "),
        (b'{"prompt": "x", "top_p": -Infinity}', "at byte 2[56] "),
        (b'{"prompt": "\\ud800"}', "hex escape at byte 1[78]"),
        (b'{"prompt": "\\udc00"}', "hex escape at byte 1[78]"),
        (b'{"prompt": "a\x00"}', "control character"),
        (b"[" * 100_000, "recursion limit|too many"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "out of range at byte"),
        ('{"prompt": "x"}'.encode("utf-16"), "byte 0xff at byte 0 is not UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16-le"), "at byte 1 "),
        (b"null", "a JSON object, not null"),
        (b"[]", "a JSON object, not an array"),
        (b'"text"', "a JSON object, not a string"),
        (b"1e999", "a JSON object, not a number"),
        (b"true", "a JSON object, not a boolean"),
    ],
    ids=range(22),
)
def test_the_error_for_invalid_json_names_the_byte(client: httpx.Client, body: bytes, message: str) -> None:
    error = client.post(COMPLETE, content=body, headers=JSON)
    assert error.status_code == 400
    assert re.search(message, error.json()["error"]["message"]), error.text


def test_a_byte_order_mark_is_skipped_and_the_last_of_equal_fields_counts(client: httpx.Client) -> None:
    twice = b'{"prompt": "x", "max_tokens": 9, "max_tokens": 1}'
    answer = client.post(COMPLETE, content=codecs.BOM_UTF8 + twice, headers=JSON)
    assert answer.json()["usage"]["completion_tokens"] == 1


def test_error_messages_are_short_for_any_request(client: httpx.Client) -> None:
    long = "\u00e9" * 500_000
    bodies: list[dict[str, Any]] = [
        {"prompt": "x", long: 1},
        {"prompt": "x", "model": long},
        {"prompt": "x", "logit_bias": {long: 1}},
        {"prompt": "x", "best_of": 10**4000},
    ]
    for body in bodies:
        answer = client.post(COMPLETE, content=json.dumps(body), headers=JSON)
        assert answer.status_code in (400, 404)
        assert len(answer.content) < 20_000, answer.text[:200]
    assert len(client.get("/" + "x" * 10_000).content) < 20_000


# Unexpected exceptions.


class Panic(BaseException):
    """Like the exceptions of libraries written in Rust."""


@pytest.mark.parametrize(
    "error", [Panic("in a library"), MemoryError(), SystemExit(3), RecursionError("deep")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_exception_fails_only_its_request(
    served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, error: BaseException, stream: bool
) -> None:
    def fail(*_: object) -> None:
        raise error

    body = {"prompt": "x", "max_tokens": 3}
    with monkeypatch.context() as patch:
        patch.setattr(served.service, "check", fail)
        answer = client.post(COMPLETE, json={**body, "stream": stream})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert client.post(COMPLETE, json=body).status_code == 200


# Priorities.


def test_a_priority_is_refused_by_name_unless_the_server_allows_it(client: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    refused = client.post(COMPLETE, json={**body, "priority": -1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    assert "--scheduling-policy fcfs" in refused.json()["error"]["message"]
    assert client.post(COMPLETE, json={**body, "priority": 0}).status_code == 200
    with (
        serving(lambda: LLM(num_blocks=64), ServerConfig(scheduling_policy="priority")) as here,
        here.client() as other,
    ):
        assert other.post(COMPLETE, json={**body, "priority": -100}).status_code == 200
        beyond = other.post(COMPLETE, json={**body, "priority": -(2**31) + 1})
        assert (beyond.status_code, beyond.json()["error"]["param"]) == (400, "priority")
