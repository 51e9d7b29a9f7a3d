"""What the server logs: a line for each finished request, the throughput while busy, and how it drains."""

import asyncio
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx2 as httpx
import pytest

from served import Served, serving, until
from smollm2_server import CHAT, COMPLETE, FRANCE
from tiny_llm import LLM, EngineStats
from tiny_llm_server import ServerConfig
from tiny_llm_server.draining import DrainReport, draining_line
from tiny_llm_server.metrics import Metrics
from tiny_llm_server.throughput import ThroughputLog

LOG = logging.getLogger("uvicorn.error")
DURATION = r" in (\d+ ms|\d+\.\d\d s)"
IDLE = EngineStats(0, 0, 0, 60, 10, 100, 0, 200, 50)  # 30 of 100 blocks in use, a quarter of the tokens found


class Lines(logging.Handler):
    """Collects what the server logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    llm = LLM(num_blocks=256, max_num_seqs=4, max_num_waiting=4)
    with serving(lambda: llm, ServerConfig(served_model_name="smollm2", max_body_bytes=10_000)) as here:
        yield here


@contextmanager
def logged() -> Iterator[list[str]]:
    """The lines logged in this block at level info and above. Starting a server in it resets the logger."""
    handler, level = Lines(), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    yield handler.lines
    LOG.removeHandler(handler)
    LOG.setLevel(level)


@pytest.fixture
def log(served: Served) -> Iterator[list[str]]:
    """The lines that a test's requests cause."""
    with logged() as lines:
        yield lines


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


def only_line(log: list[str]) -> str:
    until(lambda: bool(log))
    [line] = log
    return line


def test_a_finished_request_gets_one_line_with_its_id_tokens_times_and_reason(
    client: httpx.Client, log: list[str]
) -> None:
    body = {"prompt": "A prefix that fills more than one block of the pool, so that it is cached. " * 2}
    first = client.post(COMPLETE, json={**body, "max_tokens": 1})
    until(lambda: bool(log))
    log.clear()
    answer = client.post(COMPLETE, json={**body, "max_tokens": 9, "ignore_eos": True})
    usage, cached = answer.json()["usage"], answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first.status_code == 200
    assert cached > 0
    tokens = f"{usage['prompt_tokens']} prompt tokens ({cached} cached), 9 output tokens"
    times = r"TTFT \d+(\.\d\d)? m?s, \d+\.\d tokens/s"
    assert re.fullmatch(
        rf"INFO 127\.0\.0\.1 POST {COMPLETE} 200 in \d+(\.\d\d)? m?s: "
        rf"{answer.headers['X-Request-Id']}, {re.escape(tokens)}, {times}, length",
        only_line(log),
    )


def test_a_stream_is_logged_when_it_ends(client: httpx.Client, log: list[str]) -> None:
    body = {"messages": FRANCE, "temperature": 0, "stream": True, "n": 2}
    with client.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert log == []
        for _ in lines:
            pass
    line = only_line(log)
    assert f"{answer.headers['X-Request-Id']}, 37 prompt tokens" in line
    assert line.endswith(", 2 stop")


def test_no_speed_is_logged_for_a_request_with_only_first_tokens(
    client: httpx.Client, log: list[str]
) -> None:
    """The prefill produces them at once: their speed would be thousands of tokens per second."""
    client.post(COMPLETE, json={"prompt": "x", "n": 2, "max_tokens": 1})
    line = only_line(log)
    assert "2 output tokens, TTFT" in line
    assert "tokens/s" not in line


def test_a_disconnect_is_logged_as_an_abort(client: httpx.Client, log: list[str]) -> None:
    body = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True}
    with client.stream("POST", COMPLETE, json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
    assert re.search(r"200 in .*, 1 prompt token, \d+ output tokens?, TTFT .*, abort$", only_line(log))
    log.clear()
    with pytest.raises(httpx.ReadTimeout):
        client.post(COMPLETE, json=body, timeout=0.5)
    assert re.search(r" 499 in .*, abort$", only_line(log))


@pytest.mark.parametrize(
    ("request_of", "logged"),
    [
        (("POST", CHAT, {"messages": FRANCE, "n": 0}), f"POST {CHAT} 400 in T: invalid_request_error (n)"),
        (("POST", CHAT, {"messages": FRANCE, "functions": [{}]}), "400 in T: unsupported_field (functions)"),
        (("POST", CHAT, {"messages": FRANCE, "xyzzy": 1}), "400 in T: unsupported_field"),
        (
            ("POST", COMPLETE, {"prompt": "x", "logit_bias": {"xyzzy": "a"}}),
            "invalid_request_error (logit_bias)",
        ),
        (("POST", COMPLETE, {"prompt": "xyzzy" * 4000}), "413 in T: body_too_large"),
        (("POST", COMPLETE, {"prompt": "xyzzy", "model": "other"}), "404 in T: model_not_found (model)"),
        (
            ("POST", COMPLETE, {"prompt": ["xyzzy"] * 9, "max_tokens": 1}),
            "400 in T: invalid_request_error (prompt)",
        ),
        (("GET", CHAT, None), f"GET {CHAT} 405 in T: method_not_allowed"),
        (("GET", "/a%20b%0A2", None), "GET /a%20b%0A2 404 in T: unknown_path"),
        (("GET", "/page/nothing.js", None), "GET /page/nothing.js 404 in T: unknown_path"),
    ],
    ids=range(10),
)
def test_a_refused_request_is_logged_with_its_status_and_reason(
    client: httpx.Client, log: list[str], request_of: tuple[str, str, object], logged: str
) -> None:
    """The reason is a code and a field's name: the message may quote the request."""
    method, path, body = request_of
    client.request(method, path, json=body)
    line = re.sub(DURATION, " in T", only_line(log))
    assert line.endswith(logged), line
    assert "xyzzy" not in line


def test_a_full_queue_and_a_wrong_key_are_logged() -> None:
    llm = LLM(num_blocks=64, max_num_seqs=1, max_num_waiting=1)
    with (
        serving(lambda: llm, ServerConfig(api_keys=("k",))) as here,
        here.client() as client,
        logged() as log,
    ):
        key = {"Authorization": "Bearer k"}
        client.post(COMPLETE, json={"prompt": "x"}, headers={"Authorization": "Bearer xyzzy"})
        client.post(COMPLETE, json={"prompt": ["x"] * 2, "max_tokens": 1}, headers=key)
        long = {"prompt": ["x"] * 2, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with client.stream("POST", COMPLETE, json=long, headers=key) as answer:
            next(answer.iter_lines())
            assert client.post(COMPLETE, json={"prompt": ["x"] * 2}, headers=key).status_code == 429
        until(lambda: len(log) == 4)
    reasons = [re.sub(r".* (\d{3}) in [^:]*", r"\1", line) for line in log]
    assert reasons[0] == "401: invalid_api_key"
    assert "429: queue_full" in reasons[2:], "before or after the line of the stream that was left"


def test_requests_for_the_page_and_health_and_metrics_are_logged_only_at_level_debug(
    client: httpx.Client, log: list[str]
) -> None:
    paths = ["/", "/page/live.js", "/health", "/metrics"]
    for path in paths:
        assert client.get(path).status_code == 200
    client.get("/v1/models")
    assert re.search(rf"INFO 127\.0\.0\.1 GET /v1/models 200{DURATION}$", only_line(log))
    log.clear()
    LOG.setLevel(logging.DEBUG)
    for path in paths:
        client.get(path)
    until(lambda: len(log) == len(paths))
    assert all(line.startswith("DEBUG ") for line in log)


def test_the_throughput_is_logged_only_while_the_engine_is_busy() -> None:
    metrics = Metrics(lambda: None, lambda: "smollm2")
    stats = [IDLE]
    log = ThroughputLog(metrics, lambda: stats[0])
    start = log._last.moment
    assert log.next_line(start + 10) is None
    metrics.record_first_token(300, 0.1)
    metrics.tokens.add(50, None)
    stats[0] = replace(IDLE, num_running=2, num_waiting=1)
    assert log.next_line(start + 20) == (
        "Avg prompt throughput: 30.0 tokens/s, Avg generation throughput: 5.0 tokens/s, "
        "Running: 2 reqs, Waiting: 1 reqs, KV cache usage: 30.0%, Prefix cache hit rate: 25.0%"
    )
    assert "throughput: 0.0 tokens/s, Running: 2" in str(log.next_line(start + 30)), "a long prefill"
    stats[0] = IDLE
    metrics.tokens.add(20, 0.1)
    assert "generation throughput: 2.0 tokens/s, Running: 0" in str(log.next_line(start + 40))
    assert log.next_line(start + 50) is None


def test_no_throughput_is_logged_while_the_model_loads() -> None:
    log = ThroughputLog(Metrics(lambda: None, lambda: ""), lambda: None)
    assert log.next_line(log._last.moment + 10) is None


@pytest.mark.parametrize(
    ("num_left", "seconds", "line"),
    [
        (2, None, "Draining: 2 requests left. Press Ctrl-C again to stop now."),
        (1, 29.6, "Draining: 1 request left, for at most 30 s. Press Ctrl-C again to stop now."),
    ],
)
def test_a_draining_line_names_requests_and_seconds(num_left: int, seconds: float | None, line: str) -> None:
    assert draining_line(num_left, seconds) == line


def test_a_drain_report_has_a_line_for_each_change_and_repeats_the_last_one(
    monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    monkeypatch.setattr("tiny_llm_server.draining.CHECK_SECONDS", 0.001)
    monkeypatch.setattr("tiny_llm_server.draining.REPEAT_SECONDS", 0.05)
    counts = [3, 3, 1, *[1] * 300, 0]
    report = DrainReport(lambda: counts.pop(0), 100.0)
    asyncio.run(report.run())
    report.finish()
    numbers = [int(match[1]) for line in log if (match := re.search(r"Draining: (\d)", line))]
    assert numbers[:2] == [3, 1]
    assert set(numbers[2:]) == {1}
    assert log[-1] == "INFO No requests are left"


@pytest.mark.parametrize("grace", [0.0, 0.01])
def test_a_drain_report_says_that_the_grace_period_is_over(log: list[str], grace: float) -> None:
    report = DrainReport(lambda: 2, grace)

    async def drain() -> None:
        reporting = asyncio.create_task(report.run())
        await asyncio.sleep(0.05)
        reporting.cancel()

    asyncio.run(drain())
    report.finish()
    assert log[-1] == f"INFO The grace period of {grace:g} s is over: 2 requests aborted"
