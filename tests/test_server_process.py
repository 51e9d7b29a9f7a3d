"""`tiny-llm serve` as a process: what it prints, what signals do to it, and what it refuses to begin with."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from served import SECONDS, serving, until
from tiny_llm import LLM, TinyLLMError
from tiny_llm_server import make_app
from tiny_llm_server.serve import GracefulServer, listen

BODY = {"prompt": "Once", "max_tokens": 150, "ignore_eos": True, "temperature": 0}


class Process:
    """A server that was started from the command line; `lines` is what it has printed."""

    def __init__(self, *options: str) -> None:
        size = [] if "--demo" in options else ["--num-blocks", "512"]
        port = [] if "--port" in options else ["--port", "0"]
        command = [sys.executable, "-m", "tiny_llm_cli", "serve", *port, *size, *options]
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.popen = subprocess.Popen(command, **both, text=True, env=os.environ.copy())
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def url(self) -> str:
        """Where it listens, when it does."""
        found: list[re.Match[str] | None] = []

        def listens() -> bool:
            assert self.popen.poll() is None, self.lines
            found[:] = [re.search(r"Listening on (http://\S+)", line) for line in self.lines]
            return any(found)

        until(listens)
        return next(match for match in found if match)[1]

    def ended(self, seconds: float) -> int:
        """Its exit code."""
        return self.popen.wait(seconds)

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as lines:
            for line in lines:
                self.lines.append(line)


@contextmanager
def process(*options: str) -> Iterator[Process]:
    started = Process(*options)
    try:
        yield started
    finally:
        if started.popen.poll() is None:
            started.popen.kill()
        started.popen.wait()
        started.reader.join()


def ready(client: httpx.Client) -> None:
    until(lambda: client.get("/health").status_code == 200)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_accepted_requests_end(sent: signal.Signals) -> None:
    with process() as server, httpx.Client(base_url=server.url(), timeout=SECONDS) as client:
        ready(client)
        with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.popen.send_signal(sent)
            until(lambda: client.get("/health").status_code == 503)
            refused = client.post("/v1/completions", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        client.close()
        assert server.ended(SECONDS) == 0
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


def test_the_second_signal_ends_them_at_once() -> None:
    with process() as server, httpx.Client(base_url=server.url(), timeout=SECONDS) as client:
        ready(client)
        body = {**BODY, "max_tokens": 6000, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.popen.send_signal(signal.SIGTERM)
            until(lambda: client.get("/health").status_code == 503)
            start = time.monotonic()
            server.popen.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"finish_reason":"abort"' in rest[-2]
        assert server.ended(SECONDS) == 0
        assert time.monotonic() - start < 15
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_client_that_does_not_read_is_not_waited_for(signals: int) -> None:
    """His answer is larger than what the system takes off the server's hands."""
    body = json.dumps({"prompt": " a" * 700_000, "return_token_strs": True}).encode()
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n"
    with process() as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = server.url().removeprefix("http://").partition(":")
        with httpx.Client(base_url=server.url(), timeout=SECONDS) as other:
            ready(other)
        client.connect((host, int(port)))
        client.sendall(head % len(body) + body)
        until(lambda: bool(client.recv(1, socket.MSG_PEEK)))
        for _ in range(signals):
            server.popen.send_signal(signal.SIGTERM)
        assert server.ended(SECONDS) == 0
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


def test_a_model_that_loads_is_not_waited_for() -> None:
    """One signal is enough: nothing has been accepted yet."""
    never = threading.Event()

    def load() -> LLM:
        never.wait()
        raise ValueError("nobody waits for it")

    try:
        with serving(load, wait=False) as here:
            here.server.handle_exit(signal.SIGTERM, None)
            until(lambda: not here.server.servers or not here.server.servers[0].is_serving())
    finally:
        never.set()


def test_grace_is_over_some_time() -> None:
    with process("--grace", "0.5") as server, httpx.Client(base_url=server.url(), timeout=SECONDS) as client:
        ready(client)
        with client.stream(
            "POST", "/v1/completions", json={**BODY, "max_tokens": 6000, "stream": True}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.popen.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"finish_reason":"abort"' in rest[-2]
        assert server.ended(SECONDS) == 0


def test_the_same_seed_gives_the_same_answers_after_a_restart() -> None:
    texts = []
    for _ in range(2):
        with process("--seed", "7") as server, httpx.Client(base_url=server.url(), timeout=SECONDS) as client:
            ready(client)
            answers = [
                client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 12}).json()
                for _ in range(3)
            ]
            texts.append([answer["choices"][0]["text"] for answer in answers])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(tmp_path: os.PathLike[str]) -> None:
    with process("--model", f"{tmp_path}/absent.gguf") as server:
        assert server.ended(SECONDS) == 1
        until(lambda: any("absent.gguf" in line for line in server.lines))
        assert not any("Traceback" in line for line in server.lines), server.lines


class Panic(BaseException):
    """As a library written in Rust raises it."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Panic("called `unwrap()` on a `None` value"), "cannot be loaded: Panic: called"),
        (MemoryError(), "cannot be loaded: MemoryError"),
        (KeyboardInterrupt(), "cannot be loaded: KeyboardInterrupt"),
        (SystemExit(0), "cannot be loaded: SystemExit"),
        (StopIteration(), "cannot be loaded: StopIteration"),
        (asyncio.CancelledError(), "cannot be loaded: CancelledError"),
        (RecursionError("deep"), "cannot be loaded: RecursionError: deep"),
        (ValueError("no such tensor"), "^no such tensor$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_loading_raises_ends_the_server(error: BaseException, said: str) -> None:
    """With an error that the command line shows as one line."""

    def load() -> LLM:
        raise error

    with pytest.raises((TinyLLMError, ValueError), match=said):
        GracefulServer(make_app(load), "127.0.0.1", 0, log_level="critical").run()


def test_a_thread_that_cannot_be_started_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "load":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(TinyLLMError, match="for the thread that loads the model"):
        GracefulServer(make_app(LLM), "127.0.0.1", 0, log_level="critical").run()


@pytest.mark.parametrize("content", [b"", b"GGUF" + b"\xff" * 100], ids=range(2))
def test_a_model_file_that_is_none_ends_the_server_with_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with process("--model", str(path), "--log-level", "error") as server:
        assert server.ended(SECONDS) == 1
        until(lambda: bool(server.lines))
        server.reader.join(SECONDS)
    [line] = server.lines
    assert line.startswith("tiny-llm: error:")
    assert "broken.gguf" in line


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", "a" * 300, "", "a\0b", "::1%nowhere"])
def test_a_host_that_is_none_of_this_machines_is_refused_in_one_line(host: str) -> None:
    with pytest.raises((OSError, ValueError)) as refused:
        listen(host, 0)
    assert "\n" not in str(refused.value)
    assert "cannot listen" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "70000"], "70000"),
        (["--max-connections", "0"], "--max-connections must be at least 1, not 0"),
        (["--header-timeout", "0"], "--header-timeout must be more than 0 seconds, not 0"),
        (["--scheduling-policy", "lottery"], "--scheduling-policy must be fcfs or priority, not 'lottery'"),
        (["--log-level", "loud"], "'loud' is no level"),
        (["--max-n", "0"], "--max-n must be at least 1, not 0"),
        (["--max-body", "lots"], "'lots' is not a size"),
        (["--demo", "--kv-cache-memory", "1GiB"], "leave --kv-cache-memory out"),
        (["--demo", "--batching", "dense"], "leave --batching out"),
        (["--demo", "--preemption-mode", "recompute"], "leave --preemption-mode out"),
        (["--demo", "--no-live"], "leave --live out"),
        (["--api-key", " sesame"], "must not begin or end with white space"),
        (["--isolate-keys"], "--isolate-keys is for a server that has --api-key"),
        (["--num-blocks", "0"], "--num-blocks must be at least 1, not 0"),
        (["--kv-cache-dtype", "int8"], "not 'int8'"),
        (["--keep-alive", "0"], "--keep-alive must be more than 0 seconds, not 0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_it_begins(options: list[str], said: str) -> None:
    with process(*options) as server:
        assert server.ended(SECONDS) == 2
        until(lambda: any(said in line for line in server.lines))


def test_a_key_from_the_environment_is_one_key_whatever_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_LLM_API_KEY", "correct horse battery")
    with process() as server, httpx.Client(base_url=server.url(), timeout=SECONDS) as client:
        ready(client)
        statuses = [
            client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code
            for key in ("correct", "horse", "correct horse battery")
        ]
    assert statuses == [401, 401, 200]
    monkeypatch.setenv("TINY_LLM_API_KEY", "")
    with process() as server:
        assert server.ended(SECONDS) == 2, "a variable that somebody forgot to fill is no open door"


def test_on_loopback_without_a_key_only_its_own_names_are_answered() -> None:
    """A page of another site may have its name point at this machine; its browser sends that name."""
    names = ["localhost:8000", "127.0.0.1", "[::1]:80", "Gateway:1", "evil.example", "evil.example:8000"]
    with (
        process("--allowed-host", "gateway") as server,
        httpx.Client(base_url=server.url(), timeout=SECONDS) as client,
    ):
        ready(client)
        answers = [client.get("/v1/models", headers={"Host": name}) for name in names]
    assert [answer.status_code for answer in answers] == [200] * 4 + [403] * 2
    error = answers[-1].json()["error"]
    assert (error["type"], error["code"]) == ("permission_error", "host_not_allowed")
    assert "'evil.example:8000'" in error["message"]


@pytest.mark.parametrize("wanted", [False, True])
def test_nobodys_words_and_keys_are_in_the_log_unless_that_is_asked_for(wanted: bool) -> None:
    """Of requests that are answered, refused, too long and broken off, with everything logged that can be."""
    options = ["--api-key", "sesame", "--log-level", "debug", "--num-blocks", "64", "--max-body", "4000"]
    with process(*options, *["--log-requests"] * wanted) as server:
        key = {"Authorization": "Bearer sesame"}
        with httpx.Client(base_url=server.url(), timeout=SECONDS, headers=key) as client:
            ready(client)
            path, body = "/v1/completions", {"prompt": "xyzzy and plugh", "max_tokens": 5}
            assert client.post(path, json=body).status_code == 200
            for wrong in (
                {"n": 0},
                {"frobozz": "xyzzy"},
                {"max_tokens": 1 << 20},
                {"prompt": "xyzzy" * 1000},
            ):
                assert client.post(path, json={**body, **wrong}).status_code in (400, 413)
            assert client.post(path, content=b'{"prompt": "xyzzy').status_code == 400
            assert client.post(path, json=body, headers={"Authorization": "Bearer open"}).status_code == 401
            chat = {"messages": [{"role": "user", "content": "xyzzy"}], "max_tokens": 500, "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=chat) as answer:
                assert answer.status_code == 200
                next(answer.iter_lines())
        server.popen.send_signal(signal.SIGTERM)
        assert server.ended(SECONDS) == 0
    log = "".join(server.lines)
    assert "/v1/completions" in log
    assert "sesame" not in log
    assert "Bearer" not in log
    assert ("xyzzy and plugh" in log) == wanted
    assert wanted or "xyzzy" not in log


def test_the_demo_answers_like_any_server() -> None:
    """A chat without a limit on its length too, several at once: its pool is small, and so is its context."""
    chat = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    with process("--demo") as server, httpx.Client(base_url=server.url(), timeout=SECONDS) as client:
        ready(client)
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 96 * 16
        answer = client.post("/v1/chat/completions", json={**chat, "n": 2})
        said = [choice["message"]["content"] for choice in answer.json()["choices"]]
        assert said == ["The capital of France is Paris."] * 2


def test_an_address_that_is_not_to_be_had_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process("--port", str(port)) as server:
            assert server.ended(SECONDS) == 1
            until(lambda: bool(server.lines))
    [line] = server.lines
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use; see --host, --port" in line


def test_an_open_door_without_a_key_is_pointed_out() -> None:
    with process("--host", "0.0.0.0", "--log-level", "error") as server:
        until(lambda: any("no --api-key" in line for line in server.lines))
