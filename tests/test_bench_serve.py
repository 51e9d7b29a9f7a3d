"""`tiny-llm bench serve`: the figures of vLLM's serving benchmark, and errors.

The servers are the real one, and small ones that hang up or send no usage.
"""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn

from served import SECONDS, Served, until
from smollm2_server import llm, served
from tiny_llm import LLM
from tiny_llm_cli.serve_load import WORDS, Answer, figures

__all__ = ["llm", "served"]


def run_bench(url: str, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tiny_llm_cli", "bench", "serve", "--base-url", url, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=check)


def no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def bench_serve(served: Served, *options: str) -> dict[str, Any]:
    done = run_bench(served.url, "--json", *options)
    return dict(json.loads(done.stdout, parse_constant=no_json))


def test_the_benchmark_reports_the_figures_of_vllm(served: Served) -> None:
    options = ("--num-prompts", "6", "--max-concurrency", "3", "--random-input-len", "12")
    found = bench_serve(served, *options, "--random-output-len", "5", "--random-prefix-len", "4")
    assert (found["completed"], found["failed"], found["error_counts"]) == (6, 0, {})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (6 * 16, 6 * 5)
    assert found["output_throughput"] == pytest.approx(30 / found["duration"])
    for name in ("ttft", "tpot", "itl", "e2el"):
        for kind in ("mean", "median", "std", "p99"):
            assert found[f"{kind}_{name}_ms"] >= 0
    assert found["median_ttft_ms"] <= found["median_e2el_ms"]
    assert (found["backend"], found["model_id"], found["num_prompts"]) == ("openai", "smollm2", 6)
    assert (found["max_concurrency"], found["request_rate"], found["burstiness"]) == (3, "inf", 1.0)
    assert re.fullmatch(r"\d{8}-\d{6}", found["date"])
    assert (found["label"], found["tokenizer_id"], found["output_tokens_are"]) == (None, None, "usage")
    assert not set(found["run"]) & {*found, "model", "api_key"}
    assert found["run"]["ignore_eos"] is True


@pytest.mark.parametrize("place", ["{url}/v1", "{url}/v1/", "{url}/"])
def test_the_base_url_may_end_with_v1_or_a_slash(served: Served, place: str) -> None:
    options = ("--num-prompts", "1", "--random-output-len", "2", "--request-rate", "1000")
    found = bench_serve(served, *options, "--base-url", place.format(url=served.url))
    assert (found["completed"], found["request_rate"]) == (1, 1000)
    assert (found["run"]["base_url"], found["run"]["endpoint"]) == (served.url, "/v1/completions")


def test_the_backend_openai_chat_measures_chats(served: Served) -> None:
    options = ("--backend", "openai-chat", "--num-prompts", "3", "--random-input-len", "40")
    found = bench_serve(served, *options, "--random-output-len", "6", "--random-prefix-len", "8")
    assert (found["backend"], found["run"]["endpoint"]) == ("openai-chat", "/v1/chat/completions")
    assert (found["completed"], found["total_output_tokens"]) == (3, 18), found["error_counts"]
    assert 3 * 48 < found["total_input_tokens"] < 3 * 48 + 3 * 50, "the words, and the template's tokens"
    assert 0 < found["median_ttft_ms"] < found["median_e2el_ms"]


def test_each_word_of_a_chat_is_one_token(llm: LLM) -> None:
    assert len(llm.tokenizer.encode(" " + " ".join(WORDS))) == len(WORDS) == len(set(WORDS))


def test_host_and_port_select_the_server_as_in_vllm(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    command = [sys.executable, "-m", "tiny_llm_cli", "bench", "serve", "--host", host, "--port", port]
    options = ["--backend", "vllm", "--dataset-name", "random", "--num-prompts", "2", "--no-ignore-eos"]
    done = subprocess.run([*command, *options, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["backend"], found["completed"], found["run"]["ignore_eos"]) == ("vllm", 2, False)
    assert (found["run"]["base_url"], found["run"]["endpoint"]) == (served.url, "/v1/completions")


def test_the_table_shows_the_load_and_units(served: Served) -> None:
    options = ("--num-prompts", "2", "--max-concurrency", "1", "--random-input-len", "10")
    shown = run_bench(served.url, *options, "--random-output-len", "4", "--random-range-ratio", "0.5")
    first, second, *rows = shown.stdout.splitlines()
    asked = "2 requests, 1 at a time, 5 to 15 tokens in, 2 to 6 out"
    assert first == f"openai at {served.url}/v1/completions: {asked}"
    assert "smollm2" in second
    units = {line.split()[0]: line.split()[2] for line in rows if "_" in line or line[:8] == "duration"}
    assert (units["duration"], units["total_output_tokens"]) == ("s", "tokens")
    assert (units["request_throughput"], units["output_throughput"]) == ("requests/s", "tokens/s")
    times = rows[rows.index("") + 1 :]
    times = times[times.index("") + 1 :]
    assert times[0].split() == ["milliseconds", "mean", "median", "std", "p99"]
    assert [line.split()[0] for line in times[1:]] == ["ttft", "tpot", "itl", "e2el"]
    assert shown.stderr == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--random-input-len", "9000"], "exceed the context of 8192"),
        (["--endpoint", "/nowhere"], "404"),
        (["--model", "gpt-9"], "'gpt-9' does not exist"),
        (["--base-url", "http://127.0.0.1:9"], "does not answer"),
        (["--request-rate", "0"], "must be above 0, not 0.0"),
        (["--dataset-name", "sharegpt"], "'sharegpt' is not available: the only data set is random"),
        (["--backend", "tgi"], "'tgi'"),
        (["--backend", "openai-chat", "--endpoint", "/v1/completions"], "use --backend openai"),
        (["--endpoint", "/v1/chat/completions"], "use --backend openai-chat"),
    ],
)
def test_a_request_that_cannot_be_sent_is_explained(served: Served, options: list[str], message: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        bench_serve(served, "--num-prompts", "1", *options)
    assert message in failed.value.stderr


@contextmanager
def server_that_fails(status: int, body: bytes) -> Iterator[str]:
    """Run a server that answers every request with `status` and `body`; yield its URL."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    with serving_app(app) as url:
        yield url


@pytest.mark.parametrize(
    ("status", "body", "key", "message"),
    [
        (401, b"", None, "/v1/models: the server requires an API key: --api-key or OPENAI_API_KEY (401)"),
        (401, b'{"error": {"message": "bad key"}}', "k", "the server rejects this API key (401: bad key)"),
        (
            403,
            b'{"error": {"message": "not here"}}',
            None,
            "403: not here (if it requires an API key: --api-key",
        ),
        (403, b'{"error": {"message": "not here"}}', "k", "/v1/models: 403: not here"),
        (503, b'{"error": {"message": "the model is loading"}}', None, "503: the model is loading"),
        (502, b"<h1>bad gateway</h1>", None, "502: <h1>bad gateway</h1>"),
        (500, b"", None, "500: Internal Server Error"),
        (200, b"{}", None, "is not a list of models in OpenAI's format"),
    ],
)
def test_an_error_of_the_server_is_shown_with_its_status_and_message(
    status: int, body: bytes, key: str | None, message: str
) -> None:
    options = [] if key is None else ["--api-key", key]
    with server_that_fails(status, body) as url:
        done = run_bench(url, *options, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_request_without_the_required_key_names_the_option_for_it() -> None:
    with server_that_fails(401, b"") as url:
        done = run_bench(url, "--model", "m", check=False)
    assert "/v1/completions: the server requires an API key: --api-key or OPENAI_API_KEY (401)" in done.stderr


def serve_and_close_connections(listener: socket.socket, answers: int) -> None:
    """Serve connections; close each one at the request after `answers` answered ones."""
    body = b'data: {"choices": [{"text": "x"}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n\n'
    models = b'{"data": [{"id": "m"}]}'
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as lines:
                for _ in range(answers):
                    head = b"".join(iter(lambda: lines.readline().rstrip(b"\r\n") + b"\n", b"\n")).lower()
                    length = re.search(rb"content-length: (\d+)", head)
                    lines.read(int(length[1]) if length else 0)
                    content = models if head.startswith(b"get") else body
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
                    )
                lines.readline()


@pytest.mark.parametrize(("answers", "failed"), [(3, 0), (0, 5)])
def test_a_closed_connection_is_retried_once(answers: int, failed: int) -> None:
    """A server that closes every connection without an answer fails the benchmark."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve_and_close_connections, args=(listener, answers), daemon=True).start()
        command = [sys.executable, "-m", "tiny_llm_cli", "bench", "serve", "--json", "--num-prompts", "5"]
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        options = ["--max-concurrency", "1", "--base-url", url]
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, check=False, timeout=SECONDS
        )
    if failed:
        assert done.returncode == 1
        assert "does not answer" in done.stderr
    else:
        assert json.loads(done.stdout)["completed"] == 5, done.stdout


CHUNKS = {
    "openai": [{"text": "a"}, {"text": ""}, {"text": "b"}],
    "openai-chat": [
        {"delta": {"role": "assistant", "content": ""}},
        {"delta": {"content": "a"}},
        {"delta": {"content": "b"}},
        {"delta": {}, "finish_reason": "stop"},
    ],
}


@contextmanager
def serving_app(app: Any) -> Iterator[str]:
    """Run a server of an ASGI application; yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, lifespan="off", log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(SECONDS)


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_chunks_with_text_are_counted_with_a_warning_if_the_server_sends_no_usage(backend: str) -> None:
    """The second chunk is late. The first chunk of a chat is its role; that of a completion is a token."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        body = b'{"data": [{"id": "m"}]}'
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] != "/v1/models":
            for number, choice in enumerate(CHUNKS[backend]):
                await asyncio.sleep(0.5 if number == 1 else 0)
                event = {"choices": [choice], "error": None}
                part = b"data:" + json.dumps(event).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": part, "more_body": True})
            body = b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": body})

    with serving_app(app) as url:
        options = ("--backend", backend, "--num-prompts", "2", "--random-input-len", "7")
        done = run_bench(url, *options, "--json")
        table = run_bench(url, *options).stdout
    found = json.loads(done.stdout)
    assert (found["total_output_tokens"], found["output_tokens_are"]) == (4, "chunks")
    assert found["total_input_tokens"] == 14, "the number of tokens sent"
    assert done.stderr.startswith("tiny-llm: warning:")
    assert "does not report usage" in done.stderr
    assert "4 tokens (chunks with text, because the server does not report usage)" in table
    after_first = found["mean_e2el_ms"] - found["mean_ttft_ms"]
    assert found["mean_itl_ms"] * 2 == pytest.approx(after_first)
    assert (found["mean_ttft_ms"] if backend == "openai-chat" else after_first) > 250


def test_failed_requests_are_counted_but_not_measured() -> None:
    answers = [
        Answer(10.0, [10.5, 10.75, 11.0], 7, 3),
        Answer(11.0, [12.0], 9, 1),
        Answer(11.0, [11.5], 0, 0, "503: busy"),
    ]
    found = figures(answers, 4.0)
    assert (found["completed"], found["failed"], found["error_counts"]) == (2, 1, {"503: busy": 1})
    assert (found["total_input_tokens"], found["total_output_tokens"], found["output_throughput"]) == (
        16,
        4,
        1.0,
    )
    assert (found["mean_ttft_ms"], found["mean_itl_ms"], found["mean_tpot_ms"]) == (750.0, 250.0, 250.0)
    assert found["p99_e2el_ms"] == 1000.0
