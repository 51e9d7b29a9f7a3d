"""Limits on connections and their timeouts: raw sockets against a real server.

Oracles: RFC 9110 and RFC 9112, and the limits of `ServerConfig`.
"""

import json
import logging
import re
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import h11
import httpx2 as httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from served import SECONDS, Served, serving, until
from tiny_llm import LLM
from tiny_llm_server import ServerConfig, connections

COMPLETE = "/v1/completions"
LIMITS = ServerConfig(header_timeout=1.0, timeout_keep_alive=1, body_timeout=1.0, unread_timeout=1.0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(num_blocks=512, max_num_seqs=4)


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Served]:
    with serving(lambda: llm) as here:
        yield here


@pytest.fixture(scope="module")
def strict(llm: LLM) -> Iterator[Served]:
    """A server with time limits of one second and small kernel buffers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "KERNEL_BYTES", 16_384)
        with serving(lambda: llm, LIMITS) as here:
            yield here


def small() -> LLM:
    return LLM(num_blocks=256, max_num_seqs=4)


def connected(served: Served) -> socket.socket:
    host, _, port = served.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


def request(body: dict[str, object], *headers: str, path: str = COMPLETE) -> bytes:
    sent = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*head, f"Content-Length: {len(sent)}", "", ""]).encode() + sent


def read_to_end(connection: socket.socket) -> bytes:
    """Return the answer, until the server closes the connection."""
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def health_answer(connection: socket.socket) -> bytes:
    """Send HEALTH on a connection that stays open, and return the answer."""
    connection.sendall(HEALTH)
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(65536)
        assert part, "the connection was closed"
        answer += part
    return answer


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


# Time limits.


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX:"])
def test_an_unfinished_head_times_out(strict: Served, sent: bytes) -> None:
    with connected(strict) as connection:
        connection.sendall(sent)
        assert read_to_end(connection).startswith(b"HTTP/1.1 408 ")


def test_a_head_sent_byte_by_byte_times_out(strict: Served) -> None:
    with connected(strict) as connection:
        for byte in b"GET /health HTTP/1.1\r\nX: " + b"y" * 100:
            with suppress(ConnectionError):
                connection.send(bytes([byte]))
            if select.select([connection], [], [], 0.1)[0]:
                break
        else:
            raise AssertionError("the server did not answer")
        assert read_to_end(connection).startswith(b"HTTP/1.1 408 ")


def test_an_idle_connection_is_closed_without_an_answer(strict: Served) -> None:
    with connected(strict) as connection:
        connection.sendall(HEALTH)
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_the_head_of_a_second_request_times_out_too(strict: Served) -> None:
    with connected(strict) as connection:
        health_answer(connection)
        connection.sendall(b"GET /hea")
        assert read_to_end(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("head", [b"Content-Length: 50\r\n", b"Transfer-Encoding: chunked\r\n"])
@pytest.mark.parametrize("method", [b"POST /v1/completions", b"GET /health"])
def test_an_unfinished_body_times_out(
    strict: Served, monkeypatch: pytest.MonkeyPatch, method: bytes, head: bytes
) -> None:
    """Even if the application answers without reading it."""
    monkeypatch.setattr(connections, "BODY_GRACE", 0.5)
    start = b"%b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%b\r\n2\r\n{}"
    with connected(strict) as connection:
        connection.sendall(start % (method, head))
        answer = read_to_end(connection)
    assert re.match(rb"HTTP/1.1 (408|200) ", answer), answer


def test_a_client_that_does_not_read_is_disconnected(strict: Served, llm: LLM) -> None:
    """Its request is aborted too."""
    body = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True, "logprobs": 20}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = strict.url.removeprefix("http://").partition(":")
        connection.connect((host, int(port)))
        connection.sendall(request(body))
        until(lambda: llm.engine.stats.num_running > 0)
        until(lambda: not strict.server.server_state.connections)
        until(lambda: not strict.server.server_state.tasks)
    until(lambda: llm.engine.stats.num_running == 0)


def test_a_client_that_reads_slowly_gets_the_whole_answer(strict: Served) -> None:
    """It takes longer than `unread_timeout` in total, but keeps reading."""
    body = {"prompt": " a" * 150_000, "return_token_strs": True}
    with connected(strict) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(request(body, "Connection: close", path="/tokenize"))
        size, start = 0, time.monotonic()
        while part := connection.recv(20_000):
            size += len(part)
            time.sleep(0.03)
    assert size > 1_000_000
    assert time.monotonic() - start > 1.5


# The number of connections.


def test_at_the_limit_an_idle_connection_is_closed_for_a_new_one_and_busy_ones_stay() -> None:
    body = {"prompt": "Once", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with serving(small, ServerConfig(max_connections=4)) as here, ExitStack() as stack:
        busy = [stack.enter_context(connected(here)) for _ in range(3)]
        for connection in busy:
            connection.sendall(request(body, "Connection: close"))
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        idle = stack.enter_context(connected(here))
        idle.sendall(b"GET /hea")
        until(lambda: len(here.server.server_state.connections) == 4)
        with connected(here) as connection:
            assert health_answer(connection).startswith(b"HTTP/1.1 200 ")
        assert read_to_end(idle) == b""
        for connection in busy:
            assert read_to_end(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_new_connection_gets_503_if_all_are_busy() -> None:
    body = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with serving(small, ServerConfig(max_connections=2)) as here, ExitStack() as stack:
        busy = [stack.enter_context(connected(here)) for _ in range(2)]
        for connection in busy:
            connection.sendall(request(body))
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        with connected(here) as connection:
            answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"retry-after: 1\r\n" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"


@contextmanager
def limited_process(files: int) -> Iterator[tuple[list[str], str]]:
    """Start a server that may open few files but accepts more connections; yield its log and address."""
    code = f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({files}, {files}))\n"
    code += "from tiny_llm_server import connections\nconnections.SPARE_FILES = -1000\n"
    code += "from tiny_llm_cli.main import main\nmain()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--num-blocks", "256"]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    lines: list[str] = []
    with subprocess.Popen(command, **both, text=True) as process:  # type: ignore[call-overload]
        reader = threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True)
        reader.start()
        try:
            until(lambda: any("is ready" in line for line in lines))
            yield lines, re.search(r"http://([\d.:]+)", "".join(lines))[1]  # type: ignore[index]
        finally:
            process.kill()
            process.wait()
            reader.join()


def test_without_file_descriptors_open_connections_are_served_and_the_log_stays_short() -> None:
    """Every connection is in the middle of a body, so none is closed for another one."""
    with limited_process(80) as (lines, address), ExitStack() as stack:
        host, _, port = address.partition(":")
        first = stack.enter_context(socket.create_connection((host, int(port)), timeout=SECONDS))
        assert health_answer(first).startswith(b"HTTP/1.1 200 ")
        with ExitStack() as others:
            for _ in range(120):
                one = others.enter_context(socket.create_connection((host, int(port)), timeout=SECONDS))
                one.sendall(request({"prompt": "x"})[:-1])
            until(lambda: any("cannot accept" in line for line in lines))
            time.sleep(2 * connections.ACCEPT_PAUSE)
            assert health_answer(first).startswith(b"HTTP/1.1 200 ")
        with httpx.Client(base_url=f"http://{address}", timeout=SECONDS) as client:
            assert client.get("/health").status_code == 200
    assert [line for line in lines if "cannot accept" in line] == [
        "WARNING:  cannot accept connections: Too many open files\n"
    ]


def test_the_limit_on_open_files_is_raised() -> None:
    code = (
        "import resource as r; from tiny_llm_server.connections import raise_file_limit;"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (100, hard));"
        "raise_file_limit(); print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    expected = connections.MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, connections.MAX_FILES)
    assert int(done.stdout) == expected


# Chunked bodies and invalid HTTP.


def test_a_body_in_one_byte_chunks_is_refused_before_its_end(served: Served) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slowest, stop = [0.0], threading.Event()

    def poll_health() -> None:
        with served.client() as client:
            while not stop.is_set():
                start = time.monotonic()
                client.get("/health")
                slowest[0] = max(slowest[0], time.monotonic() - start)

    polling = threading.Thread(target=poll_health)
    polling.start()
    with connected(served) as connection:
        with suppress(ConnectionError):
            connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 200_000)
        answer = read_to_end(connection)
    stop.set()
    polling.join()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert slowest[0] < 2.0


def test_json_in_small_chunks_is_accepted(served: Served) -> None:
    """As `json.JSONEncoder().iterencode` makes them: 20,000 chunks."""
    pieces = ['{"tokens": [', *(f"{token}, " for token in range(20_000)), "1]}"]
    with served.client() as client:
        content = iter([piece.encode() for piece in pieces])
        answer = client.post("/detokenize", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200


SMUGGLED = [
    (b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"2\r\n{}\r\n0\r\n\r\n", 400),
    (b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", b"2\r\n{}\r\n0\r\n\r\n", 400),
    (b"Transfer-Encoding: chunked, identity\r\n", b"2\r\n{}\r\n0\r\n\r\n", 501),
    (b"Transfer-Encoding: gzip, chunked\r\n", b"2\r\n{}\r\n0\r\n\r\n", 501),
    (b"Content-Length: 2, 3\r\n", b"{}", 400),
    (b"Content-Length: 2\r\nContent-Length: 3\r\n", b"{}", 400),
    (b"Content-Length: -1\r\n", b"{}", 400),
    (b"Content-Length: +2\r\n", b"{}", 400),
    (b"Content-Length: 0x2\r\n", b"{}", 400),
    (b"Content-Length: " + b"9" * 30 + b"\r\n", b"", 400),
    (b"Content-Length : 2\r\n", b"{}", 400),
    (b"Transfer-Encoding: chunked\r\n", b"-1\r\n{}\r\n0\r\n\r\n", 400),
    (b"Transfer-Encoding: chunked\r\n", b"0x2\r\n{}\r\n0\r\n\r\n", 400),
    (b"Host: evil\r\n", b"", 400),
    (b"X: " + b"y" * 200_000 + b"\r\n", b"", 431),
    (b"X: y\r\n" * 30_000, b"", 431),
    (b"X: a\0b\r\n", b"", 400),
]


@pytest.mark.parametrize(("head", "body", "status"), SMUGGLED, ids=range(len(SMUGGLED)))
def test_a_request_that_two_servers_could_read_differently_is_refused(
    served: Served, head: bytes, body: bytes, status: int
) -> None:
    with connected(served) as connection:
        start = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with suppress(ConnectionError):
            connection.sendall(start + head + b"\r\n" + body)
        connection.settimeout(5)
        answer = read_to_end(connection)
    if answer or status != 431:  # the answer may be lost on a client that still sends
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize(
    "line",
    [
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1",
        b"GET /health HTTP/9.9",
        b"GET",
        b"\x16\x03\x01\x02",
        b"GET  / HTTP/1.1",
    ],
    ids=range(5),
)
def test_an_invalid_request_line_is_refused(served: Served, line: bytes) -> None:
    with connected(served) as connection:
        with suppress(ConnectionError):
            connection.sendall(line + b"\r\nHost: localhost\r\n\r\n")
        answer = read_to_end(connection)
    assert re.match(rb"HTTP/1.1 (4\d\d|505) ", answer) or not answer


def test_requests_in_one_packet_are_answered_in_order(served: Served) -> None:
    with connected(served) as connection:
        last = b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(HEALTH * 50 + last)
        assert re.findall(rb"HTTP/1.1 (\d+)", read_to_end(connection)) == [b"200"] * 50 + [b"404"]


def test_bodies_share_a_memory_limit_that_does_not_count_small_ones() -> None:
    config = ServerConfig(max_body_bytes=1 << 20, body_memory_bytes=1 << 20)
    with serving(small, config) as here, ExitStack() as stack, here.client() as client:
        head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        for _ in range(2):
            slow = stack.enter_context(connected(here))
            slow.sendall(head % 900_000 + b" " * 500_000)
        time.sleep(0.3)
        large = client.post("/tokenize", json={"prompt": "x " * 100_000})
        assert (large.status_code, large.json()["error"]["code"]) == (503, "too_many_bodies")
        assert large.headers["Retry-After"] == "1"
        assert client.post(COMPLETE, json={"prompt": "x", "max_tokens": 1}).status_code == 200
        stack.close()
        until(lambda: client.post("/tokenize", json={"prompt": "x " * 100_000}).status_code == 200)


# Clients that shut down their sending side.


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_shuts_down_its_sending_side_gets_its_answer(served: Served, stream: bool) -> None:
    """`nc -N` does this."""
    body = {"prompt": "Once", "max_tokens": 30, "ignore_eos": True, "temperature": 0, "stream": stream}
    with served.client() as client:
        expected = client.post(COMPLETE, json={**body, "stream": False}).json()["choices"][0]["text"]
    with connected(served) as connection:
        connection.sendall(request(body))
        connection.shutdown(socket.SHUT_WR)
        answer = read_to_end(connection).decode()
    if stream:
        events = re.findall(r"data: (\{.*\})", answer)
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected
        assert "data: [DONE]" in answer
    else:
        final = answer.removeprefix("HTTP/1.1 100 Continue\r\n\r\n")
        assert final.startswith("HTTP/1.1 200 ")
        assert json.loads(final.partition("\r\n\r\n")[2])["choices"][0]["text"] == expected


def test_a_client_that_shuts_down_its_sending_side_gets_all_pipelined_answers(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(HEALTH * 3)
        connection.shutdown(socket.SHUT_WR)
        assert re.findall(rb"HTTP/1.1 (\d+)", read_to_end(connection)) == [b"200"] * 3


@pytest.mark.parametrize("sent", [b"", b"GET /hea", request({"prompt": "x"})[:-3]])
def test_a_client_that_closes_before_its_request_is_complete_is_dropped(served: Served, sent: bytes) -> None:
    with connected(served) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == b""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_disconnect_cancels_the_request_at_once(
    served: Served, llm: LLM, stream: bool, waits: bool
) -> None:
    """While its request runs, and while it waits for another request."""
    body = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "stream": stream}
    stats = llm.engine.stats
    with ExitStack() as stack:
        for _ in range(4 if waits else 0):
            other = stack.enter_context(connected(served))
            other.sendall(request({**body, "stream": True}))
        until(lambda: llm.engine.stats.num_running == (4 if waits else 0))
        with connected(served) as connection:
            connection.sendall(request(body))
            until(lambda: llm.engine.stats.num_waiting == 1 if waits else llm.engine.stats.num_running == 1)
        start = time.monotonic()
        until(lambda: llm.engine.stats.num_waiting == 0 if waits else llm.engine.stats.num_running == 0)
        assert time.monotonic() - start < 10
    until(lambda: llm.engine.stats.num_running == 0)
    stats = llm.engine.stats
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def test_a_forwarded_address_is_ignored(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Any local process could claim another client's address: the log has that of the connection."""
    logger = logging.getLogger("uvicorn.error")
    headers = {"X-Forwarded-For": "203.0.113.9", "Forwarded": "for=203.0.113.9"}
    with caplog.at_level(logging.INFO, "uvicorn.error"), served.client() as client:
        logger.addHandler(caplog.handler)
        client.get("/v1/models", headers=headers)
        until(lambda: "/v1/models" in caplog.text)
        logger.removeHandler(caplog.handler)
    assert "127.0.0.1 GET /v1/models 200" in caplog.text
    assert "203.0.113.9" not in caplog.text


@given(
    version=st.sampled_from([b"1.0", b"1.1"]), parts=st.lists(st.binary(max_size=300)), known=st.booleans()
)
def test_the_parts_of_an_answer_are_framed_as_h11_frames_them(
    version: bytes, parts: list[bytes], known: bool
) -> None:
    length = [(b"content-length", str(sum(map(len, parts))).encode())] if known else []
    sent = []
    for parser in (connections._Parser(), h11.Connection(h11.SERVER)):
        parser.receive_data(b"GET / HTTP/%b\r\nhost: a\r\n\r\n" % version)
        assert [type(parser.next_event()) for _ in range(2)] == [h11.Request, h11.EndOfMessage]
        events = [h11.Response(status_code=200, headers=length), *(h11.Data(data=part) for part in parts)]
        sent.append(([parser.send(event) for event in (*events, h11.EndOfMessage())], parser.our_state))
    assert sent[0] == sent[1]
