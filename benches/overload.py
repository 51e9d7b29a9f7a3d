"""What happens when ten times as many requests arrive as the server can accept?

`tiny-llm serve` runs 16 sequences and queues 32 requests. First each kind of request is sent to the idle
server. Then 480 requests, ten times its capacity, arrive at once from as many clients, `--waves` times.
Expected: accepted requests get the same answers as on the idle server, the others get status 429 at once, no
request takes much longer than the accepted work, and memory does not grow from wave to wave.
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
from servers import RunningServer, run_server, tiny_llm_server
from tiny_llm_checkpoints.embedded import embedded_model_path

MAX_RUNNING, MAX_WAITING, OVERLOAD, NUM_KINDS = 16, 32, 10, 24
MIB = 1 << 20


@dataclass(frozen=True)
class Answer:
    """Outcome of one request. is_expected: the text equals the idle server's answer to this kind."""

    status: int
    seconds: float
    is_expected: bool
    retry_after: str | None


def body(kind: int) -> dict[str, Any]:
    """Request body of a kind: with or without a shared prefix, greedy or sampled, 16, 48 or 96 tokens out."""
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
    """Send one request and wait for its complete answer."""
    start = time.perf_counter()
    answer = await client.post("/v1/completions", json=body(kind))
    text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else None
    seconds = time.perf_counter() - start
    return Answer(answer.status_code, seconds, text == expected[kind], answer.headers.get("Retry-After"))


async def health_seconds(client: httpx2.AsyncClient) -> float:
    """Seconds of a request that costs the server almost nothing: the time of client and connection."""
    start = time.perf_counter()
    await client.get("/health")
    return time.perf_counter() - start


async def measure(server: RunningServer, waves: int) -> dict[str, Any]:
    """Send all waves; return the outcomes together, and the server's memory after each wave."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=server.url, timeout=600, limits=limits, trust_env=False) as client:
        expected = [
            (await client.post("/v1/completions", json=body(kind))).json()["choices"][0]["text"]
            for kind in range(NUM_KINDS)
        ]
        idle_health = await asyncio.gather(
            *(health_seconds(client) for _ in range(OVERLOAD * (MAX_RUNNING + MAX_WAITING)))
        )
        numbers = random.Random(0)
        answers: list[Answer] = []
        memory, longest = [], []
        for wave in range(waves):
            print(f"wave {wave + 1} of {waves}", file=sys.stderr, flush=True)
            kinds = numbers.choices(range(NUM_KINDS), k=OVERLOAD * (MAX_RUNNING + MAX_WAITING))
            start = time.perf_counter()
            answers += await asyncio.gather(*(ask(client, kind, expected) for kind in kinds))
            longest.append(time.perf_counter() - start)
            memory.append(server.rss)
    accepted = [answer for answer in answers if answer.status == 200]
    rejected = [answer for answer in answers if answer.status == 429]
    return {
        "requests": len(answers),
        "accepted": len(accepted),
        "rejected": len(rejected),
        "other": len(answers) - len(accepted) - len(rejected),
        "unexpected": sum(not answer.is_expected for answer in accepted),
        "without_retry_after": sum(answer.retry_after is None for answer in rejected),
        "health_ms": percentiles([1000 * seconds for seconds in idle_health]),
        "rejected_ms": percentiles([1000 * answer.seconds for answer in rejected]),
        "answer_s": percentiles([answer.seconds for answer in accepted]),
        "wave_s": percentiles(longest),
        "rss_mib": [round(one / MIB, 1) for one in memory],
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p99": ordered[int(0.99 * (len(ordered) - 1))],
        "max": ordered[-1],
    }


def as_text(row: dict[str, Any]) -> str:
    """The outcomes of all waves as text."""

    def line(name: str) -> str:
        return ", ".join(f"{kind} {value:.1f}" for kind, value in row[name].items())

    return "\n".join(
        [
            f"{row['requests']} requests to a server that accepts {MAX_RUNNING + MAX_WAITING} at a time: "
            f"{row['accepted']} answered, {row['rejected']} rejected with 429, {row['other']} other outcomes",
            f"answers that differ from the idle server's: {row['unexpected']}",
            f"429 responses without Retry-After: {row['without_retry_after']}",
            f"time to a 429 response, ms: {line('rejected_ms')}",
            f"time to a /health response, idle server, as many clients, ms: {line('health_ms')}",
            f"time to an answer, s: {line('answer_s')}",
            f"time of a wave, s: {line('wave_s')}",
            f"resident memory after each wave, MiB: {row['rss_mib']}",
        ]
    )


def main() -> None:
    """Start the server and overload it."""
    options = harness.parser(__doc__ or "")
    options.add_argument(
        "--waves", type=harness.positive, default=5, help="waves, one after another (default: 5)"
    )
    args = options.parse_args()
    server = tiny_llm_server("--max-num-seqs", str(MAX_RUNNING), "--max-num-waiting", str(MAX_WAITING))
    with run_server(server, embedded_model_path(), tiny_llm_kernels.num_threads()) as here:
        row = asyncio.run(measure(here, args.waves))
    harness.show({"benchmark": "overload", "row": row}, as_json=args.json, text=as_text(row))


if __name__ == "__main__":
    main()
