"""`/live`: a client that follows the stream knows the state of the pool. Without clients it costs nothing.

Oracle: the engine's own tables and prefix cache.
"""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import httpx2 as httpx
import pytest

from served import Served, serving, until
from tiny_llm import LLM, PagedBatchManager, SamplingParams
from tiny_llm_server import ServerConfig, live
from tiny_llm_server.service import Service

SYSTEM = "You answer in one short sentence, and you never say more than is asked of you. Secret: xyzzy."
QUESTIONS = ["What is the capital of France?", "What is two and two?", "Name a colour.", "Say hello."]


def small() -> LLM:
    return LLM(num_blocks=40, max_num_seqs=8, max_num_waiting=64, preemption_mode="swap")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return small()


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Served]:
    with serving(lambda: llm, ServerConfig(keep_alive=0.2)) as here:
        yield here


class Watcher:
    """A client that follows `/live` in a thread, and the state of the pool as it knows it."""

    def __init__(self, served: Served) -> None:
        self.pool: dict[str, Any] = {}
        self.holders: dict[int, int] = {}
        self.kept: set[int] = set()
        self.sequences: dict[str, dict[str, Any]] = {}
        self.received_kinds: Counter[str] = Counter()
        self.steps: list[dict[str, Any]] = []
        self.text = ""
        self.is_leaving = False
        self._served = served
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        until(lambda: bool(self.pool))
        return self

    def __exit__(self, *_: object) -> None:
        self.is_leaving = True
        self._thread.join(10)
        assert not self._thread.is_alive(), "the stream was not closed"

    def wait(self) -> None:
        """Wait until the server ends the stream."""
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not end the stream"

    def _read(self) -> None:
        with self._served.client() as client, client.stream("GET", "/live") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                self.text += line
                if line.startswith("data: {"):
                    self._take(json.loads(line.removeprefix("data: ")))
                if self.is_leaving:
                    return

    def _take(self, message: dict[str, Any]) -> None:
        self.received_kinds[message["type"]] += 1
        if message["type"] == "pool":
            self.pool = message
            self.holders = {block: holders for block, holders, _ in message["blocks"] if holders}
            self.kept = {block for block, _, kept in message["blocks"] if kept}
            self.sequences = {one["id"]: one for one in message["sequences"]}
        for step in message.get("steps", ()):
            self._step(step)

    def _step(self, step: dict[str, Any]) -> None:
        self.steps.append(step)
        for kind, block, holders, _ in step["events"]:
            self.received_kinds[kind] += 1
            self.holders[block] = holders
            if kind == "cached":
                self.kept.add(block)
            if kind == "evicted":
                self.kept.remove(block)
        for seq_id in step["ended"]:
            del self.sequences[seq_id]
        for one in step["sequences"]:
            self.sequences[one["id"]] = {**self.sequences.get(one["id"], {}), **one}
        self.pool["stats"] = step["stats"]

    def agrees_with(self, llm: LLM) -> bool:
        """Whether its state is the engine's, compared between two steps."""
        manager = llm.core.manager
        assert isinstance(manager, PagedBatchManager)

        def compare() -> bool:
            tables = {one.seq_id: list(one.table.blocks) for one in (*manager.running, *manager.waiting)}
            held = Counter(block for blocks in tables.values() for block in blocks)
            received = {seq_id: one["tables"][0]["blocks"] for seq_id, one in self.sequences.items()}
            holders = {block: count for block, count in self.holders.items() if count}
            return received == tables and holders == held and self.kept == set(manager.prefix.blocks)

        return llm.engine.call(compare)


def send_load(served: Served) -> list[httpx.Response]:
    """Send questions with one system prompt, some with forks, that need more blocks than the pool has."""
    bodies = [
        {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}], "n": n}
        for question, n in zip(QUESTIONS * 2, [1, 3, 1, 2, 1, 1, 2, 1], strict=True)
    ]
    with served.client() as client, ThreadPoolExecutor(8) as pool:
        longer = [{**body, "max_tokens": 120, "ignore_eos": True} for body in bodies]
        return list(pool.map(lambda body: client.post("/v1/chat/completions", json=body), longer))


KINDS = {
    "allocated",
    "shared",
    "released",
    "freed",
    "cached",
    "evicted",
    "copied",
    "swapped_out",
    "swapped_in",
}


def test_a_client_knows_the_state_of_the_engine(served: Served, llm: LLM) -> None:
    """A client that connects before the load, and one that connects during it. All kinds of events occur."""
    with Watcher(served) as watcher:
        assert watcher.pool["num_blocks"] == watcher.pool["num_host_blocks"] == 40
        assert watcher.pool["block_size"] == 16
        num_loads = 1
        with ThreadPoolExecutor(1) as sender:
            answers = sender.submit(send_load, served)
            until(lambda: llm.engine.stats.num_running > 3)
            with Watcher(served) as late:
                ids = {answer.json()["id"] for answer in answers.result(60)}
                until(lambda: watcher.agrees_with(llm))
                until(lambda: late.agrees_with(llm))
        while not watcher.received_kinds.keys() >= KINDS and num_loads < 5:  # the order of events varies
            send_load(served)
            num_loads += 1
            until(lambda: watcher.agrees_with(llm))
    assert watcher.received_kinds.keys() >= KINDS
    assert not watcher.sequences
    received = {one["request"] for step in watcher.steps for one in step["sequences"]}
    assert ids <= received, "the ids are those that the clients of the requests get"
    last = watcher.steps[-1]["stats"]
    assert last["preemptions"] == llm.engine.stats.num_preemptions > 0
    assert last["prefix_hits"] == llm.engine.stats.prefix_cache_hits > 0
    moments = [step["t"] for step in watcher.steps]
    assert moments == sorted(moments)
    assert "xyzzy" not in watcher.text, "a prompt was sent"


def test_no_events_are_collected_after_the_last_client_has_left(served: Served, llm: LLM) -> None:
    with Watcher(served):
        assert llm.engine._loop._watch is not None
    until(lambda: llm.engine._loop._watch is None)
    assert not llm.engine._loop._watchers


def test_a_client_of_an_idle_pool_gets_keep_alive_comments(served: Served) -> None:
    with Watcher(served) as watcher:
        until(lambda: watcher.text.count(": keep-alive") > 2)
        assert watcher.received_kinds == {"pool": 1}


def test_a_slow_client_gets_the_whole_state_again(
    served: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_STEPS", 1)
    monkeypatch.setattr(live, "FRAME_SECONDS", 1)  # one message per second; a step takes milliseconds
    with Watcher(served) as watcher:
        send_load(served)
        until(lambda: watcher.agrees_with(llm))
    assert watcher.received_kinds["pool"] > 1


def test_the_engine_does_not_wait_for_a_client_that_does_not_read(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more steps are collected for it; when it reads again, it gets the whole state."""
    monkeypatch.setattr(live, "MAX_STEPS", 8)

    async def watch() -> list[dict[str, Any]]:
        service = Service(lambda: llm, ServerConfig())
        await service.load()
        watcher = live._Watcher(service)
        received = []
        async with aclosing(watcher.messages()) as messages:
            received.append(json.loads(await anext(messages) or ""))
            params = SamplingParams(max_tokens=40, ignore_eos=True)
            await asyncio.to_thread(llm.generate, "Once", params, use_tqdm=False)
            await asyncio.to_thread(until, lambda: llm.engine._loop._watch is None)
            received.append(json.loads(await anext(messages) or ""))
        return received

    first, second = asyncio.run(watch())
    assert first["type"] == second["type"] == "pool"
    assert second["stats"]["cached"] == llm.engine.stats.num_cached_blocks >= 2


def test_stopping_the_server_closes_the_stream() -> None:
    with serving(small) as here:
        watcher = Watcher(here)
        watcher.__enter__()
        here.server.handle_exit(2, None)
        watcher.wait()
    assert watcher.text.endswith("data: [DONE]")


def test_the_stream_needs_a_key_and_the_page_does_not() -> None:
    with serving(small, ServerConfig(api_keys=("k",))) as here, here.client() as client:
        assert client.get("/live").status_code == 401
        page = client.get("/")
        assert page.status_code == 200, "the page asks the user for the key"
        with client.stream("GET", "/live", headers={"Authorization": "Bearer k"}) as answer:
            assert answer.status_code == 200


def test_the_page_and_the_stream_can_be_disabled() -> None:
    with serving(small, ServerConfig(live=False)) as here, here.client() as client:
        for path in ("/", "/live", "/favicon.ico", "/page/main.js"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_dense_batching_has_no_stream() -> None:
    llm = LLM(batching="dense", max_num_seqs=2, max_model_len=256)
    with serving(lambda: llm) as here, here.client() as client:
        answer = client.get("/live")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_blocks")


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/style.css"])
def test_the_page_can_only_connect_to_its_server(served: Served, path: str) -> None:
    with served.client() as client:
        answer = client.get(path)
        again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert answer.headers["content-security-policy"].startswith("default-src 'self';")
    assert again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/favicon.ico", "/page/favicon.svg"])
def test_the_page_has_an_icon(served: Served, path: str) -> None:
    with served.client() as client:
        icon = client.get(path)
        page = client.get("/").text
    assert (icon.status_code, icon.headers["content-type"]) == (200, "image/svg+xml")
    assert icon.text.startswith("<svg")
    assert 'href="page/favicon.svg"' in page


@pytest.mark.parametrize("path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/nothing.js", "/page/"])
def test_no_other_file_is_served(served: Served, path: str) -> None:
    with served.client() as client:
        answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
