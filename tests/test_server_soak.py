"""Hundreds of mixed requests over HTTP: a third of the clients disconnect, and the queue overflows.

No block leaks, memory stays flat, completed answers are bit-identical to those of single requests, and
refusals are immediate. Oracle: the same engine's `generate`, one request at a time, without prefix caching.
"""

import asyncio
import gc
import json
import random
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

import httpx2 as httpx
import mlx.core as mx
import pytest

from promises import check_pages
from served import SECONDS, Served, serving, until
from tiny_checkpoints import CONFIGS, random_weights, write_folder
from tiny_llm import LLM, SamplingParams

WAVES, AT_ONCE, KINDS, WAITING = 4, 24, 30, 12


@cache
def kind(number: int) -> dict[str, Any]:
    """Return one of a few bodies: shared prefixes or not, greedy or sampled, one completion or more."""
    draw = random.Random(number)
    shared = [20 + (7 * i + number % 3) % 200 for i in range(24)][: draw.choice([0, 5, 16, 24])]
    own = [draw.randrange(20, 220) for _ in range(draw.randint(1, 12))]
    return {
        "prompt": shared + own,
        "n": draw.choice([1, 1, 1, 2, 3]),
        "temperature": draw.choice([0.0, 0.8, 1.2]),
        "top_p": draw.choice([1.0, 0.9]),
        "seed": number,
        "max_tokens": draw.choice([1, 4, 10, 16, 40]),
        "ignore_eos": draw.choice([True, False]),
        "stream": draw.choice([True, False]),
        "cache_salt": draw.choice(["", "", "tenant"]),
    }


def texts_alone(llm: LLM, number: int) -> list[str]:
    body = {name: value for name, value in kind(number).items() if name not in ("prompt", "stream")}
    [output] = llm.generate(kind(number)["prompt"], SamplingParams(**body), use_tqdm=False)
    return [completion.text for completion in output.outputs]


async def ask(client: httpx.AsyncClient, number: int, leaves_after: int | None) -> list[str] | int | None:
    """Return the texts of an answer, the status of a refusal, or None if the client left after some lines."""
    body = kind(number)
    texts = [""] * body["n"]
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            return response.status_code
        lines = 0
        async for line in response.aiter_lines():
            lines += 1
            if leaves_after is not None and lines > leaves_after:
                return None
            for choice in read(line):
                texts[choice["index"]] += choice["text"]
    return texts


def read(line: str) -> list[dict[str, Any]]:
    """Return the choices in a line of a stream or in a whole answer."""
    data = line.removeprefix("data: ")
    if not data or data == "[DONE]":
        return []
    event = json.loads(data)
    assert "error" not in event, event
    return list(event["choices"])


async def wave(
    served: Served, draw: random.Random, refusals: list[float], requests: int
) -> list[tuple[int, list[str] | None]]:
    """Send a quarter of the requests. Refused clients retry; others disconnect at a random moment."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(
        client: httpx.AsyncClient, number: int, fate: float, moment: float
    ) -> tuple[int, list[str] | None]:
        async with slots:
            while True:
                asking = asyncio.create_task(ask(client, number, int(6 * moment) if fate < 0.2 else None))
                start = monotonic()
                if 0.2 <= fate < 0.34:  # before it has heard anything, perhaps while it waits
                    await asyncio.wait({asking}, timeout=0.05 * moment)
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)
                    return number, None
                answer = await asking
                if not isinstance(answer, int):
                    return number, answer
                assert answer == 429, answer
                refusals.append(monotonic() - start)
                await asyncio.sleep(0.02)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=served.url, timeout=SECONDS, limits=limits, trust_env=False
    ) as client:
        jobs = [(draw.randrange(KINDS), draw.random(), draw.random()) for _ in range(requests)]
        return await asyncio.gather(*(one(client, *job) for job in jobs))


@pytest.mark.parametrize("requests", [200, pytest.param(1000, marks=pytest.mark.deep)])
def test_hundreds_of_requests_leak_nothing(tmp_path: Path, requests: int) -> None:
    path = write_folder(tmp_path / "llama", CONFIGS["llama"], random_weights(CONFIGS["llama"]))
    lonely = LLM(path, num_blocks=64, enable_prefix_caching=False)
    expected = {number: texts_alone(lonely, number) for number in range(KINDS)}
    del lonely
    gc.collect()
    llm = LLM(path, block_size=4, num_blocks=28, max_num_seqs=6, max_num_waiting=WAITING)
    draw, live, refusals = random.Random(0), list[int](), list[float]()
    num_served = num_left = 0
    with serving(lambda: llm) as served:
        for _ in range(WAVES):
            for number, texts in asyncio.run(wave(served, draw, refusals, requests // WAVES)):
                num_served += texts is not None
                num_left += texts is None
                assert texts is None or texts == expected[number], f"kind {number} was answered otherwise"
            until(lambda: llm.engine.stats.num_running == llm.engine.stats.num_waiting == 0)
            llm.engine.call(lambda: check_pages(llm.core.manager))  # type: ignore[arg-type]
            live.append(llm.engine.call(mx.get_active_memory))
    stats = llm.engine.stats
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
    assert num_left >= requests // 5, "too few clients disconnected"
    assert num_served >= requests // 2
    assert len(refusals) >= 10, "the queue was never full"
    assert stats.num_preemptions >= requests // 100, f"too few preemptions: {stats}"
    assert max(live[1:]) - min(live[1:]) <= 4096, f"live bytes grow: {live}"
