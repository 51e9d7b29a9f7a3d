"""Clients that disconnect, requests that fail or time out, and a server that loads and drains.

A request that stops early frees its blocks and does not change the answers of others.
"""

import asyncio
import json
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import mlx.core as mx
import pytest
from tiny_llm.output_processor import CompletionText
from tiny_llm.token_output import Place, TokenOutput

from served import SECONDS, Served, serving, until
from smollm2_server import CHAT, COMPLETE, FRANCE, client, generate_text, llm, scraped, served
from tiny_llm import LLM, PagedBatchManager, TextDelta, engine_core
from tiny_llm_server import ServerConfig, make_app

__all__ = ["client", "llm", "served"]


def test_a_disconnect_frees_the_blocks(served: Served, llm: LLM) -> None:
    """While it streams, and while it waits for a whole answer."""
    body = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True}
    for stream in (True, False):
        with served.client() as client:
            if stream:
                with client.stream("POST", COMPLETE, json={**body, "stream": True}) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(COMPLETE, json=body, timeout=0.5)
        until(lambda: llm.engine.stats.num_running == 0)
        stats = llm.engine.stats
        assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def test_completions_of_a_client_that_disconnects_count_as_aborted(served: Served, llm: LLM) -> None:
    body = {"prompt": ["Once", "Twice"], "n": 2, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    aborted, written = "vllm:request_success_total{finished_reason=abort}", "vllm:generation_tokens_total"
    with served.client() as client:
        before = scraped(client)
        read, first = "vllm:prompt_tokens_total", "vllm:time_to_first_token_seconds_count"
        with served.client() as other, other.stream("POST", COMPLETE, json=body) as answer:
            next(answer.iter_lines())
            until(lambda: scraped(client)[first] == before.get(first, 0) + 2)  # while they run
        until(lambda: scraped(client).get(aborted, 0) == before.get(aborted, 0) + 4)
        after, lengths = scraped(client), [len(llm.tokenizer.encode(text)) for text in ("Once", "Twice")]
        assert after[written] > before.get(written, 0)
        assert after[read] == before.get(read, 0) + sum(lengths)
    until(lambda: llm.engine.stats.num_running == 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("broken", "status"), [({1}, 200), ({0, 1}, 500)])
def test_a_failed_choice_has_finish_reason_error_and_the_request_fails_only_if_all_fail(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, stream: bool, broken: set[int], status: int
) -> None:
    """Two prompts with two choices each; the metrics count failed choices apart from aborted ones."""
    push = CompletionText.push

    def raising(self: CompletionText, output: TokenOutput) -> TextDelta:
        if self.index in broken and len(self.token_ids) == 2:
            raise ArithmeticError("no text")
        return push(self, output)

    before = scraped(client)
    monkeypatch.setattr(CompletionText, "push", raising)
    body = {"prompt": ["Once", "Twice"], "n": 2, "max_tokens": 4, "ignore_eos": True, "stream": stream}
    answer = client.post(COMPLETE, json=body)
    after = scraped(client)

    def more(reason: str) -> float:
        name = f"vllm:request_success_total{{finished_reason={reason}}}"
        return after.get(name, 0) - before.get(name, 0)

    failed = 2 * len(broken)
    assert (more("error"), more("length"), more("abort")) == (failed, 4 - failed, 0)
    if status == 500:
        assert "no text" in answer.text
        assert answer.status_code == (200 if stream else 500)
        return
    lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: {")]
    parts = [json.loads(line) for line in lines] if stream else [answer.json()]
    reasons = {c["index"]: c["finish_reason"] for part in parts for c in part["choices"]}
    assert reasons == {0: "length", 1: "error", 2: "length", 3: "error"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_a_disconnect_before_the_first_byte_frees_the_blocks(llm: LLM, path: str, stream: bool) -> None:
    """The client is gone when the answer starts, and every write takes a while."""
    asked = {"prompt": "Once"} if path == COMPLETE else {"messages": FRANCE}
    body = json.dumps({**asked, "max_tokens": 3000, "ignore_eos": True, "n": 3, "stream": stream}).encode()
    coming = [{"type": "http.request", "body": body}, *[{"type": "http.disconnect"}] * 3]
    sent = []

    async def receive() -> Any:
        return coming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)
        await asyncio.sleep(0.001)

    async def ask() -> None:
        app = make_app(lambda: llm)
        await app.state.service.load()
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await app(scope, receive, send)
        await asyncio.to_thread(llm.engine.call, int)
        stats = llm.engine.stats
        assert (stats.num_running, stats.num_waiting) == (0, 0), "the request still runs"

    asyncio.run(ask())
    assert len(sent) <= 2, "something was sent after the disconnect"
    stats = llm.engine.stats
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def break_sampler(monkeypatch: pytest.MonkeyPatch, break_it: Callable[[mx.array], mx.array]) -> None:
    """Apply `break_it` to the fourth row of logits of the request with the seed 666."""
    choose = engine_core.choose_token

    def chosen(place: Place, row: mx.array, eos: Any) -> Any:
        is_target = place.sequence.seed == 666 and len(place.outputs) == 3
        return choose(place, break_it(row) if is_target else row, eos)

    monkeypatch.setattr(engine_core, "choose_token", chosen)


def break_rows(monkeypatch: pytest.MonkeyPatch, break_it: Callable[[mx.array], mx.array]) -> None:
    """Apply `break_it` to the same row among the rows from which tokens are chosen together."""
    choose = engine_core.choose_together

    def chosen(rows: mx.array, places: Any, eos: Any) -> Any:
        broken = [one.row for one in places if one.sequence.seed == 666 and len(one.outputs) == 3]
        if broken:
            is_broken = mx.array([row in broken for row in range(len(rows))])
            rows = mx.where(is_broken[:, None], break_it(rows), rows)
        return choose(rows, places, eos)

    monkeypatch.setattr(engine_core, "choose_together", chosen)


def break_step(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make the step that computes the fourth token of the request with the seed 666 raise."""
    run = PagedBatchManager.run_plan

    def raising(manager: PagedBatchManager, plan: Any) -> Any:
        if any(chunk.sequence.seed == 666 and len(chunk.sequence.outputs) == 3 for chunk in plan.chunks):
            raise error
        return run(manager, plan)

    monkeypatch.setattr(PagedBatchManager, "run_plan", raising)


def inject_fault(monkeypatch: pytest.MonkeyPatch, kind: str) -> str:
    """Inject a kind of fault; return a part of its message."""

    def raise_error(row: mx.array) -> mx.array:
        raise RuntimeError("injected into the sampler")

    match kind:
        case "sampler":
            break_sampler(monkeypatch, raise_error)
            return "injected into the sampler"
        case "nan among others":
            break_rows(monkeypatch, lambda rows: rows * math.nan)
            return "are not numbers"
        case "sampler among others":
            break_rows(monkeypatch, raise_error)
            return "injected into the sampler"
        case "nan":
            break_sampler(monkeypatch, lambda row: row * math.nan)
            return "are not numbers"
        case "kernel":
            break_step(monkeypatch, RuntimeError("injected into a kernel"))
            return "injected into a kernel"
        case _:
            break_step(monkeypatch, MemoryError("injected: no more memory"))
            return "no more memory"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "kind", ["sampler", "nan", "sampler among others", "nan among others", "kernel", "memory"]
)
def test_a_failing_request_does_not_affect_others(
    served: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch, kind: str, stream: bool
) -> None:
    """Requests that run with it, or after it, get the same answers as without it."""
    message = inject_fault(monkeypatch, kind)
    expected = generate_text(llm, "Once upon", temperature=0, max_tokens=30)
    bodies = [{"prompt": "Once upon", "temperature": 0, "max_tokens": 30} for _ in range(5)]
    broken = {"prompt": "The sky", "seed": 666, "max_tokens": 30, "ignore_eos": True, "stream": stream}
    if not kind.endswith("among others"):
        broken["repetition_penalty"] = 1.1  # its tokens are not chosen together with others

    with served.client() as client, ThreadPoolExecutor(6) as pool:
        asked = list(
            pool.map(lambda body: client.post(COMPLETE, json=body), [*bodies[:2], broken, *bodies[2:]])
        )
        failed = asked.pop(2)
        assert [answer.json()["choices"][0]["text"] for answer in asked] == [expected] * 5
        if stream:
            events = [line for line in failed.text.split("\n\n") if line]
            assert events[-1] == "data: [DONE]"
            error = json.loads(events[-2].removeprefix("data: "))["error"]
        else:
            assert failed.status_code == 500
            error = failed.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "request_failed")
        assert message in error["message"]
        after = client.post(COMPLETE, json=bodies[0]).json()
        assert after["choices"][0]["text"] == expected
    until(lambda: llm.engine.stats.num_running == 0)
    stats = llm.engine.stats
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def test_a_full_queue_answers_429_and_does_not_affect_accepted_requests() -> None:
    llm = LLM(num_blocks=64, max_num_seqs=2, max_num_waiting=2)
    expected = generate_text(llm, "Once", temperature=0, max_tokens=40)

    def ask(client: httpx.Client) -> httpx.Response:
        return client.post(COMPLETE, json={"prompt": "Once", "temperature": 0, "max_tokens": 40})

    with serving(lambda: llm) as here, here.client() as client, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ask(client), range(20)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert 4 <= statuses.count(200) < 20
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == expected
        else:
            assert answer.headers["Retry-After"] == "1"
            assert answer.json()["error"]["code"] == "queue_full"


def test_a_request_that_times_out_is_aborted() -> None:
    llm = LLM(num_blocks=512)
    body = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True}
    with serving(lambda: llm, ServerConfig(request_timeout=0.3)) as here, here.client() as client:
        late = client.post(COMPLETE, json=body)
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "timeout"
        streamed = client.post(COMPLETE, json={**body, "stream": True}).text.strip().split("\n\n")
        assert streamed[-1] == "data: [DONE]"
        assert json.loads(streamed[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        until(lambda: llm.engine.stats.num_running == 0)
        counted = [
            line for line in client.get("/metrics").text.splitlines() if "request_success_total{" in line
        ]
        assert [(re.findall('finished_reason="(.*?)"', line), line[-4:]) for line in counted] == [
            (["timeout"], " 2.0")
        ]


def test_a_stream_without_events_sends_keep_alive_comments() -> None:
    """A request that waits for another one gets a comment before its first token."""
    llm = LLM(num_blocks=512, max_num_seqs=1)
    with serving(lambda: llm, ServerConfig(keep_alive=0.05)) as here, here.client() as client:
        body = {"prompt": "Once", "max_tokens": 150, "ignore_eos": True, "stream": True}
        with client.stream("POST", COMPLETE, json=body), here.client() as other:
            lines = other.post(COMPLETE, json={**body, "max_tokens": 2}).text
    assert lines.startswith(": keep-alive\n\n")
    assert lines.endswith("data: [DONE]\n\n")


def test_requests_get_503_while_the_model_loads_and_while_the_server_drains() -> None:
    gate, llm = threading.Event(), LLM(num_blocks=512, generation_config="vllm")

    def load() -> LLM:
        gate.wait(SECONDS)
        return llm

    body = {"prompt": "Once", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    expected = generate_text(llm, "Once", max_tokens=60, ignore_eos=True, temperature=0)
    with serving(load, wait=False) as here, here.client() as client, ThreadPoolExecutor(1) as pool:
        assert client.get("/health").json() == {"status": "loading"}
        refused = client.post(COMPLETE, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        gate.set()
        until(lambda: client.get("/health").status_code == 200)
        accepted = pool.submit(lambda: client.post(COMPLETE, json=body))
        until(lambda: llm.engine.stats.num_running == 1)
        drained = llm.engine.start_draining()
        until(lambda: llm.engine.refusal is not None)
        assert (client.get("/health").status_code, client.get("/health").json()) == (
            503,
            {"status": "draining"},
        )
        refused = client.post(COMPLETE, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert accepted.result().json()["choices"][0]["text"] == expected
        drained.result(SECONDS)
