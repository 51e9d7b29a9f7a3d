"""How long does the death of a replica disturb clients, and when is it replaced?

`tiny-llm serve --replicas 2` on this machine, with `--streams` long streams, and a probe every half a second:
a request for one token. In each round one replica's process is killed (SIGKILL), and for 30 seconds:

    streams end     until the streams of that replica have ended with an error
    next answer     until the first probe that was sent after the death has its token
    slowest probe   the longest time to the first token; "before" is that of the 5 seconds before the death
    replaced        until both replicas are in /metrics again

Expected: the streams and the next answer need a small part of a second, as long as it takes to notice that a
connection has broken. The new process imports Ray and the engine and loads the model on the same processors,
which slows probes down until it has replaced the old one; that fewer streams run makes them faster. Needs the
group `cluster`; on Linux only.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx2

import harness
import tiny_llm_kernels
from servers import RunningServer, run_server, tiny_llm_server
from tiny_llm_checkpoints.embedded import embedded_model_path

PATH, RUNNING = "/v1/completions", "vllm:num_requests_running{"
PERIOD, BEFORE, AFTER = 0.5, 5.0, 30.0  # seconds: between two probes, before the death, after it
LIMIT = 180.0  # seconds until the replica must be replaced
NEVER = 8000  # tokens that no stream reaches in a round
SHOWN = {
    "before": "slowest probe before",
    "streams": "streams end",
    "answer": "next answer",
    "slowest": "slowest probe after",
    "replaced": "replaced",
}


@dataclass
class Stream:
    """A stream. has_begun: it has had a token. ended: when it ended with an error; None: it has not."""

    has_begun: bool = False
    ended: float | None = None


@dataclass
class Probe:
    """A request for one token. answered: when it had its token; None: it has failed."""

    sent: float = field(default_factory=perf_counter)
    answered: float | None = None


async def events(client: httpx2.AsyncClient, prompt: str, tokens: int) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, errors among them."""
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    async with client.stream("POST", PATH, json=body) as answer:
        async for line in answer.aiter_lines():
            if answer.status_code != 200:
                yield {"error": line}
            elif line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


async def read(client: httpx2.AsyncClient, prompt: str, stream: Stream) -> None:
    """Read a stream until it ends with an error, or until this is cancelled."""
    async for event in events(client, prompt, NEVER):
        stream.has_begun = True
        if "error" in event:
            stream.ended = perf_counter()


async def probe(client: httpx2.AsyncClient, prompt: str, one: Probe) -> None:
    """Send a probe; it may be refused."""
    async for event in events(client, prompt, 1):
        if one.answered is None and "error" not in event:
            one.answered = perf_counter()


async def send_probes(client: httpx2.AsyncClient, seconds: float) -> list[Probe]:
    """Send a probe every `PERIOD` seconds, the first at once; returns when all have ended."""
    probes, tasks = [], []
    for place in range(int(seconds / PERIOD)):
        probes.append(Probe())
        tasks.append(asyncio.create_task(probe(client, f"{perf_counter()} {place}", probes[-1])))
        await asyncio.sleep(PERIOD)
    await asyncio.gather(*tasks)
    return probes


async def replica_names(client: httpx2.AsyncClient) -> set[str]:
    """The replicas that are in /metrics."""
    lines = (await client.get("/metrics")).text.splitlines()
    return {line.partition('replica="')[2].partition('"')[0] for line in lines if line.startswith(RUNNING)}


async def until_replaced(client: httpx2.AsyncClient, before: set[str]) -> float:
    """Return the time at which two replicas are in /metrics again. Raises TimeoutError."""
    async with asyncio.timeout(LIMIT):
        while len(names := await replica_names(client)) < 2 or names == before:
            await asyncio.sleep(PERIOD / 5)
    return perf_counter()


def kill_a_replica(server: RunningServer) -> None:
    """Kill the process of one replica."""
    parents, replicas = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_text().startswith("ray::ServeReplica"):
                replicas.append(int(folder.name))
    own = [one for one in replicas if parents.get(parents[one]) == server.process.pid]  # below its raylet
    os.kill(own[0], signal.SIGKILL)


async def one_round(client: httpx2.AsyncClient, server: RunningServer, num_streams: int) -> dict[str, float]:
    """Kill a replica under load, and return the seconds of each figure. Raises TimeoutError."""
    before = await replica_names(client)
    streams = [Stream() for _ in range(num_streams)]
    tasks = [
        asyncio.create_task(read(client, f"Chapter {place}. It was", one))
        for place, one in enumerate(streams)
    ]
    async with asyncio.timeout(LIMIT):
        while not all(stream.has_begun for stream in streams):
            await asyncio.sleep(PERIOD / 5)
    earlier = await send_probes(client, BEFORE)
    kill_a_replica(server)
    killed = perf_counter()
    replaced = asyncio.create_task(until_replaced(client, before))
    later = await send_probes(client, AFTER)
    seconds = {"replaced": await replaced - killed}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    ends = [stream.ended - killed for stream in streams if stream.ended is not None]
    return {
        **seconds,
        "before": max(_times_to_first_token(earlier)),
        "streams": max(ends, default=0.0),
        "answer": min(one.answered - killed for one in later if one.answered is not None),
        "slowest": max(_times_to_first_token(later)),
        "num_ended": len(ends),
        "num_refused": sum(one.answered is None for one in later),
    }


def _times_to_first_token(probes: list[Probe]) -> list[float]:
    return [one.answered - one.sent for one in probes if one.answered is not None]


async def measure(server: RunningServer, rounds: int, num_streams: int) -> list[dict[str, float]]:
    """The figures of each round."""
    figures = []
    async with httpx2.AsyncClient(base_url=server.url, timeout=LIMIT, trust_env=False) as client:
        await until_replaced(client, set())
        for number in range(rounds):
            harness.print_progress(f"round {number + 1} of {rounds}")
            figures.append(await one_round(client, server, num_streams))
    return figures


def as_text(rounds: list[dict[str, float]]) -> str:
    """One line for each figure."""
    lines = [f"{'seconds':22}{'median':>8}{'min':>8}{'max':>8}"]
    for key, title in SHOWN.items():
        row = harness.summary([one[key] for one in rounds])
        lines.append(f"{title:22}{row['median']:>8.2f}{row['min']:>8.2f}{row['max']:>8.2f}")
    ended, refused = (sum(int(one[key]) for one in rounds) for key in ("num_ended", "num_refused"))
    return "\n".join([*lines, f"{ended} streams ended with an error; {refused} probes failed"])


def main() -> None:
    """Start the server, kill a replica in each round, and print the figures."""
    options = harness.parser(__doc__ or "")
    options.add_argument("--streams", type=harness.positive, default=4, help="long streams (default: 4)")
    args = options.parse_args()
    server = tiny_llm_server("--replicas", "2")
    with run_server(server, embedded_model_path(), tiny_llm_kernels.num_threads()) as running:
        rounds = asyncio.run(measure(running, args.repetitions, args.streams))
    summary = {key: harness.summary([one[key] for one in rounds]) for key in SHOWN}
    result = {"benchmark": "failover", "streams": args.streams, "seconds": summary, "rounds": rounds}
    harness.show(result, as_json=args.json, text=as_text(rounds))


if __name__ == "__main__":
    main()
