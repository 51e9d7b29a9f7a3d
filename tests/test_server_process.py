"""`tiny-llm serve` as a process: its log, its signals, and the options that it refuses."""

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
from concurrent.futures import ThreadPoolExecutor
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
    """A server started from the command line. lines: its output so far."""

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
        """Wait until the server listens, and return its URL."""
        found: list[re.Match[str] | None] = []

        def listens() -> bool:
            assert self.popen.poll() is None, self.lines
            found[:] = [re.search(r"Listening on (http://\S+)", line) for line in self.lines]
            return any(found)

        until(listens)
        return next(match for match in found if match)[1]

    def exit_code(self, seconds: float) -> int:
        """Wait until the process exits, and return its exit code."""
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
def test_the_first_signal_lets_accepted_requests_finish(sent: signal.Signals) -> None:
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
        assert server.exit_code(SECONDS) == 0
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


def test_the_second_signal_aborts_requests() -> None:
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
        assert server.exit_code(SECONDS) == 0
        assert time.monotonic() - start < 15
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_client_that_does_not_read_does_not_delay_the_exit(signals: int) -> None:
    """The answer is larger than the kernel's buffers."""
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
        assert server.exit_code(SECONDS) == 0
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


@pytest.mark.parametrize("delay", [0.2, 0.3, 0.4, 0.5])
def test_a_signal_while_the_model_loads_ends_the_process_without_an_abort(delay: float) -> None:
    """The embedded model loads for about a second; MLX aborts if Python ends beside a thread that uses it."""
    with process() as server:
        server.url()
        time.sleep(delay)
        server.popen.send_signal(signal.SIGTERM)
        assert server.exit_code(SECONDS) == 0


def test_a_loading_model_does_not_delay_the_exit() -> None:
    """One signal is enough: nothing has been accepted yet."""
    never = threading.Event()

    def load() -> LLM:
        never.wait()
        raise ValueError("no longer needed")

    try:
        with serving(load, wait=False) as here:
            here.server.handle_exit(signal.SIGTERM, None)
            until(lambda: not here.server.servers or not here.server.servers[0].is_serving())
    finally:
        never.set()


def test_requests_are_aborted_after_the_grace_period() -> None:
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
        assert server.exit_code(SECONDS) == 0


def test_a_failure_drains_like_a_signal_and_is_raised_at_the_end() -> None:
    app = make_app(lambda: LLM(num_blocks=64, max_num_seqs=2))
    server = GracefulServer(app, "127.0.0.1", 0, log_level="warning")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.run)
        until(lambda: app.state.service.status.value == "ready" and bool(server.servers))
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
            with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                server.fail(TinyLLMError("a part of it is gone"), SECONDS)
                until(lambda: app.state.service.status.value == "draining")
                assert client.post("/v1/completions", json=BODY).status_code == 503
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in rest[-2]
        with pytest.raises(TinyLLMError, match="a part of it is gone"):
            running.result(SECONDS)


def test_a_failure_while_the_server_drains_changes_nothing() -> None:
    with serving(lambda: LLM(num_blocks=64, max_num_seqs=2)) as here:
        with (
            here.client() as client,
            client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            here.server.handle_exit(signal.SIGTERM, None)
            until(lambda: here.service.status.value == "draining")
            here.server.fail(TinyLLMError("a part of it is gone"), 0.0)
            rest = [line for line in lines if line]
        assert '"finish_reason":"length"' in rest[-2]


def test_the_same_seed_gives_the_same_answers_after_a_restart() -> None:
    """The model recommends greedy decoding, so the requests must ask for a temperature."""
    body, texts = {"prompt": "Once", "max_tokens": 12, "temperature": 1}, []
    for _ in range(2):
        with process("--seed", "7") as server, httpx.Client(base_url=server.url(), timeout=SECONDS) as client:
            ready(client)
            answers = [client.post("/v1/completions", json=body).json() for _ in range(3)]
            texts.append([answer["choices"][0]["text"] for answer in answers])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def folder_with(tmp_path: Path, **files: str) -> str:
    """Make a folder with files of these contents. Names have a `_` for the dot."""
    for name, text in files.items():
        (tmp_path / name.replace("_", ".")).write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--model", "{}/absent.gguf"], 1, "absent.gguf: no such file or folder"),
        (["--model", "absent.gguf"], 1, "absent.gguf: no such file or folder"),
        (["--model", "{}"], 1, "config.json"),
        (["--model", "{}/weights.safetensors"], 1, "weights.safetensors"),
        (["--num-blocks", "2", "--max-model-len", "8192"], 2, "8192 tokens needs 512 blocks of 16; the pool"),
        (["--max-model-len", "9000"], 2, "--max-model-len (9000) exceeds the model's context of 8192 tokens"),
        (["--preemption-mode", "swap", "--swap-space", "1"], 2, "--swap-space (1 byte)"),
        (["--generation-config", "{}/nowhere"], 1, "a folder with a generation_config.json"),
        (["--chat-template-content-format", "x"], 2, "auto, string, openai, not 'x'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_model_that_cannot_run_is_refused_in_one_line_before_the_server_listens(
    tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    folder = folder_with(tmp_path, weights_safetensors="x")
    with process(*[option.replace("{}", folder) for option in options]) as server:
        assert server.exit_code(SECONDS) == code
        server.reader.join(SECONDS)
    [line] = server.lines
    assert line.startswith("tiny-llm: error:")
    assert message in line


def test_the_curl_example_of_the_help_gets_a_sensible_answer() -> None:
    """The command is run as it is printed, except for the port."""
    shown = subprocess.run(
        [sys.executable, "-m", "tiny_llm_cli", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"^ *(curl http://127.0.0.1:8000(?:.*\\\n)*.*)$", shown, re.MULTILINE)
    assert found is not None, shown
    with process() as server, httpx.Client(base_url=server.url(), timeout=SECONDS) as client:
        ready(client)
        command = found[1].replace("http://127.0.0.1:8000", server.url())
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert answer == "The capital of France is Paris."


def test_the_log_shows_startup_defaults_and_draining() -> None:
    override = '{"temperature": 0.2}'
    with (
        process("--override-generation-config", override) as server,
        httpx.Client(base_url=server.url(), timeout=SECONDS) as client,
    ):
        ready(client)
        with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.popen.send_signal(signal.SIGINT)
            for _ in lines:
                pass
        client.close()
        assert server.exit_code(SECONDS) == 0
        server.reader.join(SECONDS)
    log = "".join(server.lines)
    order = [
        "Listening on http://127.0.0.1:",
        "is ready: 512 blocks of 16 tokens",
        "Sampling defaults for fields that a request leaves out: temperature 0.2 (--override-generation",
        "Draining: 1 request left, for at most 30 s. Press Ctrl-C again to stop now.",
        "150 output tokens",
        "Finished server process",
    ]
    places = [log.find(part) for part in order]
    assert -1 not in places, log
    assert places == sorted(places), log
    assert "No requests are left" in log
    assert "/health" not in log, "a probe is not logged"


@pytest.mark.parametrize(("level", "shown"), [("info", False), ("debug", True)])
def test_the_log_starts_with_the_address_unless_its_level_is_debug(level: str, shown: bool) -> None:
    with process("--log-level", level) as server:
        with httpx.Client(base_url=server.url(), timeout=SECONDS) as client:
            ready(client)
        server.popen.send_signal(signal.SIGINT)
        assert server.exit_code(SECONDS) == 0
        server.reader.join(SECONDS)
    phases = ("Started server", "application startup", "startup complete", "application shutdown")
    log = "".join(server.lines)
    assert [phase in log for phase in phases] == [shown] * len(phases)
    assert ("Listening on http" in server.lines[0]) is not shown
    assert "Finished server process" in server.lines[-1]


def test_the_log_shows_how_many_requests_a_second_signal_aborts() -> None:
    with process() as server, httpx.Client(base_url=server.url(), timeout=SECONDS) as client:
        ready(client)
        body = {**BODY, "max_tokens": 6000, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.popen.send_signal(signal.SIGINT)
            until(lambda: any("Draining: 1 request left" in line for line in server.lines))
            server.popen.send_signal(signal.SIGINT)
            for _ in lines:
                pass
        assert server.exit_code(SECONDS) == 0
        server.reader.join(SECONDS)
    log = "".join(server.lines)
    assert "Stopping now: 1 request aborted" in log
    assert "No requests are left" not in log


class Panic(BaseException):
    """Like the exceptions of libraries written in Rust."""


@pytest.mark.parametrize(
    ("error", "message"),
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
def test_any_error_while_loading_stops_the_server(error: BaseException, message: str) -> None:
    """The error is one that the command line shows as one line."""

    def load() -> LLM:
        raise error

    with pytest.raises((TinyLLMError, ValueError), match=message):
        GracefulServer(make_app(load), "127.0.0.1", 0, log_level="critical").run()


def test_a_thread_that_cannot_start_stops_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def raise_error(thread: threading.Thread) -> None:
        if thread.name == "load":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", raise_error)
    with pytest.raises(TinyLLMError, match="for the thread that loads the model"):
        GracefulServer(make_app(LLM), "127.0.0.1", 0, log_level="critical").run()


@pytest.mark.parametrize("content", [b"", b"GGUF" + b"\xff" * 100], ids=range(2))
def test_an_invalid_model_file_stops_the_server_with_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with process("--model", str(path), "--log-level", "error") as server:
        assert server.exit_code(SECONDS) == 1
        until(lambda: bool(server.lines))
        server.reader.join(SECONDS)
    [line] = server.lines
    assert line.startswith("tiny-llm: error:")
    assert "broken.gguf" in line


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", "a" * 300, "", "a\0b", "::1%nowhere"])
def test_a_host_that_this_machine_does_not_have_is_refused_in_one_line(host: str) -> None:
    with pytest.raises((OSError, ValueError)) as refused:
        listen(host, 0)
    assert "\n" not in str(refused.value)
    assert "cannot listen" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "70000"),
        (["--max-connections", "0"], "--max-connections must be at least 1, not 0"),
        (["--header-timeout", "0"], "--header-timeout must be more than 0 seconds, not 0"),
        (["--scheduling-policy", "lottery"], "--scheduling-policy must be fcfs or priority, not 'lottery'"),
        (["--log-level", "loud"], "'loud' is not one of critical, error, warning, info, debug"),
        (["--override-generation-config", "{"], "is not JSON"),
        (["--override-generation-config", "[]"], "is not a JSON object"),
        (["--override-generation-config", '{"temp": 1}'], "'temp'; did you mean temperature?"),
        (["--override-generation-config", '{"xyzzy": 1}'], "'xyzzy'; known: temperature, "),
        (["--override-generation-config", '{"top_p": 2}'], "--override-generation-config: top_p must be"),
        (["--max-n", "0"], "--max-n must be at least 1, not 0"),
        (["--max-body", "lots"], "'lots' is not a size"),
        (["--demo", "--kv-cache-memory", "1GiB"], "leave --kv-cache-memory out"),
        (["--demo", "--batching", "dense"], "leave --batching out"),
        (["--demo", "--preemption-mode", "recompute"], "leave --preemption-mode out"),
        (["--demo", "--no-live"], "leave --live out"),
        (["--demo", "--replicas", "2"], "leave --replicas out"),
        (["--api-key", " sesame"], "must not start or end with white space"),
        (["--isolate-keys"], "--isolate-keys needs --api-key"),
        (["--num-blocks", "0"], "--num-blocks must be at least 1, not 0"),
        (["--kv-cache-dtype", "int8"], "not 'int8'"),
        (["--keep-alive", "0"], "--keep-alive must be more than 0 seconds, not 0"),
    ],
)
def test_invalid_options_are_refused_before_the_server_starts(options: list[str], message: str) -> None:
    with process(*options) as server:
        assert server.exit_code(SECONDS) == 2
        until(lambda: any(message in line for line in server.lines))


def test_the_environment_variable_holds_exactly_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert server.exit_code(SECONDS) == 2, "an empty variable must not disable the key"


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o644, True)])
def test_a_server_accepts_the_keys_of_the_file_and_warns_if_others_can_read_it(
    mode: int, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_LLM_API_KEY", "variable")
    file = tmp_path / "keys.txt"
    file.write_text("# comment\nsesame\nopen\n")
    file.chmod(mode)
    with (
        process("--api-key-file", str(file)) as server,
        httpx.Client(base_url=server.url(), timeout=SECONDS) as client,
    ):
        ready(client)
        statuses = {
            key: client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code
            for key in ("sesame", "open", "variable", "comment", "# comment")
        }
    assert statuses == {"sesame": 200, "open": 200, "variable": 200, "comment": 401, "# comment": 401}
    assert any(f"other users can access {file}" in line for line in server.lines) == warns
    assert not any("sesame" in line for line in server.lines)


def test_on_loopback_without_a_key_only_loopback_hosts_are_allowed() -> None:
    """DNS rebinding: a web page's own name resolves to this machine, and its browser sends that name."""
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


@pytest.mark.parametrize("logs_requests", [False, True])
def test_the_log_has_no_prompts_without_log_requests_and_never_a_key(logs_requests: bool) -> None:
    """At level debug, for requests that are answered, refused, oversized and aborted."""
    options = ["--api-key", "sesame", "--log-level", "debug", "--num-blocks", "64", "--max-body", "4000"]
    with process(*options, *["--log-requests"] * logs_requests) as server:
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
        assert server.exit_code(SECONDS) == 0
    log = "".join(server.lines)
    assert "/v1/completions" in log
    assert "sesame" not in log
    assert "Bearer" not in log
    assert ("xyzzy and plugh" in log) == logs_requests
    assert logs_requests or "xyzzy" not in log


def test_the_demo_answers_like_any_server() -> None:
    """Its pool and context are small; chats without max_tokens and with several choices fit even so."""
    chat = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    with process("--demo") as server, httpx.Client(base_url=server.url(), timeout=SECONDS) as client:
        ready(client)
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 96 * 16
        answer = client.post("/v1/chat/completions", json={**chat, "n": 2})
        texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
        assert texts == ["The capital of France is Paris."] * 2


def test_an_address_in_use_is_refused_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process("--port", str(port)) as server:
            assert server.exit_code(SECONDS) == 1
            until(lambda: bool(server.lines))
    [line] = server.lines
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use; see --host, --port" in line


def test_listening_on_all_addresses_without_a_key_logs_a_warning() -> None:
    with process("--host", "0.0.0.0", "--log-level", "error") as server:
        until(lambda: any("requests need no key" in line for line in server.lines))
