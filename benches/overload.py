"""What happens when ten times as many requests come as the server has room for?

`tiny-llm serve` runs 16 sequences and lets 32 requests wait. First each kind of request is asked alone; then
ten times 48 requests come at once, from as many clients, `--waves` times. Expected: those who are accepted
get what they get alone, the others hear 429 at once, nobody waits much longer than the accepted work takes,
and memory does not grow from wave to wave.
"""

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

import harness
import tiny_llm_kernels
from servers import Running, ours, running
from tiny_llm_checkpoints.embedded import embedded_model_path

SEATS, WAITING, TIMES, KINDS = 16, 32, 10, 24
MIB = 1 << 20


@dataclass(frozen=True)
class Answer:
    """How one request ended, after so many seconds. is_right: it is what the request gets alone."""

    status: int
    seconds: float
    is_right: bool
    retry_after: str | None


def body(kind: int) -> dict[str, Any]:
    """One of a few requests: prompts that begin alike or not, greedy or drawn, 16 to 96 tokens out."""
    numbers = random.Random(kind)
    shared = numbers.choice([0, 64])
    prompt = [1000 + place for place in range(shared)] + numbers.choices(range(1000, 30_000), k=32)
    return {
        "prompt": prompt,
        "max_tokens": numbers.choice([16, 48, 96]),
        "temperature": numbers.choice([0, 0.8]),
        "seed": kind,
        "ignore_eos": True,
    }


async def ask(client: httpx2.AsyncClient, kind: int, expected: Sequence[str]) -> Answer:
    """One request, to its end."""
    start = time.perf_counter()
    answer = await client.post("/v1/completions", json=body(kind))
    text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else None
    seconds = time.perf_counter() - start
    return Answer(answer.status_code, seconds, text == expected[kind], answer.headers.get("Retry-After"))


async def knock(client: httpx2.AsyncClient) -> float:
    """Seconds of a request that costs the server nothing: the clients' own work, and the connection's."""
    start = time.perf_counter()
    await client.get("/health")
    return time.perf_counter() - start


async def measure(server: Running, waves: int) -> dict[str, Any]:
    """All waves; what came of them together, and the server's memory after each."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=server.url, timeout=600, limits=limits, trust_env=False) as client:
        expected = [
            (await client.post("/v1/completions", json=body(kind))).json()["choices"][0]["text"]
            for kind in range(KINDS)
        ]
        at_the_door = await asyncio.gather(*(knock(client) for _ in range(TIMES * (SEATS + WAITING))))
        numbers = random.Random(0)
        answers: list[Answer] = []
        memory, longest = [], []
        for wave in range(waves):
            print(f"wave {wave + 1} of {waves}", file=sys.stderr, flush=True)
            kinds = numbers.choices(range(KINDS), k=TIMES * (SEATS + WAITING))
            start = time.perf_counter()
            answers += await asyncio.gather(*(ask(client, kind, expected) for kind in kinds))
            longest.append(time.perf_counter() - start)
            memory.append(server.rss)
    accepted = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 429]
    return {
        "requests": len(answers),
        "accepted": len(accepted),
        "refused": len(refused),
        "other": len(answers) - len(accepted) - len(refused),
        "wrong": sum(not answer.is_right for answer in accepted),
        "without_retry_after": sum(answer.retry_after is None for answer in refused),
        "health_ms": spread([1000 * seconds for seconds in at_the_door]),
        "refusal_ms": spread([1000 * answer.seconds for answer in refused]),
        "answer_s": spread([answer.seconds for answer in accepted]),
        "wave_s": spread(longest),
        "rss_mib": [round(one / MIB, 1) for one in memory],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and greatest."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p99": ordered[int(0.99 * (len(ordered) - 1))],
        "max": ordered[-1],
    }


def as_text(row: dict[str, Any]) -> str:
    """What came of all waves."""

    def line(name: str) -> str:
        return ", ".join(f"{kind} {value:.1f}" for kind, value in row[name].items())

    return "\n".join(
        [
            f"{row['requests']} requests, {SEATS + WAITING} places: {row['accepted']} answered, "
            f"{row['refused']} refused with 429, {row['other']} otherwise",
            f"answers other than alone: {row['wrong']}",
            f"refusals without Retry-After: {row['without_retry_after']}",
            f"refused after, ms: {line('refusal_ms')}",
            f"as many who ask an idle server for /health at once, ms: {line('health_ms')}",
            f"answered after, s: {line('answer_s')}; a wave took: {line('wave_s')}",
            f"resident after each wave, MiB: {row['rss_mib']}",
        ]
    )


def main() -> None:
    """Start the server and flood it."""
    options = harness.parser(__doc__ or "")
    options.add_argument(
        "--waves", type=harness.positive, default=5, help="floods, one after another (default: 5)"
    )
    args = options.parse_args()
    server = ours("--max-num-seqs", str(SEATS), "--max-num-waiting", str(WAITING))
    with running(server, embedded_model_path(), tiny_llm_kernels.num_threads()) as here:
        row = asyncio.run(measure(here, args.waves))
    harness.show({"benchmark": "overload", "row": row}, as_json=args.json, text=as_text(row))


if __name__ == "__main__":
    main()
