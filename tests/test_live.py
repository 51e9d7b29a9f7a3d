"""`/live`: whoever watches the pool over HTTP knows what the engine knows; once he has gone he costs nothing.

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


class Viewer:
    """What somebody knows of the pool who reads `/live` in a thread of his own."""

    def __init__(self, served: Served) -> None:
        self.pool: dict[str, Any] = {}
        self.holders: dict[int, int] = {}
        self.kept: set[int] = set()
        self.sequences: dict[str, dict[str, Any]] = {}
        self.heard: Counter[str] = Counter()
        self.steps: list[dict[str, Any]] = []
        self.text = ""
        self.leaves = False
        self._served = served
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "Viewer":
        self._thread.start()
        until(lambda: bool(self.pool))
        return self

    def __exit__(self, *_: object) -> None:
        self.leaves = True
        self._thread.join(10)
        assert not self._thread.is_alive(), "he is kept"

    def wait(self) -> None:
        """Until the end, which is the server's."""
        self._thread.join(20)
        assert not self._thread.is_alive(), "nobody told him that it is over"

    def _read(self) -> None:
        with self._served.client() as client, client.stream("GET", "/live") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                self.text += line
                if line.startswith("data: {"):
                    self._take(json.loads(line.removeprefix("data: ")))
                if self.leaves:
                    return

    def _take(self, message: dict[str, Any]) -> None:
        self.heard[message["type"]] += 1
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
            self.heard[kind] += 1
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

    def knows(self, llm: LLM) -> bool:
        """Whether that is what the engine knows, between two steps."""
        manager = llm.core.manager
        assert isinstance(manager, PagedBatchManager)

        def compare() -> bool:
            tables = {one.seq_id: list(one.table.blocks) for one in (*manager.running, *manager.waiting)}
            held = Counter(block for blocks in tables.values() for block in blocks)
            told = {seq_id: one["tables"][0]["blocks"] for seq_id, one in self.sequences.items()}
            holders = {block: count for block, count in self.holders.items() if count}
            return told == tables and holders == held and self.kept == set(manager.prefix.blocks)

        return llm.engine.call(compare)


def load_it(served: Served) -> list[httpx.Response]:
    """Questions behind one system prompt, forks among them, in a pool that is too small for all of them."""
    bodies = [
        {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}], "n": n}
        for question, n in zip(QUESTIONS * 2, [1, 3, 1, 2, 1, 1, 2, 1], strict=True)
    ]
    with served.client() as client, ThreadPoolExecutor(8) as pool:
        asked = [{**body, "max_tokens": 120, "ignore_eos": True} for body in bodies]
        return list(pool.map(lambda body: client.post("/v1/chat/completions", json=body), asked))


def test_whoever_watches_knows_what_the_engine_knows(served: Served, llm: LLM) -> None:
    """From the beginning, and from the middle; all kinds of events are met."""
    with Viewer(served) as viewer:
        assert viewer.pool["num_blocks"] == viewer.pool["num_host_blocks"] == 40
        assert viewer.pool["block_size"] == 16
        with ThreadPoolExecutor(1) as asking:
            answers = asking.submit(load_it, served)
            until(lambda: llm.engine.stats.num_running > 3)
            with Viewer(served) as late:
                ids = {answer.json()["id"] for answer in answers.result(60)}
                until(lambda: viewer.knows(llm))
                until(lambda: late.knows(llm))
    kinds = {"allocated", "shared", "released", "freed", "cached", "evicted", "copied"}
    assert {*kinds, "swapped_out", "swapped_in"} <= set(viewer.heard)
    assert not viewer.sequences
    told = {one["request"] for step in viewer.steps for one in step["sequences"]}
    assert ids <= told, "the page finds a request by the id that its client gets"
    last = viewer.steps[-1]["stats"]
    assert last["preemptions"] == llm.engine.stats.num_preemptions > 0
    assert last["prefix_hits"] == llm.engine.stats.prefix_cache_hits > 0
    moments = [step["t"] for step in viewer.steps]
    assert moments == sorted(moments)
    assert "xyzzy" not in viewer.text, "somebody's prompt"


def test_nothing_is_looked_at_once_nobody_watches(served: Served, llm: LLM) -> None:
    with Viewer(served):
        assert llm.engine._loop._watch is not None
    until(lambda: llm.engine._loop._watch is None)
    assert not llm.engine._loop._watchers


def test_a_silent_pool_keeps_its_watchers(served: Served) -> None:
    with Viewer(served) as viewer:
        until(lambda: viewer.text.count(": keep-alive") > 2)
        assert viewer.heard == {"pool": 1}


def test_who_reads_too_slowly_is_told_anew(served: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_STEPS", 1)
    monkeypatch.setattr(live, "FRAME_SECONDS", 1)  # a message a second, and a step takes milliseconds
    with Viewer(served) as viewer:
        load_it(served)
        until(lambda: viewer.knows(llm))
    assert viewer.heard["pool"] > 1


def test_who_does_not_read_at_all_is_not_waited_for(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more steps are kept for him; when he reads on he is told from the beginning what there is."""
    monkeypatch.setattr(live, "MOST_STEPS", 8)

    async def watch() -> list[dict[str, Any]]:
        service = Service(lambda: llm, ServerConfig())
        await service.load()
        watcher = live._Watcher(service)
        told = []
        async with aclosing(watcher.messages()) as messages:
            told.append(json.loads(await anext(messages) or ""))
            params = SamplingParams(max_tokens=40, ignore_eos=True)
            await asyncio.to_thread(llm.generate, "Once", params, use_tqdm=False)
            await asyncio.to_thread(until, lambda: llm.engine._loop._watch is None)
            told.append(json.loads(await anext(messages) or ""))
        return told

    first, anew = asyncio.run(watch())
    assert first["type"] == anew["type"] == "pool"
    assert anew["stats"]["cached"] == llm.engine.stats.num_cached_blocks >= 2


def test_the_end_of_the_server_is_the_end_of_the_stream() -> None:
    with serving(small) as here:
        viewer = Viewer(here)
        viewer.__enter__()
        here.server.handle_exit(2, None)
        viewer.wait()
    assert viewer.text.endswith("data: [DONE]")


def test_it_needs_a_key_where_the_rest_does() -> None:
    with serving(small, ServerConfig(api_keys=("k",))) as here, here.client() as client:
        assert client.get("/live").status_code == 401
        page = client.get("/")
        assert page.status_code == 200, "the page asks for the key"
        with client.stream("GET", "/live", headers={"Authorization": "Bearer k"}) as answer:
            assert answer.status_code == 200


def test_it_may_be_left_out() -> None:
    with serving(small, ServerConfig(live=False)) as here, here.client() as client:
        for path in ("/", "/live", "/page/main.js"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_there_is_nothing_to_watch_without_blocks() -> None:
    llm = LLM(batching="dense", max_num_seqs=2, max_model_len=256)
    with serving(lambda: llm) as here, here.client() as client:
        answer = client.get("/live")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_blocks")


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/style.css"])
def test_the_page_may_talk_to_its_server_alone(served: Served, path: str) -> None:
    with served.client() as client:
        answer = client.get(path)
        again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert answer.headers["content-security-policy"].startswith("default-src 'self';")
    assert again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/nothing.js", "/page/"])
def test_no_other_file_is_served(served: Served, path: str) -> None:
    with served.client() as client:
        answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
